"""The door to attention: causal, packed, and of new tokens against a KV cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt2_kernels import torch_backend
from fastgpt2_kernels.ops.backend import check_same, use_triton
from fastgpt2_kernels.torch_backend import RowPlan


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, dropout_p: float = 0.0, upcast: bool = False,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Causal softmax(scale q k^T) v: q (B, H, T, D), k and v (B, H, S, D) with S >= T -> (B, H, T, D).

    Query t sees keys 0 .. S - T + t: the last query sees every key (new tokens after a cache). `scale` defaults to
    1/sqrt(D). `upcast=True` computes scores and softmax in float32 at least (transformers' `reorder_and_upcast_attn`).
    `dropout_p` drops attention weights. Raises ValueError for shapes, dtypes or devices that do not go together.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "causal_attention: q must be (B, H, T, D) and k, v (B, H, S, D); "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if k.shape[2] < q.shape[2]:
        raise ValueError(f"causal_attention: needs at least as many keys as queries; got {k.shape[2]} < {q.shape[2]}")
    check_same("causal_attention", q=q, k=k, v=v)
    _check_dropout("causal_attention", dropout_p)
    use_triton("causal_attention", q.device, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch_backend.causal_attention(q, k, v, scale=scale, dropout_p=dropout_p, upcast=upcast)


def causal_attention_packed(
    qkv: Tensor, num_heads: int, *, scale: float | None = None, dropout_p: float = 0.0,
    cu_seqlens: Tensor | None = None, upcast: bool = False, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Causal self-attention on the packed projection: qkv (B, T, 3C), queries then keys then values -> (B, T, C).

    `cu_seqlens` (number of documents + 1,) int32 or int64: the T tokens of the one row (B = 1) are documents laid end
    to end, document i being tokens cu_seqlens[i] .. cu_seqlens[i + 1], and none sees another. The PyTorch backend reads
    it on the host. Otherwise as `causal_attention`.
    """
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            "causal_attention_packed: qkv must be (B, T, 3 * num_heads * D); "
            f"got {tuple(qkv.shape)} with num_heads={num_heads}"
        )
    if cu_seqlens is not None:
        _check_cu_seqlens("causal_attention_packed", cu_seqlens, qkv)
    _check_dropout("causal_attention_packed", dropout_p)
    use_triton("causal_attention", qkv.device, backend)
    scale = (qkv.shape[2] // (3 * num_heads)) ** -0.5 if scale is None else scale
    return torch_backend.causal_attention_packed(
        qkv, num_heads, scale=scale, dropout_p=dropout_p, cu_seqlens=cu_seqlens, upcast=upcast
    )


def plan_rows(
    slots: Sequence[int], counts: Sequence[int], lengths: Sequence[int], device: torch.device | str = "cpu"
) -> RowPlan:
    """The plan of one step for `cached_attention`: row i adds `counts[i]` tokens to cache slot `slots[i]`.

    `lengths[i]` tokens are in that slot already. Made once a step and passed to every layer.
    """
    rows = tuple(zip(slots, counts, lengths, strict=True))
    if any(count < 1 or past < 0 for _, count, past in rows):
        raise ValueError(f"plan_rows: every row needs at least one new token and a length >= 0; got {rows}")
    if len(set(slots)) != len(rows):
        raise ValueError(f"plan_rows: a cache slot can be in one row only; got slots {list(slots)}")
    slot_N = torch.tensor([slot for slot, count, _ in rows for _ in range(count)], dtype=torch.int64)
    position_N = torch.tensor([past + i for _, count, past in rows for i in range(count)], dtype=torch.int64)
    return RowPlan(rows, slot_N.to(device), position_N.to(device))


def cached_attention(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, plan: RowPlan, *, scale: float | None = None, upcast: bool = False,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Append new tokens to a KV cache and attend: qkv (N, 3C) of N tokens, row after row of `plan` -> (N, C).

    k_cache, v_cache (R, H, S, D), in qkv's dtype or float32, written in place at the plan's slots and positions. Each
    new token sees its slot's earlier tokens and itself, nothing else. Not differentiable (the caches are overwritten).
    Raises ValueError when the cache is too short or the shapes do not go together.
    """
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            "cached_attention: k_cache and v_cache must share shape (R, H, S, D); "
            f"got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    R, H, S, D = k_cache.shape
    if qkv.shape != (plan.slots.shape[0], 3 * H * D):
        raise ValueError(
            f"cached_attention: qkv must be ({plan.slots.shape[0]}, {3 * H * D}) for this plan and cache; "
            f"got {tuple(qkv.shape)}"
        )
    for slot, count, past in plan.rows:
        if not 0 <= slot < R or past + count > S:
            raise ValueError(
                f"cached_attention: slot {slot} needs room for {past + count} tokens; the cache has {R} slots of {S}"
            )
    check_same("cached_attention", k_cache=k_cache, v_cache=v_cache)
    if k_cache.dtype not in (qkv.dtype, torch.float32):
        raise ValueError(f"cached_attention: the caches must be {qkv.dtype} as qkv or float32; got {k_cache.dtype}")
    if k_cache.device != qkv.device:
        raise ValueError(f"cached_attention: qkv is on {qkv.device}, the caches are on {k_cache.device}")
    use_triton("cached_attention", qkv.device, backend)
    scale = D**-0.5 if scale is None else scale
    return torch_backend.cached_attention(qkv, k_cache, v_cache, plan, scale=scale, upcast=upcast)


def _check_dropout(operator: str, dropout_p: float) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{operator}: dropout_p must be in [0, 1); got {dropout_p}")


def _check_cu_seqlens(operator: str, cu_seqlens: Tensor, qkv: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{operator}: cu_seqlens must be a 1-D int32 or int64 tensor of document starts and the end; "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if qkv.shape[0] != 1:
        raise ValueError(f"{operator}: documents lie in one row, so B must be 1 with cu_seqlens; got {qkv.shape[0]}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != qkv.shape[1] or any(a > b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"{operator}: cu_seqlens must rise from 0 to T={qkv.shape[1]}; got {ends}")
