"""Attention: causal, packed, and of new tokens against a KV cache."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from fastgpt2_kernels.backends import (
    KernelFailedError,
    choose_backend,
    implementation,
    interpreter_is_on,
    note_failure,
    run_operator,
)
from fastgpt2_kernels.host import to_device
from fastgpt2_kernels.ops.checks import check_same, describe
from fastgpt2_kernels.precision import is_float32_exact
from fastgpt2_kernels.torch import decode as torch_decode
from fastgpt2_kernels.types import AttentionOptions, DecodeRows, Documents, KernelPlan, RowPlan

MAX_HEAD_SIZE = 256
# With larger heads, exact float32 products (outside the tensor cores) spill registers. PyTorch's operator does not.
MAX_FLOAT32_HEAD_SIZE = 128
MAX_ROW_STRIDE = 2**23  # offsets within a tile of up to 256 rows are 32-bit
MAX_DECODE_TOKENS = 8  # the most new tokens of a row that decode_attention takes


def plan_documents(cu_seqlens: Tensor, num_tokens: int) -> Documents:
    """Plan documents that lie end to end in one row, for `causal_attention_packed`.

    Args:
        cu_seqlens: (documents + 1,) int32 or int64. Document i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1.
            The numbers rise from 0 to T. On a GPU they are not checked, and the Triton backend gives 0 for tokens past
            the last number.
        num_tokens: the number T of tokens in the row.

    Returns:
        The plan, on the device of `cu_seqlens`.

    Raises:
        ValueError: The shape or dtype does not fit. On a CPU also: the numbers do not rise from 0 to T.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "plan_documents: cu_seqlens must be a 1-D int32 or int64 tensor of document starts and the end; "
            f"got {describe(cu_seqlens)}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != num_tokens or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"plan_documents: cu_seqlens must rise from 0 to T={num_tokens}; got {ends}")
    cu_seqlens = cu_seqlens.to(torch.int32)
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    last = max(cu_seqlens.numel() - 2, 0)
    document = torch.searchsorted(cu_seqlens[1:], tokens, right=True).clamp_max(last)
    return Documents(cu_seqlens, cu_seqlens[document], cu_seqlens[1:][document])


