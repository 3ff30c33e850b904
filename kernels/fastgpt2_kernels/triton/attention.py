"""Causal attention, forward and backward, in tiles (FlashAttention-2, Dao 2023).

For a head's queries Q (T, D), keys K and values V (S, D), with S >= T, query t is at position t + S - T:

    x = scale Q K^T, masked to s <= t + S - T     P = exp(x - lse), lse = log sum_s exp(x)     O = (P o Z) V
    dV = (P o Z)^T dO     dP = (dO V^T) o Z     dS = P o (dP - delta), delta = rowsum(dO o O)
    dQ = scale dS K       dK = scale dS^T Q

Z = keep / (1 - p) is the dropout mask. It is drawn again wherever it is needed, from Philox (Salmon et al. 2011) with
the key `seed` and the counter (s // 8, t, b H + h, offset), so it does not depend on the tiles. Exponentials are base
2. Scale and log2(e) are folded into one factor, so scale must be > 0.

Saved for backward are the inputs, O, and statistics of every row in float32 (B, H, T). For 16-bit inputs that is
lse / ln 2. For float32 inputs the rounding of a large lse would show in P = exp(x - lse). So the maximum m of x log2(e)
and the sum l of 2^(x log2(e) - m) are saved separately.

The forward and dQ kernels own a tile of queries and loop over the keys. The dK and dV kernel owns a tile of keys and
loops over the queries. No sum crosses two programs, so results are bitwise the same in every run. Tiles that are masked
out are never visited. Only tiles that the mask cuts through apply it: there is one loop over whole tiles, then one over
cut tiles. Programs with the longest loops start first, but only within SECTION heads at a time, so that the L2 cache
holds the keys and values of these heads until their last tile is done. The dQ kernel runs first, because it also
computes delta.

Documents laid end to end (`doc_start`, each token's first visible key) limit the loops at the other end too. Tokens at
and past `lengths` are zero in the outputs, and are never read in the inputs.

Dimension key: B batch, T query tokens, S key tokens, H heads, D head size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt2_kernels.backends import KernelFailedError, fallback_size, implementation
from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.arguments import Matrix
from fastgpt2_kernels.triton.devices import float32_precision, launch_kernel
from fastgpt2_kernels.triton.fallback import gradients
from fastgpt2_kernels.triton.operators import define_operator
from fastgpt2_kernels.types import AttentionOptions, Documents

LOG2_E = tl.constexpr(1.4426950408889634)
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass every statistical test (Salmon et al. 2011, table 2)
# In heads. At T = 2048, D = 64 and 16 bits, their K and V take 12.6 MB of an L2 cache of 40 to 50 MB.
SECTION = tl.constexpr(24)


# -- arguments ----------------------------------------------------------------------------------------------------


class _Heads(NamedTuple):
    """A matrix (T, D) for every row b and head h."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any


class _Inputs(NamedTuple):
    q: Any
    k: Any
    v: Any


class _Statistics(NamedTuple):
    """Statistics (B, H, T) in float32. With sum_ptr None, max_ptr holds m + log2 l."""

    max_ptr: Any
    sum_ptr: Any
    delta_ptr: Any = None


class _Mask(NamedTuple):
    """The parts of the mask; each is None where there is no such part."""

    lengths_ptr: Any
    doc_start_ptr: Any
    doc_end_ptr: Any
    seed_ptr: Any


class _Scales(NamedTuple):
    scale: Any
    keep_scale: Any  # 1 / (1 - p)


class _Meta(NamedTuple):
    D: int
    BLOCK_D: int
    BLOCK_T: int
    BLOCK_S: int
    USE_TMA: bool
    PRECISION: str


class _Walk(NamedTuple):
    """What stays the same while a program that owns one tile loops over the others."""

    b: Any
    h: Any
    bh: Any
    start: Any  # of the program's own tile
    offs: Any
    limit: Any  # end of the rows that it loops over
    offset: Any
    doc_start: Any  # of the program's queries, or None
    scale_log2: Any
    threshold: Any
    keep_scale: Any


# -- pieces -------------------------------------------------------------------------------------------------------


@triton.jit
def _place(num_tiles):
    """This program's head among all heads, and the rank of its tile.

    Within a section, all heads come with one rank before they come with the next.
    """
    num_heads = tl.num_programs(0) // num_tiles
    section = tl.program_id(0) // (SECTION * num_tiles)
    within = tl.program_id(0) - section * SECTION * num_tiles
    heads = tl.minimum(SECTION, num_heads - section * SECTION)
    return section * SECTION + within % heads, within // heads


@triton.jit
def _head(x, b, h):
    """The matrix of head h of row b."""
    return Matrix(x.ptr + (tl.cast(b, tl.int64) * x.stride_b + tl.cast(h, tl.int64) * x.stride_h), x.stride_t)


