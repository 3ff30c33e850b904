"""Decoding on a GPU or a CPU. A session holds the state of all rows, which is everything that a step needs.

On a GPU a step is 5 L + 3 kernel launches in a CUDA graph, and the host never waits for the step it has just started.
On a CPU one call of the native backend makes one step, or several until a row ends. Rows end inside the step (stop
tokens, limits, a full context). The host learns of it when it reads that step's tokens. On a GPU the next step is
already running then.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastgpt2.cache import KVCache
from fastgpt2.config import SamplingConfig
from fastgpt2.layers import MLP, Attention, Block, LayerNorm, Linear, Transformer
from fastgpt2.model import GPT2Base
from fastgpt2.step_inputs import dequantized, slot_sampling, step_weights
from fastgpt2.weights_mark import WeightsMark
from fastgpt2_kernels import ops

if TYPE_CHECKING:
    from fastgpt2_kernels.ops import PackedWeights
    from fastgpt2_kernels.ops.decode import TritonStep

# False in a build of PyTorch for CPUs. A kernel sanitizer's "cuda" device is then a stand-in without graphs and events.
_HAS_GPU_RUNTIME = bool(torch.version.cuda or torch.version.hip)
# The modules that a step computes. A module in their place (an adapter, a quantized layer) computes something else.
_MODULES = {Attention, Block, LayerNorm, Linear, MLP, Transformer, nn.Embedding, nn.ModuleList}
_DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "native": (torch.float32, torch.bfloat16),
}


def decode_backend(model: GPT2Base) -> str:
    """The backend whose step would decode `model`: "triton" or "native". `why_not_decode` says whether it can."""
    if model.backend in ("triton", "native"):
        return model.backend
    return "native" if model.device.type == "cpu" else "triton"


def why_not_decode(model: GPT2Base) -> str | None:
    """Why `model` cannot be decoded by a `DecodeSession`, in one sentence; None if it can."""
    config, device, backend = model.config, model.device, decode_backend(model)
    if model.backend == "torch":
        return "the model's backend is 'torch'"
    if backend == "native":
        reason = ops.why_not_native("decode_step", device)
    else:
        reason = ops.why_not_triton("decode_step", device, _size(model))
    if reason is not None:
        return reason
    if model.dtype not in _DTYPES[backend]:
        known = " and ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES[backend])
        return f"it takes {known}; the model is {model.dtype}"
    if config.head_dim > ops.MAX_HEAD_SIZE:
        return f"it takes head sizes up to {ops.MAX_HEAD_SIZE}; the model's is {config.head_dim}"
    if config.activation_function != "linear" and config.activation_function not in ops.TRITON_ACTIVATIONS:
        return f"the activation {config.activation_function!r} has no kernel"
    replaced = [name for name, module in model.named_modules() if type(module) not in _MODULES | {type(model)}]
    if replaced:
        return f"a module of the model was replaced (an adapter?): {replaced[0]}"
    parameters = list(model.parameters())
    if any(p.device != device or p.dtype != model.dtype for p in parameters):
        return "the model's parameters are not all on one device and of one dtype"
    if backend == "triton" and any(not p.is_contiguous() for p in parameters):
        return "the model's parameters are not all contiguous"
    return None


def _size(model: GPT2Base) -> tuple[int | torch.dtype, ...]:
    """What the kernels of a model's step are compiled for. If they fail, they fail for all models of this size."""
    config = model.config
    return (config.hidden_size, config.inner_dim, config.num_heads, config.vocab_size, model.dtype)


class NewRow(NamedTuple):
    """A row to start. Its cache slot already holds the prompt's tokens.

    Attributes:
        key: The two words that its random numbers depend on (`ops.row_keys`).
        limit: The most new tokens.
        produced: The number of new tokens that it already has. A row that continues from its last tokens has some, and
            `prompt_ids` are then those last tokens.
    """

    slot: int
    prompt_ids: Sequence[int]
    key: tuple[int, int]
    limit: int
    produced: int = 0


