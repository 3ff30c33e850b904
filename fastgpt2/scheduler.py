"""Continuous batching: prefill, then a decode loop over a changing set of rows, without padding.

A prompt is prefilled once for all its samples, and a prefix that several prompts share is computed once. Both are then
copied within the cache. When a row ends, its cache slot goes at once to the next sample of the same prompt, whose
prefix is already there. Before other prompts start, free slots wait a little for each other, so that several prompts
are prefilled together. With `context_shift`, a row that has filled the context continues from its last tokens,
which are prefilled again.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastgpt2.cache import KVCache
from fastgpt2.config import SamplingConfig
from fastgpt2.constraints import Constraints, LogitsProcessor
from fastgpt2.decode import (
    DecodeSession,
    NewRow,
    Results,
    acquire_session,
    decode_backend,
    drop_sessions,
    release_session,
    why_not_decode,
)
from fastgpt2.model import GPT2Base
from fastgpt2.operators import operator_backend
from fastgpt2.prefixes import Holder, PrefixIndex
from fastgpt2.text_stream import TextStream
from fastgpt2.weights_mark import ChangeCounts
from fastgpt2_kernels import ops

# Prompt tokens per prefill: enough for efficient matrix products, few enough that their activations fit in memory.
PREFILL_TOKENS = 4096
# The most steps that a CPU makes in one call. It makes fewer if a row ends.
MOST_STEPS = 16
# The fixed cost of a prefill, in steps of a full batch. `python -m benchmarks.refill` measures it.
PREFILL_STEPS = {"triton": 8.0, "native": 0.5, "torch": 1.0}
# The most steps that a free slot waits for others.
MOST_WAITING = 64


@dataclass
class Sample:
    """One continuation of one prompt.

    Attributes:
        prompt_index: The prompt's index.
        sample_index: The sample's index among those of its prompt.
        prompt_ids: The token ids of the prompt.
        token_ids: The new tokens, including the stop token if there was one.
        logprobs: The natural-log probabilities of the new tokens under the model itself: at temperature 1, before any
            filter.
        finish_reason: "stop" for a stop token or stop string, "length" for `max_new_tokens` or a full context
            (without context_shift).
        text: The text of the new tokens, without the stop token or stop string; None without a tokenizer.
    """

    prompt_index: int
    sample_index: int
    prompt_ids: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    text: str | None = None


@dataclass(frozen=True)
class TokenEvent:
    """A token that was chosen. `text` is the text it completes, "" while a character or stop string is undecided."""

    prompt_index: int
    sample_index: int
    token_id: int
    logprob: float
    text: str
    finished: Sample | None


@dataclass
class Request:
    """A prompt whose samples are wanted.

    Attributes:
        index: The prompt's index.
        identity: The id that its random numbers depend on.
        ids: Its token ids.
        pending: The indices of its samples that have no row yet.
    """

    index: int
    identity: int
    ids: tuple[int, ...]
    pending: deque[int]


@dataclass
class _Prefilled(Request):
    """A request whose prompt is in the cache. `logits` (V,) are those of its first new token."""

    logits: Tensor


@dataclass
class _Row:
    """A sample that is being decoded, and the cache slot that holds its tokens."""

    slot: int
    prompt: _Prefilled
    sample: Sample
    text: TextStream | None
    window: tuple[int, ...]  # the tokens at its last prefill: the prompt, or after a context shift the last tokens
    before: int = 0  # the number of tokens that the sample had at that prefill
    asked: int = 0  # tokens that were requested from the device, whether or not they have arrived

    @property
    def is_prefilled(self) -> bool:
        """Whether no token has been chosen for it since its last prefill."""
        return len(self.sample.token_ids) == self.before

    @property
    def num_tokens(self) -> int:
        """The number of its tokens: those in the cache, and the latest one, which is not there yet."""
        return len(self.window) + len(self.sample.token_ids) - self.before


@dataclass
class _Waiting:
    """How long free slots wait for others: until their idle steps cost as much as a prefill does.

    This depends only on the rows' lengths. So a repeated run prefills the same prompts together, with the same bits.

    Attributes:
        most: The fixed cost of a prefill, in steps of one slot.
    """

    most: float
    idle: int = 0  # steps of free slots, added up over the slots
    steps: int = 0
    is_needless: bool = False  # no prompt is left

    def begin(self) -> None:
        self.idle = self.steps = 0

    def note(self, num_free: int, num_steps: int) -> None:
        if num_free:
            self.idle += num_free * num_steps
            self.steps += num_steps

    @property
    def is_over(self) -> bool:
        return self.idle >= self.most or self.steps >= MOST_WAITING

    def steps_left(self, num_free: int) -> int:
        """The steps until free slots have waited long enough, at least 1."""
        if not num_free or self.is_needless:
            return MOST_WAITING
        return max(1, min(MOST_WAITING - self.steps, math.ceil((self.most - self.idle) / num_free)))


def half_context(context_length: int) -> int:
    """How many last tokens a row keeps when it has filled the context. A truncated prompt keeps at least as many."""
    return -(-context_length // 2)


class Scheduler:
    """The rows of a run and their cache. A step fills free slots, chooses a token for every row and appends it."""

    def __init__(
        self,
        model: GPT2Base,
        source: Iterator[Request],
        sampling: SamplingConfig,
        batch_size: int,
        pack_weights: bool,
        weight_dtype: torch.dtype | None,
        processor: LogitsProcessor | None,
        want_text: bool,
        context_shift: bool = False,
    ) -> None:
        self.model, self.source, self.sampling = model, source, sampling
        self.want_text = want_text or bool(sampling.stop_strings)
        self.context_shift = context_shift
        stop = sampling.stop_token_ids
        self.stop_ids = frozenset(model.config.eos_token_ids if stop is None else stop)
        self.session = None
        self.weights = ChangeCounts(model)
        reason = why_not_decode(model)
        if reason is None and decode_backend(model) == "native" and not pack_weights:
            reason = "it packs the weights, and pack_weights is False"
        self.constraints = Constraints(sampling, processor, self.stop_ids, model.config.vocab_size, model.device)
        if reason is None:
            # With constraints the scheduler chooses the tokens, and replaces those that the session chose.
            chooses = sampling if self.constraints.is_empty else SamplingConfig(temperature=0)
            self.session = acquire_session(model, batch_size, chooses, sorted(self.stop_ids), weight_dtype)
            self.cache = self.session.cache
        elif weight_dtype is not None:
            raise ValueError(
                f"generate: weight_dtype={str(weight_dtype)!r} needs a decoding step, which cannot be used: {reason}"
            )
        else:
            dtype = KVCache.best_dtype(model.dtype, model.device)
            self.cache = KVCache(model.config, batch_size, 1, dtype=dtype, device=model.device)
        self.free = list(reversed(range(batch_size)))
        backend = "torch" if self.session is None else decode_backend(model)
        self.waiting = _Waiting(PREFILL_STEPS[backend] * batch_size)
        self.held: dict[int, tuple[int, ...]] = {}  # the prompt that each slot, even a free one, begins with
        self.again: deque[Request] = deque()  # prompts that are prefilled once more, before those of `source`
        self.rows: list[_Row] = []
        self.on_device: tuple[list[_Row], Results] | None = None  # the step that runs now
        # Which tokens each slot's sequence holds, for the repetition penalty; a session that chooses keeps its own.
        penalized = sampling.repetition_penalty != 1.0 and not self._session_chooses
        self.seen = torch.zeros(batch_size, model.config.vocab_size, dtype=torch.bool) if penalized else None
        if self.seen is not None:
            self.seen = self.seen.to(model.device)

    @property
    def _session_chooses(self) -> bool:
        """Whether tokens are chosen inside the session's step."""
        return self.session is not None and self.constraints.is_empty

    def run(self) -> Iterator[TokenEvent]:
        """Generate all samples; yields every token as it is chosen. The model's mode does not matter."""
        try:
            while True:
                if not self.rows or self.waiting.is_over:
                    # Samples that end with their first token free their slots at once, so repeat until no row starts.
                    while started := self._start_rows():
                        yield from self._choose(started, [row.prompt.logits for row in started])
                    self.waiting.begin()
                if full := [row for row in self.rows if self._is_full(row)]:
                    yield from self._shift(full)
                    continue  # all rows may have ended
                if self.session is not None and self._session_chooses:
                    if not (yield from self._step_ahead(self.session)):
                        return
                    continue
                if not self.rows:
                    return
                rows = self.rows
                self.waiting.note(len(self.free), 1)
                yield from self._choose(rows, self._decode(rows))
        finally:
            if self.session is not None:
                if self.model.training:  # its weights will have changed by the next run
                    drop_sessions(self.model)
                else:
                    release_session(self.model, self.session)

    def _step_ahead(self, session: DecodeSession) -> Generator[TokenEvent, None, bool]:
        """Start a step. On a GPU, read the step before it while it runs. Returns whether the run goes on."""
        rows = [row for row in self.rows if row.asked < self._limit(row)]
        asked = None
        if rows:
            self._check_weights()
            # If nobody looks at single tokens, several steps can run in one call.
            most = 1 if self.want_text else min(MOST_STEPS, self.waiting.steps_left(len(self.free)))
            results = session.step([row.slot for row in rows], most=most)
            self.waiting.note(len(self.free), results.num_steps)
            asked = rows, results
            for row in rows:
                row.asked += results.num_steps
        ready, self.on_device = (self.on_device, asked) if session.is_asynchronous else (asked, None)
        if ready is not None:
            rows, results = ready
            still_here = {id(row) for row in self.rows}
            successors: list[_Row] = []
            for tokens, logprobs in results.read_all():
                chosen = [(row, tokens[row.slot], logprobs[row.slot]) for row in rows if id(row) in still_here]
                yield from self._accept_all(chosen, successors)
            yield from self._choose(successors, [row.prompt.logits for row in successors])
        return ready is not None or asked is not None

    def _limit(self, row: _Row) -> int:
        """The most new tokens that the row can have before its context is full. The last one needs no room in it."""
        room = self.model.config.context_length - len(row.window) + 1
        return min(self.sampling.max_new_tokens, row.before + room)

    def _is_full(self, row: _Row) -> bool:
        """Whether the row's latest token has no room in the context."""
        return row.num_tokens > self.model.config.context_length

    # -- rows ---------------------------------------------------------------------------------------------------

    def _start_rows(self) -> list[_Row]:
        """Prefill prompts into the free slots, and make rows for their samples. Returns the rows, which lack tokens."""
        started: list[_Row] = []
        fresh: list[tuple[Holder, Request]] = []
        index: PrefixIndex | None = None
        free = len(self.free)
        tokens = 0
        while free > 0 and tokens < PREFILL_TOKENS and (request := self._next_request()) is not None:
            index = PrefixIndex(self.held) if index is None else index
            fresh.append((index.add(request.ids), request))
            free -= len(request.pending)
            tokens += len(request.ids) - fresh[-1][0].shared
        if not fresh:
            self.waiting.is_needless = bool(self.free)
            return started
        self._assign_slots([holder for holder, _ in fresh])
        logits = self._prefill([holder for holder, _ in fresh])
        for (holder, request), row_logits in zip(fresh, logits, strict=True):
            prompt = _Prefilled(request.index, request.identity, request.ids, request.pending, row_logits)
            started.append(self._new_row(holder.slot, prompt))
            forks = [self.free.pop() for _ in range(min(len(request.pending), len(self.free)))]
            self.cache.fork(holder.slot, forks)
            self.held |= dict.fromkeys([holder.slot, *forks], request.ids)
            started.extend(self._new_row(fork, prompt) for fork in forks)
        self.rows = self.rows + started
        return started

    def _next_request(self) -> Request | None:
        return self.again.popleft() if self.again else next(self.source, None)

    def _assign_slots(self, prompts: list[Holder]) -> None:
        """Give each prompt a free slot: the one that holds its prefix, if that is free."""
        for prompt in prompts:
            if prompt.source is not None and prompt.source.slot in self.free:
                prompt.slot = prompt.source.slot
                self.free.remove(prompt.slot)
        for prompt in prompts:
            if prompt.slot < 0:
                prompt.slot = self.free.pop()

    def _new_row(self, slot: int, prompt: _Prefilled) -> _Row:
        if self.seen is not None:
            self.seen[slot] = False
            self.seen[slot].index_fill_(0, ops.to_device(list(prompt.ids), self.seen.device), True)
        tokenizer = self.model.tokenizer
        text = TextStream(tokenizer, self.sampling.stop_strings) if self.want_text and tokenizer else None
        return _Row(slot, prompt, Sample(prompt.index, prompt.pending.popleft(), prompt.ids), text, prompt.ids)

    def _leave(self, row: _Row) -> _Row | None:
        """Pass an ended row's slot to the next sample of its prompt, and return that row. If there is none, free it."""
        prompt = row.prompt
        if row.before and prompt.pending:  # the slot no longer begins with the prompt, so prefill it again
            self.again.append(Request(prompt.index, prompt.identity, prompt.ids, deque(prompt.pending)))
            prompt.pending.clear()
            self.waiting.is_needless = False
        if not prompt.pending:
            self.cache.free(row.slot)
            self.free.append(row.slot)
            return None
        self.cache.lengths[row.slot] = len(row.prompt.ids)
        return self._new_row(row.slot, row.prompt)

    def _shift(self, rows: list[_Row]) -> Iterator[TokenEvent]:
        """Continue rows that have filled the context: prefill their last half context, and choose their next tokens."""
        self._check_weights()
        keep = half_context(self.model.config.context_length)
        for row in rows:
            row.window = (*row.sample.prompt_ids, *row.sample.token_ids)[-keep:]
            row.before = len(row.sample.token_ids)
            self.held[row.slot] = row.window
        at_once = max(1, PREFILL_TOKENS // keep)
        for start in range(0, len(rows), at_once):
            now = rows[start : start + at_once]
            logits = self._extend([row.slot for row in now], [row.window for row in now], [0] * len(now))
            yield from self._choose(now, logits)

    # -- the model ----------------------------------------------------------------------------------------------

    def _prefill(self, prompts: list[Holder]) -> list[Tensor]:
        """Put the prompts into their slots. Returns the logits (V,) of each one's first new token."""
        self._check_weights()
        # Make room for the longest row with all its new tokens. Growing step by step would copy the cache each time.
        longest = max(len(prompt.ids) for prompt in prompts) + self.sampling.max_new_tokens
        self.cache.reserve(min(longest, self.model.config.context_length))
        logits: dict[int, Tensor] = {}
        for wave in range(1 + max(prompt.wave for prompt in prompts)):
            # Prefixes that slots already held are copied before the first pass, because it may overwrite them.
            for prompt in prompts:
                if (source := prompt.source) is not None and source.wave == wave - 1 and source.slot != prompt.slot:
                    self.cache.fork(source.slot, [prompt.slot], prompt.shared)
            now = [prompt for prompt in prompts if prompt.wave == wave]
            slots, pasts = [prompt.slot for prompt in now], [prompt.shared for prompt in now]
            of_wave = self._extend(slots, [prompt.ids[prompt.shared :] for prompt in now], pasts)
            logits |= zip(slots, of_wave, strict=True)
        return [logits[prompt.slot] for prompt in prompts]

    def _extend(self, slots: list[int], new: list[tuple[int, ...]], pasts: list[int]) -> Tensor:
        """Append new tokens to slots that hold `pasts` tokens; returns the logits (R, V) after the last ones."""
        if self.session is not None:
            return self.session.prefill(slots, new, pasts)
        counts = [len(ids) for ids in new]
        plan = ops.plan_rows(slots, counts, pasts, self.model.device)
        token_ids = ops.to_device([token for ids in new for token in ids], self.model.device)
        hidden = self.model.extend(token_ids, plan, self.cache)
        last = [end - 1 for end in itertools.accumulate(counts)]
        return self._head(hidden[ops.to_device(last, hidden.device)])

    def _decode(self, rows: list[_Row]) -> Tensor:
        """Append each row's latest token; returns the logits (R, V) of the next one."""
        self._check_weights()
        slots = [row.slot for row in rows]
        if self.session is not None:
            self.session.step(slots)
            return self.session.step_logits(len(slots))
        lengths = [self.cache.lengths[slot] for slot in slots]
        plan = ops.plan_rows(slots, [1] * len(rows), lengths, self.model.device)
        token_ids = ops.to_device([row.sample.token_ids[-1] for row in rows], self.model.device)
        return self._head(self.model.extend(token_ids, plan, self.cache))

    def _check_weights(self) -> None:
        if not self.weights.still_hold():
            raise RuntimeError("generate: the model's weights changed during the run; start a new run")

    @torch.no_grad()
    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden).float()

    # -- tokens -------------------------------------------------------------------------------------------------

    def _choose(self, rows: list[_Row], logits: Tensor | list[Tensor]) -> Iterator[TokenEvent]:
        """Choose the next token of `rows` from logits (R, V). Rows that end leave, and other rows take their slots.

        The first logits of a row that takes a slot already exist, so its first token is chosen here as well.
        """
        while rows:
            stacked = torch.stack(logits) if isinstance(logits, list) else logits
            successors: list[_Row] = []
            yield from self._accept_all(list(zip(rows, *self._sample(rows, stacked), strict=True)), successors)
            rows, logits = successors, [row.prompt.logits for row in successors]

    def _accept_all(self, chosen: list[tuple[_Row, int, float]], successors: list[_Row]) -> Iterator[TokenEvent]:
        """Add a token to each row's sample. Rows that take the slots of those that end are added to `successors`."""
        for row, _, logprob in chosen:
            if math.isnan(logprob):
                raise RuntimeError(
                    f"generate: the model's logits for prompt {row.prompt.index} after {len(row.sample.token_ids)} "
                    "tokens are NaN, infinite or all banned; check the weights, or use a wider dtype"
                )
        gone: set[int] = set()
        events = []
        for row, token, logprob in chosen:
            event = self._accept(row, token, logprob)
            events.append(event)
            if event.finished is not None:
                gone.add(id(row))
                if (successor := self._leave(row)) is not None:
                    successors.append(successor)
        if gone:
            self.rows = [row for row in self.rows if id(row) not in gone] + successors
        yield from events

    @torch.no_grad()
    def _sample(self, rows: list[_Row], logits: Tensor) -> tuple[list[int], list[float]]:
        """The rows' next tokens and their log-probabilities, NaN where the logits are not finite."""
        if self.session is not None and rows[0].is_prefilled:  # either all rows are prefilled or none is
            results = self._begin_on_device(self.session, rows, logits)
            if self._session_chooses:
                return results
        config = self.sampling
        slots_R = [row.slot for row in rows]
        slots = ops.to_device(slots_R, logits.device)
        samples = [row.sample for row in rows]
        keys = ops.row_keys(
            config.seed, [row.prompt.identity for row in rows], [sample.sample_index for sample in samples]
        )
        positions = torch.tensor([len(sample.token_ids) for sample in samples], dtype=torch.int32)
        changed = logits
        if not self.constraints.is_empty:
            held = [[*sample.prompt_ids, *sample.token_ids] for sample in samples]
            changed = self.constraints.apply(logits, held, positions.tolist())
        ids, logprobs = ops.sample(
            changed,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            seen=None if self.seen is None else self.seen[slots],
            keys=ops.to_device(keys, logits.device),
            positions=ops.to_device(positions, logits.device),
            backend=operator_backend(self.model.backend),
        )
        if self.seen is not None:
            self.seen[slots, ids] = True
        if changed is not logits:  # log-probabilities are those of the model itself, or NaN if all tokens are banned
            own = logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)
            logprobs = own.where(logprobs.isfinite(), math.nan)
        if self.session is not None:
            self.session.replace_tokens(slots_R, ids)
        return ids.tolist(), logprobs.tolist()

    def _begin_on_device(
        self, session: DecodeSession, rows: list[_Row], logits: Tensor
    ) -> tuple[list[int], list[float]]:
        """Start prefilled rows in the session; returns their next tokens and log-probabilities."""
        identities = [row.prompt.identity for row in rows]
        keys = ops.row_keys(self.sampling.seed, identities, [row.sample.sample_index for row in rows]).tolist()
        new = [
            NewRow(row.slot, row.window, (key[0], key[1]), self._limit(row), row.before)
            for row, key in zip(rows, keys, strict=True)
        ]
        tokens, logprobs = session.begin(new, logits).read()
        for row in rows:
            row.asked = row.before + 1
        return [tokens[row.slot] for row in rows], [logprobs[row.slot] for row in rows]

    def _accept(self, row: _Row, token: int, logprob: float) -> TokenEvent:
        """Add a token to its row's sample and see whether that ends it."""
        current = row.sample
        current.token_ids.append(token)
        current.logprobs.append(logprob)
        is_stop = token in self.stop_ids
        if row.text is not None and not is_stop:
            row.text.push(token)
        if is_stop or (row.text is not None and row.text.stopped):
            current.finish_reason = "stop"
        elif len(current.token_ids) == self.sampling.max_new_tokens or (not self.context_shift and self._is_full(row)):
            current.finish_reason = "length"
        finished = current if current.finish_reason is not None else None
        if finished is not None:
            self._finish_text(row, is_stop)
        piece = row.text.take() if row.text is not None else ""
        return TokenEvent(current.prompt_index, current.sample_index, token, logprob, piece, finished)

    def _finish_text(self, row: _Row, is_stop: bool) -> None:
        if row.text is not None:
            row.text.finish()
            if row.text.stopped:  # a stop string was in the text that was held back
                row.sample.finish_reason = "stop"
            row.sample.text = row.text.text
        elif self.model.tokenizer is not None:
            ids = row.sample.token_ids
            row.sample.text = self.model.tokenizer.decode(ids[:-1] if is_stop else ids)
