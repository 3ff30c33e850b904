"""Linear layers for the few rows of decoding: y = epilogue(prologue(x) W^T). The weight is read once.

    prologue   none, LayerNorm (two-pass variance, float32), or the sum over the splits of `attention.py`
    epilogue   scale of an int8 weight's row, bias, activation, residual

W (out, in) is contiguous along `in`, as in `nn.Linear`. A program owns BLOCK_N outputs of BLOCK_R rows over all of K.
So no sum crosses two programs, and a row's result is bitwise the same whatever other rows are in the batch. The order
of summing is the same in every launch row: each of SPLIT_K warps takes a contiguous share of K, in steps of 16, and
LayerNorm's sums run over tiles of the same shape along K.

With few rows, reading the weight is the only limit. The weights of the first step are loaded before the prologue
begins, and with programmatic dependent launch (PDL) before the previous kernel has ended. The weight is the 16-row
operand of the tensor cores, and the rows of x are the 8-column one. So up to 8 rows need no padding beyond 8.

More rows take larger tiles of the same tensor-core products. By estimate, PyTorch's matmul would be faster beyond some
32 rows, and earlier for a vocabulary's head: it has larger instructions and reads x less often. It is not used, because
its order of summing depends on the number of rows. It also cannot fuse LayerNorm or the sum over the splits, so a step
would take more kernel launches.

Dimension key: R rows, K inputs, N outputs, C width, H heads, D head size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.arguments import Matrix
from fastgpt2_kernels.triton.decode.attention import Parts, Rows
from fastgpt2_kernels.triton.devices import float32_precision, launch_kernel
from fastgpt2_kernels.triton.layers.activation import _activation
from fastgpt2_kernels.types import LayerNormWeights, product_dtype

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Splits(NamedTuple):
    """The parts of attention's splits, (N, H, splits, D) and (N, H, splits), and their rows. Combined, they are x."""

    out_ptr: Any
    max_ptr: Any
    sum_ptr: Any
    lengths_ptr: Any
    slots_ptr: Any
    counts_ptr: Any
    H: Any
    MAX_SPLITS: Any


class _Norm(NamedTuple):
    weight_ptr: Any
    bias_ptr: Any
    eps: Any


class _Sizes(NamedTuple):
    R: Any
    N: Any
    K: Any


class _Meta(NamedTuple):
    PROLOGUE: str  # "none", "layer_norm" or "combine"
    ACTIVATION: str
    USE_PDL: bool
    PRODUCT_TYPE: tl.dtype
    PRECISION: str
    D: int
    GRAIN: int
    SPLIT_S: int
    BLOCK_R: int
    BLOCK_N: int
    BLOCK_K: int
    SHARES: int
    STEPS: int


