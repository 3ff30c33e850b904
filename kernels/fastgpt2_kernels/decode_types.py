"""What a decoding step is given: weights, the rows' state, the way of sampling. Plain data, without Triton.

Dimension key: S slots, C width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# What a slot is: without a row, with one whose first token is yet to be appended, with one in the middle.
IDLE, FRESH, RUNNING = 0, 1, 2


class LayerNormWeights(NamedTuple):
    """weight and bias (C,)."""

    weight: Tensor
    bias: Tensor
    eps: float


class LinearWeights(NamedTuple):
    """weight (out, in), contiguous along in: a float dtype, or int8 with scale (out,) float32. bias (out,)."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


class LayerWeights(NamedTuple):
    """qkv (3C, C): queries, keys, values. `attention_scale` is what q k^T is multiplied by."""

    ln_1: LayerNormWeights
    qkv: LinearWeights
    projection: LinearWeights
    ln_2: LayerNormWeights
    up: LinearWeights
    down: LinearWeights
    attention_scale: float


class StepWeights(NamedTuple):
    """wte (V, C), wpe (context, C), head (V, C); `activation` is a value of `ops.TRITON_ACTIVATIONS`, or "linear"."""

    wte: Tensor
    wpe: Tensor
    layers: tuple[LayerWeights, ...]
    ln_f: LayerNormWeights
    head: LinearWeights
    num_heads: int
    activation: str


class SlotState(NamedTuple):
    """The rows' state on the device, an entry a slot: int32, but for `keys` (S, 2) int64 and `logprobs` float32.

    tokens: the latest one, which is not in the cache yet. lengths: tokens in the cache. produced: new tokens so far.
    limits: the most new tokens. keys: two words, of the row's noise. logprobs: of `tokens`.
    """

    tokens: Tensor
    status: Tensor
    lengths: Tensor
    produced: Tensor
    limits: Tensor
    keys: Tensor
    logprobs: Tensor

    @classmethod
    def idle(cls, num_slots: int, device: torch.device) -> SlotState:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        n = num_slots
        keys, logprobs = zeros(n, 2, dtype=torch.int64), zeros(n, dtype=torch.float32)
        return cls(zeros(n), zeros(n), zeros(n), zeros(n), zeros(n), keys, logprobs)


class SlotSampling(NamedTuple):
    """How every slot's tokens are chosen: tensors (S,), None where a filter is off; temperature None is greedy.

    seen (S, V) bool: the tokens of each slot's sequence, for the repetition penalty; chosen ones are marked.
    """

    temperature: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    penalty: Tensor | None = None
    seen: Tensor | None = None
