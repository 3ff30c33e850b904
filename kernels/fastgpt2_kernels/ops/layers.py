"""What a layer does beside attention: LayerNorm, activations, linear maps."""

from __future__ import annotations

import functools
import math
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels.backends import choose_backend, implementation, run_operator
from fastgpt2_kernels.ops.checks import check_same, describe, only_float32
from fastgpt2_kernels.reference import ACTIVATIONS
from fastgpt2_kernels.torch.layers import PackedLinear
from fastgpt2_kernels.triton.launch import ACTIVATIONS as TRITON_ACTIVATIONS


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: None = None, backend: str = "auto"
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: Tensor | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm with bias over the last dimension of x (..., C); weight, bias (C,) (Ba et al. 2016) -> y (..., C).

    float32, bfloat16 or float16, weight and bias too, which may differ from x; statistics are float32 (float64 for
    float64, on PyTorch's operators). With `residual`, of x's shape, returns (y, s): s = x + residual in the wider of
    their two dtypes, y its LayerNorm, in that dtype. All are differentiable, once; the gradients that meet in s are
    added where they are computed, and what is frozen costs nothing.

    Rows of x (B, T, C), of residual and of their gradients may lie at any strides if the last dimension's is 1;
    otherwise the Triton backend makes a contiguous copy first. ValueError for arguments that do not fit.
    """
    C = x.shape[-1] if x.dim() else 0
    if C == 0 or weight.shape != (C,) or bias.shape != (C,):
        raise ValueError(
            f"layer_norm: x must be (..., C), weight and bias (C,); "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"layer_norm: residual must have the shape of x {tuple(x.shape)}; got {tuple(residual.shape)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"layer_norm: eps must be finite and >= 0; got {eps}")
    tensors = {"x": x, "weight": weight, "bias": bias, **({} if residual is None else {"residual": residual})}
    _check_floats("layer_norm", tensors)
    widest = functools.reduce(torch.promote_types, (t.dtype for t in tensors.values()))
    chosen = choose_backend("layer_norm", x.device, backend, lambda: only_float32(widest))
    return run_operator("layer_norm", chosen, backend, x.device, x, weight, bias, eps, residual)


def activation(x: Tensor, name: str, *, backend: str = "auto") -> Tensor:
    """The activation `name` (a key of `ACTIVATIONS`, transformers' names) of x, elementwise."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: name must be one of {sorted(ACTIVATIONS)}; got {name!r}")
    return implementation("activation", choose_backend("activation", x.device, backend))(x, name)


def bias_activation(x: Tensor, bias: Tensor | None, name: str, *, backend: str = "auto") -> Tensor:
    """activation(x + bias) in one pass: x (..., C), bias (C,) or None, `name` a key of `ACTIVATIONS` -> (..., C).

    float32, bfloat16 or float16, bias too, which may differ from x; computed in float32 and rounded once to x's dtype
    (by PyTorch's operators: the sum is rounded too). Differentiable once, in x and bias; a frozen one costs nothing.
    x that is no view of rows with a last stride of 1 is copied by the Triton backend. A name that is not in
    `TRITON_ACTIVATIONS` runs on PyTorch's operators. ValueError for arguments that do not fit.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"bias_activation: name must be one of {sorted(ACTIVATIONS)}; got {name!r}")
    if x.dim() == 0 or (bias is not None and bias.shape != x.shape[-1:]):
        got = f"{tuple(x.shape)} and {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"bias_activation: x must be (..., C) and bias (C,); got {got}")
    tensors = {"x": x, **({} if bias is None else {"bias": bias})}
    _check_floats("bias_activation", tensors)
    widest = functools.reduce(torch.promote_types, (t.dtype for t in tensors.values()))
    chosen = choose_backend(
        "bias_activation",
        x.device,
        backend,
        lambda: (
            only_float32(widest) or (None if name in TRITON_ACTIVATIONS else f"{name} has no Triton kernel; use 'auto'")
        ),
    )
    return run_operator("bias_activation", chosen, backend, x.device, x, bias, name)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "linear",
    residual: Tensor | None = None,
    packed: PackedLinear | None = None,
    backend: str = "auto",
) -> Tensor:
    """activation(x weight^T + bias) or x weight^T + bias + residual: x (..., in), weight (out, in) -> (..., out).

    `packed` is `pack_linear(weight)`, used instead of `weight` when it is given, for x (N, in): the same product, 2 to
    4 times as fast for a few rows on a CPU, without gradients. Fewer than `MIN_PACKED_ROWS` rows are filled up.
    The product is PyTorch's on every backend; with an activation, `backend` is that of the `bias_activation` after it.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation must be one of {sorted(ACTIVATIONS)}; got {activation!r}")
    if activation != "linear" and residual is not None:
        raise ValueError("linear: takes an activation or a residual, not both")
    fuses = activation != "linear" and packed is None
    chosen = choose_backend("bias_activation" if fuses else "linear", x.device, backend)
    if chosen == "triton":
        return bias_activation(F.linear(x, weight), bias, activation, backend=backend)
    return implementation("linear", chosen)(x, weight, bias, activation, residual, packed)


def _check_floats(operator: str, tensors: dict[str, Tensor]) -> None:
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise ValueError(f"{operator}: {name} must be floating-point; got {describe(t)}")
    check_same(operator, check_dtype=False, **tensors)
