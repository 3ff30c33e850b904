"""One decoding step of GPT-2 in 5 L + 3 kernel launches.

The host does not wait for the device within a step, so one CUDA graph can replay it.

    begin          the rows' tokens become embeddings, or a row ends: a stop token, its limit, a full context
    L times        LayerNorm + QKV | append + attention, split over the keys | sum of the splits + projection + residual
                   | LayerNorm + up + activation | down + residual
    head           final LayerNorm + logits
    sample         the next token

The residual stream, sums and statistics are float32. The operands of the matrix products are in the model's dtype, as
in prefill. Everything that a row needs is on the device at its slot, so a graph captured for a number of rows serves
any slots. A row's result is bitwise the same whatever other rows are in the batch, because this holds for every kernel
here.

Dimension key: R rows of a step, S slots, L layers, C width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2_kernels.host import to_device
from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.arguments import Matrix
from fastgpt2_kernels.triton.decode.attention import Cache, Parts, Rows, decode_splits, num_splits
from fastgpt2_kernels.triton.decode.linear import Attended, linear_decode_out
from fastgpt2_kernels.triton.devices import LAUNCH_ERRORS, launch_kernel
from fastgpt2_kernels.triton.sampling import sample_rows
from fastgpt2_kernels.types import IDLE, RUNNING, LinearWeights, SlotSampling, SlotState, StepWeights

_IDLE, _RUNNING = tl.constexpr(IDLE), tl.constexpr(RUNNING)


class _Slots(NamedTuple):
    """Pointers to the members of `SlotState` that a step reads and writes."""

    tokens_ptr: Any
    status_ptr: Any
    lengths_ptr: Any
    produced_ptr: Any
    limits_ptr: Any


class _BeginMeta(NamedTuple):
    BLOCK_C: int
    BLOCK_STOPS: int


@triton.jit
def _begin_step_kernel(
    state, slots_ptr, counts_ptr, stop_ids_ptr, wte, wpe, x, C, context, num_stops, META: tl.constexpr
):
    """Write the embedding of row r's latest token to the residual stream, or end the row."""
    r = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + r).to(tl.int64)
    token = tl.load(state.tokens_ptr + slot).to(tl.int64)
    status = tl.load(state.status_ptr + slot)
    # Since the counts were last set, the previous step has appended a token and chosen another.
    went_on = (status == _RUNNING).to(tl.int32)
    past = tl.load(state.lengths_ptr + slot) + went_on
    produced = tl.load(state.produced_ptr + slot) + went_on
    offs_stop = tl.arange(0, META.BLOCK_STOPS)
    stops = tl.load(stop_ids_ptr + offs_stop, mask=offs_stop < num_stops, other=-1)
    is_stop = tl.max((stops == token).to(tl.int32), 0) > 0
    goes_on = (status != _IDLE) & (not is_stop) & (produced < tl.load(state.limits_ptr + slot)) & (past < context)
    tl.debug_barrier()  # all warps must have read the state before one of them writes it
    tl.store(state.lengths_ptr + slot, past)
    tl.store(state.produced_ptr + slot, produced)
    tl.store(state.status_ptr + slot, tl.where(goes_on, _RUNNING, _IDLE))
    tl.store(counts_ptr + r, goes_on.to(tl.int32))
    position = tl.minimum(past, context - 1).to(tl.int64)
    for c in range(0, C, META.BLOCK_C):
        offs_c = c + tl.arange(0, META.BLOCK_C)
        mask = offs_c < C
        embedded = tl.load(wte.ptr + token * wte.stride + offs_c, mask=mask).to(tl.float32)
        embedded += tl.load(wpe.ptr + position * wpe.stride + offs_c, mask=mask).to(tl.float32)
        tl.store(x.ptr + r * x.stride + offs_c, embedded, mask=mask)


class Buffers(NamedTuple):
    """Buffers between the kernels of a step, for the largest number of rows."""

    x: Tensor  # (R, C) float32, the residual stream
    qkv: Tensor  # (R, 3C)
    hidden: Tensor  # (R, inner)
    logits: Tensor  # (R, V) float32
    counts: Tensor  # (R,) int32, 1 for a row that goes on
    starts: Tensor  # (R,) int32, 0, 1, 2 ...
    parts: Parts