@overload
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    lengths: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    upcast: bool = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    lengths: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    upcast: bool = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    upcast: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention: softmax(scale q k^T) v.

    Query t sees the keys 0 to S - T + t. So the last query sees every key, as new tokens after cached ones must.

    Args:
        q: (B, H, T, D), float32, bfloat16, float16 or float64.
        k: (B, H, S, D) with S >= T, in q's dtype.
        v: (B, H, S, D), in q's dtype.
        scale: what the scores are multiplied by, 1 / sqrt(D) by default.
        lengths: (B,) int32 or int64, only for T = S. Tokens of row b from lengths[b] on are padding: they are never
            read, and their outputs and gradients are 0.
        dropout_p: the probability with which an attention weight is dropped.
        dropout_seed: (2,) int64, a seed and an offset. With it, Philox draws the dropout mask, and the mask is the same
            on every backend (`reference.dropout_keep`). Without it, PyTorch's generator is used.
        upcast: compute scores and softmax of half-precision inputs in float32, as transformers'
            `reorder_and_upcast_attn` does. The Triton backend always does.
        return_lse: also return the log-sum-exp of the scores.
        backend: "auto", "triton" or "torch".

    Returns:
        The output (B, H, T, D). With `return_lse=True` also the log-sum-exp (B, H, T) in float32, which has no
        gradient.

    Raises:
        ValueError: Shapes, dtypes or devices do not go together, or the backend cannot be used.

    Notes:
        The Triton backend (FlashAttention-2, Dao 2023) takes D up to 256. The last dimension must have stride 1; other
        strides are free. It has no second derivatives. float32 is multiplied exactly, unless
        `torch.set_float32_matmul_precision` allows tf32. Under autocast, float32 inputs become the autocast dtype.

    Example:
        >>> q = k = v = torch.randn(1, 2, 5, 16)
        >>> causal_attention(q, k, v).shape
        torch.Size([1, 2, 5, 16])
    """
    name = "causal_attention"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{name}: q must be (B, H, T, D) and k, v (B, H, S, D); "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    B, _, T, D = q.shape
    S = k.shape[2]
    if S < T:
        raise ValueError(f"{name}: needs at least as many keys as queries; got {S} keys and {T} queries")
    q, k, v = (_autocast(x) for x in (q, k, v))
    check_same(name, q=q, k=k, v=v)
    if lengths is not None and S != T:
        raise ValueError(f"{name}: lengths need as many keys as queries; got {S} keys and {T} queries")
    lengths = _check_lengths(name, lengths, B, T, q.device)
    scale = _check_scale(name, D**-0.5 if scale is None else scale)
    _check_dropout(name, dropout_p, dropout_seed, q.device)
    options = AttentionOptions(scale, dropout_p, dropout_seed, upcast)
    size = (D, q.dtype)
    chosen = choose_backend(name, q.device, backend, lambda: _why_not_triton(q, k, v), size)
    out, lse = run_operator(name, chosen, backend, q.device, size, q, k, v, options, lengths, return_lse)
    return (out, lse) if return_lse else out


@overload
def causal_attention_packed(
    qkv: Tensor,
    num_heads: int,
    *,
    scale: float | None = ...,
    lengths: Tensor | None = ...,
    cu_seqlens: Tensor | Documents | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    upcast: bool = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def causal_attention_packed(
    qkv: Tensor,
    num_heads: int,
    *,
    scale: float | None = ...,
    lengths: Tensor | None = ...,
    cu_seqlens: Tensor | Documents | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    upcast: bool = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def causal_attention_packed(
    qkv: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | Documents | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    upcast: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal self-attention on packed QKV, which is read in place.

    Args:
        qkv: (B, T, 3C): queries, then keys, then values, as GPT-2's `c_attn` makes them.
        num_heads: the number H of heads; C must be a multiple of it.
        cu_seqlens: (documents + 1,), or the result of `plan_documents`. B must be 1. The T tokens of the row are then
            documents laid end to end, and no document sees another. The PyTorch backend reads it on the host.
        scale, lengths, dropout_p, dropout_seed, upcast, return_lse, backend: as in `causal_attention`.

    Returns:
        The output (B, T, C). With `return_lse=True` also the log-sum-exp (B, H, T). The Triton backend writes the
        gradient of qkv as one packed tensor.

    Raises:
        ValueError: Arguments do not go together, or the backend cannot be used.

    Example:
        >>> qkv = torch.randn(2, 16, 3 * 64)
        >>> causal_attention_packed(qkv, num_heads=4, lengths=torch.tensor([16, 9])).shape
        torch.Size([2, 16, 64])
    """
    name = "causal_attention_packed"
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"{name}: qkv must be (B, T, 3 * num_heads * D); got {tuple(qkv.shape)} with num_heads={num_heads}"
        )
    B, T, width = qkv.shape
    D = width // (3 * num_heads)
    if cu_seqlens is not None and lengths is not None:
        raise ValueError(f"{name}: give lengths or cu_seqlens, not both")
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"{name}: documents lie in one row, so B must be 1 with cu_seqlens; got {B}")
    qkv = _autocast(qkv)
    documents = plan_documents(cu_seqlens, T) if isinstance(cu_seqlens, Tensor) else cu_seqlens
    if documents is not None:
        if documents.starts.shape[0] != T:
            raise ValueError(f"{name}: the documents were planned for {documents.starts.shape[0]} tokens; got {T}")
        if documents.starts.device != qkv.device:
            raise ValueError(
                f"{name}: qkv and cu_seqlens must be on one device; got {qkv.device} and {documents.starts.device}"
            )
    lengths = _check_lengths(name, lengths, B, T, qkv.device)
    scale = _check_scale(name, D**-0.5 if scale is None else scale)
    _check_dropout(name, dropout_p, dropout_seed, qkv.device)
    options = AttentionOptions(scale, dropout_p, dropout_seed, upcast)
    size = (D, qkv.dtype)
    chosen = choose_backend(name, qkv.device, backend, lambda: _why_not_triton(qkv, head_size=D), size)
    out, lse = run_operator(
        name, chosen, backend, qkv.device, size, qkv, num_heads, options, lengths, documents, return_lse
    )
    return (out, lse) if return_lse else out


