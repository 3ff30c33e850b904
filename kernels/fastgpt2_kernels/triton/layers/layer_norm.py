"""LayerNorm over the last dimension (Ba et al. 2016), optionally after adding a residual.

For a row s = x (+ residual) of C numbers, with biased variance:

    y = (s - mean) rstd weight + bias,   rstd = 1 / sqrt(var + eps)

and for the gradients, with h = (s - mean) rstd, g = weight dy and means over the row:

    ds = rstd (g - mean(g) - h mean(g h)) + ds_after,   dweight = sum over rows of dy h,   dbias = sum over rows of dy

`ds_after` is the gradient that reaches s directly, past this LayerNorm. x and residual share ds.

Everything is computed in float32. The variance takes two passes over the row in registers: first the differences to the
mean, then their squares. The mean is rounded. So the mean of the differences, which is what the rounding left, is
subtracted too. Thus a mean far larger than the spread costs no accuracy. Saved for backward are s (or x) and, for each
row, the mean, what its rounding left, and rstd. These are 12 bytes; computing them again would take three more
reductions, each waiting for the one before.

In backward a fixed number of programs loops over the rows. Each sums its share of dweight and dbias in registers and
writes one partial row. `partial_sums` adds these. Rows too long for the registers are processed in blocks.

Dimension key: N = B * T rows, C width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2_kernels.backends import KernelFailedError, fallback_size, implementation
from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.arguments import Batch
from fastgpt2_kernels.triton.devices import launch_kernel
from fastgpt2_kernels.triton.fallback import gradients
from fastgpt2_kernels.triton.layers.partial_sums import empty_unless, row_alignment, sum_partials
from fastgpt2_kernels.triton.operators import define_operator


class _Statistics(NamedTuple):
    """The statistics of every row: the mean, what its rounding left, and 1 / sqrt(var + eps)."""

    mean_ptr: Any
    left_ptr: Any
    rstd_ptr: Any


class _ForwardMeta(NamedTuple):
    C: int
    ALIGN: int
    BLOCK_C: int


class _BackwardMeta(NamedTuple):
    C: int
    NEEDS_DS: bool
    NEEDS_DW: bool
    NEEDS_DB: bool
    ALIGN: int
    BLOCK_C: int


@triton.jit
def _row(x, n, T, ALIGN: tl.constexpr):
    """A pointer to the start of row n = b T + t."""
    n = tl.cast(n, tl.int64)
    return x.ptr + tl.multiple_of((n // T) * x.stride_b + (n % T) * x.stride_t, ALIGN)


@triton.jit
def _load_sum(x_row, residual_row, s_row, offs, mask):
    """s in float32: x, or x + residual, which is stored at s_row and rounded as it is stored."""
    s = tl.load(x_row + offs, mask=mask, other=0.0).to(tl.float32)
    if residual_row is not None:
        s += tl.load(residual_row + offs, mask=mask, other=0.0).to(tl.float32)
        rounded = s.to(s_row.dtype.element_ty)
        tl.store(s_row + offs, rounded, mask=mask)
        s = rounded.to(tl.float32)
    return s


@triton.jit(do_not_specialize=["N", "T"])
def _layer_norm_fwd_kernel(x, residual, weight_ptr, bias_ptr, y_ptr, s_ptr, stats, N, T, eps, META: tl.constexpr):
    """Process every num_programs-th row, each in registers. Weight and bias are loaded once.

    residual and s_ptr may be None.
    """
    C: tl.constexpr = META.C
    offs = tl.arange(0, META.BLOCK_C)
    mask = offs < C
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        x_row = _row(x, n, T, ALIGN=META.ALIGN)
        out = tl.cast(n, tl.int64) * C
        if residual is not None:
            s = _load_sum(x_row, _row(residual, n, T, ALIGN=META.ALIGN), s_ptr + out, offs, mask)
        else:
            s = _load_sum(x_row, None, None, offs, mask)
        mean = tl.sum(s, 0) / C
        d = tl.where(mask, s - mean, 0.0)
        left = tl.sum(d, 0) / C
        d = tl.where(mask, d - left, 0.0)
        rstd = tl.rsqrt(tl.sum(d * d, 0) / C + eps)
        y = d * rstd * weight + bias
        tl.store(y_ptr + out + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(stats.mean_ptr + n, mean)
        tl.store(stats.left_ptr + n, left)
        tl.store(stats.rstd_ptr + n, rstd)


@triton.jit(do_not_specialize=["N", "T"])
def _layer_norm_wide_fwd_kernel(x, residual, weight_ptr, bias_ptr, y_ptr, s_ptr, stats, N, T, eps, META: tl.constexpr):
    """Process one row in blocks, in three passes: mean, variance, result. The last two find it in the L2 cache."""
    C: tl.constexpr = META.C
    BLOCK_C: tl.constexpr = META.BLOCK_C
    n = tl.program_id(0)
    x_row = _row(x, n, T, ALIGN=META.ALIGN)
    out = tl.cast(n, tl.int64) * C
    residual_row, s_row = None, None
    if residual is not None:
        residual_row, s_row = _row(residual, n, T, ALIGN=META.ALIGN), s_ptr + out
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        offs = start + tl.arange(0, BLOCK_C)
        sums += _load_sum(x_row, residual_row, s_row, offs, offs < C)
    mean = tl.sum(sums, 0) / C
    # Each thread reads back what it wrote itself, because blocks have the same layout in all three loops.
    if residual is None:
        s_row = x_row
    sums = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        offs = start + tl.arange(0, BLOCK_C)
        s = tl.load(s_row + offs, mask=offs < C, other=0.0).to(tl.float32)
        d = tl.where(offs < C, s - mean, 0.0)
        sums += d
        squares += d * d
    left = tl.sum(sums, 0) / C  # a few rounding errors of the mean, so its square is small beside the variance
    rstd = tl.rsqrt(tl.maximum(tl.sum(squares, 0) / C - left * left, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)
    for start in range(0, C, BLOCK_C):
        offs = start + tl.arange(0, BLOCK_C)
        mask = offs < C
        s = tl.load(s_row + offs, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y = ((s - mean) - left) * rstd * weight + bias
        tl.store(y_ptr + out + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(stats.mean_ptr + n, mean)
    tl.store(stats.left_ptr + n, left)
    tl.store(stats.rstd_ptr + n, rstd)


@triton.jit(do_not_specialize=["N", "T"])
def _layer_norm_bwd_kernel(dy, ds_after, s, weight_ptr, stats, ds_ptr, partials_ptr, N, T, META: tl.constexpr):
    """Compute ds for every num_programs-th row, and the share of these rows in dweight and dbias."""
    C: tl.constexpr = META.C
    BLOCK_C: tl.constexpr = META.BLOCK_C
    first = tl.program_id(0)
    offs = tl.arange(0, BLOCK_C)
    mask = offs < C
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for n in range(first, N, tl.num_programs(0)):
        dy_row = _row(dy, n, T, ALIGN=META.ALIGN)
        dy_n = tl.load(dy_row + offs, mask=mask, other=0.0).to(tl.float32)
        if META.NEEDS_DS or META.NEEDS_DW:
            s_row = _row(s, n, T, ALIGN=META.ALIGN)
            s_n = tl.load(s_row + offs, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(stats.rstd_ptr + n)
            h = tl.where(mask, ((s_n - tl.load(stats.mean_ptr + n)) - tl.load(stats.left_ptr + n)) * rstd, 0.0)
        if META.NEEDS_DS:
            g = weight * dy_n
            ds = rstd * ((g - tl.sum(g, 0) / C) - h * (tl.sum(g * h, 0) / C))
            if ds_after is not None:
                after_row = _row(ds_after, n, T, ALIGN=META.ALIGN)
                ds += tl.load(after_row + offs, mask=mask, other=0.0).to(tl.float32)
            tl.store(ds_ptr + tl.cast(n, tl.int64) * C + offs, ds.to(ds_ptr.dtype.element_ty), mask=mask)
        if META.NEEDS_DW:
            dweight += dy_n * h
        if META.NEEDS_DB:
            dbias += dy_n
    partial = partials_ptr + first.to(tl.int64) * (META.NEEDS_DW + META.NEEDS_DB) * C
    if META.NEEDS_DW:
        tl.store(partial + offs, dweight, mask=mask)
    if META.NEEDS_DB:
        tl.store(partial + META.NEEDS_DW * C + offs, dbias, mask=mask)


@triton.jit(do_not_specialize=["N", "T"])
def _layer_norm_wide_bwd_kernel(dy, ds_after, s, weight_ptr, stats, ds_ptr, partials_ptr, N, T, META: tl.constexpr):
    """The same in blocks: first ds, row by row, with two passes over each; then dweight and dbias, block by block."""
    C: tl.constexpr = META.C
    BLOCK_C: tl.constexpr = META.BLOCK_C
    first = tl.program_id(0)
    if META.NEEDS_DS:
        for n in range(first, N, tl.num_programs(0)):
            dy_row = _row(dy, n, T, ALIGN=META.ALIGN)
            s_row = _row(s, n, T, ALIGN=META.ALIGN)
            after_row = _row(ds_after, n, T, ALIGN=META.ALIGN) if ds_after is not None else None
            ds_row = ds_ptr + tl.cast(n, tl.int64) * C
            mean = tl.load(stats.mean_ptr + n)
            left = tl.load(stats.left_ptr + n)
            rstd = tl.load(stats.rstd_ptr + n)
            sums_g = tl.zeros((BLOCK_C,), tl.float32)
            sums_gh = tl.zeros((BLOCK_C,), tl.float32)
            for start in range(0, C, BLOCK_C):
                offs = start + tl.arange(0, BLOCK_C)
                g, h = _load_g_and_h(dy_row, s_row, weight_ptr, offs, offs < C, mean, left, rstd)
                sums_g += g
                sums_gh += g * h
            mean_g = tl.sum(sums_g, 0) / C
            mean_gh = tl.sum(sums_gh, 0) / C
            for start in range(0, C, BLOCK_C):
                offs = start + tl.arange(0, BLOCK_C)
                mask = offs < C
                g, h = _load_g_and_h(dy_row, s_row, weight_ptr, offs, mask, mean, left, rstd)
                ds = rstd * ((g - mean_g) - h * mean_gh)
                if ds_after is not None:
                    ds += tl.load(after_row + offs, mask=mask, other=0.0).to(tl.float32)
                tl.store(ds_row + offs, ds.to(ds_ptr.dtype.element_ty), mask=mask)
    if META.NEEDS_DW or META.NEEDS_DB:
        partial = partials_ptr + first.to(tl.int64) * (META.NEEDS_DW + META.NEEDS_DB) * C
        for start in range(0, C, BLOCK_C):
            offs = start + tl.arange(0, BLOCK_C)
            mask = offs < C
            dweight = tl.zeros((BLOCK_C,), tl.float32)
            dbias = tl.zeros((BLOCK_C,), tl.float32)
            for n in range(first, N, tl.num_programs(0)):
                dy_row = _row(dy, n, T, ALIGN=META.ALIGN)
                dy_n = tl.load(dy_row + offs, mask=mask, other=0.0).to(tl.float32)
                dbias += dy_n
                if META.NEEDS_DW:
                    s_row = _row(s, n, T, ALIGN=META.ALIGN)
                    s_n = tl.load(s_row + offs, mask=mask, other=0.0).to(tl.float32)
                    d = (s_n - tl.load(stats.mean_ptr + n)) - tl.load(stats.left_ptr + n)
                    dweight += dy_n * (d * tl.load(stats.rstd_ptr + n))
            if META.NEEDS_DW:
                tl.store(partial + offs, dweight, mask=mask)
            if META.NEEDS_DB:
                tl.store(partial + META.NEEDS_DW * C + offs, dbias, mask=mask)


@triton.jit
def _load_g_and_h(dy_row, s_row, weight_ptr, offs, mask, mean, left, rstd):
    dy = tl.load(dy_row + offs, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(s_row + offs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return weight * dy, tl.where(mask, ((s - mean) - left) * rstd, 0.0)


# -- launchers ----------------------------------------------------------------------------------------------------


class Outputs(NamedTuple):
    """y (B, T, C); s = x + residual, empty if there is no residual; mean, left and rstd, (B, T) float32."""

    y: Tensor
    s: Tensor
    mean: Tensor
    left: Tensor
    rstd: Tensor


class Gradients(NamedTuple):
    """ds (B, T, C), dweight and dbias (C,); each is empty if it is not needed."""

    ds: Tensor
    dweight: Tensor
    dbias: Tensor


def _empty_outputs(x: Tensor, residual: Tensor | None) -> Outputs:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    stats = [x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(3)]
    return Outputs(x.new_empty(x.shape, dtype=dtype), empty_unless(residual is not None, x, x.shape, dtype), *stats)


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> Outputs:
    """x and residual (B, T, C) have stride 1 in the last dimension; weight and bias (C,) are contiguous."""
    B, T, C = x.shape
    out = _empty_outputs(x, residual)
    if x.numel() == 0:
        return out
    row = launch.layer_norm_row("forward", C, launch.architecture(x.device))
    is_wide = row.block_c < C
    kernel = _layer_norm_wide_fwd_kernel if is_wide else _layer_norm_fwd_kernel
    launch_kernel(
        x.device,
        kernel,
        (B * T if is_wide else _num_programs(row, x),),
        x=Batch.of(x),
        residual=Batch.of(residual),
        weight_ptr=weight,
        bias_ptr=bias,
        y_ptr=out.y,
        s_ptr=None if residual is None else out.s,
        stats=_Statistics(out.mean, out.left, out.rstd),
        N=B * T,
        T=T,
        eps=eps,
        META=_ForwardMeta(C=C, ALIGN=row_alignment(x, residual), BLOCK_C=row.block_c),
        num_warps=row.num_warps,
        **row.options,
    )
    return out


def _num_programs(row: launch.LayerNormRow, x: Tensor) -> int:
    return min(x.shape[0] * x.shape[1], row.programs * launch.multiprocessors(x.device))


def layer_norm_backward(
    dy: Tensor,
    ds_after: Tensor | None,
    s: Tensor,
    weight: Tensor,
    mean: Tensor,
    left: Tensor,
    rstd: Tensor,
    *,
    bias_dtype: torch.dtype,
    needs_ds: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> Gradients:
    """dy, ds_after and s (B, T, C) have stride 1 in the last dimension. Only what is needed is computed."""
    B, T, C = s.shape
    out = _empty_gradients(s, weight, bias_dtype, needs_ds, needs_dweight, needs_dbias)
    if s.numel() == 0:
        out.dweight.zero_()
        out.dbias.zero_()
        return out
    row = launch.layer_norm_row("backward", C, launch.architecture(s.device))
    num_programs = _num_programs(row, s)
    sums = [t for t, needed in ((out.dweight, needs_dweight), (out.dbias, needs_dbias)) if needed]
    partials = s.new_empty((num_programs, len(sums), C), dtype=torch.float32)
    kernel = _layer_norm_wide_bwd_kernel if row.block_c < C else _layer_norm_bwd_kernel
    launch_kernel(
        s.device,
        kernel,
        (num_programs,),
        dy=Batch.of(dy),
        ds_after=Batch.of(ds_after),
        s=Batch.of(s),
        weight_ptr=weight,
        stats=_Statistics(mean, left, rstd),
        ds_ptr=out.ds,
        partials_ptr=partials,
        N=B * T,
        T=T,
        META=_BackwardMeta(
            C=C,
            NEEDS_DS=needs_ds,
            NEEDS_DW=needs_dweight,
            NEEDS_DB=needs_dbias,
            ALIGN=row_alignment(dy, ds_after, s),
            BLOCK_C=row.block_c,
        ),
        num_warps=row.num_warps,
        **row.options,
    )
    if sums:
        sum_partials(partials, sums)
    return out


def _empty_gradients(
    s: Tensor, weight: Tensor, bias_dtype: torch.dtype, needs_ds: bool, needs_dweight: bool, needs_dbias: bool
) -> Gradients:
    return Gradients(
        empty_unless(needs_ds, s, s.shape, s.dtype),
        empty_unless(needs_dweight, weight, weight.shape, weight.dtype),
        empty_unless(needs_dbias, weight, weight.shape, bias_dtype),
    )


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """The LayerNorm y of x (..., C); with `residual` the pair (y, s), where y is the LayerNorm of s = x + residual."""
    flat = None if residual is None else _as_3d(residual)
    y, s, *_ = layer_norm_op(_as_3d(x), weight.contiguous(), bias.contiguous(), flat, eps)
    if x.dim() != 3:
        y, s = y.view(x.shape), s if residual is None else s.view(x.shape)
    return y if residual is None else (y, s)


def _as_3d(x: Tensor) -> Tensor:
    """x (..., C) as (B, T, C) with last stride 1, as a view where possible."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1]) if x.dim() < 3 else x.flatten(0, -3)


