"""What a decoding step reads: a model's weights, quantized on request, and the sampling settings."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastgpt2.config import SamplingConfig
from fastgpt2.layers import Block, LayerNorm, Linear
from fastgpt2.model import GPT2Base
from fastgpt2_kernels import ops


def step_weights(model: GPT2Base, weight_dtype: torch.dtype | None = None) -> ops.StepWeights:
    """The model's own weights as a step reads them. With torch.int8 the linear layers' are quantized copies."""

    def linear(layer: Linear) -> ops.LinearWeights:
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        if weight_dtype == torch.int8:
            weight, scale = ops.quantize_rows(weight)
            return ops.LinearWeights(weight, bias, scale)
        return ops.LinearWeights(weight, bias)

    def layer_norm(layer: LayerNorm) -> ops.LayerNormWeights:
        return ops.LayerNormWeights(layer.weight.detach(), layer.bias.detach(), layer.eps)

    def block_weights(block: Block) -> ops.LayerWeights:
        return ops.LayerWeights(
            ln_1=layer_norm(block.ln_1),
            qkv=linear(block.attn.c_attn),
            projection=linear(block.attn.c_proj),
            ln_2=layer_norm(block.ln_2),
            up=linear(block.mlp.c_fc),
            down=linear(block.mlp.c_proj),
            attention_scale=block.scale,
        )

    transformer = model.transformer
    return ops.StepWeights(
        wte=transformer.wte.weight.detach(),
        wpe=transformer.wpe.weight.detach(),
        layers=tuple(block_weights(block) for block in transformer.h if isinstance(block, Block)),
        ln_f=layer_norm(transformer.ln_f),
        head=linear(model.lm_head),
        num_heads=model.config.num_heads,
        activation=ops.TRITON_ACTIVATIONS.get(model.config.activation_function, "linear"),
    )


@torch.no_grad()
def dequantized(model: GPT2Base, weights: ops.StepWeights) -> GPT2Base:
    """A copy of the model whose linear layers have the values of the step's 8-bit weights."""
    twin = copy.deepcopy(model)
    pairs: list[tuple[Linear, ops.LinearWeights]] = [(twin.lm_head, weights.head)]
    for block, layer in zip(twin.transformer.h, weights.layers, strict=True):
        if isinstance(block, Block):
            pairs += [(block.attn.c_attn, layer.qkv), (block.attn.c_proj, layer.projection)]
            pairs += [(block.mlp.c_fc, layer.up), (block.mlp.c_proj, layer.down)]
    for linear, held in pairs:
        if held.scale is not None:
            exact = held.weight.float() * held.scale[:, None]
            linear.weight = nn.Parameter(exact.to(model.dtype), requires_grad=False)  # the head is no longer tied
    return twin


def slot_sampling(
    config: SamplingConfig, num_slots: int, seen: Tensor | None, device: torch.device
) -> ops.SlotSampling:
    """The sampling settings of every slot. A filter that is off is None, so that the kernel has no code for it."""

    def full(name: str, value: float) -> Tensor:
        dtype = torch.int32 if name == "top_k" else torch.float32
        return torch.full((num_slots,), ops.in_range(name, value), dtype=dtype, device=device)

    penalty = None if seen is None else full("repetition_penalty", config.repetition_penalty)
    if config.is_greedy:
        return ops.SlotSampling(penalty=penalty, seen=seen)
    return ops.SlotSampling(
        temperature=full("temperature", config.temperature),
        top_k=None if config.top_k is None else full("top_k", config.top_k),
        top_p=None if config.top_p is None or config.top_p >= 1.0 else full("top_p", config.top_p),
        min_p=full("min_p", config.min_p) if config.min_p else None,
        penalty=penalty,
        seen=seen,
    )
