"""The door to what a layer does beside attention: LayerNorm, activations, linear maps."""

from __future__ import annotations

import functools
import math
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels.ops.backend import check_same, describe, use_triton
from fastgpt2_kernels.reference import ACTIVATIONS
from fastgpt2_kernels.torch import layers as torch_layers
from fastgpt2_kernels.torch.layers import PackedLinear

# The activations that `bias_activation` has a Triton kernel for, and the kernel's own names for them.
TRITON_ACTIVATIONS = {
    **{name: name for name in ACTIVATIONS if name not in ("linear", "sqrtsoftplus")},
    **dict.fromkeys(("gelu_new", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
    "gelu_python": "gelu",
    "swish": "silu",
}


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
    if not use_triton("layer_norm", x.device, backend, widest):
        if residual is not None:
            s = residual + x
            return _torch_layer_norm(s, weight, bias, eps), s
        return _torch_layer_norm(x, weight, bias, eps)
    from fastgpt2_kernels.triton.layers import layer_norm as kernel

    flat = None if residual is None else _as_3d(residual)
    y, s, *_ = kernel.layer_norm_op(_as_3d(x), weight.contiguous(), bias.contiguous(), flat, eps)
    return y.view(x.shape) if residual is None else (y.view(x.shape), s.view(x.shape))


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype == bias.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = torch.promote_types(torch.promote_types(x.dtype, torch.float32), weight.dtype)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)


def _as_3d(x: Tensor) -> Tensor:
    """x (..., C) as (B, T, C), a view wherever there is one, its last stride 1."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1]) if x.dim() < 3 else x.flatten(0, -3)


def activation(x: Tensor, name: str, *, backend: str = "auto") -> Tensor:
    """The activation `name` (a key of `ACTIVATIONS`, transformers' names) of x, elementwise."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: name must be one of {sorted(ACTIVATIONS)}; got {name!r}")
    use_triton("activation", x.device, backend)
    return torch_layers.activation(x, name)


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
    on_triton = use_triton("bias_activation", x.device, backend, widest)
    if on_triton and name in TRITON_ACTIVATIONS:
        from fastgpt2_kernels.triton.layers import activation as kernel

        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        bias = None if bias is None else bias.contiguous()
        return kernel.bias_activation_op(rows, bias, TRITON_ACTIVATIONS[name]).view(x.shape)
    if on_triton and backend == "triton":
        raise ValueError(f"bias_activation: backend='triton' cannot be used: {name} has no Triton kernel; use 'auto'")
    return torch_layers.activation(x if bias is None else (x + bias).to(x.dtype), name)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "linear",
    residual: Tensor | None = None, packed: PackedLinear | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
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
    if use_triton("bias_activation" if fuses else "linear", x.device, backend) and fuses:
        return bias_activation(F.linear(x, weight), bias, activation, backend=backend)
    if packed is not None:
        return torch_layers.packed_linear(x, packed, bias, activation, residual)
    y = F.linear(x, weight, bias)
    if residual is not None:
        return y + residual
    return torch_layers.activation(y, activation)


def _check_floats(operator: str, tensors: dict[str, Tensor]) -> None:
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise ValueError(f"{operator}: {name} must be floating-point; got {describe(t)}")
    check_same(operator, check_dtype=False, **tensors)
