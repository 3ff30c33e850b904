"""Decoding on a CPU: linear layers with packed weights, cached attention, sampling, and the whole step as one call.

A step is one call into the extension, which enters one OpenMP region. The residual stream, sums, scores and statistics
are float32. The operands of the matrix products are in the model's dtype, or int8 with a scale for each token. The
cache is float32 or bfloat16.

Every output is summed in one order, whatever the number of rows and threads. So a row's result is bitwise the same
whatever other rows are in the batch. Two threads must not use the same object at once.

Dimension key: R rows, N new tokens of all rows, S slots, L layers, C width, V vocabulary, H heads, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt2_kernels import native
from fastgpt2_kernels.native import structs
from fastgpt2_kernels.types import LayerNormWeights, LinearWeights, SlotSampling, SlotState, StepWeights

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_CACHE_DTYPES = (torch.float32, torch.bfloat16)
# The phases of a step that `DecodeStep.times` measures. `waiting` is waiting for other threads.
PHASES = ("embedding", "norms and operands", "qkv", "attention", "other linear layers", "head", "sampling", "waiting")
# A prefill runs at most this many tokens through the layers at a time, unless one row has more.
PREFILL_TOKENS = 1024
# The most steps of one call. Their tokens are read together afterwards.
MAX_STEPS = 16


class Layout(NamedTuple):
    """How the instruction set in use lays out weights and operands; see LayoutArgs in api.h."""

    panel: int
    group: tuple[int, ...]
    operand: tuple[int, ...]
    row_padding: int
    key_split: int
    private_rows: int
    scratch_bytes: int

    @classmethod
    def of(cls, vocab: int = 1, positions: int = 1, head_size: int = 1, width: int = 1) -> Layout:
        args = structs.LayoutArgs(vocab=vocab, positions=positions, head_size=head_size, width=width)
        native.call(structs.LAYOUT, args)
        return cls(
            args.panel, tuple(args.group), tuple(args.operand), args.row_padding, args.key_split, args.private_rows,
            args.scratch_bytes,
        )  # fmt: skip

    def operand_bytes(self, type_: int, k: int) -> int:
        """The bytes that one row of k numbers takes as an operand."""
        padded = -(-k // self.group[type_]) * self.group[type_]
        return -(-padded * self.operand[type_] // 64) * 64 + self.row_padding

    def panels(self, n: int) -> int:
        return -(-n // self.panel)


class PackedLinear(NamedTuple):
    """A linear layer: its weight (n, k) in panels, its float32 bias and scale, and the int32 sums of int8 weights.

    Bias, scale and sums are padded with zeros to whole panels.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    sums: Tensor | None
    n: int
    k: int
    type: int

    def struct(self) -> structs.Linear:
        return structs.Linear(*(_address(t) for t in self[:4]), *self[4:])


