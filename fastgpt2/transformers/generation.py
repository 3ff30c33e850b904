"""`generate` of transformers' GPT-2 classes on our decoding step, without padding.

transformers' `generate` turns its arguments into logits processors and stopping criteria, and then calls a method for
the decoding strategy. `FastGenerationMixin` overrides only the method for greedy decoding and sampling. So every
argument keeps its meaning, and other strategies (beam search, assisted decoding ...) still run in transformers.

A run goes one of three ways:

- The fused step chooses the tokens itself: greedy, temperature, top-k, top-p, min-p, repetition penalty.
- With other logits processors, or if scores are asked for, the step returns logits, and transformers' own processors
  run on them.
- For the reasons that `why_not_fast` gives, it runs in transformers' own loop.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation import GenerationMixin
from transformers.generation import logits_process as processes
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from fastgpt2.config import GPT2Config, SamplingConfig
from fastgpt2.decode import DecodeSession, NewRow, Results, acquire_session, release_session, why_not_decode
from fastgpt2.formats.huggingface import load_hf_views
from fastgpt2.gpt2 import GPT2
from fastgpt2.weights_mark import WeightsMark
from fastgpt2_kernels import ops

_LOGGER = logging.getLogger(__name__)
# Prompt tokens prefilled in one forward pass.
_PREFILL_TOKENS = 4096
_NO_LIMIT = 2**31 - 1
# Arguments that `generate` always passes to its loop.
_USUAL_INPUTS = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", "tokenizer")
# How transformers names the cache; newer releases call it "cache".
_CACHE_NAMES = ("past_key_values", "cache")
_CACHE_OF_OUTPUT = next(name for name in _CACHE_NAMES if name in GenerateDecoderOnlyOutput.__dataclass_fields__)
# These attention implementations compute the same as ours.
_ATTENTION = {None, "eager", "sdpa", "fastgpt2", "flash_attention_2", "flash_attention_3", "flex_attention"}
# Methods that transformers' loop calls. A model that overrides one of them may compute something else.
_LOOP_METHODS = ("forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill")


class FastGenerationMixin(GenerationMixin):
    """Greedy decoding and sampling by `generate`, as fast as `fastgpt2.GPT2` generates.

    Put it before a GPT-2 class of transformers in the list of base classes. It differs from transformers in this:

    - Rows are decoded without their padding, wherever it lies. A right-padded prompt gives what it gives alone. Logits
      processors and stopping criteria see the padding on the left.
    - Samples follow from `torch.manual_seed`, but they are not those that transformers draws from the same seed.
    - A row that has ended has scores and logits of 0, and zeros in the returned cache.
    - A row of padding only, or one that grows past the context, raises a ValueError.
    """

    @torch.no_grad()
    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        inputs, reason = model_kwargs, _why_not_inputs(model_kwargs)
        rows = None
        if reason is None:
            if (keep := _tokens_of(input_ids, inputs)) is None:
                reason = "its attention mask or positions are none that padding has"
            else:
                rows = _Rows.of(input_ids, keep)
                reason = why_not_fast(self, generation_config, synced_gpus, inputs)
        if reason is not None:
            _LOGGER.info("generate runs in transformers' own loop: %s", reason)
        if rows is None or (reason is not None and rows.is_left_padded):
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        processors = rows.left_padded_processors(logits_processor)
        if reason is not None:
            model_kwargs |= rows.left_padded_inputs()
            result = super()._sample(
                rows.ids, processors, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        else:
            engine = _ENGINES[self].model
            run = _Run(engine, rows, processors, stopping_criteria, generation_config, streamer)
            result = run.result(_cache_of(inputs))
        return rows.as_given(result)

    def train(self, mode: bool = True) -> Any:
        if mode:
            _ENGINES.pop(self, None)  # its weights are about to change
        return super().train(mode)


# -- whether the step can serve a call --------------------------------------------------------------------------------


def _cache_of(inputs: dict[str, Any]) -> Any:
    return next((inputs[name] for name in _CACHE_NAMES if inputs.get(name) is not None), None)


def _why_not_inputs(inputs: dict[str, Any]) -> str | None:
    """Why the inputs of the forward pass are more than prompts and their padding; None if they are not."""
    usual = (*_USUAL_INPUTS, *_CACHE_NAMES)
    given = sorted(name for name, value in inputs.items() if value is not None and name not in usual)
    cache = _cache_of(inputs)
    if given:
        return f"it has {', '.join(given)}"
    is_fresh = type(cache) in (DynamicCache, StaticCache) and not getattr(cache, "_is_user_defined", False)
    return None if cache is None or is_fresh else "it has a cache of the user's or of another kind"


def why_not_fast(model: Any, config: Any, synced_gpus: bool, inputs: dict[str, Any]) -> str | None:
    """Why a call of `generate` with plain prompts runs in transformers' own loop; None if it runs on our step.

    Args:
        model: The model.
        config: The `GenerationConfig` of the call.
        synced_gpus: Whether processes generate in step with each other.
        inputs: What the loop would pass to the model's forward pass.
    """
    if synced_gpus or config.is_assistant:
        return "its steps are tied to another model's or process's"
    if type(_cache_of(inputs)) is not DynamicCache or config.cache_implementation not in (None, "dynamic"):
        return "it asks for a cache of another kind, or for none"
    if config.prefill_chunk_size is not None:
        return "it asks for a prefill in chunks"
    return _why_not_model(model)


def _why_not_model(model: Any) -> str | None:
    own = model.config
    if model.training and max(own.resid_pdrop, own.embd_pdrop, own.attn_pdrop) > 0:
        return "the model is in training mode, with dropout"
    if own._attn_implementation not in _ATTENTION:
        return f"the model attends by {own._attn_implementation!r}"
    device = next(model.parameters()).device
    if torch.is_autocast_enabled(device.type) or torch.compiler.is_compiling():
        return "it runs under autocast or torch.compile"
    for name in _LOOP_METHODS:
        place = getattr(getattr(type(model), name), "__module__", "")
        if name in model.__dict__ or not place.startswith(("transformers.", "fastgpt2.")):
            return f"the model has a {name} of its own"
    if (odd := next((name for name, module in model.named_modules() if not _is_plain(module)), None)) is not None:
        return f"the module {odd!r} has hooks or is another than GPT-2's" if odd else "the model has hooks"
    try:
        return why_not_decode(_update_engine(model))
    except ValueError as error:
        return str(error)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes just what its class in transformers or PyTorch computes."""
    kind = type(module)
    has_hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )
    is_known = kind.__module__.startswith(("transformers.", "torch.nn.", "fastgpt2.")) or isinstance(
        module, FastGenerationMixin
    )
    return is_known and not has_hooks and "forward" not in module.__dict__ and not hasattr(module, "parametrizations")


