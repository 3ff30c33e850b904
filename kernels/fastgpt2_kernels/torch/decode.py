"""The parts of a decoding step: attention to a KV cache, with one fused call per row, and linear layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastgpt2_kernels import reference
from fastgpt2_kernels.torch.attention import causal_attention
from fastgpt2_kernels.types import AttentionOptions, DecodeRows, LayerNormWeights, RowPlan, product_dtype


def cached_attention(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, plan: RowPlan, options: AttentionOptions) -> Tensor:
    """Append the new tokens of qkv (N, 3C) to the caches (R, H, S, D), then attend, row by row of `plan` -> (N, C)."""
    append_to_cache(qkv, k_cache, v_cache, plan.slots, plan.positions)
    attend = functools.partial(causal_attention, options=options)
    return attend_row_by_row(qkv, k_cache, v_cache, plan.rows, attend)


def append_and_attend(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, lengths: Tensor, rows: DecodeRows, scale: float
) -> None:
    """Like `cached_attention`, but the rows are tensors, which are read on the host. Writes to `out` (N, C)."""
    num_rows = qkv.shape[0] if rows.starts is None else rows.starts.shape[0]
    each = range(num_rows)
    slots = each if rows.slots is None else rows.slots.tolist()
    starts = each if rows.starts is None else rows.starts.tolist()
    counts = [1] * num_rows if rows.counts is None else rows.counts.tolist()
    held = lengths.tolist()
    found = [(slot, start, count) for slot, start, count in zip(slots, starts, counts, strict=True) if count]
    if not found:
        return
    tokens = [(start + i, slot, held[slot] + i) for slot, start, count in found for i in range(count)]
    index, token_slots, positions = torch.tensor(tokens, device=qkv.device).unbind(1)
    plan = RowPlan(tuple((slot, count, held[slot]) for slot, _, count in found), token_slots, positions)
    out[index] = cached_attention(qkv[index], k_cache, v_cache, plan, AttentionOptions(scale))


def append_to_cache(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Write the new keys and values of qkv (N, 3C) to the caches (R, H, S, D), each to its slot and position (N,)."""
    _, k_NHD, v_NHD = _split_tokens(qkv, k_cache)
    k_cache[slots, :, positions] = k_NHD
    v_cache[slots, :, positions] = v_NHD


def attend_row_by_row(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Iterable[tuple[int, int, int]],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attend with the queries of qkv (N, 3C) to the caches, which already hold their keys -> (N, C).

    Each row is one fused call. So nothing is computed for padding, and a row's result does not depend on other rows.
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


def linear_decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    layer_norm: LayerNormWeights | None,
    activation: str,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """activation(LN(x) weight^T + bias) + residual, x (R, K), weight (N, K) -> (R, N)."""
    return reference.linear_decode(
        x,
        weight,
        bias,
        weight_scale=weight_scale,
        layer_norm=layer_norm,
        activation=activation,
        residual=residual,
        product_dtype=product_dtype(x, weight, bias, layer_norm),
        out_dtype=out_dtype,
    )