# -- PyTorch operators --------------------------------------------------------------------------------------------


def _layer_norm(x, weight, bias, residual, eps):
    return tuple(layer_norm_forward(x, weight, bias, residual, eps))


def _fake_layer_norm(x, weight, bias, residual, eps):
    return tuple(_empty_outputs(x, residual))


def _layer_norm_backward(dy, ds_after, s, weight, mean, left, rstd, bias_dtype, needs_ds, needs_dweight, needs_dbias):
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    ds_after = ds_after if ds_after is None or ds_after.stride(-1) == 1 else ds_after.contiguous()
    gradients = layer_norm_backward(
        dy,
        ds_after,
        s,
        weight,
        mean,
        left,
        rstd,
        bias_dtype=bias_dtype,
        needs_ds=needs_ds,
        needs_dweight=needs_dweight,
        needs_dbias=needs_dbias,
    )
    return tuple(gradients)


def _fake_layer_norm_backward(
    dy, ds_after, s, weight, mean, left, rstd, bias_dtype, needs_ds, needs_dweight, needs_dbias
):
    return tuple(_empty_gradients(s, weight, bias_dtype, needs_ds, needs_dweight, needs_dbias))


def _save(ctx, inputs, output):
    x, weight, bias, residual, ctx.eps = inputs
    ctx.fallback_size = fallback_size()
    _, s, *stats = output
    ctx.save_for_backward(x if residual is None else s, weight, *stats)
    ctx.dtypes = (x.dtype, bias.dtype, None if residual is None else residual.dtype)
    ctx.mark_non_differentiable(*stats)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, ds_after, *_):
    needs_x, needs_dweight, needs_dbias, needs_residual, _ = ctx.needs_input_grad
    x_dtype, bias_dtype, residual_dtype = ctx.dtypes
    if residual_dtype is None:
        ds_after = None
    ds, dweight, dbias = ds_after, None, None
    if dy is not None:
        s, weight, mean, left, rstd = ctx.saved_tensors
        needs = (needs_x or needs_residual, needs_dweight, needs_dbias)
        try:
            results = layer_norm_backward_op(dy, ds_after, s, weight, mean, left, rstd, bias_dtype, *needs)
        except KernelFailedError as error:
            results = _plain_gradients(ctx, error, dy, ds_after, needs)
        ds, dweight, dbias = (t if needed else None for t, needed in zip(results, needs, strict=True))
    dx = ds.to(x_dtype) if needs_x and ds is not None else None
    dresidual = ds.to(residual_dtype) if needs_residual and ds is not None else None
    return dx, dweight, dbias, dresidual, None