@triton.jit
def _load_tile(x, start, limit, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, META: tl.constexpr):
    """Load rows start .. start + BLOCK of a (T, D) matrix: zeros from row `limit` on (HAS_MASK) and past column D."""
    D: tl.constexpr = META.D
    BLOCK_D: tl.constexpr = META.BLOCK_D
    offs_t = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = x.ptr + tl.cast(start, tl.int64) * x.stride + (offs_t[:, None] * x.stride + offs_d[None, :])
    if HAS_MASK and D == BLOCK_D:
        tile = tl.load(ptrs, mask=(start + offs_t < limit)[:, None], other=0.0)
    elif HAS_MASK:
        tile = tl.load(ptrs, mask=(start + offs_t < limit)[:, None] & (offs_d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    return tile


@triton.jit
def _load_keys(x, walk, s, IS_CUT: tl.constexpr, META: tl.constexpr):
    """Load rows s .. s + BLOCK_S of k or v.

    x is a matrix, or with USE_TMA a tensor descriptor (B, H, S, D) or (B, S, H, D).
    """
    BLOCK_S: tl.constexpr = META.BLOCK_S
    BLOCK_D: tl.constexpr = META.BLOCK_D
    if META.USE_TMA:
        if x.block_shape[1] == 1:
            tile = tl.reshape(x.load([walk.b, walk.h, s, 0]), (BLOCK_S, BLOCK_D))
        else:
            tile = tl.reshape(x.load([walk.b, s, walk.h, 0]), (BLOCK_S, BLOCK_D))
    else:
        tile = _load_tile(x, s, walk.limit, BLOCK=BLOCK_S, HAS_MASK=IS_CUT, META=META)
    return tile


@triton.jit
def _store_tile(x, tile, start, limit, BLOCK: tl.constexpr, META: tl.constexpr):
    """Store rows start .. start + BLOCK up to `limit`, and columns up to D, in the matrix's dtype."""
    offs_t = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, META.BLOCK_D)
    ptrs = x.ptr + tl.cast(start, tl.int64) * x.stride + (offs_t[:, None] * x.stride + offs_d[None, :])
    mask = (start + offs_t < limit)[:, None] & (offs_d < META.D)[None, :]
    tl.store(ptrs, tile.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _keep_mask(seed_ptr, bh, t_start, s_start, threshold, META: tl.constexpr):
    """Which weights of a tile dropout keeps, (BLOCK_T, BLOCK_S). `threshold` is p in units of 2^-16.

    A call of Philox gives 128 bits, 16 for each of 8 neighbouring keys. These calls are the cost of dropout.
    """
    BLOCK_T: tl.constexpr = META.BLOCK_T
    BLOCK_S: tl.constexpr = META.BLOCK_S
    offs_t = (t_start + tl.arange(0, BLOCK_T))[:, None]
    offs_g = (s_start // 8 + tl.arange(0, BLOCK_S // 8))[None, :]
    zero = (offs_t + offs_g) * 0
    counter = tl.load(seed_ptr + 1).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed_ptr), zero + offs_g, zero + offs_t, zero + bh, zero + counter, n_rounds=PHILOX_ROUNDS
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (..., 2, 2), the words in order
    keep = tl.join(words & 0xFFFF, words >> 16).to(tl.int32) >= threshold
    return tl.reshape(keep, (BLOCK_T, BLOCK_S))


@triton.jit
def _key_range(t_start, t_end, offset, doc_start_ptr, BLOCK_S: tl.constexpr):
    """The tiles of keys that the queries t_start .. t_end see: (whole_start, whole_end, cut_start, num_lead, num_cut).

    Whole tiles lie in whole_start .. whole_end. The mask cuts through `num_cut` tiles. The first `num_lead` of them
    start at cut_start and are cut by documents. The others start at whole_end and are cut by the diagonal.
    """
    whole_start, cut_start = 0, 0
    whole_end = (t_start + offset + 1) // BLOCK_S * BLOCK_S
    if doc_start_ptr is not None:
        cut_start = tl.load(doc_start_ptr + t_start) // BLOCK_S * BLOCK_S
        whole_start = tl.cdiv(tl.load(doc_start_ptr + t_end - 1), BLOCK_S) * BLOCK_S
        whole_start = tl.minimum(whole_start, whole_end)
    num_lead = (whole_start - cut_start) // BLOCK_S
    num_cut = num_lead + tl.cdiv(t_end + offset - whole_end, BLOCK_S)
    return whole_start, whole_end, cut_start, num_lead, num_cut


@triton.jit
def _query_range(s_start, s_end, num_queries, offset, doc_end_ptr, BLOCK_T: tl.constexpr):
    """The tiles of queries that see the keys s_start .. s_end, as in `_key_range`.

    Here the diagonal cuts the first `num_lead` tiles, and documents cut the others.
    """
    cut_start = tl.maximum(s_start - offset, 0) // BLOCK_T * BLOCK_T
    last, whole_last = num_queries, num_queries
    if doc_end_ptr is not None:
        last = tl.minimum(last, tl.load(doc_end_ptr + s_end - 1))
        whole_last = tl.minimum(last, tl.load(doc_end_ptr + s_start))
    whole_start = tl.maximum(tl.cdiv(s_end - 1 - offset, BLOCK_T) * BLOCK_T, cut_start)
    whole_start = tl.minimum(whole_start, tl.maximum(tl.cdiv(last, BLOCK_T) * BLOCK_T, cut_start))
    whole_end = tl.maximum(whole_last // BLOCK_T * BLOCK_T, whole_start)
    num_lead = (whole_start - cut_start) // BLOCK_T
    num_cut = num_lead + tl.maximum(tl.cdiv(last - whole_end, BLOCK_T), 0)
    return whole_start, whole_end, cut_start, num_lead, num_cut


@triton.jit
def _limits(mask, b, T, S):
    """The numbers of queries and keys of row b: all, or up to its length."""
    t_limit, s_limit = T, S
    if mask.lengths_ptr is not None:
        t_limit = tl.minimum(tl.maximum(tl.load(mask.lengths_ptr + b), 0), T)
        s_limit = t_limit
    return t_limit, s_limit


@triton.jit
def _is_seen(walk, offs_s):
    """Which of the keys offs_s the program's own queries see, (BLOCK_T, BLOCK_S)."""
    allowed = offs_s[None, :] <= walk.offs[:, None] + walk.offset
    if walk.doc_start is not None:
        allowed = allowed & (offs_s[None, :] >= walk.doc_start[:, None])
    return allowed


# -- forward ------------------------------------------------------------------------------------------------------


@triton.jit
def _online_softmax_step(acc, m, l, q, k_heads, v_heads, mask, walk, s, IS_CUT: tl.constexpr, META: tl.constexpr):
    """Add the keys s .. s + BLOCK_S to the running maximum m, sum l and output acc (not yet divided by l)."""
    PRECISION: tl.constexpr = META.PRECISION
    offs_s = s + tl.arange(0, META.BLOCK_S)
    k = _load_keys(k_heads, walk, s, IS_CUT=IS_CUT, META=META)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_T, BLOCK_S)
    if IS_CUT:
        x = tl.where(_is_seen(walk, offs_s), x, float("-inf"))
    m_new = tl.maximum(m, tl.max(x, 1) * walk.scale_log2)
    m_used = m_new
    if IS_CUT and mask.doc_start_ptr is not None:
        # A row of a later document has seen no key yet. Subtract 0 then, because -inf - (-inf) is NaN.
        m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(x * walk.scale_log2 - m_used[:, None])
    alpha = tl.exp2(m - m_used)
    l = l * alpha + tl.sum(p, 1)
    if mask.seed_ptr is not None:
        keep = _keep_mask(mask.seed_ptr, walk.bh, walk.start, s, walk.threshold, META=META)
        p = tl.where(keep, p, 0.0)
    acc = acc * alpha[:, None]
    v = _load_keys(v_heads, walk, s, IS_CUT=IS_CUT, META=META)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_new, l


@triton.jit(do_not_specialize=["H", "T", "S", "threshold"])
def _attention_fwd_kernel(q, k, v, o, stats, mask, H, T, S, threshold, scales, META: tl.constexpr):
    """Compute O, m and l for one tile of queries of one head. With USE_TMA, k and v are tensor descriptors."""
    BLOCK_T: tl.constexpr = META.BLOCK_T
    BLOCK_S: tl.constexpr = META.BLOCK_S
    BLOCK_D: tl.constexpr = META.BLOCK_D
    num_tiles = tl.cdiv(T, BLOCK_T)
    bh, rank = _place(num_tiles)
    t_start = (num_tiles - 1 - rank) * BLOCK_T  # the last queries see the most keys
    b, h = bh // H, bh % H
    offset = S - T
    t_limit, s_limit = _limits(mask, b, T, S)
    q_head, o_head = _head(q, b, h), _head(o, b, h)
    if not META.USE_TMA:
        k, v = _head(k, b, h), _head(v, b, h)
    offs_t = t_start + tl.arange(0, BLOCK_T)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_T,), tl.float32)
    if t_start < t_limit:
        t_end = tl.minimum(t_start + BLOCK_T, t_limit)
        doc_start = None
        if mask.doc_start_ptr is not None:
            doc_start = tl.load(mask.doc_start_ptr + offs_t, mask=offs_t < t_limit, other=0)
        q_tile = _load_tile(q_head, t_start, t_limit, BLOCK=BLOCK_T, HAS_MASK=True, META=META)
        walk = _Walk(
            b, h, bh, t_start, offs_t, s_limit, offset, doc_start, scales.scale * LOG2_E, threshold, scales.keep_scale
        )
        whole_start, whole_end, cut_start, num_lead, num_cut = _key_range(
            t_start, t_end, offset, mask.doc_start_ptr, BLOCK_S=BLOCK_S
        )
        for s in range(whole_start, whole_end, BLOCK_S):
            acc, m, l = _online_softmax_step(acc, m, l, q_tile, k, v, mask, walk, s, IS_CUT=False, META=META)
        for i in range(num_cut):
            s = tl.where(i < num_lead, cut_start + i * BLOCK_S, whole_end + (i - num_lead) * BLOCK_S)
            acc, m, l = _online_softmax_step(acc, m, l, q_tile, k, v, mask, walk, s, IS_CUT=True, META=META)
    is_valid = offs_t < t_limit
    l_used = tl.where(is_valid, l, 1.0)
    acc = tl.where(is_valid[:, None], acc * (scales.keep_scale / l_used)[:, None], 0.0)
    _store_tile(o_head, acc, t_start, T, BLOCK=BLOCK_T, META=META)
    rows = bh.to(tl.int64) * T + offs_t
    if stats.sum_ptr is not None:
        tl.store(stats.sum_ptr + rows, tl.where(is_valid, l, 0.0), mask=offs_t < T)
    else:
        m += tl.log2(l_used)
    tl.store(stats.max_ptr + rows, tl.where(is_valid, m, float("-inf")), mask=offs_t < T)


