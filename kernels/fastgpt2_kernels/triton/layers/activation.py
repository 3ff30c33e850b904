"""Bias and activation in one pass, after the first product of the MLP: GELU (Hendrycks and Gimpel 2016) and others.

    y = f(z),  z = x + bias          dx = dy f'(z),  dbias = sum over rows of dx

Everything is computed in float32. Each number is read once and written once. Backward computes f'(z) from x and bias
again. So nothing else is saved, and neither z nor f'(z) is ever written.

The tanh GELU is 0.5 z (1 + tanh(u)) = z sigmoid(2 u), with u = sqrt(2 / pi) (z + 0.044715 z^3). The sigmoid subtracts
no nearly equal numbers, so the negative tail stays accurate. Its exponential is never of a positive number, so nothing
overflows. SiLU and quick GELU are z sigmoid(w(z)) too, and differ only in w.

In backward each program sums dbias over its own rows and writes one partial row. `partial_sums` adds these.

Dimension key: N rows, C width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2_kernels.backends import KernelFailedError, fallback_size, implementation
from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.arguments import Matrix
from fastgpt2_kernels.triton.devices import launch_kernel
from fastgpt2_kernels.triton.fallback import gradients
from fastgpt2_kernels.triton.layers.partial_sums import empty_unless, row_alignment, sum_partials
from fastgpt2_kernels.triton.operators import define_operator

LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_PI = tl.constexpr(0.5641895835477563)
INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)  # of the tanh GELU
# The Laplace activation (Ma et al. 2022) is an error function. Its width is sqrt(2) times the standard deviation.
LAPLACE_MEAN = tl.constexpr(0.707107)
LAPLACE_WIDTH = tl.constexpr(0.3989425750415753)


@triton.jit
def _sigmoids(w):
    """sigmoid(w) and sigmoid(-w), both fully accurate."""
    e = tl.exp2(tl.abs(w) * -LOG2_E)
    larger = 1.0 / (1.0 + e)
    return tl.where(w < 0, e * larger, larger), tl.where(w < 0, larger, e * larger)


@triton.jit
def _gate_slope(z, s, rest, dw):
    """The derivative of z sigmoid(w): sigmoid(w) + z w' sigmoid(w) sigmoid(-w), where 0 times an overflow is 0."""
    product = s * rest
    return s + tl.where(product == 0, 0.0, z * product * dw)


@triton.jit
def _tanh(z):
    """(1 - e) / (1 + e), where e = exp(-2 |z|), with z's sign; near 0 a series, because 1 - e would lose accuracy."""
    e = tl.exp2(tl.abs(z) * (-2.0 * LOG2_E))
    t = (1.0 - e) / (1.0 + e)
    z2 = z * z
    series = z + z * z2 * (-1.0 / 3.0 + z2 * (2.0 / 15.0 + z2 * (-17.0 / 315.0 + z2 * (62.0 / 2835.0))))
    return tl.where(tl.abs(z) < 0.25, series, tl.where(z < 0, -t, t))


@triton.jit
def _normal_cdf(z):
    return (tl.erf(z * SQRT_HALF) + 1.0) * 0.5


@triton.jit
def _normal_density(z):
    return tl.exp2(z * z * (-0.5 * LOG2_E)) * INV_SQRT_2_PI


@triton.jit
def _mish_gate(z):
    """tanh(log(1 + exp(z))), and the square root of 1 minus its square, as fractions in e = exp(-|z|)."""
    e = tl.exp2(tl.abs(z) * -LOG2_E)
    top = tl.where(z < 0, e * (e + 2.0), 1.0 + 2.0 * e)
    bottom = tl.where(z < 0, 2.0, 2.0 * e * e) + top
    return top / bottom, 2.0 * (1.0 + e) * tl.where(z < 0, 1.0, e) / bottom


