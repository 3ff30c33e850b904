"""New tokens against a KV cache: one fused attention call a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


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