# -- backward -----------------------------------------------------------------------------------------------------


@triton.jit
def _dq_step(dq, q, do, m, delta, heads, mask, walk, s, IS_CUT: tl.constexpr, META: tl.constexpr):
    """dq += dS K over the keys s .. s + BLOCK_S. If m does not include l, dq += l dS K."""
    PRECISION: tl.constexpr = META.PRECISION
    offs_s = s + tl.arange(0, META.BLOCK_S)
    k = _load_keys(heads.k, walk, s, IS_CUT=IS_CUT, META=META)
    v = _load_keys(heads.v, walk, s, IS_CUT=IS_CUT, META=META)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(x * walk.scale_log2 - m[:, None])
    if IS_CUT:
        p = tl.where(_is_seen(walk, offs_s), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if mask.seed_ptr is not None:
        keep = _keep_mask(mask.seed_ptr, walk.bh, walk.start, s, walk.threshold, META=META)
        dp = tl.where(keep, dp * walk.keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["H", "T", "S", "threshold"])
def _attention_bwd_dq_kernel(inputs, o, do, dq, stats, mask, H, T, S, threshold, scales, META: tl.constexpr):
    """Compute delta and, unless dq is None, dQ for one tile of queries of one head."""
    BLOCK_T: tl.constexpr = META.BLOCK_T
    BLOCK_S: tl.constexpr = META.BLOCK_S
    BLOCK_D: tl.constexpr = META.BLOCK_D
    num_tiles = tl.cdiv(T, BLOCK_T)
    bh, rank = _place(num_tiles)
    t_start = (num_tiles - 1 - rank) * BLOCK_T
    b, h = bh // H, bh % H
    offset = S - T
    t_limit, s_limit = _limits(mask, b, T, S)
    offs_t = t_start + tl.arange(0, BLOCK_T)
    rows = bh.to(tl.int64) * T + offs_t
    o_tile = _load_tile(_head(o, b, h), t_start, t_limit, BLOCK=BLOCK_T, HAS_MASK=True, META=META)
    do_tile = _load_tile(_head(do, b, h), t_start, t_limit, BLOCK=BLOCK_T, HAS_MASK=True, META=META)
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(stats.delta_ptr + rows, delta, mask=offs_t < T)
    if dq is not None:
        acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        if t_start < t_limit:
            t_end = tl.minimum(t_start + BLOCK_T, t_limit)
            heads = _Inputs(None, _head(inputs.k, b, h), _head(inputs.v, b, h))
            doc_start = None
            if mask.doc_start_ptr is not None:
                doc_start = tl.load(mask.doc_start_ptr + offs_t, mask=offs_t < t_limit, other=0)
            q = _load_tile(_head(inputs.q, b, h), t_start, t_limit, BLOCK=BLOCK_T, HAS_MASK=True, META=META)
            m = tl.load(stats.max_ptr + rows, mask=offs_t < t_limit, other=float("inf"))
            scale_log2 = scales.scale * LOG2_E
            walk = _Walk(
                b, h, bh, t_start, offs_t, s_limit, offset, doc_start, scale_log2, threshold, scales.keep_scale
            )
            whole_start, whole_end, cut_start, num_lead, num_cut = _key_range(
                t_start, t_end, offset, mask.doc_start_ptr, BLOCK_S=BLOCK_S
            )
            for s in range(whole_start, whole_end, BLOCK_S):
                acc = _dq_step(acc, q, do_tile, m, delta, heads, mask, walk, s, IS_CUT=False, META=META)
            for i in range(num_cut):
                s = tl.where(i < num_lead, cut_start + i * BLOCK_S, whole_end + (i - num_lead) * BLOCK_S)
                acc = _dq_step(acc, q, do_tile, m, delta, heads, mask, walk, s, IS_CUT=True, META=META)
        if stats.sum_ptr is not None:
            acc *= (1.0 / tl.load(stats.sum_ptr + rows, mask=offs_t < t_limit, other=1.0))[:, None]
        _store_tile(_head(dq, b, h), acc * scales.scale, t_start, T, BLOCK=BLOCK_T, META=META)


@triton.jit
def _dkdv_step(dk, dv, k, v, q_head, do_head, stats, mask, walk, t, IS_CUT: tl.constexpr, META: tl.constexpr):
    """dk += dS^T Q and dv += (1 - p) (P o Z)^T dO over the queries t .. t + BLOCK_T."""
    PRECISION: tl.constexpr = META.PRECISION
    limit = walk.limit
    offs_t = t + tl.arange(0, META.BLOCK_T)
    q = _load_tile(q_head, t, limit, BLOCK=META.BLOCK_T, HAS_MASK=IS_CUT, META=META)
    do = _load_tile(do_head, t, limit, BLOCK=META.BLOCK_T, HAS_MASK=IS_CUT, META=META)
    if IS_CUT:
        # Past the last row, exp2(x - inf) is 0.
        m = tl.load(stats.max_ptr + offs_t, mask=offs_t < limit, other=float("inf"))
        delta = tl.load(stats.delta_ptr + offs_t, mask=offs_t < limit, other=0.0)
    else:
        m = tl.load(stats.max_ptr + offs_t)
        delta = tl.load(stats.delta_ptr + offs_t)
    x_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_S, BLOCK_T)
    p_t = tl.exp2(x_t * walk.scale_log2 - m[None, :])
    if stats.sum_ptr is not None:
        p_t = p_t * (1.0 / tl.load(stats.sum_ptr + offs_t, mask=offs_t < limit, other=1.0))[None, :]
    if IS_CUT:
        allowed = walk.offs[:, None] <= offs_t[None, :] + walk.offset
        if mask.doc_start_ptr is not None:
            doc_start = tl.load(mask.doc_start_ptr + offs_t, mask=offs_t < limit, other=0)
            allowed = allowed & (walk.offs[:, None] >= doc_start[None, :])
        p_t = tl.where(allowed, p_t, 0.0)
    dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    kept_t = p_t
    if mask.seed_ptr is not None:
        keep = tl.trans(_keep_mask(mask.seed_ptr, walk.bh, t, walk.start, walk.threshold, META=META))
        kept_t = tl.where(keep, p_t, 0.0)
        dp_t = tl.where(keep, dp_t * walk.keep_scale, 0.0)
    dv = tl.dot(kept_t.to(do.dtype), do, dv, input_precision=PRECISION)
    ds_t = p_t * (dp_t - delta[None, :])
    dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["H", "T", "S", "threshold"])
