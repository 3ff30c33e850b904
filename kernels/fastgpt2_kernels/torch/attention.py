"""Attention on PyTorch's own fused operators: causal, with packed QKV, and of documents laid end to end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import reference
from fastgpt2_kernels.types import AttentionOptions, Documents

QUERY_BLOCK = 128


def attention(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, lengths: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The output (B, H, T, D) and, with `return_lse`, the log-sum-exp (B, H, T)."""
    out = causal_attention(q, k, v, options, lengths=lengths)
    return out, attention_lse(q, k, options, lengths=lengths) if return_lse else None


def attention_packed(
    qkv: Tensor,
    num_heads: int,
    options: AttentionOptions,
    lengths: Tensor | None,
    documents: Documents | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output (B, T, C) and, with `return_lse`, the log-sum-exp (B, H, T)."""
    cu_seqlens = None if documents is None else documents.cu_seqlens
    out = causal_attention_packed(qkv, num_heads, options, lengths=lengths, cu_seqlens=cu_seqlens)
    if not return_lse:
        return out, None
    return out, attention_lse_packed(qkv, num_heads, options, lengths=lengths, cu_seqlens=cu_seqlens)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *, lengths: Tensor | None = None
) -> Tensor:
    """q (B, H, T, D), k and v (B, H, S, D) with S >= T -> (B, H, T, D)."""
    if lengths is not None:
        padding = _padding(lengths, q.shape[-2])
        q, k, v = (x.masked_fill(padding, 0.0) for x in (q, k, v))
        return causal_attention(q, k, v, options).masked_fill(padding, 0.0)
    scale, dropout_p, seed, upcast = options
    T, S = q.shape[-2], k.shape[-2]
    if seed is not None and dropout_p:
        keep = reference.dropout_keep(seed, q.shape[0], q.shape[1], T, S, dropout_p)
        return reference.causal_attention(q, k, v, scale=scale, keep=keep, dropout_p=dropout_p, upcast=upcast)
    if upcast:
        return _upcast_attention(q, k, v, scale=scale, dropout_p=dropout_p)
    if dropout_p and q.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _DropoutAttention.apply(q, k, v, scale, dropout_p)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout_p, is_causal=True)
    mask = reference.causal_mask(T, S, q.device) if T > 1 else None
    return F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout_p, attn_mask=mask)


class _DropoutAttention(torch.autograd.Function):
    """Attention with dropout on a CPU, for which PyTorch has no fused kernel.

    Queries are processed in blocks, each against the keys that its last query sees. For the backward pass only the
    dropout mask is kept of all (B, H, T, S) tensors, one byte per weight. The probabilities P are computed again.

    Let P' be P with dropped weights at 0 and the others scaled, and G the gradient of the output. Then dV = P'^T G and
    dP' = G V^T, and dP follows from dP' by the same mask and scale.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
        wide_q, wide_k, wide_v = _wide(q), _wide(k), _wide(v)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        dropped = []
        with torch.autocast("cpu", enabled=False):  # backward runs without autocast, and must compute the same P
            for start, end, seen in _query_blocks(q.shape[2], k.shape[2]):
                probs = _causal_probs(wide_q[:, :, start:end], wide_k[:, :, :seen], scale)
                dropped.append(_draw_dropped(probs.shape, dropout_p))
                probs.masked_fill_(dropped[-1], 0.0)
                out[:, :, start:end] = (probs @ wide_v[:, :, :seen]) * _kept_factor(dropout_p)
        ctx.save_for_backward(q, k, v, *dropped)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *dropped = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives (create_graph=True)
            return *_differentiable_gradients(ctx, q, k, v, dropped, grad), None, None
        wide_q, wide_k, wide_v = _wide(q), _wide(k), _wide(v)
        grad = _wide(grad) * _kept_factor(ctx.dropout_p)
        dq, dk, dv = torch.empty_like(wide_q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
        for (start, end, seen), drop in zip(_query_blocks(q.shape[2], k.shape[2]), dropped, strict=True):
            rows, block_q, seen_k = grad[:, :, start:end], wide_q[:, :, start:end], wide_k[:, :, :seen]
            probs = _causal_probs(block_q, seen_k, ctx.scale)
            grad_probs = (rows @ wide_v[:, :, :seen].transpose(-1, -2)).masked_fill_(drop, 0.0)
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            dq[:, :, start:end] = (grad_scores @ seen_k) * ctx.scale
            dk[:, :, :seen] += (grad_scores.transpose(-1, -2) @ block_q) * ctx.scale
            dv[:, :, :seen] += probs.masked_fill_(drop, 0.0).transpose(-1, -2) @ rows
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _differentiable_gradients(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropped: list[Tensor], grad: Tensor
) -> list[Tensor | None]:
    keep = q.new_zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    for (start, end, seen), drop in zip(_query_blocks(q.shape[2], k.shape[2]), dropped, strict=True):
        keep[:, :, start:end, :seen] = ~drop
    out = reference.causal_attention(q, k, v, scale=ctx.scale, keep=keep, dropout_p=ctx.dropout_p)
    needed = [x for x, needs in zip((q, k, v), ctx.needs_input_grad, strict=False) if needs]
    grads = iter(torch.autograd.grad(out, needed, grad, create_graph=True))
    return [next(grads) if needs else None for needs in ctx.needs_input_grad[:3]]


def _query_blocks(T: int, S: int) -> Iterator[tuple[int, int, int]]:
    """For each block: its first query, the one past its last, and how many keys its last query sees."""
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        yield start, end, end + S - T


def _causal_probs(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The probabilities (B, H, n, s) of n queries over s keys. The last query sees all keys."""
    n, s = q.shape[2], k.shape[2]
    scores = (q * scale) @ k.transpose(-1, -2)
    scores[..., s - n :].masked_fill_(~reference.causal_mask(n, n, q.device), float("-inf"))
    return scores.softmax(-1)


def _wide(x: Tensor) -> Tensor:
    """x in float32 or wider, contiguous as (B, H, T, D)."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _draw_dropped(shape: torch.Size, dropout_p: float) -> Tensor:
    """A mask that is True with probability `dropout_p`, to within 2^-17.

    It takes 16 random bits per element, and a third of the time of `bernoulli_`.
    """
    count = shape.numel()
    bits = (
        torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count].view(shape)
    )
    threshold = round(dropout_p * 2**16) - 2**15
    return bits < threshold if threshold < 2**15 else torch.ones(shape, dtype=torch.bool)


def _kept_factor(dropout_p: float) -> float:
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def attention_lse(q: Tensor, k: Tensor, options: AttentionOptions, *, lengths: Tensor | None = None) -> Tensor:
    """The log-sum-exp (B, H, T) of the scores, in float32 (float64 for float64 inputs), without gradient."""
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = reference.attention_lse(q.detach().to(wide), k.detach().to(wide), scale=options.scale)
    return lse if lengths is None else lse.masked_fill(_padding(lengths, q.shape[-2]).squeeze(-1), float("-inf"))


def _padding(lengths: Tensor, num_tokens: int) -> Tensor:
    """(B, 1, T, 1) bool, True at padding: each row's tokens from its length on."""
    return (torch.arange(num_tokens, device=lengths.device) >= lengths[:, None])[:, None, :, None]


def _upcast_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float) -> Tensor:
    # The operations and their order are those of transformers: baddbmm with alpha, softmax in float32, v's dtype.
    B, H, T, D = q.shape
    S = k.shape[-2]
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.empty(B * H, T, S, dtype=wide, device=q.device)
        k_t = k.to(wide).transpose(-1, -2).reshape(B * H, D, S)
        scores = torch.baddbmm(scores, q.to(wide).reshape(B * H, T, D), k_t, beta=0, alpha=scale).view(B, H, T, S)
    scores = scores.masked_fill(~reference.causal_mask(T, S, q.device), float("-inf"))
    probs = F.dropout(scores.softmax(-1).to(v.dtype), dropout_p)
    return torch.matmul(probs, v)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split packed QKV (..., T, 3C) into three views (..., H, T, D)."""
    *lead, T, width = qkv.shape
    q, k, v = qkv.view(*lead, T, 3, num_heads, width // (3 * num_heads)).unbind(-3)
    return q.transpose(-2, -3), k.transpose(-2, -3), v.transpose(-2, -3)


def causal_attention_packed(
    qkv: Tensor,
    num_heads: int,
    options: AttentionOptions,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attention of qkv (B, T, 3C) -> (B, T, C). With `cu_seqlens`, B is 1 and each document sees only itself."""
    if cu_seqlens is None:
        out = causal_attention(*split_heads(qkv, num_heads), options, lengths=lengths)
        return out.transpose(1, 2).flatten(2)
    if options.dropout_seed is not None and options.dropout_p:
        q, k, v = split_heads(qkv, num_heads)
        keep = reference.dropout_keep(options.dropout_seed, 1, num_heads, q.shape[2], k.shape[2], options.dropout_p)
        mask = reference.document_mask(cu_seqlens, qkv.shape[1])
        out = reference.causal_attention(
            q, k, v, scale=options.scale, mask=mask, keep=keep, dropout_p=options.dropout_p, upcast=options.upcast
        )
        return out.transpose(1, 2).flatten(2)
    parts = _documents(qkv, cu_seqlens)
    outs = [causal_attention_packed(part, num_heads, options) for part in parts]
    return torch.cat(outs, 1) if outs else qkv[..., : qkv.shape[-1] // 3]


def attention_lse_packed(
    qkv: Tensor,
    num_heads: int,
    options: AttentionOptions,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    if cu_seqlens is None:
        q, k, _ = split_heads(qkv, num_heads)
        return attention_lse(q, k, options, lengths=lengths)
    lses = [attention_lse_packed(part, num_heads, options) for part in _documents(qkv, cu_seqlens)]
    return torch.cat(lses, 2) if lses else qkv.new_zeros((1, num_heads, 0), dtype=torch.float32)


def _documents(qkv: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    return [qkv[:, start:end] for start, end in itertools.pairwise(cu_seqlens.tolist()) if end > start]
