"""Decoding attention: append one new token per row to a KV cache, and attend. Rows have different lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Call, Case, Contender, Settings
from benchmarks.peers import hidden_sizes, need, need_gpu, need_triton
from fastgpt2_kernels import ops, reference


class Inputs(NamedTuple):
    """qkv (R, 3C); caches (R, H, S, D); row r holds lengths[r] tokens before the new one."""

    qkv: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lengths: list[int]


def cases(settings: Settings) -> Iterator[Case]:
    width, heads = hidden_sizes()["gpt2"] if settings.scale != "toy" else (32, 2)
    for R in settings.pick((1, 8, 32, 64, 256), (1, 32), (3,)):
        for S in settings.pick((128, 512, 1024), (128, 1024), (16,)):
            for dtype in ("bfloat16", "float32") if settings.scale != "toy" else ("float32",):
                yield _case(settings, R, S, width, heads, dtype)


def _case(settings: Settings, R: int, S: int, width: int, heads: int, dtype: str) -> Case:
    tokens = sum(length + 1 for length in _lengths(R, S))
    return Case(
        name="cached_attention",
        shape={"R": R, "H": heads, "S": S, "D": width // heads},
        dtype=dtype,
        contenders=[
            Contender(name, functools.partial(make, settings), name.startswith("ours"), name == "eager")
            for name, make in CONTENDERS.items()
        ],
        inputs=functools.partial(_inputs, settings, R, S, width, heads, dtype),
        exact=lambda inputs: [eager(*(t.double() for t in inputs[:3]), inputs.lengths)],
        flops=4.0 * tokens * width,
        bytes=2.0 * tokens * width * getattr(torch, dtype).itemsize,
        measures_memory=False,
    )  # fmt: skip


def _lengths(R: int, S: int) -> list[int]:
    """Lengths from half full to full, with one place left for the new token."""
    return [S - 1 - (r * S) // (2 * R) for r in range(R)]


def _inputs(settings: Settings, R: int, S: int, width: int, heads: int, dtype: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(R, 3 * width, generator=generator)
    caches = torch.randn(2, R, heads, S, width // heads, generator=generator)
    qkv, caches = (t.to(settings.device, getattr(torch, dtype)) for t in (qkv, caches))
    return Inputs(qkv, caches[0], caches[1], _lengths(R, S))


def append(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Write the new keys and values to the cache; returns the queries (R, H, 1, D)."""
    R, H, _, D = k_cache.shape
    q, k, v = qkv.view(R, 3, H, D).unbind(1)
    k_cache[rows, :, positions] = k
    v_cache[rows, :, positions] = v
    return q[:, :, None]


def eager(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: list[int]) -> Tensor:
    """The reference, row by row."""
    positions = torch.tensor(lengths, device=qkv.device)
    q = append(qkv, k_cache, v_cache, torch.arange(len(lengths), device=qkv.device), positions)
    rows = [
        reference.causal_attention(q[r : r + 1], k_cache[r : r + 1, :, : n + 1], v_cache[r : r + 1, :, : n + 1])
        for r, n in enumerate(lengths)
    ]
    return torch.cat(rows).flatten(1)


def _eager(settings: Settings, inputs: Inputs) -> Call:
    return lambda: [eager(*inputs)]


def _ours(backend: str) -> Callable[[Settings, Inputs], Call]:
    def build(settings: Settings, inputs: Inputs) -> Call:
        if backend == "triton":
            need_triton(settings, "cached_attention")
        R = len(inputs.lengths)
        plan = ops.plan_rows(range(R), [1] * R, inputs.lengths, settings.device)
        return lambda: [ops.cached_attention(inputs.qkv, inputs.k_cache, inputs.v_cache, plan, backend=backend)]

    return build


def _sdpa_padded(settings: Settings, inputs: Inputs) -> Call:
    """As transformers calls it: all rows attend to as many keys as the longest one, under a mask."""
    qkv, k_cache, v_cache, lengths = inputs
    positions = torch.tensor(lengths, device=qkv.device)
    rows, longest = torch.arange(len(lengths), device=qkv.device), max(lengths) + 1
    mask = (torch.arange(longest, device=qkv.device) <= positions[:, None])[:, None, None]

    def call() -> list[Tensor]:
        q = append(qkv, k_cache, v_cache, rows, positions)
        out = F.scaled_dot_product_attention(q, k_cache[:, :, :longest], v_cache[:, :, :longest], attn_mask=mask)
        return [out.flatten(1)]

    return call


def _flash_attn(settings: Settings, inputs: Inputs) -> Call:
    need_gpu(settings)
    attend = need("flash_attn", "flash-attn").flash_attn_with_kvcache
    qkv, k_cache, v_cache, lengths = inputs
    R, H, _, D = k_cache.shape
    k_RSHD, v_RSHD = (t.transpose(1, 2).contiguous() for t in (k_cache, v_cache))  # its cache has this layout
    q, k, v = (t[:, None] for t in qkv.view(R, 3, H, D).unbind(1))
    used = torch.tensor(lengths, dtype=torch.int32, device=qkv.device)
    return lambda: [attend(q, k_RSHD, v_RSHD, k, v, cache_seqlens=used, causal=True).flatten(1)]


CONTENDERS: dict[str, Callable[[Settings, Inputs], Call]] = {
    "eager": _eager,
    "ours triton": _ours("triton"),
    "ours torch": _ours("torch"),
    "sdpa padded": _sdpa_padded,
    "flash-attn": _flash_attn,
}
