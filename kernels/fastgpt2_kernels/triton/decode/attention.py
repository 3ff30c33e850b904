"""Attention of a few new tokens to a KV cache, with a fused append, split over the keys.

This is Flash-Decoding (Dao et al. 2023). Row r adds count new tokens, 1 to 8, to a cache slot that holds `past` keys
and values. Its token t is at position p = past + t and sees the positions 0 .. p. Split i is the positions
[i SPLIT_S, (i + 1) SPLIT_S). For every token, head and split, over the positions s that the token sees in the split:

    x_s = scale log2(e) q k_s     m = max x_s     l = sum 2^(x_s - m)     a = sum 2^(x_s - m) v_s

and then, over the token's ceil((p + 1) / SPLIT_S) splits in order, O = sum 2^(m_i - m) a_i / sum 2^(m_i - m) l_i.

The new keys and values are read from the projection, not from the cache. The program whose split holds a position
writes it to the cache, and no program reads it in the same launch. SPLIT_S depends only on the launch row, and every
split is summed on its own. So a row's result is bitwise the same whatever other rows are in the batch. The grid covers
the capacity, not the lengths. So a captured graph stays valid as the rows grow, and programs past a row's end return at
once.

One new token takes 4 D operations for each key and value of 2 D numbers, so memory bandwidth is the only limit. A split
is one tile. All of its keys and values are loaded at once, and its products are computed outside the tensor cores.
Several new tokens share the tile. They use tensor cores, padded to 16 queries. In float32, which tensor cores would
round, the tokens run one after another.

Dimension key: R rows, N new tokens, S cache positions, H heads, D head size, C = H D.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.arguments import Matrix
from fastgpt2_kernels.triton.devices import launch_kernel
from fastgpt2_kernels.types import DecodeRows

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_NEW = 8  # the most new tokens of one row
UNROLLED_SPLITS = tl.constexpr(8)  # all splits of a context of 1024
_DOT_ROWS = 16  # the smallest number of queries in a tensor-core product


# -- arguments ----------------------------------------------------------------------------------------------------


class _Cache(NamedTuple):
    """The keys and values of a layer, and their strides of slots and heads."""

    k_ptr: Any
    v_ptr: Any
    stride_k_slot: Any
    stride_k_head: Any
    stride_v_slot: Any
    stride_v_head: Any


class _Parts(NamedTuple):
    out_ptr: Any
    max_ptr: Any
    sum_ptr: Any


class _Rows(NamedTuple):
    """The rows of a launch, and their limits. table_ptr, slots_ptr, starts_ptr and counts_ptr may be None."""

    table_ptr: Any
    lengths_ptr: Any
    slots_ptr: Any
    starts_ptr: Any
    counts_ptr: Any
    N: Any
    num_slots: Any
    S: Any
    max_new: Any


class _SplitMeta(NamedTuple):
    D: int
    BLOCK_D: int
    BLOCK_T: int
    SPLIT_S: int
    USE_DOT: bool


class _CombineMeta(NamedTuple):
    D: int
    BLOCK_C: int
    SPLIT_S: int


# -- pieces -------------------------------------------------------------------------------------------------------


@triton.jit
def _find_row(r, rows, D: tl.constexpr):
    """Row r's cache slot, first new token, number of new tokens, number of cached tokens, and whether it fits."""
    slot, start, count = r, r, 1
    if rows.slots_ptr is not None:
        slot = tl.load(rows.slots_ptr + r)
    if rows.starts_ptr is not None:
        start = tl.load(rows.starts_ptr + r)
        count = tl.load(rows.counts_ptr + r)
    capacity = rows.S
    if rows.table_ptr is not None:
        # Slots and heads are nested, and made of whole blocks (S, D). So the smaller stride is the size of one block.
        block = tl.minimum(tl.load(rows.table_ptr + 3), tl.load(rows.table_ptr + 4))
        capacity = tl.minimum(block // D, rows.S).to(tl.int32)
    is_slot = (slot >= 0) & (slot < rows.num_slots)
    past = tl.load(rows.lengths_ptr + slot, mask=is_slot, other=-1)
    # Subtract, because sums of unchecked numbers could overflow.
    has_room = (past >= 0) & (count <= rows.max_new) & (past <= capacity - count)
    return slot, start, count, past, has_room & (start >= 0) & (start <= rows.N - count)


@triton.jit
def _find_cache(cache, table_ptr, layer, slot, h, D: tl.constexpr):
    """Pointers to the keys and the values of a slot's head."""
    slot, h = tl.cast(slot, tl.int64), tl.cast(h, tl.int64)
    if table_ptr is not None:
        # All strides are multiples of D. To state this and the alignment of addresses allows 128-bit accesses.
        ALIGN: tl.constexpr = 16 if D % 16 == 0 else 8 if D % 8 == 0 else 1
        BYTES: tl.constexpr = 16
        stride_layer = tl.multiple_of(tl.load(table_ptr + 2), ALIGN)
        stride_slot = tl.multiple_of(tl.load(table_ptr + 3), ALIGN)
        stride_head = tl.multiple_of(tl.load(table_ptr + 4), ALIGN)
        offset = layer * stride_layer + slot * stride_slot + h * stride_head
        k_type: tl.constexpr = tl.pointer_type(cache.k_ptr.dtype.element_ty)
        v_type: tl.constexpr = tl.pointer_type(cache.v_ptr.dtype.element_ty)
        k_ptr = tl.multiple_of(tl.load(table_ptr).to(k_type), BYTES) + offset
        v_ptr = tl.multiple_of(tl.load(table_ptr + 1).to(v_type), BYTES) + offset
    else:
        k_ptr = cache.k_ptr + slot * cache.stride_k_slot + h * cache.stride_k_head
        v_ptr = cache.v_ptr + slot * cache.stride_v_slot + h * cache.stride_v_head
    return k_ptr, v_ptr


@triton.jit
def _combine_splits(parts, rows, offs_d, num_splits, MAX_SPLITS, D: tl.constexpr):
    """The output of attention in float32, combined from the splits' parts, for a tile such as (tokens, columns).

    All arguments have the tile's shape. For token n and column c of head h = c // D, `rows` is n H + h in int64,
    `offs_d` is c - h D, and `num_splits` is the token's ceil((p + 1) / SPLIT_S). Where it is 0, nothing is read and the
    output is 0. The parts have MAX_SPLITS entries per token and head.
    """
    is_any = num_splits > 0
    acc = tl.where(is_any, 0.0, 0.0)
    l = acc
    m = acc + float("-inf")
    for start in range(0, tl.max(num_splits), UNROLLED_SPLITS):
        # The loads of several splits are in flight together, because there is little else to hide their latency.
        for i in tl.static_range(UNROLLED_SPLITS):
            is_split = start + i < num_splits
            at = rows * MAX_SPLITS + start + i
            m_i = tl.load(parts.max_ptr + at, mask=is_split, other=float("-inf"))
            l_i = tl.load(parts.sum_ptr + at, mask=is_split, other=0.0)
            acc_i = tl.load(parts.out_ptr + at * D + offs_d, mask=is_split, other=0.0)
            m_new = tl.maximum(m, m_i)
            m_used = tl.where(is_any, m_new, 0.0)  # -inf - (-inf) is NaN
            alpha, beta = tl.exp2(m - m_used), tl.exp2(m_i - m_used)
            acc = acc * alpha + acc_i * beta
            l = l * alpha + l_i * beta
            m = m_new
    return tl.where(is_any, acc / tl.where(is_any, l, 1.0), 0.0)


# -- a split ------------------------------------------------------------------------------------------------------


@triton.jit
def _load_cached(k_ptr, v_ptr, past, split_start, META: tl.constexpr):
    """The split's cached keys and values (SPLIT_S, BLOCK_D), zeros from position `past` on, and which are cached."""
    D: tl.constexpr = META.D
    offs_s, offs_d = tl.arange(0, META.SPLIT_S), tl.arange(0, META.BLOCK_D)
    is_cached = split_start + offs_s < past
    mask = is_cached[:, None] & (offs_d < D)[None, :]
    tile = tl.cast(split_start, tl.int64) * D + (offs_s[:, None] * D + offs_d[None, :])
    return tl.load(k_ptr + tile, mask=mask, other=0.0), tl.load(v_ptr + tile, mask=mask, other=0.0), is_cached


@triton.jit
def _append_new(qkv, k_ptr, v_ptr, past, count, split_start, C, META: tl.constexpr):
    """Write the new keys and values that lie in the split to the cache.

    Return keys and values (BLOCK_T, BLOCK_D), and which of them lie in the split.
    """
    D: tl.constexpr = META.D
    offs_t, offs_d = tl.arange(0, META.BLOCK_T), tl.arange(0, META.BLOCK_D)
    is_here = (offs_t < count) & (past + offs_t >= split_start) & (past + offs_t < split_start + META.SPLIT_S)
    mask = is_here[:, None] & (offs_d < D)[None, :]
    new = qkv.ptr + (offs_t[:, None] * qkv.stride + offs_d[None, :])
    k = tl.load(new + C, mask=mask, other=0.0).to(k_ptr.dtype.element_ty)
    v = tl.load(new + 2 * C, mask=mask, other=0.0).to(v_ptr.dtype.element_ty)
    at = tl.cast(past, tl.int64) * D + (offs_t[:, None] * D + offs_d[None, :])
    tl.store(k_ptr + at, k, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)
    return k, v, is_here


@triton.jit
def _attend_one(q, k, v, is_seen, k_new, v_new, is_seen_new):
    """(a (BLOCK_D,), m, l) of one scaled query over cached and new keys, outside the tensor cores."""
    x = tl.where(is_seen, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
    x_new = tl.where(is_seen_new, tl.sum(q[None, :] * k_new.to(tl.float32), 1), float("-inf"))
    m = tl.maximum(tl.max(x, 0), tl.max(x_new, 0))
    p, p_new = tl.exp2(x - m), tl.exp2(x_new - m)
    acc = tl.sum(p[:, None] * v.to(tl.float32), 0) + tl.sum(p_new[:, None] * v_new.to(tl.float32), 0)
    return acc, m, tl.sum(p, 0) + tl.sum(p_new, 0)


@triton.jit
def _attend_all(q, k, v, is_seen, k_new, v_new, is_here, scale_log2, BLOCK_T: tl.constexpr):
    """a (BLOCK_T, BLOCK_D), m and l (BLOCK_T,) of the new queries (BLOCK_T, BLOCK_D), on tensor cores."""
    offs_t = tl.arange(0, BLOCK_T)
    x = tl.where(is_seen[None, :], tl.dot(q, tl.trans(k)) * scale_log2, float("-inf"))  # (BLOCK_T, SPLIT_S)
    is_seen_new = (offs_t[None, :] <= offs_t[:, None]) & is_here[None, :]
    x_new = tl.where(is_seen_new, tl.dot(q, tl.trans(k_new)) * scale_log2, float("-inf"))  # (BLOCK_T, BLOCK_T)
    m = tl.maximum(tl.max(x, 1), tl.max(x_new, 1))
    m_used = tl.where(m == float("-inf"), 0.0, m)[:, None]  # a token before the split: -inf - (-inf) is NaN
    p, p_new = tl.exp2(x - m_used), tl.exp2(x_new - m_used)
    acc = tl.dot(p_new.to(v.dtype), v_new, tl.dot(p.to(v.dtype), v))
    return acc, m, tl.sum(p, 1) + tl.sum(p_new, 1)


@triton.jit(
    do_not_specialize=["layer", "N", "num_slots", "S", "max_new"],
    do_not_specialize_on_alignment=["lengths_ptr", "slots_ptr", "starts_ptr", "counts_ptr"],
)
def _decode_attention_kernel(
    qkv,
    cache,
    parts,
    table_ptr,
    lengths_ptr,
    slots_ptr,
    starts_ptr,
    counts_ptr,
    layer,
    N,
    num_slots,
    S,
    max_new,
    scale,
    META: tl.constexpr,
):
    """Compute the parts of one split, for one head and all new tokens of one row; grid (R, H, splits)."""
    BLOCK_D: tl.constexpr = META.BLOCK_D
    r, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    H, MAX_SPLITS = tl.num_programs(1), tl.num_programs(2)
    rows = _Rows(table_ptr, lengths_ptr, slots_ptr, starts_ptr, counts_ptr, N, num_slots, S, max_new)
    slot, start, count, past, fits = _find_row(r, rows, D=META.D)
    split_start = split * META.SPLIT_S
    scale_log2 = scale * LOG2_E
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < META.D
    part = (tl.cast(start, tl.int64) * H + h) * MAX_SPLITS + split  # the first token's index in the parts
    if fits & (count > 0) & (split_start < past + count):
        k_ptr, v_ptr = _find_cache(cache, table_ptr, layer, slot, h, D=META.D)
        new = Matrix(qkv.ptr + tl.cast(start, tl.int64) * qkv.stride + h * META.D, qkv.stride)
        k, v, is_cached = _load_cached(k_ptr, v_ptr, past, split_start, META=META)
        k_new, v_new, is_here = _append_new(new, k_ptr, v_ptr, past, count, split_start, C=H * META.D, META=META)
        offs_t = tl.arange(0, META.BLOCK_T)
        if META.USE_DOT:
            ptrs = new.ptr + (offs_t[:, None] * new.stride + offs_d[None, :])
            q = tl.load(ptrs, mask=(offs_t < count)[:, None] & mask_d[None, :], other=0.0)
            acc, m, l = _attend_all(q, k, v, is_cached, k_new, v_new, is_here, scale_log2, BLOCK_T=META.BLOCK_T)
            mask_t = (offs_t < count) & (past + offs_t >= split_start)
            at = part + offs_t * (H * MAX_SPLITS)
            mask = mask_t[:, None] & mask_d[None, :]
            tl.store(parts.out_ptr + at[:, None] * META.D + offs_d[None, :], acc, mask=mask)
            tl.store(parts.max_ptr + at, m, mask=mask_t)
            tl.store(parts.sum_ptr + at, l, mask=mask_t)
        else:
            t_first, t_end = tl.maximum(split_start - past, 0), count
            if META.BLOCK_T == 1:
                t_first, t_end = 0, 1  # no loop
            for t in range(t_first, t_end):
                q = tl.load(new.ptr + t * new.stride + offs_d, mask=mask_d, other=0.0).to(tl.float32) * scale_log2
                acc, m, l = _attend_one(q, k, v, is_cached, k_new, v_new, is_here & (offs_t <= t))
                at = part + t * (H * MAX_SPLITS)
                tl.store(parts.out_ptr + at * META.D + offs_d, acc, mask=mask_d)
                tl.store(parts.max_ptr + at, m)
                tl.store(parts.sum_ptr + at, l)
    elif (split == 0) & (not fits):
        # A row that does not fit writes nothing to the cache, and those of its tokens that exist give NaN.
        for t in range(tl.maximum(-start, 0), tl.minimum(count, N - start)):
            at = part + tl.cast(t, tl.int64) * (H * MAX_SPLITS)
            tl.store(parts.out_ptr + at * META.D + offs_d, tl.full((BLOCK_D,), float("nan"), tl.float32), mask=mask_d)
            tl.store(parts.max_ptr + at, float("nan"))
            tl.store(parts.sum_ptr + at, float("nan"))


@triton.jit(
    do_not_specialize=["N", "num_slots", "S", "max_new", "H", "MAX_SPLITS"],
    do_not_specialize_on_alignment=["lengths_ptr", "slots_ptr", "starts_ptr", "counts_ptr"],
)
def _combine_kernel(
    out,
    parts,
    table_ptr,
    lengths_ptr,
    slots_ptr,
    starts_ptr,
    counts_ptr,
    N,
    num_slots,
    S,
    max_new,
    H,
    MAX_SPLITS,
    META: tl.constexpr,
):
    """Compute BLOCK_C columns of the output of one new token; grid (R, cdiv(C, BLOCK_C), most new tokens of a row)."""
    D: tl.constexpr = META.D
    rows = _Rows(table_ptr, lengths_ptr, slots_ptr, starts_ptr, counts_ptr, N, num_slots, S, max_new)
    _, start, count, past, fits = _find_row(tl.program_id(0), rows, D=D)
    offs_c = tl.program_id(1) * META.BLOCK_C + tl.arange(0, META.BLOCK_C)
    h = offs_c // D
    # This loop runs once, except for a row that does not fit because it has too many tokens. All of these are NaN.
    t_first = tl.maximum(-start, 0) + tl.program_id(2)
    for t in range(t_first, tl.minimum(count, N - start), tl.num_programs(2)):
        n = tl.cast(start + t, tl.int64)
        mask = offs_c < H * D
        num_splits = tl.where(mask, tl.where(fits, tl.cdiv(past + t + 1, META.SPLIT_S), 1), 0)
        y = _combine_splits(parts, n * H + h, offs_c - h * D, num_splits, MAX_SPLITS, D=D)
        tl.store(out.ptr + n * out.stride + offs_c, y.to(out.ptr.dtype.element_ty), mask=mask)


# -- launchers ----------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """The parts of every token, head and split in float32: out (N, H, splits, D), max and sum (N, H, splits)."""

    out: Tensor
    max: Tensor
    sum: Tensor

    @classmethod
    def empty(cls, qkv: Tensor, num_heads: int, num_splits: int) -> Parts:
        N, width = qkv.shape
        shape = (N, num_heads, num_splits)
        out = qkv.new_empty((*shape, width // (3 * num_heads)), dtype=torch.float32)
        return cls(out, *(qkv.new_empty(shape, dtype=torch.float32) for _ in range(2)))


class Rows(NamedTuple):
    """The rows of a launch. Tensors are int32 and on the device.

    lengths: (slots,), how many tokens each slot holds.
    slots: (R,), the cache slot of each row, no two the same. With None, row r uses slot r.
    starts, counts: (R,), each row's first new token and how many it has. With None, row r has token r alone.
    max_new: the most new tokens of a row, up to MAX_NEW. A row with more does not fit. With max_new = 1, sums have
        another order than with a larger max_new.
    """

    num_rows: int
    lengths: Tensor
    slots: Tensor | None = None
    starts: Tensor | None = None
    counts: Tensor | None = None
    max_new: int = 1


class Cache(NamedTuple):
    """Keys and values (slots, H, S, D) of one layer, contiguous in S and D.

    With `table`, the kernel finds the cache (layers, slots, H, S, D) at launch time. So a longer cache may replace it
    between two replays of a graph. `table` is (5,) int64 on the device: the addresses of keys and values (multiples of
    16), and the strides of layer, slot and head in elements (multiples of D). k and v then only give the dtype, and
    `capacity` is the largest S that there will be.
    """

    k: Tensor
    v: Tensor
    capacity: int
    table: Tensor | None = None
    layer: int = 0


def num_splits(capacity: int, cache: Tensor, head_size: int) -> int:
    """The number of splits for `capacity` positions in a cache of this dtype."""
    return launch.ceil_div(capacity, launch.decode_row(cache.element_size(), _block_d(head_size)).split_s)


def decode_splits(qkv: Tensor, cache: Cache, rows: Rows, parts: Parts, scale: float) -> None:
    """Write the parts of the new tokens, and append their keys and values to the cache."""
    _, H, splits, D = parts.out.shape
    if rows.num_rows * H == 0:
        return
    row = launch.decode_row(cache.k.element_size(), _block_d(D))
    use_dot = rows.max_new > 1 and cache.k.element_size() == 2
    launch_kernel(
        qkv.device,
        _decode_attention_kernel,
        (rows.num_rows, H, splits),
        qkv=Matrix.of(qkv),
        cache=_Cache(cache.k, cache.v, *cache.k.stride()[:2], *cache.v.stride()[:2]),
        parts=_Parts(*parts),
        layer=cache.layer,
        scale=scale,
        META=_SplitMeta(
            D=D,
            BLOCK_D=_block_d(D),
            BLOCK_T=1 if rows.max_new == 1 else _DOT_ROWS if use_dot else MAX_NEW,
            SPLIT_S=row.split_s,
            USE_DOT=use_dot,
        ),
        num_warps=row.one_warps if rows.max_new == 1 else row.few_warps,
        **_row_arguments(qkv.shape[0], cache, rows),
        **launch.OPTIONS,
    )


def combine_splits(parts: Parts, cache: Cache, rows: Rows, out: Tensor) -> None:
    """Combine the parts, and write the outputs of the rows' tokens to `out` (N, C)."""
    N, H, splits, D = parts.out.shape
    if rows.num_rows * H == 0:
        return
    row = launch.decode_row(cache.k.element_size(), _block_d(D))
    launch_kernel(
        out.device,
        _combine_kernel,
        (rows.num_rows, launch.ceil_div(H * D, row.block_c), rows.max_new),
        out=Matrix.of(out),
        parts=_Parts(*parts),
        H=H,
        MAX_SPLITS=splits,
        META=_CombineMeta(D=D, BLOCK_C=row.block_c, SPLIT_S=row.split_s),
        num_warps=1,
        **_row_arguments(N, cache, rows),
        **launch.OPTIONS,
    )


def decode_attention(qkv: Tensor, cache: Cache, rows: Rows, out: Tensor, scale: float) -> None:
    """Append the rows' new tokens of qkv (N, 3C) to the cache, and write their attention outputs to `out` (N, C)."""
    H, D = cache.k.shape[1], cache.k.shape[3]
    if qkv.numel() == 0:
        return
    parts = Parts.empty(qkv, H, num_splits(cache.capacity, cache.k, D))
    decode_splits(qkv, cache, rows, parts, scale)
    combine_splits(parts, cache, rows, out)


def _block_d(head_size: int) -> int:
    return max(16, launch.next_power_of_2(head_size))


def _row_arguments(num_tokens: int, cache: Cache, rows: Rows) -> dict[str, Any]:
    """The members of `_Rows` as separate arguments, because they must not be specialized by value or alignment."""
    return {
        "table_ptr": cache.table,
        "lengths_ptr": rows.lengths,
        "slots_ptr": rows.slots,
        "starts_ptr": rows.starts,
        "counts_ptr": rows.counts,
        "N": num_tokens,
        "num_slots": rows.lengths.shape[0],
        "S": cache.capacity,
        "max_new": rows.max_new,
    }


def append_and_attend(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, lengths: Tensor, rows: DecodeRows, scale: float
) -> None:
    """`decode_attention` through PyTorch's dispatcher. `ops` calls it."""
    torch.ops.fastgpt2.decode_attention(
        qkv, k_cache, v_cache, out, lengths, rows.slots, rows.starts, rows.counts, rows.max_new, scale
    )


# -- PyTorch operators --------------------------------------------------------------------------------------------

torch.library.define(
    "fastgpt2::decode_attention",
    "(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) out, Tensor lengths, Tensor? slots, "
    "Tensor? starts, Tensor? counts, int max_new, float scale) -> ()",
)


@torch.library.impl("fastgpt2::decode_attention", "default")
def _decode_attention(qkv, k_cache, v_cache, out, lengths, slots, starts, counts, max_new, scale):
    num_rows = qkv.shape[0] if starts is None else starts.shape[0]
    rows = Rows(num_rows, lengths, slots, starts, counts, max_new)
    decode_attention(qkv, Cache(k_cache, v_cache, k_cache.shape[2]), rows, out, scale)


@torch.library.register_fake("fastgpt2::decode_attention")
def _(qkv, k_cache, v_cache, out, lengths, slots, starts, counts, max_new, scale):
    return None
