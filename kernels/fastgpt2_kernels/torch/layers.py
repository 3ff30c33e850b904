"""Linear layers, activations and LayerNorm on PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import reference


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """activation(x weight^T + bias), or x weight^T + bias + residual."""
    y = F.linear(x, weight, bias)
    return reference.ACTIVATIONS[activation](y) if residual is None else y + residual


def activation(x: Tensor, name: str) -> Tensor:
    fn: Callable[[Tensor], Tensor] = reference.ACTIVATIONS[name]
    return fn(x)


def bias_activation(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    return activation(x if bias is None else (x + bias).to(x.dtype), name)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """The LayerNorm y of x; with `residual` the pair (y, s), where y is the LayerNorm of s = x + residual."""
    if residual is None:
        return _layer_norm(x, weight, bias, eps)
    s = residual + x
    return _layer_norm(s, weight, bias, eps), s


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype == bias.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = torch.promote_types(torch.promote_types(x.dtype, torch.float32), weight.dtype)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)