def _plain_gradients(ctx, error, dy, ds_after, needs):
    s, weight, *_ = ctx.saved_tensors
    name, bias = "layer_norm", torch.zeros_like(weight, dtype=ctx.dtypes[1])

    def norm(s, weight, bias):
        return implementation(name, "torch")(s, weight, bias, ctx.eps, None)

    ds, *rest = gradients(name, ctx.fallback_size, error, norm, [s, weight, bias], needs, dy)
    return [ds if ds is None or ds_after is None else ds + ds_after, *rest]


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "layer_norm: the Triton backend has no second derivatives; use backend='torch' for a double backward"
    )


# (y, s, mean, left, rstd), as in `Outputs`. Only y and s have gradients.
layer_norm_op = define_operator(
    "fastgpt2::layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps) -> "
    "(Tensor y, Tensor s, Tensor mean, Tensor left, Tensor rstd)",
    _layer_norm,
    _fake_layer_norm,
    _backward,
    _save,
)
layer_norm_backward_op = define_operator(
    "fastgpt2::layer_norm_backward",
    "(Tensor dy, Tensor? ds_after, Tensor s, Tensor weight, Tensor mean, Tensor left, Tensor rstd, "
    "ScalarType bias_dtype, bool needs_ds, bool needs_dweight, bool needs_dbias) -> "
    "(Tensor ds, Tensor dweight, Tensor dbias)",
    _layer_norm_backward,
    _fake_layer_norm_backward,
    _no_second_derivative,
)