class Results(NamedTuple):
    """Tokens and natural-log probabilities of some steps, by step and slot. They may not have reached the host yet."""

    tokens: Tensor
    logprobs: Tensor
    ready: torch.cuda.Event | None

    @property
    def num_steps(self) -> int:
        return len(self.tokens)

    def read(self) -> tuple[list[int], list[float]]:
        """The results of the last step, by slot. Waits until it is done; later steps may still be running."""
        return self.read_all()[-1]

    def read_all(self) -> list[tuple[list[int], list[float]]]:
        """The results of every step."""
        if self.ready is not None:
            self.ready.synchronize()
        return list(zip(self.tokens.tolist(), self.logprobs.tolist(), strict=True))


class DecodeSession:
    """Decodes rows of a model, one in each slot of its cache, all with the same sampling settings.

    On a GPU each step is a CUDA graph. There is one for each power of two of rows, captured when it is first needed.
    Where capture fails, and on a CPU under Triton's interpreter, the kernels are launched one by one. On a CPU a step
    is one call of the native backend, on a packed copy of the weights as they were when the session was made.

    Args:
        cache: The keys and values of the rows. Its slots are those of the session, which grows and fills it.
        stop_ids: The tokens that end a row.
        use_pdl: Whether to use programmatic dependent launch. None tries it on the device (sm_90 and newer), and keeps
            it if it is faster and gives the same bits.
        weight_dtype: torch.int8 stores the linear layers' weights in 8 bits, with a scale for every output.
        packed: For the native backend, what `pack_step_weights` made from the model's weights; None packs them here.

    Raises:
        ValueError: A session cannot decode the model (`why_not_decode` says why), or `weight_dtype` or the cache does
            not fit it.
    """

    def __init__(
        self,
        model: GPT2Base,
        cache: KVCache,
        sampling: SamplingConfig,
        stop_ids: Sequence[int] = (),
        *,
        use_graphs: bool = True,
        use_pdl: bool | None = None,
        weight_dtype: torch.dtype | None = None,
        packed: PackedWeights | None = None,
    ) -> None:
        if (reason := why_not_decode(model)) is not None:
            raise ValueError(f"DecodeSession: cannot be used: {reason}")
        if weight_dtype not in (None, model.dtype, torch.int8):
            raise ValueError(f"DecodeSession: weight_dtype must be {model.dtype} or torch.int8; got {weight_dtype}")
        is_native = decode_backend(model) == "native"
        dtypes = _DTYPES["native"] if is_native else tuple({model.dtype: None, torch.float32: None})
        if cache.keys.device != model.device or cache.keys.dtype not in dtypes:
            raise ValueError(
                f"DecodeSession: the cache must be on {model.device} in {' or '.join(map(str, dtypes))}; "
                f"got {cache.keys.device} and {cache.keys.dtype}"
            )
        self.cache = cache
        self._model = weakref.ref(model)  # so that a session does not keep its model alive
        self._is_native = is_native
        self._vocab_size = model.config.vocab_size
        self.num_slots = cache.num_slots
        self._is_asynchronous = model.device.type == "cuda" and _HAS_GPU_RUNTIME
        # The device on which graphs, events and streams are made and used. torch.cuda.device takes -1 for no device.
        self._gpu: torch.device | int = model.device if self._is_asynchronous else -1
        self.use_graphs = use_graphs and self._is_asynchronous
        self.use_table = self.use_graphs  # only through it can a graph find a cache that has grown
        self.use_pdl = use_pdl if use_pdl is not None or self._may_have_pdl() else False
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._max_rows = self._bucket(self.num_slots)
        # Each spare row of a bucket gets an idle slot of its own, so that no two programs share one.
        total = self.num_slots if self._is_native else self.num_slots + self._max_rows
        device = model.device
        self.slots = ops.SlotState.idle(total, device)
        self.seen = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(total, model.config.vocab_size, dtype=torch.bool, device=device)
        self._step = ops.decode_step(
            # With packed weights the model's linear layers are not read, so they need no other dtype.
            step_weights(model, weight_dtype if packed is None else None),
            self.slots,
            slot_sampling(sampling, total, self.seen, device),
            ops.to_device(list(stop_ids), device, torch.int32),
            self._max_rows,
            cache.keys.dtype,
            packed=packed,
            backend=decode_backend(model),
        )
        self._stop_ids = self._step.stop_ids
        self._proven: set[int] = set()  # the numbers of rows with which the step's kernels have already run
        self._is_plain = False  # whether PyTorch replaces the kernels, because they failed and the model is "auto"
        self._plain_model: GPT2Base | None = None  # the model that then computes; None is the session's own
        self._plain_logits: Tensor | None = None  # the logits of the last step without kernels
        self._rows: dict[int, tuple[list[int], Tensor]] = {}
        self._cached: tuple[int, int] | None = None
        self.fits: tuple[object, ...] = ()

    @property
    def is_asynchronous(self) -> bool:
        """Whether `step` returns before the step is done."""
        return self._is_asynchronous

    def _bucket(self, rows: int) -> int:
        return rows if self._is_native else 1 << max(rows - 1, 0).bit_length()

    def _may_have_pdl(self) -> bool:
        """Whether the device may have programmatic dependent launch."""
        return self.use_graphs and not torch.version.hip and torch.cuda.get_device_capability(self._gpu)[0] >= 9

    def configure(self, sampling: SamplingConfig) -> None:
        """Sample with these settings from now on. ValueError if they need other filters than the session has."""
        old, device = self._step.sampling, self.slots.tokens.device
        new = slot_sampling(sampling, len(self.slots.tokens), self.seen, device)
        if [t is None for t in old] != [t is None for t in new]:
            raise ValueError("DecodeSession: it was made for other sampling filters; make a new one")
        for to, of in zip(old, new, strict=True):
            if to is not None and of is not None and to is not self.seen:
                to.copy_(of)

    @torch.no_grad()
    def prefill(
        self, slots: Sequence[int], prompts: Sequence[Sequence[int]], pasts: Sequence[int] | None = None
    ) -> Tensor:
        """Put prompts into the cache at their slots.

        Args:
            slots: The slot of each prompt.
            prompts: The tokens to add to each slot.
            pasts: How many tokens each slot already holds before them; None means none.

        Returns:
            The logits (R, V) float32 of the first new token of each prompt.

        Raises:
            ValueError: A slot or a prompt does not fit.
        """
        pasts = [0] * len(slots) if pasts is None else pasts
        counts = [len(ids) for ids in prompts]
        token_ids = ops.to_device([token for ids in prompts for token in ids], self.slots.tokens.device)
        if isinstance(self._step, ops.NativeStep):
            self.cache.reserve(max(past + count for past, count in zip(pasts, counts, strict=True)))
            self._find_cache()
            logits = self._step.prefill(token_ids, slots, counts, pasts)
            for slot, past, count in zip(slots, pasts, counts, strict=True):
                self.cache.lengths[slot] = past + count
            return logits
        model = self._model()
        if model is None:
            raise RuntimeError("DecodeSession: its model no longer exists; keep a reference to the model")
        plan = ops.plan_rows(slots, counts, pasts, token_ids.device)
        hidden = model.extend(token_ids, plan, self.cache)
        last = [end - 1 for end in itertools.accumulate(counts)]
        return model.logits(hidden[ops.to_device(last, hidden.device)]).float()

    def begin(self, rows: Sequence[NewRow], logits: Tensor) -> Results:
        """Put rows into their slots and choose their next tokens from logits (rows, V) float32.

        The former state of the slots is dropped. Only a row that continues (`produced` above 0) keeps the tokens that
        it has seen. ValueError for a slot or a prompt that does not fit.
        """
        for row in rows:
            if not 0 <= row.slot < self.num_slots:
                raise ValueError(f"DecodeSession: slots must be in 0 .. {self.num_slots - 1}; got {row.slot}")
            if not 0 < len(row.prompt_ids) <= self.cache.capacity:
                raise ValueError(
                    f"DecodeSession: slot {row.slot} cannot hold {len(row.prompt_ids)} tokens; the cache has room for "
                    f"{self.cache.capacity}: call cache.reserve"
                )
        if logits.shape != (len(rows), self._vocab_size) or logits.dtype != torch.float32:
            raise ValueError(
                f"DecodeSession: logits must be float32 of shape {(len(rows), self._vocab_size)}; "
                f"got {logits.dtype} {tuple(logits.shape)}"
            )
        state, device = self.slots, self.slots.tokens.device
        columns = [[row.slot, len(row.prompt_ids), row.limit, row.produced, *row.key] for row in rows]
        slots, lengths, limits, produced, *key = ops.to_device(columns, device, torch.int64).unbind(1)
        state.lengths[slots] = lengths.int()
        state.limits[slots] = limits.int()
        state.keys[slots] = torch.stack(key, 1)
        state.status[slots] = ops.FRESH
        state.produced[slots] = produced.int()  # the position of the token that is chosen now
        if self.seen is not None and (new := [row for row in rows if not row.produced]):
            self.seen[ops.to_device([row.slot for row in new], device, torch.int64)] = False
            seen = [(row.slot, token) for row in new for token in set(row.prompt_ids)]
            self.seen[tuple(ops.to_device(seen, device).unbind(1))] = True
        self._choose(logits, slots.int())
        state.produced[slots] += 1
        return self._results()

    def step(self, slots: Sequence[int], most: int = 1) -> Results:
        """Start a step that makes a token for each of `slots`. Rows that have ended do not change.

        most: The most steps that a CPU makes in this call. It makes fewer if a row ends.
        """
        if not 0 < len(slots) <= self.num_slots or len(set(slots)) != len(slots):
            raise ValueError(
                f"DecodeSession: a step must have 1 to {self.num_slots} different slots; got {list(slots)}"
            )
        self._find_cache()
        bucket = self._bucket(len(slots))
        rows = self._device_rows(bucket, slots)
        if isinstance(self._step, ops.NativeStep):
            done = self._step.run(rows, most)
            return Results(self._step.tokens[:done].clone(), self._step.logprobs[:done].clone(), None)
        if self.use_graphs:
            self._replay(bucket, rows)
        else:
            self._run(rows)
        return self._results()

    def step_logits(self, num_rows: int) -> Tensor:
        """The logits (R, V) float32 of the last step, in the order of its slots; the next step overwrites them.

        They match the slots only if no row of the step has ended.
        """
        if isinstance(self._step, ops.NativeStep):
            return self._step.step_logits(num_rows)
        if self._plain_logits is not None:
            return self._plain_logits[:num_rows]
        return self._kernels.buffers.logits[:num_rows]

    def replace_tokens(self, slots: Sequence[int], tokens: Tensor) -> None:
        """Put other tokens (R,) in place of those that `begin` or the last step chose for the slots.

        ValueError for a session with a repetition penalty, because it has already marked its own choices as seen.
        """
        if self.seen is not None:
            raise ValueError(
                "DecodeSession: tokens cannot be replaced with a repetition penalty; make a session without one"
            )
        at = ops.to_device(list(slots), self.slots.tokens.device, torch.int64)
        self.slots.tokens[at] = tokens.to(self.slots.tokens)

    def _find_cache(self) -> None:
        cache = (self.cache.keys.data_ptr(), self.cache.capacity)
        if cache != self._cached:
            self._step.use_cache(self.cache.keys, self.cache.values)
            self._cached = cache

    def _run(self, rows: Tensor) -> None:
        if not self._is_plain:
            held = [] if len(rows) in self._proven else [t.clone() for t in self.slots]
            try:
                self._kernels.run(rows, use_table=self.use_table, use_pdl=bool(self.use_pdl))
                self._proven.add(len(rows))
                return
            except ops.KernelFailedError as error:
                self._fall_back(error)
                for to, of in zip(
                    self.slots, held, strict=bool(held)
                ):  # undo what the launches before the failed one did
                    to.copy_(of)
        self._run_plain(rows)

    def _fall_back(self, error: ops.KernelFailedError) -> None:
        """Continue without the step's kernels, with a warning; raise an error if the model asks for them by name."""
        model = self._model()
        if model is None or model.backend != "auto":
            raise error
        ops.note_failure("decode_step", model.device, error, _size(model))
        self._is_plain, self.use_graphs = True, False
        if (weights := self._kernels.weights).head.scale is not None:
            self._plain_model = dequantized(model, weights)

    @torch.no_grad()
    def _run_plain(self, rows: Tensor) -> None:
        """Make a step with the operators of the model's own backend. Unlike the kernels, it waits for the device."""
        state, model, at = self.slots, self._plain_model or self._model(), rows.long()
        if model is None:
            raise RuntimeError("DecodeSession: its model no longer exists; keep a reference to the model")
        went_on = (state.status[at] == ops.RUNNING).int()
        past, produced = state.lengths[at] + went_on, state.produced[at] + went_on
        goes_on = (state.status[at] != ops.IDLE) & ~torch.isin(state.tokens[at], self._stop_ids)
        goes_on &= (produced < state.limits[at]) & (past < model.config.context_length)
        state.lengths[at], state.produced[at] = past, produced
        state.status[at] = torch.where(goes_on, ops.RUNNING, ops.IDLE).int()
        live = at[goes_on]
        if not len(live):
            return
        slots, lengths = live.tolist(), past[goes_on].tolist()
        plan = ops.plan_rows(slots, [1] * len(slots), lengths, live.device)
        hidden = model.extend(state.tokens[live].long(), plan, self.cache)
        self._plain_logits = model.logits(hidden).float()
        self._choose_plain(self._plain_logits, live.int())

    def _choose(self, logits: Tensor, slots: Tensor) -> None:
        if not self._is_plain:
            try:
                self._step.choose(logits, slots)
                return
            except ops.KernelFailedError as error:
                self._fall_back(error)
        self._choose_plain(logits, slots)

    def _choose_plain(self, logits: Tensor, slots: Tensor) -> None:
        state, choice = self.slots, self._step.sampling
        # A filter that is off keeps its default.
        options = {name: t for name, t in choice._asdict().items() if t is not None and name != "seen"}
        if "penalty" in options:
            options["repetition_penalty"] = options.pop("penalty")
        ops.sample(
            logits,
            **{"temperature": 0.0, **options},
            seen=choice.seen,
            mark_seen=choice.seen is not None,
            keys=state.keys,
            positions=state.produced,
            slots=slots,
            out=(state.tokens, state.logprobs),
        )

    def _device_rows(self, bucket: int, slots: Sequence[int]) -> Tensor:
        """The slots of a bucket's rows, in the tensor that its graph reads."""
        wanted = [*slots, *range(self.num_slots, self.num_slots + bucket - len(slots))]
        if bucket not in self._rows:
            with torch.inference_mode(False):  # so that it can be written to outside of inference mode
                self._rows[bucket] = [], torch.empty(bucket, dtype=torch.int32, device=self.slots.tokens.device)
        held, tensor = self._rows[bucket]
        if held != wanted:
            tensor.copy_(ops.to_device(wanted, tensor.device, torch.int32))
            self._rows[bucket] = wanted, tensor
        return tensor

    def _results(self) -> Results:
        tokens, logprobs = self.slots.tokens[None], self.slots.logprobs[None]
        if not self._is_asynchronous:
            return Results(tokens.clone(), logprobs.clone(), None)
        with torch.cuda.device(self._gpu):
            # Copies to pinned memory do not wait.
            tokens, logprobs = (t.to("cpu", non_blocking=True) for t in (tokens, logprobs))
            ready = torch.cuda.Event()
            ready.record()
        return Results(tokens, logprobs, ready)

    @property
    def _kernels(self) -> TritonStep:
        """The step on a GPU."""
        return cast("TritonStep", self._step)

    # -- graphs -------------------------------------------------------------------------------------------------

    def _replay(self, bucket: int, rows: Tensor) -> None:
        with torch.cuda.device(self._gpu):
            if bucket not in self._graphs:
                self._capture(bucket, rows)
            if bucket in self._graphs:
                self._graphs[bucket].replay()
                return
        self._run(rows)

    def _capture(self, bucket: int, rows: Tensor) -> None:
        """Capture the step of `bucket` rows. If that fails, the session warns and continues without graphs."""
        held = rows.clone()
        # Meanwhile all rows are idle ones, so that compiling launches and the self-test advance no row.
        torch.arange(self.num_slots, self.num_slots + bucket, out=rows)
        try:
            if self.use_pdl is None:
                self.use_pdl = self._pdl_is_better(rows)
            self._graphs[bucket] = self._captured(rows, self.use_pdl)
        except self._kernels.errors as error:
            self.use_graphs = False
            warnings.warn(
                f"DecodeSession: a CUDA graph cannot be used ({error}); kernels are launched one by one", stacklevel=4
            )
        finally:
            rows.copy_(held)

    def _captured(self, rows: Tensor, use_pdl: bool) -> torch.cuda.CUDAGraph:
        self._kernels.run(rows, use_table=True, use_pdl=use_pdl)
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # PyTorch's own stream for captures is on the device that captured first. "thread_local" lets other threads
            # allocate memory meanwhile.
            stream = torch.cuda.Stream(self._gpu)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._kernels.run(rows, use_table=True, use_pdl=use_pdl)
        finally:
            torch.cuda.set_stream(before)  # a capture that fails at its end leaves its stream current
        return graph

    def _pdl_is_better(self, rows: Tensor) -> bool:
        """Whether programmatic dependent launch gives bit-identical logits in less time on this device."""
        times, logits = [], []
        try:
            graphs = [self._captured(rows, use_pdl) for use_pdl in (False, True)]
        except self._kernels.errors:
            return False
        for graph in graphs:
            graph.replay()
            logits.append(self._kernels.buffers.logits[: len(rows)].clone())
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(20):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return torch.equal(*logits) and times[1] < times[0]