# -- the model on our step --------------------------------------------------------------------------------------------


class _Engine(NamedTuple):
    """Our model on the weights of a model of transformers, and a mark of these weights as they were then."""

    config: GPT2Config
    mark: WeightsMark
    model: GPT2


_ENGINES: weakref.WeakKeyDictionary[nn.Module, _Engine] = weakref.WeakKeyDictionary()


def _update_engine(model: Any) -> GPT2:
    """Our GPT2 on the weights of a GPT-2 with a head. It is kept between calls until the weights change.

    On a CPU both share the storage of the weights. On a GPU the linear layers' weights are copied once, because the
    kernels read them transposed.

    Raises:
        ValueError: The model is not a plain GPT-2.
    """
    state = {n: t for n, t in model.state_dict().items() if n.startswith(("transformer.", "lm_head."))}
    tied = state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    # The call names the special tokens. Fields that we do not know have been read by transformers.
    fields = {**model.config.to_dict(), "tie_word_embeddings": tied}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config = GPT2Config.from_hf({**fields, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
    kept = _ENGINES.get(model)
    if kept is not None and kept.config == config and kept.mark.still_holds(model):
        return kept.model
    _ENGINES.pop(model, None)  # frees its memory before more is allocated
    del kept
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            ours = GPT2(config)
        load_hf_views(ours, state)
        if ours.device.type != "cpu":
            for parameter in ours.parameters():
                parameter.data = parameter.data.contiguous()
        ours.requires_grad_(False).eval()
        _ENGINES[model] = _Engine(config, WeightsMark(model), ours)
    return ours


# -- rows and their padding -------------------------------------------------------------------------------------------


def _tokens_of(input_ids: Tensor, inputs: dict[str, Any]) -> Tensor | None:
    """Which of the ids (B, T) are not padding, as bool; None if masks and positions mean something other than padding.

    A token that the mask leaves out is padding wherever it lies: no token sees it, and positions do not count it.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is None:
        keep = torch.ones_like(input_ids, dtype=torch.bool)
    elif mask.shape == input_ids.shape and bool(((mask == 0) | (mask == 1)).all()):
        keep = mask.to(input_ids.device).bool()
    else:
        return None
    if positions is None:
        return keep
    if positions.dim() != 2 or positions.shape[1] != keep.shape[1] or positions.shape[0] not in (1, keep.shape[0]):
        return None
    usual = positions.to(keep.device) == keep.long().cumsum(1) - 1
    return keep if bool((usual | ~keep).all()) else None


class _Rows(NamedTuple):
    """Prompts with their padding on the left, and how they were given.

    ids, keep (B, T): padding where `keep` is False; given, given_keep: as they came; order (B, T): the column of
    `given` that each column of `ids` holds.
    """

    ids: Tensor
    keep: Tensor
    given: Tensor
    given_keep: Tensor
    order: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, keep: Tensor) -> _Rows:
        if not bool(keep.any(1).all()):
            row = int(keep.any(1).int().argmin())
            raise ValueError(
                f"generate: row {row} of the batch is padding only; give it a token to begin with, such as bos_token_id"
            )
        order = keep.long().argsort(dim=1, stable=True)
        return cls(input_ids.gather(1, order), keep.gather(1, order), input_ids, keep, order)

    @property
    def is_left_padded(self) -> bool:
        return torch.equal(self.keep, self.given_keep)

    @property
    def padding(self) -> Tensor:
        """Padding tokens of each row (B,)."""
        return (~self.keep).sum(1)

    def tokens(self) -> list[list[int]]:
        return [ids[kept].tolist() for ids, kept in zip(self.ids, self.keep, strict=True)]

    def left_padded_inputs(self) -> dict[str, Tensor]:
        positions = (self.keep.long().cumsum(1) - 1).clamp(min=0)
        return {"attention_mask": self.keep.long(), "position_ids": positions}

    def left_padded_processors(self, processors: Any) -> Any:
        """The logits processors, adjusted to where the padding is now."""
        first = self.given_keep.int().argmax(1)  # transformers takes this as the number of padding tokens

        def moved(processor: Any) -> Any:
            ignored = getattr(processor, "prompt_ignore_length", None)
            is_stock = type(processor) is processes.RepetitionPenaltyLogitsProcessor
            if not is_stock or not isinstance(ignored, Tensor) or not torch.equal(ignored.to(first.device), first):
                return processor
            processor = copy.copy(processor)
            processor.prompt_ignore_length = self.padding
            return processor

        return processes.LogitsProcessorList(moved(processor) for processor in processors)

    def as_given(self, result: Any) -> Any:
        """The result, with the prompts in front of it as they were given."""
        if self.is_left_padded:
            return result
        T = self.ids.shape[1]
        if isinstance(result, Tensor):
            return torch.cat([self.given, result[:, T:]], 1)
        result.sequences = torch.cat([self.given, result.sequences[:, T:]], 1)
        for layer in getattr(result[_CACHE_OF_OUTPUT], "layers", ()):
            layer.keys, layer.values = (self._columns_as_given(t) for t in (layer.keys, layer.values))
        return result

    def _columns_as_given(self, cached: Tensor) -> Tensor:
        """Reorder the first T columns of `cached` (B, H, S, D) as in `given`."""
        T = self.ids.shape[1]
        index = (
            self.order.argsort(1).to(cached.device)[:, None, :, None].expand(-1, cached.shape[1], -1, cached.shape[3])
        )
        return torch.cat([cached[:, :, :T].gather(2, index), cached[:, :, T:]], 2)


# -- a run ------------------------------------------------------------------------------------------------------------


class _Run:
    """One call of `generate` on a `DecodeSession`. All rows start together, and a step chooses one token for each."""

    def __init__(self, model: GPT2, rows: _Rows, processors: Any, criteria: Any, config: Any, streamer: Any) -> None:
        self.model, self.rows, self.processors, self.criteria = model, rows, processors, criteria
        self.config, self.streamer = config, streamer
        self.prompts = rows.tokens()
        self.produced = [0] * len(self.prompts)  # new tokens of each row
        self.scores: tuple[Tensor, ...] | None = () if self._asks_for("output_scores") else None
        self.logits: tuple[Tensor, ...] | None = () if self._asks_for("output_logits") else None
        # Drawn whatever else is asked for, so that other options do not change the samples.
        seed = int(torch.randint(2**63 - 1, ())) if config.do_sample else 0
        sampling = fused_sampling(processors, config.do_sample, rows.padding, seed)
        self.is_fused = sampling is not None and self.scores is None and self.logits is None
        self.sampling = sampling if self.is_fused and sampling is not None else SamplingConfig(temperature=0)
        self.keys = ops.row_keys(seed, range(len(self.prompts)), [0] * len(self.prompts))
        eos = [c.eos_token_id for c in criteria if type(c) is EosTokenCriteria]
        self.stop_ids = sorted({int(token) for ids in eos for token in ids.flatten().tolist()})
        self.max_new = min(
            (c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=_NO_LIMIT
        ) - rows.ids.shape[1]  # fmt: skip
        # The device itself can tell when a row has ended.
        self.runs_ahead = (
            self.is_fused
            and streamer is None
            and all(type(c) in (EosTokenCriteria, MaxLengthCriteria) for c in criteria)
        )

    def _asks_for(self, name: str) -> bool:
        return bool(self.config.return_dict_in_generate and getattr(self.config, name))

    def result(self, cache: DynamicCache) -> Any:
        """Generate, and return what transformers' loop returns. If the cache is part of it, `cache` is filled."""
        with self._session() as session:
            logits, first = self._start(session)
            sequences = self._run_ahead(session, first) if self.runs_ahead else self._run(session, first, logits)
            if self.config.return_dict_in_generate:
                self._fill(cache, session, sequences.shape[1] - 1)
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return sequences
        outputs: Any = {"sequences": sequences, "scores": self.scores, "logits": self.logits}
        return GenerateDecoderOnlyOutput(**outputs, **{_CACHE_OF_OUTPUT: cache})

    @contextmanager
    def _session(self) -> Iterator[DecodeSession]:
        stop_ids = self.stop_ids if self.runs_ahead else ()
        session = acquire_session(self.model, len(self.prompts), self.sampling, stop_ids)
        try:
            yield session
        finally:
            release_session(self.model, session)

    def _start(self, session: DecodeSession) -> tuple[Tensor, Results]:
        """Prefill every distinct prompt once; returns the first logits (B, V) and the tokens chosen from them."""
        slots: dict[tuple[int, ...], list[int]] = {}
        for slot, ids in enumerate(self.prompts):
            slots.setdefault(tuple(ids), []).append(slot)
        context = self.model.config.context_length
        if (longest := max(map(len, slots))) > context:
            raise ValueError(f"generate: a prompt has {longest} tokens; the context holds {context}; shorten it")
        session.cache.reserve(min(longest + min(self.max_new, context), context))
        logits = torch.empty(len(self.prompts), self.model.config.vocab_size, device=self.model.device)
        for part in _parts(list(slots)):
            of_part = session.prefill([slots[prompt][0] for prompt in part], part)
            for prompt, row_logits in zip(part, of_part, strict=True):
                session.cache.fork(slots[prompt][0], slots[prompt][1:])
                logits[slots[prompt]] = row_logits
        limit = self.max_new if self.runs_ahead else _NO_LIMIT
        keys = [(int(a), int(b)) for a, b in self.keys.tolist()]
        new = [NewRow(slot, ids, keys[slot], limit) for slot, ids in enumerate(self.prompts)]
        return logits, session.begin(new, logits)

    def _has_room(self, row: int, produced: int) -> bool:
        """Whether a row with this many new tokens still fits the context. The last token of a row needs no room."""
        return len(self.prompts[row]) + produced <= self.model.config.context_length

    def _next(self, session: DecodeSession, going: list[int]) -> Results:
        """Start a step of the rows that have not ended."""
        for row in going:
            if not self._has_room(row, self.produced[row]):
                raise ValueError(
                    f"generate: row {row} has {len(self.prompts[row])} tokens and {self.produced[row]} new ones; the "
                    f"context holds {self.model.config.context_length}: shorten the prompt, or lower max_new_tokens"
                )
        return session.step(going)

    def _chosen(self, results: Results, going: list[int]) -> list[int]:
        """The tokens that a step chose for the rows. RuntimeError if there was none to choose from."""
        tokens, logprobs = results.read()
        for row in going:
            if math.isnan(logprobs[row]):
                self._refuse_logits(row)
        return [tokens[row] for row in going]

    def _refuse_logits(self, row: int) -> None:
        raise RuntimeError(
            f"generate: the logits of row {row} after {self.produced[row]} new tokens are NaN, infinite or all "
            "filtered out; check the weights and the logits processors"
        )

    def _run_ahead(self, session: DecodeSession, results: Results) -> Tensor:
        """Generate the sequences (B, T + n). On a GPU a step starts before the tokens of the previous one are read."""
        new: list[list[int]] = [[] for _ in self.prompts]
        going = list(range(len(new)))
        for count in range(1, self.max_new + 1):
            with_room = [row for row in going if self._has_room(row, count)]
            starts_ahead = session.is_asynchronous and count < self.max_new and with_room
            ahead = session.step(with_room) if starts_ahead else None
            for row, token in zip(going, self._chosen(results, going), strict=True):
                new[row].append(token)
                self.produced[row] = count
            going = [row for row in going if new[row][-1] not in self.stop_ids]
            if not going or count == self.max_new:
                break
            if ahead is None or not set(going) <= set(with_room):
                ahead = self._next(session, going)
            results = ahead
        longest = max(map(len, new))
        ids, pad = self.rows.ids, int(self.config._pad_token_tensor) if self.stop_ids else 0
        tokens = [row + [pad] * (longest - len(row)) for row in new]
        return torch.cat([ids, torch.tensor(tokens, dtype=ids.dtype).to(ids.device)], 1)

    def _run(self, session: DecodeSession, results: Results, logits: Tensor) -> Tensor:
        """Generate the sequences (B, T + n) like transformers' loop, with criteria and a streamer after every step."""
        ids = self.rows.ids
        B = ids.shape[0]
        going = list(range(B))
        unfinished = torch.ones(B, dtype=torch.long, device=ids.device)
        # Without an end-of-text criterion transformers continues all rows until every one has ended.
        ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)
        pad = int(self.config._pad_token_tensor) if ends_rows else 0
        while True:
            if self.is_fused:
                chosen = torch.tensor(self._chosen(results, going))
            else:
                chosen = self._choose(ids, going, logits)
                session.replace_tokens(going, chosen)
            for row in going:
                self.produced[row] += 1
            tokens = torch.full((B,), pad, dtype=ids.dtype, device=ids.device)
            tokens[going] = chosen.to(tokens)
            ids = torch.cat([ids, tokens[:, None]], 1)
            unfinished = unfinished & ~self.criteria(ids, self.scores)
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            if not bool(unfinished.any()):
                return ids
            if ends_rows:
                going = unfinished.nonzero().flatten().tolist()
            results = self._next(session, going)
            if not self.is_fused:
                logits = session.step_logits(len(going))

    def _choose(self, ids: Tensor, going: list[int], logits: Tensor) -> Tensor:
        """Choose the next token of every row that has not ended, with transformers' own processors."""
        full = torch.zeros(ids.shape[0], logits.shape[1], device=ids.device)
        full[going] = logits.to(ids.device)
        if self.logits is not None:
            self.logits += (full.clone(),)
        scores = self.processors(ids, full)
        if self.scores is not None:
            ended = sorted(set(range(ids.shape[0])) - set(going))
            self.scores += (scores.index_fill(0, torch.tensor(ended, device=scores.device, dtype=torch.long), 0.0),)
        if not self.config.do_sample:
            return scores[going].argmax(-1)
        device = self.model.device
        positions = torch.tensor([self.produced[row] for row in going], dtype=torch.int32, device=device)
        drawn, logprobs = ops.sample(
            scores[going].float().to(device), keys=self.keys[going].to(device), positions=positions
        )
        if bool(logprobs.isnan().any()):
            self._refuse_logits(going[int(logprobs.isnan().int().argmax())])
        return drawn

    def _fill(self, cache: DynamicCache, session: DecodeSession, columns: int) -> None:
        """Copy keys and values into transformers' cache, in the columns of left-padded prompts, with 0 at padding."""
        keys, values = session.cache.keys, session.cache.values
        device = keys.device
        produced = torch.tensor(self.produced, device=device)
        new = torch.arange(columns - self.rows.ids.shape[1], device=device)
        held = torch.cat([self.rows.keep.to(device), new[None] < produced[:, None] - 1], 1)
        B, H, D = held.shape[0], keys.shape[2], keys.shape[4]
        index = (held.long().cumsum(1) - 1).clamp(min=0)[:, None, :, None].expand(B, H, columns, D)
        for layer in range(len(keys)):
            placed = [t[layer, :B].gather(2, index).masked_fill(~held[:, None, :, None], 0) for t in (keys, values)]
            cache.update(placed[0], placed[1], layer)


def _parts(prompts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Split the prompts into parts of about `_PREFILL_TOKENS` tokens."""
    part: list[tuple[int, ...]] = []
    for prompt in prompts:
        if part and sum(map(len, part)) + len(prompt) > _PREFILL_TOKENS:
            yield part
            part = []
        part.append(prompt)
    yield part


def fused_sampling(processors: Sequence[Any], do_sample: bool, padding: Tensor, seed: int) -> SamplingConfig | None:
    """The sampling settings that these logits processors amount to; None if they do anything else.

    Args:
        padding: padding tokens on the left of each row (B,).
    """
    fields: dict[str, Any] = {}
    left = list(processors)
    if left and type(left[0]) is processes.RepetitionPenaltyLogitsProcessor:
        penalty = left.pop(0)
        ignored = penalty.prompt_ignore_length
        ignored = torch.zeros_like(padding) if ignored is None else ignored
        if not isinstance(ignored, Tensor) or not torch.equal(ignored.to(padding), padding):
            return None
        fields["repetition_penalty"] = penalty.penalty
    if not do_sample:
        fields["temperature"] = 0
    for kind, name in (
        (processes.TemperatureLogitsWarper, "temperature"),
        (processes.TopKLogitsWarper, "top_k"),
        (processes.TopPLogitsWarper, "top_p"),
        (processes.MinPLogitsWarper, "min_p"),
    ):
        if do_sample and left and type(left[0]) is kind:
            processor = left.pop(0)
            is_usual = getattr(processor, "filter_value", -math.inf) == -math.inf
            if not is_usual or getattr(processor, "min_tokens_to_keep", 1) != 1:
                return None
            fields[name] = getattr(processor, name)
    if left:
        return None
    try:
        return SamplingConfig(**fields, seed=seed)
    except ValueError:
        return None