@triton.jit
def _activation(z, NAME: tl.constexpr):
    # Comparisons are written so that NaN propagates.
    if NAME == "gelu_tanh":
        y = z * _sigmoids(z * (z * z * CUBIC + 1.0) * TWO_SQRT_2_OVER_PI)[0]
    elif NAME == "silu":
        y = z * _sigmoids(z)[0]
    elif NAME == "quick_gelu":
        y = z * _sigmoids(z * 1.702)[0]
    elif NAME == "gelu":
        y = z * _normal_cdf(z)
    elif NAME == "gelu_10":
        y = z * _normal_cdf(z)
        y = tl.where(y > 10.0, 10.0, y)  # GELU is never below -10
    elif NAME == "laplace":
        y = (tl.erf((z - LAPLACE_MEAN) / LAPLACE_WIDTH) + 1.0) * 0.5
    elif NAME == "sigmoid":
        y = _sigmoids(z)[0]
    elif NAME == "tanh":
        y = _tanh(z)
    elif NAME == "mish":
        y = z * _mish_gate(z)[0]
    elif NAME == "relu":
        y = tl.where(z <= 0, 0.0, z)
    elif NAME == "relu2":
        y = tl.where(z <= 0, 0.0, z * z)
    elif NAME == "relu6":
        y = tl.where(z <= 0, 0.0, tl.where(z >= 6.0, 6.0, z))
    elif NAME == "leaky_relu":
        y = tl.where(z > 0, z, z * 0.01)
    else:
        tl.static_assert(NAME == "hardswish", "no such activation")
        y = z * tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, 1.0, (z + 3.0) * (1.0 / 6.0)))
    return y


@triton.jit
def _slope(z, NAME: tl.constexpr):
    """The derivative f'(z)."""
    if NAME == "gelu_tanh":
        s, rest = _sigmoids(z * (z * z * CUBIC + 1.0) * TWO_SQRT_2_OVER_PI)
        slope = _gate_slope(z, s, rest, (z * z * (3.0 * CUBIC) + 1.0) * TWO_SQRT_2_OVER_PI)
    elif NAME == "silu":
        s, rest = _sigmoids(z)
        slope = _gate_slope(z, s, rest, 1.0)
    elif NAME == "quick_gelu":
        s, rest = _sigmoids(z * 1.702)
        slope = _gate_slope(z, s, rest, 1.702)
    elif NAME == "gelu":
        slope = _normal_cdf(z) + z * _normal_density(z)
    elif NAME == "gelu_10":
        cdf = _normal_cdf(z)
        slope = tl.where(z * cdf > 10.0, 0.0, cdf + z * _normal_density(z))
    elif NAME == "laplace":
        u = (z - LAPLACE_MEAN) / LAPLACE_WIDTH
        slope = tl.exp2(u * u * -LOG2_E) * (INV_SQRT_PI / LAPLACE_WIDTH)
    elif NAME == "sigmoid":
        s, rest = _sigmoids(z)
        slope = s * rest
    elif NAME == "tanh":
        s, rest = _sigmoids(z * 2.0)
        slope = s * rest * 4.0
    elif NAME == "mish":
        gate, root = _mish_gate(z)
        slope = gate + z * (root * root) * _sigmoids(z)[0]
    elif NAME == "relu":
        slope = tl.where(z <= 0, 0.0, 1.0)
    elif NAME == "relu2":
        slope = tl.where(z <= 0, 0.0, z * 2.0)
    elif NAME == "relu6":
        slope = tl.where((z <= 0) | (z >= 6.0), 0.0, 1.0)
    elif NAME == "leaky_relu":
        slope = tl.where(z > 0, 1.0, 0.01)
    else:
        tl.static_assert(NAME == "hardswish", "no such activation")
        slope = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, 1.0, z * (1.0 / 3.0) + 0.5))
    return slope


class _ForwardMeta(NamedTuple):
    C: int
    NAME: str
    ALIGN: int
    BLOCK_N: int
    BLOCK_C: int


class _BackwardMeta(NamedTuple):
    C: int
    NAME: str
    NEEDS_DX: bool
    NEEDS_DB: bool
    ALIGN: int
    BLOCK_N: int
    BLOCK_C: int