def _why_not_triton(*tensors: Tensor, head_size: int | None = None) -> str | None:
    """Why the Triton kernel cannot take these queries, keys and values (or packed QKV); None if it can."""
    dtype, D = tensors[0].dtype, head_size or tensors[0].shape[-1]
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16; got {dtype}"
    if D > MAX_HEAD_SIZE:
        return f"it takes head sizes up to {MAX_HEAD_SIZE}; got {D}"
    if D > MAX_FLOAT32_HEAD_SIZE and dtype == torch.float32 and torch.version.hip:  # not all have tf32
        return f"on AMD's GPUs it takes float32 head sizes up to {MAX_FLOAT32_HEAD_SIZE}; got {D}"
    if D > MAX_FLOAT32_HEAD_SIZE and dtype == torch.float32 and is_float32_exact():
        return (
            f"it takes float32 head sizes up to {MAX_FLOAT32_HEAD_SIZE}, and larger ones only in tf32; got {D}: "
            "call torch.set_float32_matmul_precision('high') to allow tf32"
        )
    if D > 1 and any(x.stride(-1) != 1 for x in tensors):
        got = ", ".join(str(x.stride(-1)) for x in tensors)
        return f"the last dimension must have stride 1; got {got}: call .contiguous()"
    if any(x.stride(-2) > MAX_ROW_STRIDE for x in tensors):
        return f"rows must lie at most {MAX_ROW_STRIDE} elements apart: call .contiguous()"
    return None


