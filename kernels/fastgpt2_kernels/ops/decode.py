"""Decoding: linear layers for a few rows, and the decode step, which combines all the decoding kernels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt2_kernels import reference
from fastgpt2_kernels.backends import choose_backend, implementation, run_operator
from fastgpt2_kernels.native import decode as native_decode
from fastgpt2_kernels.ops.checks import check_same, describe
from fastgpt2_kernels.triton.launch import ACTIVATIONS as TRITON_ACTIVATIONS
from fastgpt2_kernels.types import LayerNormWeights, SlotSampling, SlotState, StepWeights, product_dtype

if TYPE_CHECKING:
    from fastgpt2_kernels.native.decode import DecodeStep as NativeStep
    from fastgpt2_kernels.native.decode import PackedWeights
    from fastgpt2_kernels.triton.decode.step import DecodeStep as TritonStep

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight to int8 with one scale per output, so that weight is approximately int8 * scale.

    Args:
        weight: (out, in), floating-point.

    Returns:
        int8 (out, in) and the scale (out,) in float32. A row's largest magnitude becomes 127; a row of zeros has the
        scale 1.

    Raises:
        ValueError: The weight is not a floating-point matrix.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"quantize_rows: weight must be a float tensor (out, in); got {describe(weight)}")
    wide = weight.detach().float()
    largest = wide.abs().amax(1) if weight.shape[1] else wide.new_zeros(weight.shape[0])
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (wide / scale[:, None]).round_().to(torch.int8), scale


def linear_decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    layer_norm: LayerNormWeights | None = None,
    activation: str = "linear",
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """A linear layer for a few rows: activation(LN(x) weight^T + bias) + residual.

    It is designed for 1 to about 64 rows and reads the weight once. A row's result is bitwise the same whatever other
    rows are in the batch. There are no gradients.

    Args:
        x: (R, K), float32, bfloat16 or float16.
        weight: (N, K), of a floating-point dtype, or int8 with `weight_scale`.
        bias: (N,), or None.
        weight_scale: (N,) float32, for an int8 weight; see `quantize_rows`.
        layer_norm: the LayerNorm applied to x first, or None.
        activation: a key of `ACTIVATIONS`.
        residual: (R, N), or None.
        out_dtype: the result's dtype; by default the residual's, or without a residual the products' dtype.
        backend: "auto", "triton" or "torch".

    Returns:
        The result (R, N). Products are computed in the weight's dtype. For an int8 weight it is the dtype of the bias,
        else of the LayerNorm's weight, else of x. Sums and statistics are float32.

    Raises:
        ValueError: Arguments do not go together, or the backend cannot be used.
    """
    name = "linear_decode"
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"{name}: x must be (R, K) and weight (N, K); got {tuple(x.shape)} and {tuple(weight.shape)}")
    (R, K), N = x.shape, weight.shape[0]
    if (weight.dtype == torch.int8) != (weight_scale is not None):
        raise ValueError(f"{name}: an int8 weight needs weight_scale, no other takes one; got {weight.dtype}")
    if weight_scale is not None and (weight_scale.shape != (N,) or weight_scale.dtype != torch.float32):
        raise ValueError(f"{name}: weight_scale must be float32 of shape ({N},); got {describe(weight_scale)}")
    parts = {"bias": (bias, (N,)), "residual": (residual, (R, N))}
    if layer_norm is not None:
        parts |= {"layer_norm.weight": (layer_norm.weight, (K,)), "layer_norm.bias": (layer_norm.bias, (K,))}
        if not 0 <= layer_norm.eps < math.inf:
            raise ValueError(f"{name}: layer_norm.eps must be finite and >= 0; got {layer_norm.eps}")
    for part, (tensor, shape) in parts.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: {part} must have shape {shape}; got {tuple(tensor.shape)}")
    given = {"x": x, "weight": weight, **{part: tensor for part, (tensor, _) in parts.items() if tensor is not None}}
    check_same(name, check_dtype=False, **given)
    for part, tensor in given.items():
        if tensor.dtype not in _FLOATS and not (part == "weight" and tensor.dtype in (torch.int8, torch.float64)):
            raise ValueError(f"{name}: {part} must be float32, bfloat16 or float16; got {tensor.dtype}")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"{name}: activation must be one of {sorted(reference.ACTIVATIONS)}; got {activation!r}")
    product = product_dtype(x, weight, bias, layer_norm)
    dtype = out_dtype or (product if residual is None else residual.dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"{name}: out_dtype must be a float dtype; got {dtype}")
    # Tiles are chosen for classes of rows, the powers of two.
    size = (R.bit_length(), K, N, product)
    chosen = choose_backend(name, x.device, backend, lambda: _why_not_triton(product, activation, given), size)
    return run_operator(
        name, chosen, backend, x.device, size, x, weight, bias, weight_scale, layer_norm, activation, residual, dtype
    )


def _why_not_triton(product: torch.dtype, activation: str, given: dict[str, Tensor]) -> str | None:
    if product not in _FLOATS:
        return f"it multiplies float32, bfloat16 and float16; got {product}"
    if activation != "linear" and activation not in TRITON_ACTIVATIONS:
        return f"the activation {activation!r} has no Triton kernel"
    strided = [part for part, t in given.items() if t.shape[-1] > 1 and t.stride(-1) != 1]
    return f"{', '.join(strided)} must have stride 1 in the last dimension: call .contiguous()" if strided else None


def decode_step(
    weights: StepWeights,
    slots: SlotState,
    sampling: SlotSampling,
    stop_ids: Tensor,
    max_rows: int,
    cache_dtype: torch.dtype,
    *,
    packed: PackedWeights | None = None,
    backend: str = "auto",
) -> TritonStep | NativeStep:
    """Build a decode step for up to `max_rows` rows over the state of the slots.

    Args:
        weights: the weights of the model. The Triton backend reads them in place. The native backend copies them when
            the step is built, so it does not see later changes.
        slots: the state of every slot. The step reads and updates it.
        sampling: how the tokens of every slot are chosen.
        stop_ids: the ids of the stop tokens, 1-D.
        max_rows: the most rows that a step decodes.
        cache_dtype: the dtype of the KV cache; float32 or bfloat16 on the native backend.
        packed: the result of `pack_step_weights(weights)`, only for the native backend. None packs the weights now.
        backend: "auto", "triton" or "native". There is no PyTorch version.

    Returns:
        `triton.decode.step.DecodeStep` or `native.decode.DecodeStep`. Call its `use_cache` before `run`.

    Raises:
        ValueError: The backend cannot be used. The native backend also raises if it cannot use these weights or this
            cache dtype.
    """
    chosen = choose_backend("decode_step", weights.wte.device, backend)
    options = {} if packed is None else {"packed": packed}
    step = implementation("decode_step", chosen)
    return step(weights, slots, sampling, stop_ids, max_rows, cache_dtype, **options)


def pack_step_weights(weights: StepWeights) -> PackedWeights:
    """Copy the weights of a decode step into the layout of the native backend. Several steps can share the copy.

    Args:
        weights: the weights of the model, on the CPU. Linear layers must be float32, bfloat16 or int8.

    Returns:
        The packed weights, for the argument `packed` of `decode_step`.

    Raises:
        ValueError: The native backend cannot be used, or a linear layer has another dtype.
    """
    choose_backend("decode_step", weights.wte.device, "native")
    return native_decode.pack_weights(weights)
