"""Data that operators and backends exchange: options, plans of ragged batches, weights and slots of a decode step.

Plain data: nothing here computes, and nothing loads Triton.

Dimension key: B batch, T query tokens, S slots, N tokens, R rows, C width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# -- attention and losses ------------------------------------------------------------------------------------------


class AttentionOptions(NamedTuple):
    scale: float
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    upcast: bool = False


class Documents(NamedTuple):
    """Where documents begin and end that lie end to end in one row of T tokens.

    `ops.plan_documents` makes it once for all layers.

    Attributes:
        cu_seqlens: (documents + 1,) int32. Document i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1.
        starts: (T,) int32, where each token's document starts.
        ends: (T,) int32, where each token's document ends.
    """

    cu_seqlens: Tensor
    starts: Tensor
    ends: Tensor


class DecodeRows(NamedTuple):
    """Rows that go through `decode_attention` together.

    starts, counts, slots: (R,) int32, each row's first new token, its number of new tokens, and its cache slot. With
    starts and counts None, row r has token r alone. With slots None, row r uses slot r.
    max_new: the most new tokens of a row. 1 chooses the kernel for rows of one token.
    """

    starts: Tensor | None
    counts: Tensor | None
    slots: Tensor | None
    max_new: int


class KernelPlan(NamedTuple):
    """Which kernel handles which rows of a `RowPlan`. The choice for a row depends on that row alone.

    lengths: (slots,) int32, how many tokens each slot holds, up to the largest slot of the plan.
    decode: rows with a few new tokens after cached ones. Their kernel writes the cache.
    fresh: runs of neighbouring rows without cached tokens. For each run: its first token, its end, and its rows as
        documents.
    long: the other rows, as (slot, first token, number of new tokens, number of cached tokens).
    appended: (tokens,) int64, the tokens of fresh and long rows, which must still be written to the cache. None means
        all tokens.
    """

    lengths: Tensor
    decode: tuple[DecodeRows, ...]
    fresh: tuple[tuple[int, int, Documents], ...]
    long: tuple[tuple[int, int, int, int], ...]
    appended: Tensor | None


class RowPlan(NamedTuple):
    """Where the new tokens of one step go. `ops.plan_rows` makes it once per step for all layers.

    Attributes:
        rows: for every row its cache slot, its number of new tokens, and its number of cached tokens.
        slots: (N,) int64, the cache slot of each of the N new tokens, row after row.
        positions: (N,) int64, the position of each new token.
        kernels: what the Triton backend needs. None where it cannot run.
    """

    rows: tuple[tuple[int, int, int], ...]
    slots: Tensor
    positions: Tensor
    kernels: KernelPlan | None = None


class LossRows(NamedTuple):
    """Results per row, 0 where the target is ignored. All but `loss` are None unless they were asked for."""

    loss: Tensor
    lse: Tensor | None = None
    logprob: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None


class CrossEntropyOptions(NamedTuple):
    """The options of `ops.cross_entropy`."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    shift: bool
    fuse_backward: bool
    inplace_backward: bool
    return_stats: bool


class LossOptions(NamedTuple):
    """The options of `ops.linear_cross_entropy`."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_scale: float
    chunk_rows: int
    compute_dtype: torch.dtype  # of the matrix products; the softmax is float32 (float64 for float64 inputs)
    use_triton: bool

    @property
    def wide_dtype(self) -> torch.dtype:
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32


# -- a decoding step ----------------------------------------------------------------------------------------------

# The status of a slot: it has no row; its row's first token is not in the cache yet; its row is being decoded.
IDLE, FRESH, RUNNING = 0, 1, 2


class LayerNormWeights(NamedTuple):
    """The weights of a LayerNorm: weight and bias (C,)."""

    weight: Tensor
    bias: Tensor
    eps: float


class LinearWeights(NamedTuple):
    """The weights of a linear layer.

    Attributes:
        weight: (out, in), contiguous along `in`, of a floating-point dtype, or int8 with `scale`.
        bias: (out,), or None.
        scale: (out,) float32, for an int8 weight; else None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


def product_dtype(x: Tensor, weight: Tensor, bias: Tensor | None, layer_norm: LayerNormWeights | None) -> torch.dtype:
    """The dtype of a linear layer's products: the weight's, or for int8 that of the bias, the LayerNorm or x.

    The first of these that is there counts.
    """
    if weight.is_floating_point():
        return weight.dtype
    return next(t.dtype for t in (bias, None if layer_norm is None else layer_norm.weight, x) if t is not None)


class LayerWeights(NamedTuple):
    """The weights of a layer. qkv (3C, C): queries, then keys, then values. `attention_scale` multiplies q k^T."""

    ln_1: LayerNormWeights
    qkv: LinearWeights
    projection: LinearWeights
    ln_2: LayerNormWeights
    up: LinearWeights
    down: LinearWeights
    attention_scale: float


class StepWeights(NamedTuple):
    """The weights of a model for a decode step.

    Attributes:
        wte: (V, C), the token embedding.
        wpe: (context, C), the position embedding.
        layers: the weights of each layer.
        ln_f: the final LayerNorm.
        head: (V, C), the layer that computes the logits.
        num_heads: the number of attention heads.
        activation: a value of `ops.TRITON_ACTIVATIONS`, or "linear".
    """

    wte: Tensor
    wpe: Tensor
    layers: tuple[LayerWeights, ...]
    ln_f: LayerNormWeights
    head: LinearWeights
    num_heads: int
    activation: str


class SlotState(NamedTuple):
    """The state of the rows on the device, with one entry per slot. Tensors are int32 (S,) unless said otherwise.

    Attributes:
        tokens: the latest token, which is not in the cache yet.
        status: `IDLE`, `FRESH` or `RUNNING`.
        lengths: the number of tokens in the cache.
        produced: the number of new tokens so far.
        limits: the most new tokens that the row may get.
        keys: (S, 2) int64, the two words that the row's noise is drawn with; see `ops.row_keys`.
        logprobs: (S,) float32, the log-probability of `tokens`.
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
        """The state of `num_slots` slots that have no rows."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        n = num_slots
        keys, logprobs = zeros(n, 2, dtype=torch.int64), zeros(n, dtype=torch.float32)
        return cls(zeros(n), zeros(n), zeros(n), zeros(n), zeros(n), keys, logprobs)


class SlotSampling(NamedTuple):
    """How the tokens of each slot are chosen. The settings are tensors (S,), or None where a filter is off.

    Temperature None means greedy. `seen` (S, V) bool marks the tokens of each slot's sequence for the repetition
    penalty; a step marks the tokens that it chooses.
    """

    temperature: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    penalty: Tensor | None = None
    seen: Tensor | None = None