def _autocast(x: Tensor) -> Tensor:
    """x, in the autocast dtype if it is float32 and autocast is on."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _check_lengths(operator: str, lengths: Tensor | None, B: int, T: int, device: torch.device) -> Tensor | None:
    if lengths is None:
        return None
    if lengths.shape != (B,) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{operator}: lengths must be int32 or int64 of shape ({B},); got {describe(lengths)}")
    if lengths.device != device:
        raise ValueError(f"{operator}: lengths must be on {device}, like the inputs; got {lengths.device}")
    if device.type == "cpu" and not torch.compiler.is_compiling() and ((lengths < 0) | (lengths > T)).any():
        raise ValueError(f"{operator}: lengths must be in [0, T={T}]; got {lengths.tolist()}")
    return lengths.to(torch.int32)


def _check_scale(operator: str, scale: float) -> float:
    if not 0 < scale < math.inf:
        raise ValueError(f"{operator}: scale must be finite and > 0; got {scale}")
    return float(scale)


def _check_dropout(operator: str, dropout_p: float, seed: Tensor | None, device: torch.device) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{operator}: dropout_p must be in [0, 1); got {dropout_p}")
    if seed is not None and (seed.shape != (2,) or seed.dtype != torch.int64 or seed.device != device):
        raise ValueError(
            f"{operator}: dropout_seed must be int64 of shape (2,) on {device}; got {describe(seed)} on {seed.device}"
        )


def plan_rows(
    slots: Sequence[int], counts: Sequence[int], lengths: Sequence[int], device: torch.device | str = "cpu"
) -> RowPlan:
    """Plan one step of `cached_attention`. Make one plan per step and pass it to every layer.

    Args:
        slots: the cache slot of each row. No slot may be in two rows.
        counts: how many new tokens each row adds, at least 1.
        lengths: how many tokens each row's slot already holds.
        device: where the caches are.

    Returns:
        The plan, on `device`.

    Raises:
        ValueError: A row adds no token, a length is negative, or a slot is in two rows.
    """
    rows = tuple(zip(slots, counts, lengths, strict=True))
    if any(count < 1 or past < 0 for _, count, past in rows):
        raise ValueError(f"plan_rows: every row needs at least one new token and a length >= 0; got {rows}")
    if len(set(slots)) != len(rows):
        raise ValueError(f"plan_rows: a cache slot can be in one row only; got slots {list(slots)}")
    slots_N = [slot for slot, count, _ in rows for _ in range(count)]
    positions_N = [past + i for _, count, past in rows for i in range(count)]
    slot_N, position_N = to_device([slots_N, positions_N], device, torch.int64)
    may_use_kernels = torch.device(device).type != "cpu" or interpreter_is_on()
    return RowPlan(rows, slot_N, position_N, _plan_kernels(rows, device) if may_use_kernels and rows else None)


def _plan_kernels(rows: Sequence[tuple[int, int, int]], device: torch.device | str) -> KernelPlan:
    starts = [0, *itertools.accumulate(count for _, count, _ in rows)]
    one: list[tuple[int, int, int]] = []
    few: list[tuple[int, int, int]] = []
    long: list[tuple[int, int, int, int]] = []
    fresh: list[list[int]] = []
    appended: list[int] = []
    for (slot, count, past), start in zip(rows, starts, strict=False):
        if past and count <= MAX_DECODE_TOKENS:
            (one if count == 1 else few).append((start, count, slot))
            continue
        appended += range(start, start + count)
        if past:
            long.append((slot, start, count, past))
        elif fresh and fresh[-1][-1] == start:
            fresh[-1].append(start + count)
        else:
            fresh.append([start, start + count])
    slot_lengths = [0] * (1 + max(slot for slot, _, _ in rows))
    for slot, _, past in rows:
        slot_lengths[slot] = past
    # All numbers go to the device in one copy.
    parts = [slot_lengths, *zip(*one, strict=True), *zip(*few, strict=True)]
    parts += ([border - borders[0] for border in borders] for borders in fresh)
    flat = to_device([number for part in parts for number in part], device, torch.int32)
    lengths_S, *row_parts = flat.split([len(part) for part in parts])
    decode = []
    for group, max_new in ((one, 1), (few, MAX_DECODE_TOKENS)):
        if group:
            starts_R, counts_R, slots_R, *row_parts = row_parts
            decode.append(DecodeRows(starts_R, counts_R, slots_R, max_new))
    runs = []
    for borders, cu_seqlens in zip(fresh, row_parts, strict=True):
        runs.append((borders[0], borders[-1], plan_documents(cu_seqlens, borders[-1] - borders[0])))
    is_all = len(appended) == starts[-1]
    appended_N = None if is_all else to_device(appended, device, torch.int64)
    return KernelPlan(lengths_S, tuple(decode), tuple(runs), tuple(long), appended_N)


def cached_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: RowPlan,
    *,
    scale: float | None = None,
    upcast: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Append new tokens to a KV cache, then attend to it.

    Each new token sees itself and the earlier tokens of its slot. There are no gradients, because the caches are
    overwritten.

    Args:
        qkv: (N, 3C), the packed projection of N new tokens, in the order of the rows of `plan`.
        k_cache: (slots, H, S, D), in qkv's dtype or float32. The new keys are written to it.
        v_cache: the same for the values.
        plan: the result of `plan_rows`.
        scale, upcast, backend: as in `causal_attention`.

    Returns:
        The outputs (N, C).

    Raises:
        ValueError: A cache slot is too short, shapes, dtypes or devices do not go together, or the backend cannot be
            used.

    Notes:
        On Triton, neighbouring rows without cached tokens (prefill) take one kernel launch, as documents of one packed
        row. Rows with cached tokens and up to 8 new ones go through `decode_attention` together. Rows with cached
        tokens and more new ones run one by one.
    """
    name = "cached_attention"
    R, H, S, D = _check_cache(name, qkv, k_cache, v_cache)
    if qkv.shape[0] != plan.slots.shape[0]:
        raise ValueError(
            f"{name}: qkv must be ({plan.slots.shape[0]}, {3 * H * D}) for this plan; got {tuple(qkv.shape)}"
        )
    for slot, count, past in plan.rows:
        if not 0 <= slot < R or past + count > S:
            raise ValueError(
                f"{name}: slot {slot} needs room for {past + count} tokens; the cache has {R} slots of {S}"
            )
    scale = _check_scale(name, D**-0.5 if scale is None else scale)
    size = (D, qkv.dtype, k_cache.dtype)
    chosen = choose_backend(name, qkv.device, backend, lambda: _why_not_triton_decoding(qkv, k_cache, v_cache), size)
    if chosen == "triton" and plan.kernels is not None:
        try:
            return _cached_attention_kernels(qkv.detach(), k_cache, v_cache, plan, plan.kernels, scale, backend)
        except KernelFailedError as error:
            if backend != "auto":
                raise
            note_failure(name, qkv.device, error, size)  # PyTorch's operators write the new tokens to the caches again
    return torch_decode.cached_attention(qkv, k_cache, v_cache, plan, AttentionOptions(scale, upcast=upcast))


