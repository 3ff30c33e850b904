"""The noise functions of the sampling kernel, vectorised: one program draws for many rows."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.sampling import _gumbel, _gumbel_at, _words


@triton.jit
def _of_words(out_ptr, word_ptr, N: tl.constexpr):
    offs = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + offs, _gumbel(tl.load(word_ptr + offs).to(tl.uint32)))


@triton.jit
def _of_token(out_ptr, key_ptr, positions_ptr, V, N: tl.constexpr):
    v = tl.program_id(1)
    offs = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + offs * V + v, _gumbel_at(tl.load(key_ptr), tl.load(positions_ptr + offs), offs * 0 + v))


@triton.jit
def _of_block(out_ptr, key_ptr, positions_ptr, V, BLOCK: tl.constexpr):
    n, start = tl.program_id(0), tl.program_id(1) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    noise = _gumbel(_words(tl.load(key_ptr), tl.load(positions_ptr + n), start, BLOCK))
    tl.store(out_ptr + n * V + offs, noise, mask=offs < V)


def of_words(words: Tensor, device: str) -> Tensor:
    """words (N,) int64, N a multiple of 1024 -> (N,) float64."""
    out = torch.full(words.shape, math.nan, device=device)
    _of_words[(len(words) // 1024,)](out, words.to(device), 1024, **launch.OPTIONS)
    return out.cpu().double()


def of_tokens(key: Tensor, positions: Tensor, vocab_size: int, device: str, *, in_blocks: bool = False) -> Tensor:
    """key (2,), positions (N,) int32 -> (N, V) float32: token by token, or in blocks of 64 as in the first pass."""
    N = len(positions)
    out = torch.full((N, vocab_size), math.nan, device=device)
    packed = (key[:1] | key[1:] << 32).to(device)
    if in_blocks:
        _of_block[(N, triton.cdiv(vocab_size, 64))](out, packed, positions.to(device), vocab_size, 64, **launch.OPTIONS)
    else:
        block = min(N, 2**15) if device == "cpu" else min(N, 1024)
        _of_token[(N // block, vocab_size)](out, packed, positions.to(device), vocab_size, block, **launch.OPTIONS)
    return out.cpu()
