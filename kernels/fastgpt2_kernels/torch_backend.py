"""The "torch" backend: the operators on PyTorch's own fused kernels, on any device.

Called by `ops.py` only, with arguments it has checked. What a CPU is good at is used here: oneDNN's packed weights
for the linear layers (2 to 4 times a plain `F.linear` on a few rows), one fused attention call a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import reference

# -- attention ----------------------------------------------------------------------------------------------------


class AttentionOptions(NamedTuple):
    scale: float
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    upcast: bool = False


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
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=scale, dropout_p=dropout_p)
    mask = None if T == 1 else reference.causal_mask(T, S, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout_p)


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
    qkv: Tensor, num_heads: int, options: AttentionOptions, *, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
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
    qkv: Tensor, num_heads: int, options: AttentionOptions, *, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if cu_seqlens is None:
        q, k, _ = split_heads(qkv, num_heads)
        return attention_lse(q, k, options, lengths=lengths)
    lses = [attention_lse_packed(part, num_heads, options) for part in _documents(qkv, cu_seqlens)]
    return torch.cat(lses, 2) if lses else qkv.new_zeros((1, num_heads, 0), dtype=torch.float32)


def _documents(qkv: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    return [qkv[:, start:end] for start, end in itertools.pairwise(cu_seqlens.tolist()) if end > start]


class Documents(NamedTuple):
    """Where documents laid end to end in T tokens lie: `ops.plan_documents` makes it once, every layer uses it.

    cu_seqlens (documents + 1,) int32. starts, ends (T,) int32: the borders of each token's document.
    """

    cu_seqlens: Tensor
    starts: Tensor
    ends: Tensor


class DecodeRows(NamedTuple):
    """Rows that go through `decode_attention` together, all with one new token (max_new = 1) or all with several.

    starts, counts, slots: (R,) int32, each row's first new token, how many it has, and its cache slot.
    """

    starts: Tensor
    counts: Tensor
    slots: Tensor
    max_new: int


class KernelPlan(NamedTuple):
    """Which kernel takes which rows of a `RowPlan`; a row's kernel depends on nothing but the row.

    lengths: (slots,) int32, the tokens that each slot holds, up to the largest slot of the plan.
    decode: rows of few new tokens after cached ones; their kernel writes the cache.
    fresh: of every run of rows without cached tokens the first token, the end, and the rows as documents.
    long: (slot, first token, number of new tokens, cached tokens) of the other rows.
    appended: (tokens,) int64, which tokens of fresh and long rows are still to be written to the cache; None: all.
    """

    lengths: Tensor
    decode: tuple[DecodeRows, ...]
    fresh: tuple[tuple[int, int, Documents], ...]
    long: tuple[tuple[int, int, int, int], ...]
    appended: Tensor | None


class RowPlan(NamedTuple):
    """Where the new tokens of one step go: made once a step, used by every layer.

    rows: for every row its cache slot, its number of new tokens, its number of cached tokens.
    slots, positions: (N,) int64, the cache slot and the position of each of the N new tokens, row after row.
    kernels: what the Triton backend needs; None where it cannot run.
    """

    rows: tuple[tuple[int, int, int], ...]
    slots: Tensor
    positions: Tensor
    kernels: KernelPlan | None = None


def append_to_cache(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Write the new keys and values of qkv (N, 3C) to the caches (R, H, S, D), each to its slot and position (N,)."""
    _, k_NHD, v_NHD = _split_tokens(qkv, k_cache)
    k_cache[slots, :, positions] = k_NHD
    v_cache[slots, :, positions] = v_NHD