@triton.jit
def _load_attended(splits, offs_r, mask_r, first_k, mask_k, META: tl.constexpr):
    """The output of attention (SHARES, BLOCK_K, BLOCK_R) in float32, combined from the splits' parts.

    GRAIN neighbouring columns belong to one head and share their weights, so there is one exponential per grain.
    """
    slot = tl.load(splits.slots_ptr + offs_r, mask=mask_r, other=0) if splits.slots_ptr is not None else offs_r
    past = tl.load(splits.lengths_ptr + slot, mask=mask_r, other=0)
    # A row that does not fit has NaN in its first split.
    num_splits = tl.where(mask_r, tl.minimum(past // META.SPLIT_S + 1, splits.MAX_SPLITS), 0)
    if splits.counts_ptr is not None:
        num_splits = tl.where(tl.load(splits.counts_ptr + offs_r, mask=mask_r, other=0) > 0, num_splits, 0)
    SHARES: tl.constexpr = META.SHARES
    BLOCK_R: tl.constexpr = META.BLOCK_R
    BLOCK_K: tl.constexpr = META.BLOCK_K
    GRAIN: tl.constexpr = META.GRAIN
    GRAINS: tl.constexpr = BLOCK_K // GRAIN
    grain_k = first_k + tl.arange(0, GRAINS)[None, :] * GRAIN  # (SHARES, GRAINS): columns c = h D + d
    h, d = grain_k // META.D, grain_k % META.D
    head = (offs_r.to(tl.int64) * splits.H)[None, None, :] + h[:, :, None]
    is_column = (tl.arange(0, GRAINS)[None, :] * GRAIN < mask_k)[:, :, None] & (h < splits.H)[:, :, None]
    columns = d[:, :, None, None] + tl.arange(0, GRAIN)[None, None, :, None]
    m = tl.full((SHARES, GRAINS, BLOCK_R), float("-inf"), tl.float32)
    l = tl.zeros((SHARES, GRAINS, BLOCK_R), tl.float32)
    acc = tl.zeros((SHARES, GRAINS, GRAIN, BLOCK_R), tl.float32)
    for i in range(0, tl.max(num_splits)):
        mask = is_column & (i < num_splits)[None, None, :]
        at = head * splits.MAX_SPLITS + i
        m_i = tl.load(splits.max_ptr + at, mask=mask, other=float("-inf"))
        l_i = tl.load(splits.sum_ptr + at, mask=mask, other=0.0)
        out_i = tl.load(splits.out_ptr + at[:, :, None, :] * META.D + columns, mask=mask[:, :, None, :], other=0.0)
        m_new = tl.maximum(m, m_i)
        m_used = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - (-inf) is NaN
        alpha, beta = tl.exp2(m - m_used), tl.exp2(m_i - m_used)
        acc = acc * alpha[:, :, None, :] + out_i * beta[:, :, None, :]
        l = l * alpha + l_i * beta
        m = m_new
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, :, None, :]
    return tl.reshape(acc, (SHARES, BLOCK_K, BLOCK_R))


@triton.jit
def _sum_eight(x):
    """Sum (..., 2, 2, 2) -> (...) in pairs, so that no layout can change the order."""
    for _ in tl.static_range(3):
        even, odd = tl.split(x)
        x = even + odd
    return x


@triton.jit
def _sum_shares(acc, SHARES: tl.constexpr):
    """Sum acc (SHARES, BLOCK_N, BLOCK_R) over the shares -> (BLOCK_R, BLOCK_N)."""
    tl.static_assert(SHARES == 8)
    return _sum_eight(tl.reshape(acc, (2, 2, 2, acc.shape[1], acc.shape[2])).permute(4, 3, 0, 1, 2))


@triton.jit
def _sum_inputs(x, SHARES: tl.constexpr):
    """Sum x (SHARES, BLOCK_K, BLOCK_R) -> (BLOCK_R,). Along BLOCK_K the tile's layout decides the order."""
    tl.static_assert(SHARES == 8)
    return _sum_eight(tl.reshape(tl.sum(x, 1), (2, 2, 2, x.shape[2])).permute(3, 0, 1, 2))


@triton.jit
def _linear_decode_kernel(x, weight, out, residual, bias_ptr, scale_ptr, norm, splits, sizes, META: tl.constexpr):
    """Compute BLOCK_N outputs of BLOCK_R rows; grid (row blocks, output blocks). A share of K has STEPS blocks.

    Either x or splits is given; the other one is None. residual, bias_ptr, scale_ptr and norm may be None.
    """
    K = sizes.K
    ACTIVATION: tl.constexpr = META.ACTIVATION
    SHARES: tl.constexpr = META.SHARES
    BLOCK_R: tl.constexpr = META.BLOCK_R
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_K: tl.constexpr = META.BLOCK_K
    STEPS: tl.constexpr = META.STEPS
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_r, mask_n = offs_r < sizes.R, offs_n < sizes.N
    # A share is a multiple of 16 even where K is not.
    share = (K + SHARES * 16 - 1) // (SHARES * 16) * 16
    first_k = tl.arange(0, SHARES)[:, None] * share
    share_end = tl.minimum(share, K - first_k)  # (SHARES, 1), how much of each share lies within K
    offs_b = tl.arange(0, BLOCK_K)[None, :]
    mask_k = offs_b < share_end
    w_ptrs = weight.ptr + offs_n.to(tl.int64)[None, :, None] * weight.stride + (first_k + offs_b)[:, None, :]
    w = tl.load(w_ptrs, mask=mask_k[:, None, :] & mask_n[None, :, None], other=0.0)
    if META.USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()

    if META.PROLOGUE == "combine":
        x_k = _load_attended(splits, offs_r, mask_r, first_k, mask_k=share_end, META=META)
    else:
        x_ptrs = x.ptr + offs_r.to(tl.int64)[None, None, :] * x.stride + (first_k + offs_b)[:, :, None]
        x_k = tl.load(x_ptrs, mask=mask_k[:, :, None] & mask_r[None, None, :], other=0.0)
    if META.PROLOGUE == "layer_norm":
        total = x_k.to(tl.float32)
        for i in range(1, STEPS):
            mask = (i * BLOCK_K + offs_b < share_end)[:, :, None] & mask_r[None, None, :]
            total += tl.load(x_ptrs + i * BLOCK_K, mask=mask, other=0.0).to(tl.float32)
        mean = (_sum_inputs(total, SHARES) / K)[None, None, :]
        centred = tl.where(mask_k[:, :, None], x_k.to(tl.float32) - mean, 0.0)
        total = centred * centred
        for i in range(1, STEPS):
            mask = (i * BLOCK_K + offs_b < share_end)[:, :, None]
            x_i = tl.load(x_ptrs + i * BLOCK_K, mask=mask & mask_r[None, None, :], other=0.0).to(tl.float32)
            centred = tl.where(mask, x_i - mean, 0.0)
            total += centred * centred
        rstd = (1.0 / tl.sqrt_rn(_sum_inputs(total, SHARES) / K + norm.eps))[None, None, :]

    acc = tl.zeros((SHARES, BLOCK_N, BLOCK_R), tl.float32)
    for i in range(STEPS):
        if STEPS > 1:  # load the next step's operands while this step multiplies
            next_k = (i + 1) * BLOCK_K
            mask_next = next_k + offs_b < share_end
            w_next = tl.load(w_ptrs + next_k, mask=mask_next[:, None, :] & mask_n[None, :, None], other=0.0)
            if META.PROLOGUE == "combine":
                x_next = _load_attended(splits, offs_r, mask_r, first_k + next_k, mask_k=share_end - next_k, META=META)
            else:
                mask = mask_next[:, :, None] & mask_r[None, None, :]
                x_next = tl.load(x_ptrs + next_k, mask=mask, other=0.0)
        operand = x_k
        if META.PROLOGUE == "layer_norm":
            offs_k = i * BLOCK_K + offs_b
            mask = offs_k < share_end
            g = tl.load(norm.weight_ptr + first_k + offs_k, mask=mask, other=0.0).to(tl.float32)[:, :, None]
            b = tl.load(norm.bias_ptr + first_k + offs_k, mask=mask, other=0.0).to(tl.float32)[:, :, None]
            operand = (x_k.to(tl.float32) - mean) * rstd * g + b
        acc = tl.dot(w.to(META.PRODUCT_TYPE), operand.to(META.PRODUCT_TYPE), acc, input_precision=META.PRECISION)
        if STEPS > 1:
            w, x_k = w_next, x_next

    y = _sum_shares(acc, SHARES)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "linear":
        y = _activation(y, ACTIVATION)
    mask = mask_r[:, None] & mask_n[None, :]
    rows = offs_r.to(tl.int64)[:, None]
    if residual is not None:
        y += tl.load(residual.ptr + rows * residual.stride + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out.ptr + rows * out.stride + offs_n[None, :], y.to(out.ptr.dtype.element_ty), mask=mask)


# -- launcher -----------------------------------------------------------------------------------------------------


class Attended(NamedTuple):
    """Takes the place of x: the parts that `decode_splits` wrote, with one new token per row. x is the combined parts.

    split_s: the number of keys in a split.
    """

    parts: Parts
    rows: Rows
    split_s: int


def linear_decode_out(
    x: Tensor | Attended,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
    layer_norm: LayerNormWeights | None = None,
    activation: str = "linear",
    residual: Tensor | None = None,
    use_pdl: bool = False,
) -> None:
    """Write epilogue(prologue(x) weight^T) to out (R, N), for x (R, K) and weight (N, K) whose last strides are 1.

    An int8 weight has scales (N,) in float32. `types.product_dtype` gives the dtype of the products. `residual` may be
    `out`.
    """
    N, K = weight.shape
    R = out.shape[0]
    if R == 0 or N == 0:
        return
    prologue, splits, head_size, split_s = "none" if layer_norm is None else "layer_norm", None, 16, 1
    source = x if isinstance(x, Tensor) else x.parts.out
    if isinstance(x, Attended):
        prologue, split_s = "combine", x.split_s
        _, heads, num_splits, head_size = source.shape
        splits = _Splits(*x.parts, x.rows.lengths, x.rows.slots, x.rows.counts, H=heads, MAX_SPLITS=num_splits)
    product = product_dtype(source, weight, bias, layer_norm)
    row = launch.linear_decode_row(R, N, K, product.itemsize, prologue, launch.architecture(weight.device))
    meta = _Meta(
        PROLOGUE=prologue,
        ACTIVATION=activation,
        USE_PDL=use_pdl,
        PRODUCT_TYPE=_DTYPES[product],
        PRECISION=float32_precision(weight.device) if product == torch.float32 else "ieee",
        D=head_size,
        GRAIN=math.gcd(16, head_size),
        SPLIT_S=split_s,
        BLOCK_R=row.block_r,
        BLOCK_N=row.block_n,
        BLOCK_K=row.block_k,
        SHARES=launch.SPLIT_K,
        STEPS=launch.ceil_div(launch.linear_decode_share(K), row.block_k),
    )
    options: dict[str, Any] = {"launch_pdl": True} if use_pdl else {}
    launch_kernel(
        weight.device,
        _linear_decode_kernel,
        (launch.ceil_div(R, row.block_r), launch.ceil_div(N, row.block_n)),
        x=None if isinstance(x, Attended) else Matrix.of(x),
        weight=Matrix.of(weight),
        out=Matrix.of(out),
        residual=Matrix.of(residual),
        bias_ptr=bias,
        scale_ptr=weight_scale,
        norm=None if layer_norm is None else _Norm(*layer_norm),
        splits=splits,
        sizes=_Sizes(R, N, K),
        META=meta,
        num_warps=row.num_warps,
        num_stages=1,
        **launch.OPTIONS,
        **options,
    )


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
    """activation(LN(x) weight^T + bias) + residual, for x (R, K) and weight (N, K) -> (R, N)."""
    norm = (None, None, 0.0) if layer_norm is None else layer_norm
    name = launch.ACTIVATIONS.get(activation, activation)
    return torch.ops.fastgpt2.linear_decode(x, weight, bias, weight_scale, *norm, name, residual, out_dtype)


# -- registration -------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastgpt2::linear_decode", mutates_args=())
def linear_decode_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`linear_decode_out` with a new tensor (R, N) for the result."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=out_dtype, device=x.device)
    layer_norm = None if ln_weight is None or ln_bias is None else LayerNormWeights(ln_weight, ln_bias, eps)
    linear_decode_out(
        x,
        weight,
        out,
        bias=bias,
        weight_scale=weight_scale,
        layer_norm=layer_norm,
        activation=activation,
        residual=residual,
    )
    return out


@linear_decode_op.register_fake
def _(x, weight, bias, weight_scale, ln_weight, ln_bias, eps, activation, residual, out_dtype):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