def _attention_bwd_dkdv_kernel(inputs, do, dk, dv, stats, mask, H, T, S, threshold, scales, META: tl.constexpr):
    """Compute dK and dV for one tile of keys of one head."""
    BLOCK_T: tl.constexpr = META.BLOCK_T
    BLOCK_S: tl.constexpr = META.BLOCK_S
    BLOCK_D: tl.constexpr = META.BLOCK_D
    bh, rank = _place(tl.cdiv(S, BLOCK_S))
    s_start = rank * BLOCK_S  # the first keys are seen by the most queries
    b, h = bh // H, bh % H
    offset = S - T
    t_limit, s_limit = _limits(mask, b, T, S)
    dk_acc = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    if s_start < s_limit:
        s_end = tl.minimum(s_start + BLOCK_S, s_limit)
        offs_s = s_start + tl.arange(0, BLOCK_S)
        k = _load_tile(_head(inputs.k, b, h), s_start, s_limit, BLOCK=BLOCK_S, HAS_MASK=True, META=META)
        v = _load_tile(_head(inputs.v, b, h), s_start, s_limit, BLOCK=BLOCK_S, HAS_MASK=True, META=META)
        q_head, do_head = _head(inputs.q, b, h), _head(do, b, h)
        rows = bh.to(tl.int64) * T
        of_head = _Statistics(
            max_ptr=stats.max_ptr + rows,
            sum_ptr=stats.sum_ptr + rows if stats.sum_ptr is not None else None,
            delta_ptr=stats.delta_ptr + rows,
        )
        scale_log2 = scales.scale * LOG2_E
        walk = _Walk(b, h, bh, s_start, offs_s, t_limit, offset, None, scale_log2, threshold, scales.keep_scale)
        whole_start, whole_end, cut_start, num_lead, num_cut = _query_range(
            s_start, s_end, t_limit, offset, mask.doc_end_ptr, BLOCK_T=BLOCK_T
        )
        for i in range(num_cut):
            t = tl.where(i < num_lead, cut_start + i * BLOCK_T, whole_end + (i - num_lead) * BLOCK_T)
            dk_acc, dv_acc = _dkdv_step(
                dk_acc, dv_acc, k, v, q_head, do_head, of_head, mask, walk, t, IS_CUT=True, META=META
            )
        for t in range(whole_start, whole_end, BLOCK_T):
            dk_acc, dv_acc = _dkdv_step(
                dk_acc, dv_acc, k, v, q_head, do_head, of_head, mask, walk, t, IS_CUT=False, META=META
            )
    dk_head, dv_head = _head(dk, b, h), _head(dv, b, h)
    _store_tile(dk_head, dk_acc * scales.scale, s_start, S, BLOCK=BLOCK_S, META=META)
    _store_tile(dv_head, dv_acc * scales.keep_scale, s_start, S, BLOCK=BLOCK_S, META=META)