# -- reuse of sessions ----------------------------------------------------------------------------------------------

_KEPT: weakref.WeakKeyDictionary[GPT2Base, DecodeSession] = weakref.WeakKeyDictionary()


class _Packed(NamedTuple):
    """Packed weights, and a mark of the model's weights from which they were packed."""

    mark: WeightsMark
    weight_dtype: torch.dtype | None
    weights: PackedWeights


_PACKED: weakref.WeakKeyDictionary[GPT2Base, _Packed] = weakref.WeakKeyDictionary()


def acquire_session(
    model: GPT2Base,
    num_slots: int,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    weight_dtype: torch.dtype | None = None,
) -> DecodeSession:
    """A session with an empty cache: the last released one, with its graphs, if it fits. Otherwise a new one."""
    kept = _KEPT.pop(model, None)
    packed = _packed_weights(model, weight_dtype) if decode_backend(model) == "native" else None
    fits = _fits(model, num_slots, sampling, stop_ids, weight_dtype, packed)
    # Tensors made under torch.inference_mode could not be written to by a later run outside of it.
    with torch.inference_mode(False), torch.no_grad():
        if kept is not None and kept.fits == fits:
            kept.configure(sampling)
            kept.cache.lengths = [0] * num_slots
            if kept.cache.keys.is_inference():  # it grew under inference mode
                kept.cache.keys, kept.cache.values = kept.cache.keys.clone(), kept.cache.values.clone()
            return kept
        del kept
        # A bfloat16 cache is read in half the time, and rounds less than 8-bit weights do.
        dtype = torch.bfloat16 if weight_dtype == torch.int8 and decode_backend(model) == "native" else model.dtype
        cache = KVCache(model.config, num_slots, 1, dtype=dtype, device=model.device)
        session = DecodeSession(model, cache, sampling, stop_ids, weight_dtype=weight_dtype, packed=packed)
        session.fits = fits
        return session