@triton.jit
def _load_z(x, bias_ptr, n, offs_c, mask, mask_c, ALIGN: tl.constexpr):
    """x + bias of the rows n, (BLOCK_N, BLOCK_C) in float32."""
    rows = tl.multiple_of(n.to(tl.int64)[:, None] * x.stride, [ALIGN, ALIGN])
    z = tl.load(x.ptr + rows + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit(do_not_specialize=["N"])
def _bias_activation_fwd_kernel(x, bias_ptr, y_ptr, N, META: tl.constexpr):
    """Compute one tile of y.

    Columns vary fastest in the one grid dimension, so neighbouring programs share rows, and there is no limit of rows.
    """
    C: tl.constexpr = META.C
    NAME: tl.constexpr = META.NAME
    BLOCK_C: tl.constexpr = META.BLOCK_C
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    n = (pid // column_blocks) * META.BLOCK_N + tl.arange(0, META.BLOCK_N)
    offs_c = (pid % column_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (n < N)[:, None] & mask_c[None, :]
    z = _load_z(x, bias_ptr, n, offs_c, mask, mask_c, ALIGN=META.ALIGN)
    out = n.to(tl.int64)[:, None] * C + offs_c[None, :]
    tl.store(y_ptr + out, _activation(z, NAME).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _bias_activation_bwd_kernel(dy, x, bias_ptr, dx_ptr, partials_ptr, N, META: tl.constexpr):
    """Compute dx for a block of columns in every num_programs(1)-th tile of rows, and the share of these in dbias."""
    C: tl.constexpr = META.C
    NAME: tl.constexpr = META.NAME
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_C: tl.constexpr = META.BLOCK_C
    ALIGN: tl.constexpr = META.ALIGN
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    dbias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_N, N, tl.num_programs(1) * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & mask_c[None, :]
        dy_rows = tl.multiple_of(n.to(tl.int64)[:, None] * dy.stride, [ALIGN, ALIGN])
        dy_tile = tl.load(dy.ptr + dy_rows + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        z = _load_z(x, bias_ptr, n, offs_c, mask, mask_c, ALIGN=ALIGN)
        dx = dy_tile * _slope(z, NAME)
        if META.NEEDS_DX:
            out = n.to(tl.int64)[:, None] * C + offs_c[None, :]
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if META.NEEDS_DB:
            dbias += tl.where(mask, dx, 0.0)  # outside the rows x is 0, but the bias may still make the slope NaN
    if META.NEEDS_DB:
        partial = partials_ptr + tl.program_id(1).to(tl.int64) * C
        tl.store(partial + offs_c, tl.sum(dbias, 0), mask=mask_c)


# -- launchers ----------------------------------------------------------------------------------------------------


def bias_activation_forward(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """activation(x + bias) for x (..., C) and contiguous bias (C,) -> (..., C)."""
    y = x.new_empty(x.shape)
    if x.numel():
        x = _as_rows(x)
        N, C = x.shape
        row = launch.ACTIVATION
        launch_kernel(
            x.device,
            _bias_activation_fwd_kernel,
            (launch.ceil_div(N, row.block_n) * launch.ceil_div(C, row.block_c),),
            x=Matrix.of(x),
            bias_ptr=bias,
            y_ptr=y,
            N=N,
            META=_ForwardMeta(C=C, NAME=name, ALIGN=row_alignment(x), BLOCK_N=row.block_n, BLOCK_C=row.block_c),
            num_warps=row.num_warps,
            **launch.OPTIONS,
        )
    return y


def bias_activation_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, name: str, *, needs_dx: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor]:
    """dx (..., C) and dbias (C,) from dy and x (..., C). What is not needed is empty."""
    dx, dbias = _empty_gradients(x, bias, needs_dx, needs_dbias)
    if x.numel() == 0:
        return dx, dbias.zero_()
    dy, x = _as_rows(dy), _as_rows(x)
    N, C = x.shape
    row = launch.ACTIVATION
    column_blocks = launch.ceil_div(C, row.block_c)
    programs = launch.ceil_div(row.programs * launch.multiprocessors(x.device), column_blocks)
    programs = min(programs, launch.ceil_div(N, row.bwd_block_n))
    partials = empty_unless(needs_dbias, x, (programs, 1, C), torch.float32)
    launch_kernel(
        x.device,
        _bias_activation_bwd_kernel,
        (column_blocks, programs),
        dy=Matrix.of(dy),
        x=Matrix.of(x),
        bias_ptr=bias,
        dx_ptr=dx,
        partials_ptr=partials,
        N=N,
        META=_BackwardMeta(
            C=C,
            NAME=name,
            NEEDS_DX=needs_dx,
            NEEDS_DB=needs_dbias,
            ALIGN=row_alignment(dy, x),
            BLOCK_N=row.bwd_block_n,
            BLOCK_C=row.block_c,
        ),
        num_warps=row.num_warps,
        **launch.OPTIONS,
    )
    if needs_dbias:
        sum_partials(partials, [dbias])
    return dx, dbias


def _empty_gradients(x: Tensor, bias: Tensor | None, needs_dx: bool, needs_dbias: bool) -> tuple[Tensor, Tensor]:
    dbias = empty_unless(needs_dbias, x, x.shape[-1:], x.dtype if bias is None else bias.dtype)
    return empty_unless(needs_dx, x, x.shape, x.dtype), dbias


def bias_activation(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """activation(x + bias) for x (..., C) and bias (C,). `name` is a key of `launch.ACTIVATIONS`."""
    bias = None if bias is None else bias.contiguous()
    return bias_activation_op(x, bias, launch.ACTIVATIONS[name])


def _as_rows(x: Tensor) -> Tensor:
    """x (..., C) as (N, C) with last stride 1, as a view where possible."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


# -- PyTorch operators --------------------------------------------------------------------------------------------


def _bias_activation(x, bias, name):
    return bias_activation_forward(x, bias, name)


def _fake_bias_activation(x, bias, name):
    return x.new_empty(x.shape)


def _bias_activation_backward(dy, x, bias, name, needs_dx, needs_dbias):
    return bias_activation_backward(dy, x, bias, name, needs_dx=needs_dx, needs_dbias=needs_dbias)


def _fake_bias_activation_backward(dy, x, bias, name, needs_dx, needs_dbias):
    return _empty_gradients(x, bias, needs_dx, needs_dbias)


def _save(ctx, inputs, output):
    x, bias, ctx.name = inputs
    ctx.fallback_size = fallback_size()
    ctx.save_for_backward(x, bias)


def _backward(ctx, dy):
    x, bias = ctx.saved_tensors
    needs_dx, needs_dbias, _ = ctx.needs_input_grad
    try:
        dx, dbias = bias_activation_backward_op(dy, x, bias, ctx.name, needs_dx, needs_dbias)
    except KernelFailedError as error:
        dx, dbias = _plain_gradients(ctx, error, dy)
    return dx if needs_dx else None, dbias if needs_dbias else None, None


def _plain_gradients(ctx, error, dy):
    operator, name = "bias_activation", next(name for name, kernel in launch.ACTIVATIONS.items() if kernel == ctx.name)

    def activate(x, bias):
        return implementation(operator, "torch")(x, bias, name)

    return gradients(operator, ctx.fallback_size, error, activate, ctx.saved_tensors, ctx.needs_input_grad[:2], dy)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "bias_activation: the Triton backend has no second derivatives; use backend='torch' for a double backward"
    )


bias_activation_op = define_operator(
    "fastgpt2::bias_activation",
    "(Tensor x, Tensor? bias, str name) -> Tensor",
    _bias_activation,
    _fake_bias_activation,
    _backward,
    _save,
)
bias_activation_backward_op = define_operator(
    "fastgpt2::bias_activation_backward",
    "(Tensor dy, Tensor x, Tensor? bias, str name, bool needs_dx, bool needs_dbias) -> (Tensor dx, Tensor dbias)",
    _bias_activation_backward,
    _fake_bias_activation_backward,
    _no_second_derivative,
)