class DecodeStep:
    """A decoding step. Its tensors keep their addresses, so a CUDA graph can capture `run`.

    With `use_table`, `run` finds the cache through a table on the device. The cache can then be replaced (`use_cache`)
    without another capture. The weights are read in place.

    Args:
        weights: the weights of the model.
        slots: the state of every slot.
        sampling: how the tokens of every slot are chosen.
        stop_ids: the ids of the stop tokens.
        max_rows: the most rows that a step decodes.
        cache_dtype: the dtype of the KV cache.
    """

    errors = LAUNCH_ERRORS  # the errors that `run` may raise

    def __init__(
        self,
        weights: StepWeights,
        slots: SlotState,
        sampling: SlotSampling,
        stop_ids: Tensor,
        max_rows: int,
        cache_dtype: torch.dtype,
    ) -> None:
        wte = weights.wte
        device, dtype = wte.device, wte.dtype
        (V, C), context = wte.shape, weights.wpe.shape[0]
        H, inner = weights.num_heads, weights.layers[0].up.weight.shape[0]
        self.weights, self.slots, self.sampling, self.stop_ids = weights, slots, sampling, stop_ids
        self.keys = self.values = torch.empty(0, 0, H, 0, C // H, dtype=cache_dtype, device=device)
        self.cache_table = torch.zeros(5, dtype=torch.int64, device=device)
        qkv = torch.zeros(max_rows, 3 * C, dtype=dtype, device=device)
        # Rows of logits begin at multiples of 64 elements, which allows 128-bit accesses whatever the vocabulary.
        logits = torch.zeros(max_rows, -(-V // 64) * 64, dtype=torch.float32, device=device)[:, :V]
        self.buffers = Buffers(
            x=torch.zeros(max_rows, C, dtype=torch.float32, device=device),
            qkv=qkv,
            hidden=torch.zeros(max_rows, inner, dtype=dtype, device=device),
            logits=logits,
            counts=torch.zeros(max_rows, dtype=torch.int32, device=device),
            starts=torch.arange(max_rows, dtype=torch.int32, device=device),
            parts=Parts.empty(qkv, H, num_splits(context, self.keys, C // H)),
        )

    def use_cache(self, keys: Tensor, values: Tensor) -> None:
        """Use this cache from now on: keys and values (L, S, H, T, D), which must have the same strides.

        Raises:
            ValueError: Their strides differ.
        """
        if keys.stride() != values.stride():
            raise ValueError(f"use_cache: keys and values must share strides; got {keys.stride()}, {values.stride()}")
        self.keys, self.values = keys, values
        table = [keys.data_ptr(), values.data_ptr(), *keys.stride()[:3]]
        self.cache_table.copy_(to_device(table, self.cache_table.device, torch.int64))

    def run(self, slots: Tensor, *, use_table: bool = False, use_pdl: bool = False) -> None:
        """Decode a token for each of the slots.

        Args:
            slots: (R,) int32, no two the same.
            use_table: find the cache through the table on the device, for a CUDA graph.
            use_pdl: use programmatic dependent launch for the linear layers.
        """
        self._begin(slots)
        weights, (R,) = self.weights, slots.shape
        x, qkv, hidden, logits, counts, starts = (t[:R] for t in self.buffers[:6])
        parts = Parts(*(t[:R] for t in self.buffers.parts))
        rows = Rows(R, self.slots.lengths, slots, starts, counts)
        block_d = max(16, launch.next_power_of_2(self.keys.shape[4]))
        row = launch.decode_row(self.keys.element_size(), block_d)
        attended = Attended(parts, rows, row.split_s)
        for i, layer in enumerate(weights.layers):
            if use_table:
                cache = Cache(self.keys[0], self.values[0], weights.wpe.shape[0], self.cache_table, i)
            else:
                cache = Cache(self.keys[i], self.values[i], self.keys.shape[3])
            self._linear(x, layer.qkv, qkv, layer_norm=layer.ln_1, use_pdl=use_pdl)
            decode_splits(qkv, cache, rows, parts, layer.attention_scale)
            self._linear(attended, layer.projection, x, residual=x, use_pdl=use_pdl)
            self._linear(x, layer.up, hidden, layer_norm=layer.ln_2, activation=weights.activation, use_pdl=use_pdl)
            self._linear(hidden, layer.down, x, residual=x, use_pdl=use_pdl)
        self._linear(x, weights.head, logits, layer_norm=weights.ln_f, use_pdl=use_pdl)
        self.choose(logits, slots)

    def step_logits(self, num_rows: int) -> Tensor:
        """The logits (R, V) float32 of the latest step. The next step overwrites them."""
        return self.buffers.logits[:num_rows]

    def choose(self, logits: Tensor, slots: Tensor) -> None:
        """Choose the next token of the slots (R,) int32 from logits (R, V) float32, and write it to the state."""
        choice, state = self.sampling, self.slots
        sample_rows(
            logits,
            state.tokens,
            state.logprobs,
            slots=slots,
            keys=state.keys,
            positions=state.produced,
            temperature=choice.temperature,
            top_k=choice.top_k,
            top_p=choice.top_p,
            min_p=choice.min_p,
            penalty=choice.penalty,
            seen=choice.seen,
            mark_seen=choice.seen is not None,
        )

    def _begin(self, slots: Tensor) -> None:
        state, weights, x = self.slots, self.weights, self.buffers.x
        C = x.shape[1]
        launch_kernel(
            x.device,
            _begin_step_kernel,
            (slots.shape[0],),
            state=_Slots(state.tokens, state.status, state.lengths, state.produced, state.limits),
            slots_ptr=slots,
            counts_ptr=self.buffers.counts,
            stop_ids_ptr=self.stop_ids,
            wte=Matrix.of(weights.wte),
            wpe=Matrix.of(weights.wpe),
            x=Matrix.of(x),
            C=C,
            context=weights.wpe.shape[0],
            num_stops=self.stop_ids.shape[0],
            META=_BeginMeta(
                BLOCK_C=min(1024, launch.next_power_of_2(C)),
                BLOCK_STOPS=launch.next_power_of_2(max(1, self.stop_ids.shape[0])),
            ),
            num_warps=4,
            **launch.OPTIONS,
        )

    @staticmethod
    def _linear(x: Tensor | Attended, linear: LinearWeights, out: Tensor, **options: Any) -> None:
        linear_decode_out(x, linear.weight, out, bias=linear.bias, weight_scale=linear.scale, **options)