class PackedNorm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float

    def struct(self) -> structs.LayerNorm:
        return structs.LayerNorm(_address(self.weight), _address(self.bias), self.eps)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def packed_bytes(n: int, k: int, dtype: torch.dtype, layout: Layout) -> int:
    group = layout.group[_TYPES[dtype]]
    return layout.panels(n) * layout.panel * (-(-k // group) * 4)


def pack_linear(linear: LinearWeights, into: Tensor | None = None) -> PackedLinear:
    """Pack a layer's weight (n, k), which is float32, bfloat16, or int8 with scale (n,), into panels.

    The weight is packed into the bytes `into`, or into new memory. Raises ValueError if arguments do not go together.
    """
    weight, bias, scale = linear
    if weight.dim() != 2 or 0 in weight.shape or weight.dtype not in _TYPES or weight.device.type != "cpu":
        raise ValueError(
            "pack_linear: weight must be (n, k) of float32, bfloat16 or int8 on the CPU; "
            f"got {weight.dtype} {tuple(weight.shape)} on {weight.device}"
        )
    n, k = weight.shape
    if (scale is not None) != (weight.dtype == torch.int8):
        raise ValueError(f"pack_linear: an int8 weight needs scale, no other takes one; got {weight.dtype}")
    for name, tensor in (("bias", bias), ("scale", scale)):
        if tensor is not None and tensor.shape != (n,):
            raise ValueError(f"pack_linear: {name} must be ({n},); got {tuple(tensor.shape)}")
    layout = Layout.of()
    size = packed_bytes(n, k, weight.dtype, layout)
    packed = torch.empty(size, dtype=torch.uint8) if into is None else into
    if packed.numel() != size or packed.data_ptr() % 64:
        raise ValueError(f"pack_linear: `into` must be {size} bytes at a multiple of 64; got {packed.numel()} bytes")
    width = layout.panels(n) * layout.panel

    def padded(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        out = torch.zeros(width)
        out[:n] = tensor.detach()
        return out

    weight = weight.detach() if weight.stride(1) == 1 else weight.detach().contiguous()
    sums = torch.zeros(width, dtype=torch.int32) if weight.dtype == torch.int8 else None
    type_ = _TYPES[weight.dtype]
    args = structs.PackArgs(
        _address(weight), _address(packed), _address(sums), n, k, type_, weight.stride(0), native.num_threads()
    )
    native.call(structs.PACK, args)
    return PackedLinear(packed, padded(bias), padded(scale), sums, n, k, type_)


def pack_norm(norm: LayerNormWeights) -> PackedNorm:
    weight, bias = (t.detach().float().contiguous() for t in norm[:2])
    return PackedNorm(weight, bias, norm.eps)


def _check_rows(name: str, tensor: Tensor, width: int) -> None:
    if tensor.dim() != 2 or tensor.shape[1] != width or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be float32 (rows, {width}) on the CPU; "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        raise ValueError(f"{name} must be contiguous along its last dimension; got strides {tensor.stride()}")


def linear(
    x: Tensor, linear: PackedLinear, *, layer_norm: PackedNorm | None = None, activation: str = "linear",
    residual: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """activation(LN(x) weight^T + bias) + residual, for x (R, k) float32 -> (R, n) float32.

    The operands of the product are rounded to the weight's dtype. `out` may be `residual`. Raises ValueError if
    arguments do not go together.
    """
    _check_rows("linear: x", x, linear.k)
    if activation not in native.ACTIVATIONS:
        raise ValueError(f"linear: activation must be one of {', '.join(native.ACTIVATIONS)}; got {activation!r}")
    if layer_norm is not None and layer_norm.weight.shape != (linear.k,):
        raise ValueError(f"linear: layer_norm must be of width {linear.k}; got {tuple(layer_norm.weight.shape)}")
    R = x.shape[0]
    out = x.new_empty(R, linear.n) if out is None else out
    for name, tensor in (("linear: out", out), ("linear: residual", residual)):
        if tensor is not None:
            _check_rows(name, tensor, linear.n)
            if tensor.shape[0] != R:
                raise ValueError(f"{name} must have {R} rows; got {tensor.shape[0]}")
    if R == 0:
        return out
    threads, layout = native.num_threads(), Layout.of(width=linear.k)
    rows = max(R, threads * layout.private_rows)
    operand = torch.empty(rows * layout.operand_bytes(linear.type, linear.k), dtype=torch.uint8)
    operand_scale = torch.empty(rows)
    scratch = torch.empty(threads * layout.scratch_bytes, dtype=torch.uint8)
    norm = None if layer_norm is None else ctypes.pointer(layer_norm.struct())
    to = structs.Epilogue(
        activation=native.ACTIVATIONS.index(activation), residual=_address(residual),
        residual_stride=0 if residual is None else residual.stride(0), out=_address(out), out_stride=out.stride(0),
    )  # fmt: skip
    args = structs.LinearArgs(
        linear.struct(), to, _address(x), norm, _address(operand), _address(operand_scale), _address(scratch), R,
        x.stride(0), threads, layout.scratch_bytes,
    )  # fmt: skip
    native.call(structs.LINEAR, args)
    return out


# -- attention ----------------------------------------------------------------------------------------------------


def cache_struct(keys: Tensor, values: Tensor) -> structs.Cache:
    """The struct of a cache: keys and values (L, S, H, T, D), float32 or bfloat16.

    They must have the same strides and be contiguous in T and D; else it raises ValueError.
    """
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dim() != 5 or tensor.dtype not in _CACHE_DTYPES or tensor.device.type != "cpu":
            raise ValueError(
                f"the cache's {name} must be float32 or bfloat16 (L, S, H, T, D) on the CPU; "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    if keys.shape != values.shape or keys.stride() != values.stride() or keys.dtype != values.dtype:
        raise ValueError(
            "the cache's keys and values must share shape, strides and dtype; "
            f"got {tuple(keys.shape)} {keys.stride()} {keys.dtype} and "
            f"{tuple(values.shape)} {values.stride()} {values.dtype}"
        )
    if keys.numel() and keys.stride()[3:] != (keys.shape[4], 1):
        raise ValueError(f"the cache must be contiguous in positions and head elements; got strides {keys.stride()}")
    return structs.Cache(
        _address(keys), _address(values), *keys.stride()[:3], keys.shape[1], keys.shape[3], _TYPES[keys.dtype]
    )


class RowTensors(NamedTuple):
    """The rows of a call as int32 tensors; see Rows in api.h."""

    slots: Tensor
    starts: Tensor
    counts: Tensor
    pasts: Tensor
    tasks: Tensor
    done: Tensor

    @classmethod
    def of(cls, slots: Sequence[int], counts: Sequence[int], pasts: Sequence[int], num_heads: int) -> RowTensors:
        counts_R = torch.tensor(counts, dtype=torch.int32)
        starts = (counts_R.cumsum(0) - counts_R).int()
        slots_R, pasts_R = (torch.tensor(t, dtype=torch.int32) for t in (slots, pasts))
        return cls(slots_R, starts, counts_R, pasts_R, *cls.plan(len(counts), num_heads))

    @staticmethod
    def plan(num_rows: int, num_heads: int) -> tuple[Tensor, Tensor]:
        """The tensors that the extension fills in: tasks and done."""
        return torch.zeros(num_rows + 1, dtype=torch.int32), torch.zeros(num_rows * num_heads, dtype=torch.int32)

    def struct(self, num_rows: int, num_tokens: int) -> structs.Rows:
        return structs.Rows(num_rows, num_tokens, *(_address(t) for t in self))


def _num_parts(num_rows: int, num_heads: int, capacity: int, head_size: int, layout: Layout) -> int:
    """How many float32 numbers the partial results of the rows' attention take."""
    return num_rows * num_heads * -(-capacity // layout.key_split) * (-(-head_size // 16) * 16 + 16)


def _check_rows_of(name: str, slots: Sequence[int], counts: Sequence[int], pasts: Sequence[int]) -> None:
    if not len(slots) == len(counts) == len(pasts) or len(set(slots)) != len(slots) or min(counts, default=1) < 1:
        raise ValueError(
            f"{name}: slots (all different), counts (1 or more) and pasts must have one entry per row; "
            f"got {list(slots)}, {list(counts)} and {list(pasts)}"
        )


def attention(
    qkv: Tensor, keys: Tensor, values: Tensor, layer: int, slots: Sequence[int], counts: Sequence[int],
    pasts: Sequence[int], *, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Append the new tokens of qkv (N, 3C) float32 to one layer of the cache, then attend to it -> (N, C).

    Row r has counts[r] new tokens in qkv, after those of earlier rows. Its cache slot slots[r] already holds pasts[r]
    tokens. A row that does not fit in its slot gives NaN and leaves the cache unchanged. Raises ValueError if arguments
    do not go together.
    """
    cache = cache_struct(keys, values)
    L, _, H, _, D = keys.shape
    _check_rows("attention: qkv", qkv, 3 * H * D)
    _check_rows_of("attention", slots, counts, pasts)
    if not 0 <= layer < L or D > native.MAX_HEAD_SIZE or sum(counts) != qkv.shape[0]:
        raise ValueError(
            f"attention: layer must be in 0 .. {L - 1}, heads at most {native.MAX_HEAD_SIZE} wide, counts sum to "
            f"{qkv.shape[0]}; got layer {layer}, head size {D}, counts {list(counts)}"
        )
    threads = native.num_threads()
    layout = Layout.of(positions=keys.shape[3], head_size=D, width=3 * H * D)
    rows = RowTensors.of(slots, counts, pasts, H)
    out = qkv.new_empty(qkv.shape[0], H * D)
    parts = torch.empty(_num_parts(len(slots), H, keys.shape[3], D, layout))
    scratch = torch.empty(threads * layout.scratch_bytes, dtype=torch.uint8)
    row_struct = rows.struct(len(slots), qkv.shape[0])
    work = structs.Attention(
        ctypes.pointer(cache), ctypes.pointer(row_struct), layer, H, D, D**-0.5 if scale is None else scale,
        _address(qkv), qkv.stride(0), _address(parts), _address(out), out.stride(0),
    )  # fmt: skip
    args = structs.AttentionArgs(work, _address(scratch), threads, layout.scratch_bytes)
    native.call(structs.ATTENTION, args)
    return out


# -- sampling -----------------------------------------------------------------------------------------------------


def _state_struct(state: SlotState) -> structs.Slots:
    for name, tensor in state._asdict().items():
        want = {"keys": torch.int64, "logprobs": torch.float32}.get(name, torch.int32)
        shape = (len(state.tokens), 2) if name == "keys" else (len(state.tokens),)
        if tensor.dtype != want or tensor.shape != shape or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(
                f"the slots' {name} must be contiguous {want} {shape} on the CPU; got {tensor.dtype} "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
    return structs.Slots(*(_address(t) for t in state), len(state.tokens))


def _sampling_struct(sampling: SlotSampling, num_slots: int, vocab: int) -> structs.Sampling:
    for name, tensor in sampling._asdict().items():
        if tensor is None:
            continue
        want = {"top_k": torch.int32, "seen": torch.bool}.get(name, torch.float32)
        shape = (num_slots, vocab) if name == "seen" else (num_slots,)
        if tensor.dtype != want or tensor.shape != shape or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be contiguous {want} {shape} on the CPU; got {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )
    if sampling.penalty is not None and sampling.seen is None:
        raise ValueError("a repetition penalty needs `seen` (S, V); got None")
    stride = 0 if sampling.seen is None else sampling.seen.stride(0)
    return structs.Sampling(*(_address(t) for t in sampling), stride)


def sample(logits: Tensor, slots: Tensor, state: SlotState, sampling: SlotSampling) -> None:
    """Choose the next token of the slots (R,) int32 from logits (R, V) float32, and write it to the slots' state."""
    R, V = logits.shape
    _check_rows("sample: logits", logits, V)
    if slots.shape != (R,) or slots.dtype != torch.int32 or not slots.is_contiguous() or V == 0:
        raise ValueError(
            f"sample: slots must be contiguous int32 ({R},), V at least 1; got {slots.dtype} {slots.shape}"
        )
    threads, layout = native.num_threads(), Layout.of(vocab=V)
    scratch = torch.empty(threads * layout.scratch_bytes, dtype=torch.uint8)
    args = structs.SampleArgs(
        _state_struct(state), _sampling_struct(sampling, len(state.tokens), V), _address(logits), _address(slots),
        _address(scratch), R, V, logits.stride(0), threads, layout.scratch_bytes,
    )  # fmt: skip
    native.call(structs.SAMPLE, args)


def sample_rows(
    logits: Tensor, ids: Tensor, logprobs: Tensor, slots: Tensor | None, settings: dict[str, Tensor | None],
    seen: Tensor | None, mark_seen: bool,
) -> None:  # fmt: skip
    """Choose a token for every row of logits (R, V), and write it to ids and logprobs (S,) at `slots`.

    `ops.sample` calls it.
    """
    R = logits.shape[0]
    at = torch.arange(R) if slots is None else slots.long()
    rows = {name: None if t is None else t[at].contiguous() for name, t in settings.items()}
    keys, positions, penalty = rows.pop("keys"), rows.pop("positions"), rows.pop("penalty")
    state = SlotState.idle(R, logits.device)
    if keys is not None and positions is not None:
        state = state._replace(keys=keys.long(), produced=positions)
    # A copy of the rows of `seen`, because the extension marks the tokens that it chooses.
    penalized = None if penalty is None or seen is None else seen[at].bool()
    sampling = SlotSampling(**rows, penalty=penalty, seen=penalized)
    wide = logits.detach().float()
    wide = wide if wide.stride(1) == 1 else wide.contiguous()
    sample(wide, torch.arange(R, dtype=torch.int32), state, sampling)
    ids[at], logprobs[at] = state.tokens.to(ids.dtype), state.logprobs
    if mark_seen and seen is not None:
        seen[at, state.tokens.long()] |= ~state.logprobs.isnan()


# -- the step -----------------------------------------------------------------------------------------------------


class PackedLayer(NamedTuple):
    ln_1: PackedNorm
    qkv: PackedLinear
    projection: PackedLinear
    ln_2: PackedNorm
    up: PackedLinear
    down: PackedLinear
    attention_scale: float


class PackedWeights(NamedTuple):
    """A model's weights for the native step: linear layers packed into one block of memory, the rest in float32."""

    layers: tuple[PackedLayer, ...]
    ln_f: PackedNorm
    head: PackedLinear


def pack_weights(weights: StepWeights) -> PackedWeights:
    """Copy a model's weights into the layout of the instruction set in use."""
    layout = Layout.of()

    def size(linear: LinearWeights) -> int:
        n, k = linear.weight.shape
        return -(-packed_bytes(n, k, linear.weight.dtype, layout) // 64) * 64

    linears = [m for layer in weights.layers for m in (layer.qkv, layer.projection, layer.up, layer.down)]
    linears.append(weights.head)
    # One block of memory that begins at a large page.
    memory = torch.empty(sum(map(size, linears)) + 2 * native.LARGE_PAGE, dtype=torch.uint8)
    offset = -native.use_large_pages(memory).data_ptr() % native.LARGE_PAGE
    packed = []
    for linear in linears:
        n, k = linear.weight.shape
        end = offset + packed_bytes(n, k, linear.weight.dtype, layout)
        packed.append(pack_linear(linear, memory[offset:end]))
        offset += size(linear)
    layers = tuple(
        PackedLayer(pack_norm(layer.ln_1), qkv, projection, pack_norm(layer.ln_2), up, down, layer.attention_scale)
        for layer, qkv, projection, up, down in zip(weights.layers, *(packed[i:-1:4] for i in range(4)), strict=True)
    )
    return PackedWeights(layers, pack_norm(weights.ln_f), packed[-1])


def why_not_step(weights: StepWeights) -> str | None:
    """Why `DecodeStep` cannot serve these weights, in one sentence; None if it can."""
    if (reason := native.why_not_native()) is not None:
        return reason
    dtypes = {t.dtype for t in (weights.wte, weights.wpe)}
    if weights.wte.device.type != "cpu" or dtypes not in ({torch.float32}, {torch.bfloat16}):
        return f"it takes float32 and bfloat16 on the CPU; the model is {weights.wte.dtype} on {weights.wte.device}"
    kinds = {m.weight.dtype for layer in weights.layers for m in (layer.qkv, layer.projection, layer.up, layer.down)}
    if len(kinds) > 1 or not kinds <= set(_TYPES) or weights.head.weight.dtype not in _TYPES:
        return f"it takes linear layers of one dtype, float32, bfloat16 or int8; got {sorted(map(str, kinds))}"
    if weights.wte.shape[1] // weights.num_heads > native.MAX_HEAD_SIZE:
        return f"it takes heads up to {native.MAX_HEAD_SIZE} wide; got {weights.wte.shape[1] // weights.num_heads}"
    if weights.activation not in native.ACTIVATIONS:
        return f"the activation {weights.activation!r} has no native kernel"
    if not weights.layers or len(weights.layers) > 1023:
        return f"it takes 1 to 1023 layers; got {len(weights.layers)}"
    return None


class _Buffers:
    """Buffers between the phases of a forward pass, for up to `num_tokens` tokens in `num_rows` rows."""

    def __init__(self, step: DecodeStep, num_tokens: int, num_rows: int) -> None:
        C, inner, layout = step.width, step.inner, step.layout
        self.num_tokens, self.num_rows, self.threads = num_tokens, num_rows, native.num_threads()
        rows = max(num_tokens, self.threads * layout.private_rows, num_rows)
        self.x, self.qkv = torch.empty(num_tokens, C), torch.empty(num_tokens, 3 * C)
        self.hidden = torch.empty(num_tokens if step.type == 2 else 0, max(C, inner))
        head = layout.operand_bytes(step.packed.head.type, C)
        widths = max(layout.operand_bytes(step.type, C), head), layout.operand_bytes(step.type, inner)
        self.operand, self.operand_2 = (torch.empty(rows * width, dtype=torch.uint8) for width in widths)
        self.operand_scale = torch.empty(rows)
        # Rows of logits begin at multiples of 64 bytes.
        self.logits = torch.empty(num_rows, -(-step.vocab // 16) * 16)[:, : step.vocab]
        self.active = torch.empty(num_rows, dtype=torch.int32)
        self.parts = torch.empty(0)  # its size depends on the cache; see `_arguments`
        self.scratch = torch.empty(self.threads * layout.scratch_bytes, dtype=torch.uint8)

    def fit(self, num_tokens: int, num_rows: int) -> bool:
        return num_tokens <= self.num_tokens and num_rows <= self.num_rows and native.num_threads() == self.threads


class DecodeStep:
    """A decoding step as one call into the extension. `prefill` runs on the same weights.

    The weights are packed when the step is made. This copy does not see later changes of the model's weights.

    Args:
        weights: the weights of the model. Linear layers are float32, bfloat16, or int8 with scales.
        slots: the state of every slot.
        sampling: how the tokens of every slot are chosen.
        stop_ids: the ids of the stop tokens.
        max_rows: the most rows that a step decodes.
        cache_dtype: float32 or bfloat16.
        packed: the result of `pack_weights(weights)`, to be shared by several steps. None packs the weights now.

    Raises:
        ValueError: The step cannot use these weights (see `why_not_step`) or this cache dtype.
    """

    def __init__(
        self, weights: StepWeights, slots: SlotState, sampling: SlotSampling, stop_ids: Tensor, max_rows: int,
        cache_dtype: torch.dtype, packed: PackedWeights | None = None,
    ) -> None:  # fmt: skip
        if (reason := why_not_step(weights)) is not None:
            raise ValueError(f"decode_step: the native backend cannot be used: {reason}")
        if cache_dtype not in _CACHE_DTYPES:
            raise ValueError(f"decode_step: the native backend's cache is float32 or bfloat16; got {cache_dtype}")
        self.cache_dtype = cache_dtype
        self.weights, self.slots, self.sampling = weights, slots, sampling
        self.stop_ids = stop_ids.int().contiguous()
        (self.vocab, self.width), self.context = weights.wte.shape, weights.wpe.shape[0]
        self.inner = weights.layers[0].up.weight.shape[0]
        self.num_heads = weights.num_heads
        self.max_rows = max_rows
        self.packed = pack_weights(weights) if packed is None else packed
        self.type = self.packed.layers[0].qkv.type
        layers = [
            structs.Layer(
                ln_1.struct(), qkv.struct(), projection.struct(), ln_2.struct(), up.struct(), down.struct(), scale
            )
            for ln_1, qkv, projection, ln_2, up, down, scale in self.packed.layers
        ]
        self._layers = (structs.Layer * len(layers))(*layers)
        self._tables = tuple(t.detach() if t.stride(1) == 1 else t.detach().contiguous() for t in weights[:2])
        self._cache: structs.Cache | None = None
        self.keys = self.values = torch.empty(0)
        self._step: tuple[_Buffers, RowTensors, structs.ForwardArgs] | None = None
        self._prefill: _Buffers | None = None
        self.times: Tensor | None = None  # (8,) float64, to which each step adds the seconds of PHASES, for a profile
        # The tokens that the steps of a call chose, by step and slot.
        self.tokens = torch.zeros(MAX_STEPS, len(slots.tokens), dtype=torch.int32)
        self.logprobs = torch.zeros(MAX_STEPS, len(slots.tokens))

    @property
    def layout(self) -> Layout:
        return Layout.of(self.vocab, self.context, self.width // self.num_heads, max(self.width, self.inner))

    def use_cache(self, keys: Tensor, values: Tensor) -> None:
        """Use this cache from now on: keys and values (L, S, H, T, D), which must have the same strides."""
        cache = cache_struct(keys, values)
        L, _, H, _, D = keys.shape
        if (len(self._layers), self.num_heads, self.width // self.num_heads, self.cache_dtype) != (L, H, D, keys.dtype):
            raise ValueError(
                f"use_cache: the cache must be {self.cache_dtype} of {len(self._layers)} layers, {self.num_heads} "
                f"heads of {self.width // self.num_heads}; got {keys.dtype} {tuple(keys.shape)}"
            )
        self.keys, self.values, self._cache = keys, values, cache
        self._step = self._prefill = None

    def run(self, slots: Tensor, steps: int = 1) -> int:
        """Decode a token for each of the slots, up to `steps` times. A row that has ended is left alone.

        It stops early after a step in which a row has ended. Signals are handled between two steps.

        Args:
            slots: (R,) int32, no two the same.
            steps: how many steps to run at most; no more than `MAX_STEPS` are run.

        Returns:
            How many steps were run. Their tokens are in `tokens` and `logprobs`.

        Raises:
            ValueError: `slots` does not fit, or there is no cache.
        """
        R = slots.shape[0]
        if slots.dim() != 1 or slots.dtype != torch.int32 or not slots.is_contiguous() or self.max_rows < R:
            raise ValueError(
                f"run: slots must be contiguous int32 of up to {self.max_rows}; got {slots.dtype} {tuple(slots.shape)}"
            )
        if self._cache is None:
            raise ValueError("run: there is no cache; call use_cache first")
        if self._step is None or not self._step[0].fit(R, R):
            buffers = _Buffers(self, self.max_rows, self.max_rows)
            rows = RowTensors.of([0] * self.max_rows, [0] * self.max_rows, [0] * self.max_rows, self.num_heads)
            self._step = buffers, rows, self._arguments(self._cache, buffers, rows, None, 0, 0)
        args = self._step[2]
        args.rows.slots, args.rows.num_rows = slots.data_ptr(), R
        args.times = _address(self.times)
        args.steps, args.steps_done = min(steps, MAX_STEPS), 0
        native.call(structs.FORWARD, args)
        return int(args.steps_done)

    def step_logits(self, num_rows: int) -> Tensor:
        """The logits (R, V) of the latest step, for its rows that had not ended, in order. `run` overwrites them."""
        if self._step is None:
            raise ValueError("step_logits: there are no logits before the first step; call run first")
        return self._step[0].logits[:num_rows]

    def prefill(
        self, token_ids: Tensor, slots: Sequence[int], counts: Sequence[int], pasts: Sequence[int] | None = None
    ) -> Tensor:
        """Append tokens to the cache slots. The slots' state is neither read nor written.

        Args:
            token_ids: (N,) int64, the tokens of all rows, row after row.
            slots: the cache slot of each row, no two the same.
            counts: how many tokens each row has.
            pasts: how many tokens each row's slot already holds. None means that all are empty.

        Returns:
            The logits (R, V) float32 after the last token of each row.

        Raises:
            ValueError: Tokens or rows do not fit, or there is no cache.
        """
        pasts = [0] * len(slots) if pasts is None else pasts
        _check_rows_of("prefill", slots, counts, pasts)
        if self._cache is None:
            raise ValueError("prefill: there is no cache; call use_cache first")
        room = min(self._cache.capacity, self.context)
        if token_ids.shape != (sum(counts),) or token_ids.dtype != torch.int64 or token_ids.device.type != "cpu":
            raise ValueError(
                f"prefill: token_ids must be int64 ({sum(counts)},) on the CPU; "
                f"got {token_ids.dtype} {tuple(token_ids.shape)}"
            )
        for slot, count, past in zip(slots, counts, pasts, strict=True):
            if not 0 <= slot < self._cache.slots or past < 0 or past + count > room:
                raise ValueError(
                    f"prefill: slots must be in 0 .. {self._cache.slots - 1} with room for {room} tokens; "
                    f"got slot {slot}, {past} tokens and {count} more"
                )
        token_ids = token_ids.contiguous()
        if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self.vocab:
            raise ValueError(f"prefill: token ids must be in [0, {self.vocab})")
        logits = torch.empty(len(slots), self.vocab)
        first = token = 0
        while first < len(slots):
            last, tokens = first + 1, counts[first]
            while last < len(slots) and tokens + counts[last] <= PREFILL_TOKENS:
                tokens += counts[last]
                last += 1
            part = slice(first, last)
            ids = token_ids[token : token + tokens]
            logits[part] = self._prefill_part(self._cache, ids, slots[part], counts[part], pasts[part])
            first, token = last, token + tokens
        return logits

    def _prefill_part(
        self, cache: structs.Cache, ids: Tensor, slots: Sequence[int], counts: Sequence[int], pasts: Sequence[int]
    ) -> Tensor:
        R, N = len(slots), len(ids)
        buffers = self._prefill
        if buffers is None or not buffers.fit(N, R):
            buffers = self._prefill = _Buffers(self, max(N, 64), max(R, 8))
        rows = RowTensors.of(slots, counts, pasts, self.num_heads)
        args = self._arguments(cache, buffers, rows, ids, R, N)
        args.times = _address(self.times)
        native.call(structs.FORWARD, args)
        return buffers.logits[:R]

    def choose(self, logits: Tensor, slots: Tensor) -> None:
        """Choose the next token of the slots (R,) int32 from logits (R, V) float32, and write it to the state."""
        sample(logits, slots, self.slots, self.sampling)

    def _arguments(
        self,
        cache: structs.Cache,
        buffers: _Buffers,
        rows: RowTensors,
        ids: Tensor | None,
        num_rows: int,
        num_tokens: int,
    ) -> structs.ForwardArgs:
        H, D = self.num_heads, self.width // self.num_heads
        buffers.parts = torch.empty(_num_parts(buffers.num_rows, H, cache.capacity, D, self.layout))
        wte, wpe = self._tables
        return structs.ForwardArgs(
            layers=self._layers, num_layers=len(self._layers), ln_f=self.packed.ln_f.struct(),
            head=self.packed.head.struct(), wte=_address(wte), wpe=_address(wpe), embedding_type=_TYPES[wte.dtype],
            wte_stride=wte.stride(0), wpe_stride=wpe.stride(0), vocab=self.vocab, width=self.width,
            context=self.context, heads=H, inner=self.inner,
            activation=native.ACTIVATIONS.index(self.weights.activation), state=_state_struct(self.slots),
            sampling=_sampling_struct(self.sampling, len(self.slots.tokens), self.vocab),
            stop_ids=_address(self.stop_ids), num_stops=len(self.stop_ids), cache=cache,
            rows=rows.struct(num_rows, num_tokens), token_ids=_address(ids), x=_address(buffers.x),
            qkv=_address(buffers.qkv), hidden=_address(buffers.hidden), operand=_address(buffers.operand),
            operand_2=_address(buffers.operand_2), operand_scale=_address(buffers.operand_scale),
            parts=_address(buffers.parts), logits=_address(buffers.logits), active=_address(buffers.active),
            scratch=_address(buffers.scratch), logits_stride=buffers.logits.stride(0), threads=buffers.threads,
            scratch_bytes=self.layout.scratch_bytes, step_tokens=_address(self.tokens),
            step_logprobs=_address(self.logprobs),
        )  # fmt: skip
