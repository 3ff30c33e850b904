"""Linear layers, activations and LayerNorm.

A CPU is best at oneDNN's packed weights: they take a half to a quarter of a plain `F.linear`'s time on a few rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import reference

# oneDNN's fused epilogues (attr, algorithm) for the activations it has.
_FUSED_ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh"), ("gelu", "tanh")),
    **dict.fromkeys(("gelu", "gelu_python"), ("gelu", "none")),
    "linear": ("none", ""),
    "relu": ("relu", ""),
    "sigmoid": ("sigmoid", ""),
    "silu": ("swish", ""),
    "swish": ("swish", ""),
    "tanh": ("tanh", ""),
}
# The number of rows oneDNN is told to lay the weights out for. One layout serves every number of rows.
_PACK_ROWS = 8
# Fewer rows are filled up to these. From 2 rows on, a row's result is the same to the bit whatever the number of rows
# (tested); for a single row oneDNN splits long sums otherwise. And 6 rows, one register tile, take less time than 1.
MIN_PACKED_ROWS = 6


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer's weight in the CPU's blocked layout, with what tells whether the original has changed since."""

    weight: Tensor
    fingerprint: tuple[object, ...]


def fingerprint(weight: Tensor) -> tuple[object, ...]:
    """Changes when `weight` does, also through `.data`, which PyTorch's version counter does not see. Reads it once."""
    flat = weight.detach()
    flat = (flat if flat.is_contiguous() else flat.t().contiguous()).view(-1)
    per_lane = 8 // flat.element_size()
    if flat.storage_offset() % per_lane:
        flat = flat.clone()
    # Summed as 64-bit integers, which runs at the speed of memory; the few elements past the last lane as they are.
    whole = flat.numel() // per_lane * per_lane
    total = int(flat[:whole].view(torch.int64).sum())
    return (weight.data_ptr(), weight.dtype, weight.shape, total, *flat[whole:].tolist())


def can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack_linear(weight: Tensor) -> PackedLinear | None:
    """`weight` (out, in) in oneDNN's layout, or None where this machine or dtype has none."""
    if not can_pack(weight):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _PACK_ROWS)
    return PackedLinear(packed, fingerprint(weight))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    packed: PackedLinear | None,
) -> Tensor:
    """activation(x weight^T + bias), or x weight^T + bias + residual, of the packed weight where there is one."""
    if packed is not None:
        return packed_linear(x, packed, bias, activation, residual)
    y = F.linear(x, weight, bias)
    return reference.ACTIVATIONS[activation](y) if residual is None else y + residual


def packed_linear(
    x: Tensor, packed: PackedLinear, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    if 0 < x.shape[0] < MIN_PACKED_ROWS:
        filler = (0, 0, 0, MIN_PACKED_ROWS - x.shape[0])
        padded = None if residual is None else F.pad(residual, filler)
        return packed_linear(F.pad(x, filler), packed, bias, activation, padded)[: x.shape[0]]
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed.weight, bias, "add")
    attr, algorithm = _FUSED_ACTIVATIONS.get(activation, ("none", ""))
    y = torch.ops.mkldnn._linear_pointwise(x, packed.weight, bias, attr, [], algorithm)
    return y if activation in _FUSED_ACTIVATIONS else reference.ACTIVATIONS[activation](y)


def activation(x: Tensor, name: str) -> Tensor:
    fn: Callable[[Tensor], Tensor] = reference.ACTIVATIONS[name]
    return fn(x)


def bias_activation(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    return activation(x if bias is None else (x + bias).to(x.dtype), name)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """y, or with `residual` (y, s): y the LayerNorm of s = x + residual."""
    if residual is None:
        return _layer_norm(x, weight, bias, eps)
    s = residual + x
    return _layer_norm(s, weight, bias, eps), s


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype == bias.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = torch.promote_types(torch.promote_types(x.dtype, torch.float32), weight.dtype)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)