# -- launchers ----------------------------------------------------------------------------------------------------


class Heads(NamedTuple):
    """The matrices (B, H, T, D) of all heads in memory: where they begin, shape and strides. The last stride is 1."""

    data: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Heads:
        return cls(x, tuple(x.shape), x.stride()[:3])

    @classmethod
    def packed(cls, qkv: Tensor, num_heads: int) -> tuple[Heads, Heads, Heads]:
        """The queries, keys and values of packed QKV (B, T, 3C), in place."""
        B, T, width = qkv.shape
        C = width // 3
        shape, strides = (B, num_heads, T, C // num_heads), (qkv.stride(0), C // num_heads, qkv.stride(1))
        return cls(qkv, shape, strides), cls(qkv[..., C:], shape, strides), cls(qkv[..., 2 * C :], shape, strides)

    @classmethod
    def merged(cls, x: Tensor, num_heads: int) -> Heads:
        """The heads that lie side by side in a tensor (B, T, C)."""
        B, T, C = x.shape
        return cls(x, (B, num_heads, T, C // num_heads), (x.stride(0), C // num_heads, x.stride(1)))

    def argument(self) -> _Heads:
        return _Heads(self.data, *self.strides)

    def descriptor(self, block: int, block_d: int) -> Any:
        """A descriptor for the tensor memory accelerator, (B, H, T, D) or (B, T, H, D).

        The accelerator gives zeros outside the shape. CUDA's manual requires that every stride is a multiple of the
        next one and spans its dimension.
        """
        shape, strides, is_by_tokens = self._falling_strides()
        block_shape = [1, block, 1, block_d] if is_by_tokens else [1, 1, block, block_d]
        return TensorDescriptor(self.data, shape, strides, block_shape)

    def fits_descriptor(self) -> bool:
        shape, strides, _ = self._falling_strides()
        is_aligned = all(stride * self.data.element_size() % 16 == 0 for stride in strides[:-1])
        falls = all(
            inner > 0 and outer % inner == 0 and outer >= size * inner
            for outer, inner, size in zip(strides, strides[1:], shape[1:], strict=False)
        )
        return self.data.data_ptr() % 16 == 0 and is_aligned and falls

    def _falling_strides(self) -> tuple[list[int], list[int], bool]:
        """Shape and strides, the larger of the head and token strides first, and whether that is the token stride."""
        is_by_tokens = self.strides[2] > self.strides[1]
        order = (0, 2, 1, 3) if is_by_tokens else (0, 1, 2, 3)
        shape, strides = ([of[dim] for dim in order] for of in (self.shape, (*self.strides, 1)))
        for dim in (2, 1, 0):
            if shape[dim] == 1:  # its stride is never used
                strides[dim] = shape[dim + 1] * strides[dim + 1]
        return shape, strides, is_by_tokens


class Masking(NamedTuple):
    """The mask apart from causality. All tensors are on the inputs' device, and only the device reads them.

    lengths: (B,) int32. Tokens from there on are padding.
    doc_start, doc_end: (T,) int32, where each token's document starts and ends.
    seed: (2,) int64, dropout's seed and offset; None without dropout.
    """

    lengths: Tensor | None = None
    doc_start: Tensor | None = None
    doc_end: Tensor | None = None
    seed: Tensor | None = None
    dropout_p: float = 0.0


def attention_forward(
    q: Heads, k: Heads, v: Heads, out: Heads, row_max: Tensor, row_sum: Tensor, masking: Masking, scale: float
) -> None:
    """Write O to `out`, and m and l of each row to `row_max` and `row_sum` (B, H, T).

    For 16-bit inputs `row_max` gets m + log2 l, and `row_sum` is not used.
    """
    B, H, T, D = q.shape
    if B * H * T == 0:
        return
    block_d = _block_d(D)
    row = _row("forward", q.data, block_d, masking)
    use_tma = row.use_tma and masking.lengths is None and k.fits_descriptor() and v.fits_descriptor()
    launch_kernel(
        q.data.device,
        _attention_fwd_kernel,
        (launch.ceil_div(T, row.block_t) * B * H,),
        q=q.argument(),
        k=k.descriptor(row.block_s, block_d) if use_tma else k.argument(),
        v=v.descriptor(row.block_s, block_d) if use_tma else v.argument(),
        o=out.argument(),
        stats=_Statistics(row_max, row_sum if q.data.dtype == torch.float32 else None),
        **_common(q, k, masking, scale),
        META=_meta(q, row, use_tma),
        **row.options(),
    )


def attention_backward(
    dout: Heads,
    q: Heads,
    k: Heads,
    v: Heads,
    out: Heads,
    row_max: Tensor,
    row_sum: Tensor,
    dq: Heads | None,
    dkdv: tuple[Heads, Heads] | None,
    masking: Masking,
    scale: float,
) -> None:
    """Write the gradients that are not None: dq, and the pair dk and dv."""
    B, H, T, D = q.shape
    S = k.shape[2]
    block_d = _block_d(D)
    inputs = _Inputs(q.argument(), k.argument(), v.argument())
    common = _common(q, k, masking, scale)
    delta = torch.empty_like(row_max)
    stats = _Statistics(row_max, row_sum if q.data.dtype == torch.float32 else None, delta)
    if B * H * T:
        row = _row("dq", q.data, block_d, masking)
        launch_kernel(
            q.data.device,
            _attention_bwd_dq_kernel,
            (launch.ceil_div(T, row.block_t) * B * H,),
            inputs=inputs,
            o=out.argument(),
            do=dout.argument(),
            dq=None if dq is None else dq.argument(),
            stats=stats,
            **common,
            META=_meta(q, row),
            **row.options(),
        )
    if dkdv is not None and B * H * S:
        dk, dv = dkdv
        row = _row("dkdv", q.data, block_d, masking)
        launch_kernel(
            q.data.device,
            _attention_bwd_dkdv_kernel,
            (launch.ceil_div(S, row.block_s) * B * H,),
            inputs=inputs,
            do=dout.argument(),
            dk=dk.argument(),
            dv=dv.argument(),
            stats=stats,
            **common,
            META=_meta(q, row),
            **row.options(),
        )


def _block_d(head_size: int) -> int:
    return max(16, launch.next_power_of_2(head_size))


def _precision(x: Tensor) -> str:
    """The precision of the products, for float32 as in PyTorch's own operators."""
    return float32_precision(x.device) if x.dtype == torch.float32 else "ieee"


def _row(kernel: str, x: Tensor, block_d: int, masking: Masking) -> launch.AttentionRow:
    return launch.attention_row(
        kernel,
        launch.architecture(x.device),
        "half" if x.element_size() == 2 else _precision(x),
        block_d,
        has_dropout=masking.seed is not None,
        has_documents=masking.doc_start is not None,
    )


def _common(q: Heads, k: Heads, masking: Masking, scale: float) -> dict[str, Any]:
    """The arguments that all three kernels take."""
    p = masking.dropout_p
    return {
        "mask": _Mask(masking.lengths, masking.doc_start, masking.doc_end, masking.seed),
        "H": q.shape[1],
        "T": q.shape[2],
        "S": k.shape[2],
        "threshold": round(p * 2**16),
        "scales": _Scales(scale, 1.0 / (1.0 - p)),
    }


def _meta(q: Heads, row: launch.AttentionRow, use_tma: bool = False) -> _Meta:
    D = q.shape[3]
    return _Meta(D, _block_d(D), row.block_t, row.block_s, use_tma, _precision(q.data))


# -- what `ops` calls ---------------------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, lengths: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The output (B, H, T, D) and, with `return_lse`, the log-sum-exp (B, H, T)."""
    seed, dropout_p = _dropout(options, q.device)
    out, *stats = attention_op(q, k, v, lengths, None, None, seed, dropout_p, options.scale)
    return out, _lse(*stats) if return_lse else None


def attention_packed(
    qkv: Tensor,
    num_heads: int,
    options: AttentionOptions,
    lengths: Tensor | None,
    documents: Documents | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output (B, T, C) and, with `return_lse`, the log-sum-exp (B, H, T)."""
    seed, dropout_p = _dropout(options, qkv.device)
    starts, ends = None, None
    if documents is not None:
        lengths, starts, ends = documents.cu_seqlens[-1:], documents.starts, documents.ends
    out, *stats = attention_packed_op(qkv, num_heads, lengths, starts, ends, seed, dropout_p, options.scale)
    return out, _lse(*stats) if return_lse else None


def _dropout(options: AttentionOptions, device: torch.device) -> tuple[Tensor | None, float]:
    """The seed and offset (2,) of this call's dropout, or None, and p.

    Without a given seed they are drawn on the device, so that each replay of a CUDA graph draws new ones.
    """
    if options.dropout_p == 0.0:
        return None, 0.0
    seed = options.dropout_seed
    return torch.randint(2**63 - 1, (2,), device=device) if seed is None else seed, options.dropout_p


def _lse(row_max: Tensor, row_sum: Tensor) -> Tensor:
    lse = math.log(2) * row_max
    return lse + row_sum.log() if row_sum.numel() else lse


# -- PyTorch operators --------------------------------------------------------------------------------------------
# Outputs and gradients of (B, H, T, D) inputs are stored as (B, T, H, D), so that heads can be merged without a copy.


def _new_heads(x: Tensor) -> Tensor:
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


def _new_output(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _new_heads(q), *_new_stats(q, q.shape[:3])


def _new_stats(q: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    row_sum = q.new_empty(rows if q.dtype == torch.float32 else (0,), dtype=torch.float32)
    return q.new_empty(rows, dtype=torch.float32), row_sum


def _new_gradients(q: Tensor, k: Tensor, need_dq: bool, need_dkdv: bool) -> tuple[Tensor, Tensor, Tensor]:
    """New tensors for the gradients; those that are not needed are empty."""
    dq = _new_heads(q) if need_dq else q.new_empty(0)
    return (dq, *((_new_heads(k), _new_heads(k)) if need_dkdv else (q.new_empty(0), q.new_empty(0))))


def _new_packed_output(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, width = qkv.shape
    return qkv.new_empty((B, T, width // 3)), *_new_stats(qkv, (B, num_heads, T))


def _attention(q, k, v, lengths, doc_start, doc_end, seed, dropout_p, scale):
    out, row_max, row_sum = _new_output(q)
    masking = Masking(lengths, doc_start, doc_end, seed, dropout_p)
    attention_forward(Heads.of(q), Heads.of(k), Heads.of(v), Heads.of(out), row_max, row_sum, masking, scale)
    return out, row_max, row_sum


def _attention_backward(
    dout, q, k, v, out, row_max, row_sum, lengths, doc_start, doc_end, seed, dropout_p, scale, need_dq, need_dkdv
):
    dq, dk, dv = _new_gradients(q, k, need_dq, need_dkdv)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    attention_backward(
        Heads.of(dout),
        Heads.of(q),
        Heads.of(k),
        Heads.of(v),
        Heads.of(out),
        row_max,
        row_sum,
        Heads.of(dq) if need_dq else None,
        (Heads.of(dk), Heads.of(dv)) if need_dkdv else None,
        Masking(lengths, doc_start, doc_end, seed, dropout_p),
        scale,
    )
    return dq, dk, dv


def _attention_packed(qkv, num_heads, lengths, doc_start, doc_end, seed, dropout_p, scale):
    out, row_max, row_sum = _new_packed_output(qkv, num_heads)
    masking = Masking(lengths, doc_start, doc_end, seed, dropout_p)
    attention_forward(*Heads.packed(qkv, num_heads), Heads.merged(out, num_heads), row_max, row_sum, masking, scale)
    return out, row_max, row_sum


def _attention_packed_backward(
    dout, qkv, out, row_max, row_sum, num_heads, lengths, doc_start, doc_end, seed, dropout_p, scale
):
    dqkv = qkv.new_empty(qkv.shape)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dq, *dkdv = Heads.packed(dqkv, num_heads)
    attention_backward(
        Heads.merged(dout, num_heads),
        *Heads.packed(qkv, num_heads),
        Heads.merged(out, num_heads),
        row_max,
        row_sum,
        dq,
        (dkdv[0], dkdv[1]),
        Masking(lengths, doc_start, doc_end, seed, dropout_p),
        scale,
    )
    return dqkv


def _fake_attention(q, *rest):
    return _new_output(q)


def _fake_attention_backward(dout, q, k, v, *rest):
    return _new_gradients(q, k, *rest[-2:])


def _fake_attention_packed(qkv, num_heads, *rest):
    return _new_packed_output(qkv, num_heads)


def _fake_attention_packed_backward(dout, qkv, *rest):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    q, k, v, lengths, doc_start, doc_end, seed, *ctx.options = inputs
    ctx.fallback_size = fallback_size()
    ctx.save_for_backward(q, k, v, *output, lengths, doc_start, doc_end, seed)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    need_q, *need_kv = ctx.needs_input_grad[:3]
    if dout is None:
        return (None,) * 9
    try:
        grads = attention_backward_op(dout, *ctx.saved_tensors, *ctx.options, need_q, any(need_kv))
    except KernelFailedError as error:
        grads = _plain_gradients(ctx, error, dout)
    needed = zip(grads, ctx.needs_input_grad, strict=False)
    return *(grad if need else None for grad, need in needed), *(None,) * 6


def _plain_gradients(ctx, error, dout):
    *qkv, _, _, _, lengths, _, _, seed = ctx.saved_tensors
    dropout_p, scale = ctx.options
    options, name = AttentionOptions(scale, dropout_p, seed), "causal_attention"

    def attend(q, k, v):
        return implementation(name, "torch")(q, k, v, options, lengths, False)[0]

    return gradients(name, ctx.fallback_size, error, attend, qkv, ctx.needs_input_grad[:3], dout)


def _save_packed(ctx, inputs, output):
    ctx.fallback_size = fallback_size()
    qkv, ctx.num_heads, lengths, doc_start, doc_end, seed, *ctx.options = inputs
    ctx.save_for_backward(qkv, *output, lengths, doc_start, doc_end, seed)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _packed_backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 8
    qkv, out, row_max, row_sum, *masks = ctx.saved_tensors
    try:
        dqkv = attention_packed_backward_op(dout, qkv, out, row_max, row_sum, ctx.num_heads, *masks, *ctx.options)
    except KernelFailedError as error:
        dqkv = _plain_packed_gradient(ctx, error, dout)
    return dqkv, *(None,) * 7


def _plain_packed_gradient(ctx, error, dout):
    qkv, _, _, _, lengths, doc_start, doc_end, seed = ctx.saved_tensors
    dropout_p, scale = ctx.options
    options, documents, name = AttentionOptions(scale, dropout_p, seed), None, "causal_attention_packed"
    if doc_start is not None:
        starts = doc_start[: int(lengths)].unique_consecutive()
        documents, lengths = Documents(torch.cat([starts, lengths]), doc_start, doc_end), None

    def attend(qkv):
        return implementation(name, "torch")(qkv, ctx.num_heads, options, lengths, documents, False)[0]

    return gradients(name, ctx.fallback_size, error, attend, [qkv], [True], dout)[0]


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "causal_attention: the Triton backend has no second derivatives; use backend='torch' for a double backward"
    )


_MASKING = "Tensor? lengths, Tensor? doc_start, Tensor? doc_end, Tensor? seed, float dropout_p"
attention_op = define_operator(
    "fastgpt2::attention",
    f"(Tensor q, Tensor k, Tensor v, {_MASKING}, float scale) -> (Tensor out, Tensor row_max, Tensor row_sum)",
    _attention,
    _fake_attention,
    _backward,
    _save,
)
attention_backward_op = define_operator(
    "fastgpt2::attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor row_max, Tensor row_sum, {_MASKING}, float scale, "
    "bool need_dq, bool need_dkdv) -> (Tensor dq, Tensor dk, Tensor dv)",
    _attention_backward,
    _fake_attention_backward,
    _no_second_derivative,
)
attention_packed_op = define_operator(
    "fastgpt2::attention_packed",
    f"(Tensor qkv, int num_heads, {_MASKING}, float scale) -> (Tensor out, Tensor row_max, Tensor row_sum)",
    _attention_packed,
    _fake_attention_packed,
    _packed_backward,
    _save_packed,
)
attention_packed_backward_op = define_operator(
    "fastgpt2::attention_packed_backward",
    f"(Tensor dout, Tensor qkv, Tensor out, Tensor row_max, Tensor row_sum, int num_heads, {_MASKING}, "
    "float scale) -> Tensor dqkv",
    _attention_packed_backward,
    _fake_attention_packed_backward,
    _no_second_derivative,
)
