"""The door to what a layer does beside attention: LayerNorm, activations, linear maps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import torch_backend
from fastgpt2_kernels.ops.backend import use_triton
from fastgpt2_kernels.reference import ACTIVATIONS
from fastgpt2_kernels.torch_backend import PackedLinear


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """LayerNorm with bias over the last dimension of x (..., C); weight, bias (C,) (Ba et al. 2016)."""
    use_triton("layer_norm", x.device, backend)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def activation(x: Tensor, name: str, *, backend: str = "auto") -> Tensor:
    """The activation `name` (a key of `ACTIVATIONS`, transformers' names) of x, elementwise."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: name must be one of {sorted(ACTIVATIONS)}; got {name!r}")
    use_triton("activation", x.device, backend)
    return torch_backend.activation(x, name)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "linear",
    residual: Tensor | None = None, packed: PackedLinear | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """activation(x weight^T + bias) or x weight^T + bias + residual: x (..., in), weight (out, in) -> (..., out).

    `packed` is `pack_linear(weight)`, used instead of `weight` when it is given, for x (N, in): the same product, 2 to
    4 times as fast for a few rows on a CPU, without gradients. Fewer than `MIN_PACKED_ROWS` rows are filled up.
    """
    if activation != "linear" and residual is not None:
        raise ValueError("linear: takes an activation or a residual, not both")
    use_triton("linear", x.device, backend)
    if packed is not None:
        return torch_backend.packed_linear(x, packed, bias, activation, residual)
    y = F.linear(x, weight, bias)
    if residual is not None:
        return y + residual
    return torch_backend.activation(y, activation)