def _cached_attention_kernels(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, plan: RowPlan, kernels: KernelPlan, scale: float, backend: str
) -> Tensor:
    H = k_cache.shape[1]
    if kernels.appended is None:
        torch_decode.append_to_cache(qkv, k_cache, v_cache, plan.slots, plan.positions)
    elif kernels.appended.shape[0]:
        where = kernels.appended
        torch_decode.append_to_cache(qkv[where], k_cache, v_cache, plan.slots[where], plan.positions[where])
    out = qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3))
    append_and_attend = implementation("cached_attention", "triton")
    for rows in kernels.decode:
        append_and_attend(qkv, k_cache, v_cache, out, kernels.lengths, rows, scale)
    for start, end, documents in kernels.fresh:
        part = causal_attention_packed(qkv[None, start:end], H, scale=scale, cu_seqlens=documents, backend=backend)[0]
        if end - start == qkv.shape[0]:
            return part
        out[start:end] = part
    attend = functools.partial(causal_attention, scale=scale, backend=backend)
    for slot, start, count, past in kernels.long:
        end = start + count
        out[start:end] = torch_decode.attend_row_by_row(qkv[start:end], k_cache, v_cache, [(slot, count, past)], attend)
    return out


def decode_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    counts: Tensor | None = None,
    slots: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Append up to 8 new tokens per row to a KV cache, then attend to it.

    A token sees the cached tokens of its slot, and the new tokens of its row up to itself. There are no gradients.

    Args:
        qkv: (N, 3C), the packed projection of N new tokens.
        k_cache: (slots, H, S, D), in qkv's dtype or float32. The new keys are written to it.
        v_cache: the same for the values.
        lengths: (slots,) int32 or int64, how many tokens each slot holds. It is not changed.
        starts: (R,) int32 or int64, the index of each row's first token among the N. With starts and counts None, there
            are N rows of one token each.
        counts: (R,) int32 or int64, how many tokens each row has, 0 to 8.
        slots: (R,) int32 or int64, the cache slot of each row, no two the same. With None, row r uses slot r.
        scale: what the scores are multiplied by, 1 / sqrt(D) by default.
        backend: "auto", "triton" or "torch".

    Returns:
        The outputs (N, C). A token that is in no row gives 0.

    Raises:
        ValueError: Shapes, dtypes or devices do not go together, or the backend cannot be used. On a CPU, and on the
            PyTorch backend, also: a row has too many tokens, does not fit in its slot, or names a slot or tokens that
            do not exist.

    Notes:
        The Triton backend never makes the host wait for the device, so a CUDA graph can capture it. On a GPU it does
        not check the values of the integers: such a bad row gives NaN and writes nothing to the cache. The PyTorch
        backend reads the integers on the host, and runs the rows one by one.

        On Triton a row's result is bitwise the same whatever the other rows are. Keys are split as in Flash-Decoding
        (Dao et al. 2023), at positions that depend only on the dtype and D.
    """
    name = "decode_attention"
    num_slots, H, _, D = _check_cache(name, qkv, k_cache, v_cache)
    N = qkv.shape[0]
    if (starts is None) != (counts is None):
        raise ValueError(
            f"{name}: give starts and counts together; got only {'counts' if starts is None else 'starts'}"
        )
    num_rows = N if starts is None else starts.shape[0] if starts.dim() else -1
    lengths = _check_integers(name, "lengths", lengths, num_slots, qkv.device)
    starts, counts, slots = (
        None if given is None else _check_integers(name, what, given, num_rows, qkv.device)
        for what, given in (("starts", starts), ("counts", counts), ("slots", slots))
    )
    if slots is None and num_rows > num_slots:
        raise ValueError(f"{name}: there must be at most {num_slots} rows, one for each cache slot; got {num_rows}")
    scale = _check_scale(name, D**-0.5 if scale is None else scale)
    size = (D, qkv.dtype, k_cache.dtype)
    chosen = choose_backend(name, qkv.device, backend, lambda: _why_not_triton_decoding(qkv, k_cache, v_cache), size)
    qkv = qkv.detach()
    if chosen == "torch" or (qkv.device.type == "cpu" and not torch.compiler.is_compiling()):
        _check_rows(name, N, k_cache.shape[2], num_rows, lengths, starts, counts, slots)
    out = qkv.new_zeros((N, H * D)) if starts is not None else qkv.new_empty((N, H * D))
    rows = DecodeRows(starts, counts, slots, 1 if starts is None else MAX_DECODE_TOKENS)
    run_operator(name, chosen, backend, qkv.device, size, qkv, k_cache, v_cache, out, lengths, rows, scale)
    return out


def _check_rows(
    name: str,
    N: int,
    capacity: int,
    num_rows: int,
    lengths: Tensor,
    starts: Tensor | None,
    counts: Tensor | None,
    slots: Tensor | None,
) -> None:
    """Raise ValueError unless the values of the rows' tensors are valid. Reads them on the host."""
    held = lengths.tolist()
    slot_R = list(range(num_rows)) if slots is None else slots.tolist()
    start_R = list(range(num_rows)) if starts is None else starts.tolist()
    count_R = [1] * num_rows if counts is None else counts.tolist()
    used = []
    for slot, start, count in zip(slot_R, start_R, count_R, strict=True):
        if not 0 <= count <= MAX_DECODE_TOKENS or start < 0 or start + count > N:
            raise ValueError(
                f"{name}: a row must have 0 to {MAX_DECODE_TOKENS} of the {N} tokens; "
                f"got {count} tokens from token {start} on"
            )
        if not 0 <= slot < len(held):
            raise ValueError(f"{name}: slots must be in [0, {len(held)}); got {slot}")
        if not 0 <= held[slot] <= capacity - count:
            raise ValueError(
                f"{name}: slot {slot} holds {held[slot]} tokens and gets {count}; the cache has room for {capacity}"
            )
        if count:
            used.append(slot)
    if len(set(used)) != len(used):
        raise ValueError(f"{name}: a cache slot can be in one row only; got slots {slot_R}")


