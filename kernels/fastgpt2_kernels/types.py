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
    """The borders of documents packed end to end into T tokens. `ops.plan_documents` makes it once for all layers.

    cu_seqlens: (documents + 1,) int32. starts, ends: (T,) int32, where each token's document starts and ends.
    """

    cu_seqlens: Tensor
    starts: Tensor
    ends: Tensor


class DecodeRows(NamedTuple):
    """Rows that go through `decode_attention` together, all with one new token (max_new = 1) or all with several.

    starts, counts, slots: (R,) int32, each row's first new token, how many it has, and its cache slot. Without starts
    and counts row r has token r alone, without slots its slot is r.
    """

    starts: Tensor | None
    counts: Tensor | None
    slots: Tensor | None
    max_new: int


class KernelPlan(NamedTuple):
    """Which kernel handles which rows of a `RowPlan`. The choice for a row depends on that row alone.

    lengths: (slots,) int32, the tokens that each slot holds, up to the largest slot of the plan.
    decode: rows of few new tokens after cached ones; their kernel writes the cache.
    fresh: of every run of rows without cached tokens the first token, the end, and the rows as documents.
    long: (slot, first token, number of new tokens, cached tokens) of the other rows.
    appended: (tokens,) int64, which tokens of fresh and long rows are still to be written to the cache; None: all.
    """

    lengths: Tensor
    decode: tuple[DecodeRows, ...]
    fresh: tuple[tuple[int, int, Documents], ...]
    long: tuple[tuple[int, int, int, int], ...]
    appended: Tensor | None


class RowPlan(NamedTuple):
    """Where the new tokens of one step go: made once a step, used by every layer.

    rows: for every row its cache slot, its number of new tokens, its number of cached tokens.
    slots, positions: (N,) int64, the cache slot and the position of each of the N new tokens, row after row.
    kernels: what the Triton backend needs; None where it cannot run.
    """

    rows: tuple[tuple[int, int, int], ...]
    slots: Tensor
    positions: Tensor
    kernels: KernelPlan | None = None


class LossRows(NamedTuple):
    """Results per row, zero where the target is ignored. All but `loss` are None unless requested."""

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

# The status of a slot: no row; a row whose first token is yet to be appended; a row being decoded.
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


def product_dtype(x: Tensor, weight: Tensor, bias: Tensor | None, layer_norm: LayerNormWeights | None) -> torch.dtype:
    """The dtype of a linear layer's products: the weight's; for int8, that of the bias, else the LayerNorm, else x."""
    if weight.is_floating_point():
        return weight.dtype
    return next(t.dtype for t in (bias, None if layer_norm is None else layer_norm.weight, x) if t is not None)


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
