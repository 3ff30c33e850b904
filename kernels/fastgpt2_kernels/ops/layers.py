"""The parts of a layer other than attention: LayerNorm, activations, linear layers."""

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
    """LayerNorm with bias over the last dimension (Ba et al. 2016), optionally after adding a residual.

    Statistics are computed in float32; float64 inputs run on PyTorch's operators, with float64 statistics. Every input
    is differentiable. The Triton backend has no second derivatives. With a residual, its backward kernel also adds the
    gradient that reaches the sum directly. No gradient is computed for a frozen input.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        weight: (C,). Its dtype may differ from x's, and so may bias's and residual's.
        bias: (C,).
        eps: added to the variance; finite and >= 0.
        residual: same shape as x, or None.
        backend: "auto", "triton" or "torch".

    Returns:
        y (..., C). With `residual`, the pair (y, s): s is x + residual in the wider of their two dtypes, and y is the
        LayerNorm of s in that dtype.

    Raises:
        ValueError: Arguments do not go together, or the backend cannot be used.

    Notes:
        x of shape (B, T, C) may have any strides as long as the last one is 1. Otherwise the Triton backend first makes
        a contiguous copy.

    Example:
        >>> x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        >>> y, s = layer_norm(x, torch.ones(8), torch.zeros(8), 1e-5, residual=residual)
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
    size = (C, widest)
    chosen = choose_backend("layer_norm", x.device, backend, lambda: only_float32(widest), size)
    return run_operator("layer_norm", chosen, backend, x.device, size, x, weight, bias, eps, residual)


def activation(x: Tensor, name: str, *, backend: str = "auto") -> Tensor:
    """Apply an activation to every element of x.

    Args:
        x: any shape.
        name: a key of `ACTIVATIONS`, which uses the names of transformers.
        backend: "auto" or "torch".

    Returns:
        The activation, in x's shape and dtype.

    Raises:
        ValueError: There is no activation of that name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: name must be one of {sorted(ACTIVATIONS)}; got {name!r}")
    return implementation("activation", choose_backend("activation", x.device, backend))(x, name)


def bias_activation(x: Tensor, bias: Tensor | None, name: str, *, backend: str = "auto") -> Tensor:
    """activation(x + bias) in one pass.

    The Triton kernel computes in float32 and rounds once, to x's dtype; PyTorch's operators also round the sum. The
    result is differentiable in x and bias. The Triton backend has no second derivatives. No gradient is computed for a
    frozen input.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        bias: (C,), or None. Its dtype may differ from x's.
        name: a key of `ACTIVATIONS`. An activation without a Triton kernel runs on PyTorch's operators.
        backend: "auto", "triton" or "torch".

    Returns:
        The activation (..., C), in x's dtype.

    Raises:
        ValueError: Arguments do not go together, or the backend cannot be used.

    Notes:
        The Triton backend copies x unless it is a view of rows whose last stride is 1.

    Example:
        >>> bias_activation(torch.randn(4, 8), torch.zeros(8), "gelu_new").shape
        torch.Size([4, 8])
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
        (x.shape[-1], widest),
    )
    return run_operator("bias_activation", chosen, backend, x.device, (x.shape[-1], widest), x, bias, name)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "linear",
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A linear layer: activation(x weight^T + bias), or x weight^T + bias + residual.

    PyTorch computes the matrix product on every backend. With an activation, `backend` chooses who computes the
    `bias_activation` after the product.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,), or None.
        activation: a key of `ACTIVATIONS`; "linear" is none. Any other excludes `residual`.
        residual: (..., out), or None.
        backend: the backend, or "auto".

    Returns:
        The result (..., out).

    Raises:
        ValueError: Arguments do not go together, or the backend cannot be used.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation must be one of {sorted(ACTIVATIONS)}; got {activation!r}")
    if activation != "linear" and residual is not None:
        raise ValueError("linear: give an activation or a residual, not both")
    chosen = choose_backend("linear" if activation == "linear" else "bias_activation", x.device, backend)
    if chosen == "triton":
        return bias_activation(F.linear(x, weight), bias, activation, backend=backend)
    return implementation("linear", chosen)(x, weight, bias, activation, residual)


def _check_floats(operator: str, tensors: dict[str, Tensor]) -> None:
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise ValueError(f"{operator}: {name} must be floating-point; got {describe(t)}")
    check_same(operator, check_dtype=False, **tensors)