def _check_cache(name: str, qkv: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[int, ...]:
    """Check the caches and qkv; return the shape (slots, H, S, D) of the caches."""
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"{name}: k_cache and v_cache must share shape (R, H, S, D); "
            f"got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    width = 3 * k_cache.shape[1] * k_cache.shape[3]
    if qkv.dim() != 2 or qkv.shape[1] != width:
        raise ValueError(f"{name}: qkv must be (N, {width}) for this cache; got {tuple(qkv.shape)}")
    check_same(name, k_cache=k_cache, v_cache=v_cache)
    if k_cache.dtype not in (qkv.dtype, torch.float32):
        raise ValueError(f"{name}: the caches must be {qkv.dtype} as qkv or float32; got {k_cache.dtype}")
    if k_cache.device != qkv.device:
        raise ValueError(f"{name}: the caches must be on {qkv.device}, like qkv; got {k_cache.device}")
    return tuple(k_cache.shape)


def _check_integers(name: str, what: str, given: Tensor, count: int, device: torch.device) -> Tensor:
    if given.shape != (count,) or given.dtype not in (torch.int32, torch.int64) or given.device != device:
        raise ValueError(
            f"{name}: {what} must be int32 or int64 of shape ({count},) on {device}; "
            f"got {describe(given)} on {given.device}"
        )
    return given.to(torch.int32).contiguous()


def _why_not_triton_decoding(qkv: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    D = k_cache.shape[3]
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16; got {qkv.dtype}"
    if D > MAX_HEAD_SIZE:
        return f"it takes head sizes up to {MAX_HEAD_SIZE}; got {D}"
    if qkv.stride(1) != 1 or qkv.stride(0) > MAX_ROW_STRIDE:
        return f"qkv must have stride 1 in its last dimension and at most {MAX_ROW_STRIDE} between tokens"
    if any((D > 1 and x.stride(3) != 1) or (x.shape[2] > 1 and x.stride(2) != D) for x in (k_cache, v_cache)):
        return "the last two dimensions of the caches, tokens and head size, must be contiguous"
    return None
