"""Attention on PyTorch's own fused operators: causal, of packed projections, of documents laid end to end."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgpt2_kernels import reference
from fastgpt2_kernels.types import AttentionOptions, Documents


def attention(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, lengths: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The output (B, H, T, D) and, where it is asked for, the log-sum-exp (B, H, T)."""
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
    """The output (B, T, C) and, where it is asked for, the log-sum-exp (B, H, T)."""
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
    attend = functools.partial(F.scaled_dot_product_attention, scale=scale, dropout_p=dropout_p)
    if T == S:
        attend = functools.partial(attend, is_causal=True)
    elif T > 1:
        attend = functools.partial(attend, attn_mask=reference.causal_mask(T, S, q.device))
    if dropout_p and q.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # PyTorch has no fused kernel with dropout for a CPU, and would keep several (B, H, T, S) tensors for backward.
        return checkpoint(attend, q, k, v, use_reentrant=False)
    return attend(q, k, v)


def attention_lse(q: Tensor, k: Tensor, options: AttentionOptions, *, lengths: Tensor | None = None) -> Tensor:
    """The softmax's log-sum-exp (B, H, T) in float32 (float64 for float64 inputs), without gradient."""
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = reference.attention_lse(q.detach().to(wide), k.detach().to(wide), scale=options.scale)
    return lse if lengths is None else lse.masked_fill(_padding(lengths, q.shape[-2]).squeeze(-1), float("-inf"))


def _padding(lengths: Tensor, num_tokens: int) -> Tensor:
    """(B, 1, T, 1) bool, True from each row's length on."""
    return (torch.arange(num_tokens, device=lengths.device) >= lengths[:, None])[:, None, :, None]


def _upcast_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float) -> Tensor:
    # The order of operations (baddbmm with alpha, softmax in float32, back to v's dtype) is transformers'.
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
    """Packed (..., T, 3C) -> three views (..., H, T, D)."""
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
    """qkv (B, T, 3C) -> (B, T, C); with `cu_seqlens` B is 1 and each document sees itself only."""
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