def attend_row_by_row(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Iterable[tuple[int, int, int]],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """The queries of qkv (N, 3C) against the caches that hold their keys already -> (N, C).

    One fused call a row: rows of any lengths cost what they hold (no padding is computed), and a row's result does
    not depend on its neighbours.
    """
    q_HND = _split_tokens(qkv, k_cache)[0].transpose(0, 1).unsqueeze(0)
    outs, start = [], 0
    for slot, count, past in rows:
        q = q_HND[:, :, start : start + count]
        outs.append(attend(q, k_cache[slot : slot + 1, :, : past + count], v_cache[slot : slot + 1, :, : past + count]))
        start += count
    out = torch.cat(outs, 2) if len(outs) != 1 else outs[0]
    return out.transpose(1, 2).reshape(qkv.shape[0], -1).to(qkv.dtype)


def _split_tokens(qkv: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    return qkv.view(qkv.shape[0], 3, cache.shape[1], -1).to(cache.dtype).unbind(1)


# -- linear layers ------------------------------------------------------------------------------------------------

# oneDNN's fused epilogues (attr, algorithm) for the activations it has.
_FUSED_ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh"), ("gelu", "tanh")),
    **dict.fromkeys(("gelu", "gelu_python"), ("gelu", "none")),
    "linear": ("none", ""),
    "relu": ("relu", ""),
    "sigmoid": ("sigmoid", ""),
    "silu": ("swish", ""),
    "swish": ("swish", ""),
    "tanh": ("tanh", ""),
}
# The number of rows oneDNN is told to lay the weights out for. One layout serves every number of rows.
_PACK_ROWS = 8
# Fewer rows are filled up to these. From 2 rows on, a row's result is the same to the bit whatever the number of rows
# (tested); for a single row oneDNN splits long sums otherwise. And 6 rows, one register tile, take less time than 1.
MIN_PACKED_ROWS = 6


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer's weight in the CPU's blocked layout, with what tells whether the original has changed since."""

    weight: Tensor
    fingerprint: tuple[object, ...]


def fingerprint(weight: Tensor) -> tuple[object, ...]:
    """Changes when `weight` does, also through `.data`, which PyTorch's version counter does not see. Reads it once."""
    flat = weight.detach()
    flat = (flat if flat.is_contiguous() else flat.t().contiguous()).view(-1)
    per_lane = 8 // flat.element_size()
    if flat.storage_offset() % per_lane:
        flat = flat.clone()
    # Summed as 64-bit integers, which runs at the speed of memory; the few elements past the last lane as they are.
    whole = flat.numel() // per_lane * per_lane
    total = int(flat[:whole].view(torch.int64).sum())
    return (weight.data_ptr(), weight.dtype, weight.shape, total, *flat[whole:].tolist())


def can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack_linear(weight: Tensor) -> PackedLinear | None:
    """`weight` (out, in) in oneDNN's layout, or None where this machine or dtype has none."""
    if not can_pack(weight):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _PACK_ROWS)
    return PackedLinear(packed, fingerprint(weight))


def packed_linear(
    x: Tensor, packed: PackedLinear, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    if 0 < x.shape[0] < MIN_PACKED_ROWS:
        filler = (0, 0, 0, MIN_PACKED_ROWS - x.shape[0])
        padded = None if residual is None else F.pad(residual, filler)
        return packed_linear(F.pad(x, filler), packed, bias, activation, padded)[: x.shape[0]]
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed.weight, bias, "add")
    attr, algorithm = _FUSED_ACTIVATIONS.get(activation, ("none", ""))
    y = torch.ops.mkldnn._linear_pointwise(x, packed.weight, bias, attr, [], algorithm)
    return y if activation in _FUSED_ACTIVATIONS else reference.ACTIVATIONS[activation](y)


# -- loss ---------------------------------------------------------------------------------------------------------


class LossRows(NamedTuple):
    """Of every row, zeros where the target is ignored. All but the loss are None unless they are asked for."""

    loss: Tensor
    lse: Tensor | None = None
    logprob: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, *, ignore_index: int, class_weight: Tensor | None, label_smoothing: float,
    z_loss: float, with_stats: bool,
) -> LossRows:  # fmt: skip
    """Loss of every row of logits (..., V), targets (...), in float32 (float64 for float64 logits)."""
    V = logits.shape[-1]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    counted = targets != ignore_index
    is_bad = counted & ((targets < 0) | (targets >= V))
    safe = targets.long().masked_fill(~counted | is_bad, -100)
    flat = logits.reshape(-1, V).to(wide)
    loss = F.cross_entropy(
        flat,
        safe.reshape(-1),
        None if class_weight is None else class_weight.to(wide),
        reduction="none",
        label_smoothing=label_smoothing,
    ).view(targets.shape)
    lse = flat.logsumexp(-1).view(targets.shape).where(counted, 0.0) if z_loss or with_stats else None
    if z_loss and lse is not None:
        loss = loss + z_loss * lse.square()
    if logits.device.type != "cpu" or torch.compiler.is_compiling() or is_bad.any():
        # A bad target makes its row NaN: the loss, and through the sum of its logits the gradient.
        rows = flat.masked_fill(~is_bad.reshape(-1, 1), 0.0).sum(-1).view(targets.shape)
        loss = torch.where(is_bad, rows * float("nan"), loss)
    if not with_stats or lse is None:
        return LossRows(loss)
    with torch.no_grad():
        log_probs = flat.log_softmax(-1).view(logits.shape)
        index = safe.clamp_min(0)[..., None]
        logprob = log_probs.gather(-1, index).squeeze(-1).where(counted, 0.0)
        entropy = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1).where(counted, 0.0)
        correct = counted & ~is_bad & (logits.gather(-1, index).squeeze(-1) >= logits.amax(-1))
    return LossRows(loss, lse.detach(), logprob.masked_fill(is_bad, float("nan")), entropy, correct)


def activation(x: Tensor, name: str) -> Tensor:
    fn: Callable[[Tensor], Tensor] = reference.ACTIVATIONS[name]
    return fn(x)