def release_session(model: GPT2Base, session: DecodeSession) -> None:
    """Keep the session and its cache for the model's next run. They are dropped with the model."""
    _KEPT[model] = session


def drop_sessions(model: GPT2Base) -> None:
    """Free what generation keeps for the model's next run: packed weights, a cache, CUDA graphs.

    The next run reads the weights anew, so it also follows a change that was not noticed (see `WeightsMark`).
    """
    _KEPT.pop(model, None)
    _PACKED.pop(model, None)


def _packed_weights(model: GPT2Base, weight_dtype: torch.dtype | None) -> PackedWeights:
    """The model's weights in the native layout. Those of the last run are used again unless the model has changed."""
    kept = _PACKED.get(model)
    if kept is not None and kept.weight_dtype == weight_dtype and kept.mark.still_holds(model):
        return kept.weights
    drop_sessions(model)  # frees their memory before more is allocated
    del kept
    mark = WeightsMark(model)
    packed = ops.pack_step_weights(step_weights(model, weight_dtype))
    _PACKED[model] = _Packed(mark, weight_dtype, packed)
    return packed


def _fits(
    model: GPT2Base,
    num_slots: int,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    weight_dtype: torch.dtype | None,
    packed: PackedWeights | None,
) -> tuple[object, ...]:
    """What cannot change in a session: slots, weights, the kernels' flags and precision, and stop tokens."""
    filters = [t is None for t in slot_sampling(sampling, 0, None, torch.device("cpu"))]
    weights = [(p.data_ptr(), p.dtype, p.device) for p in model.parameters()]
    flags = (*filters, sampling.repetition_penalty == 1.0, ops.is_float32_exact(), model.backend)
    return num_slots, flags, tuple(stop_ids), tuple(weights), weight_dtype, id(packed)
