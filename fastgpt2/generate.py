"""Generation in bulk: prefill, a decode loop over a changing set of rows, prompts of any lengths, no padding.

A prompt is prefilled once, whatever the number of its samples. A row that ends leaves its cache slot at once to the
next sample of its prompt (whose prefix lies there already) or to the next prompt.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastgpt2.cache import KVCache
from fastgpt2.config import SamplingConfig
from fastgpt2.decode import DecodeSession, NewRow, Results, give_back, take_session, why_not_decode
from fastgpt2.model import GPT2
from fastgpt2.sampling import sample, uniforms
from fastgpt2_kernels import ops

if TYPE_CHECKING:
    from fastgpt2.tokenizer import Tokenizer

# Prompt tokens prefilled in one forward: enough for efficient matrix products, little enough for their activations.
PREFILL_TOKENS = 4096

Prompts = Iterable[str] | Iterable[Sequence[int]] | Tensor


@dataclass
class Sample:
    """One continuation of one prompt.

    token_ids and logprobs: the new tokens (the stop token among them, when there was one) and their natural-log
    probabilities under the model itself (temperature 1, nothing filtered). text: the new tokens' text without the
    stop token or stop string; None without a tokenizer. finish_reason: "stop" for a stop token or string, "length"
    for max_new_tokens or a full context.
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
    """A token as it was chosen. `text` is the text it completes, "" while a character or stop string is undecided."""

    prompt_index: int
    sample_index: int
    token_id: int
    logprob: float
    text: str
    finished: Sample | None


def generate(model: GPT2, prompts: Prompts, **options: Any) -> list[Sample]:
    """Continue every prompt; samples in the order of the prompts. Arguments as for `generate_iter`."""
    return sorted(generate_iter(model, prompts, **options), key=lambda s: (s.prompt_index, s.sample_index))


def generate_iter(model: GPT2, prompts: Prompts, **options: Any) -> Iterator[Sample]:
    """Continue every prompt; yields each sample when it ends.

    prompts: texts (the model needs a tokenizer), sequences of token ids, or a (B, T) tensor; of any lengths; an
    iterable is read as room becomes free. num_samples: continuations of each prompt. batch_size: rows decoded
    together. pack_weights: on a CPU, lay the weights out for speed, which takes their memory once more. The fields of
    `SamplingConfig`, the seed among them, go by keyword or as `sampling=SamplingConfig(...)`.

    A sample's tokens depend on (seed, prompt id, sample index) alone, the prompt id being the prompt's index or what
    `sample_ids` (an int >= 0 for each prompt) says. `skip`: (prompt id, sample index) pairs not to generate.

    ValueError names a prompt that is empty or does not fit the context; samples yielded before stay good.
    """
    return (event.finished for event in _run(model, prompts, **options) if event.finished is not None)


def stream(model: GPT2, prompts: Prompts, **options: Any) -> Iterator[TokenEvent]:
    """Continue every prompt; yields each token as it is chosen. Arguments as for `generate_iter`."""
    return _run(model, prompts, want_text=True, **options)


# -- the pieces of a run ------------------------------------------------------------------------------------------


@dataclass
class _Prompt:
    index: int
    identity: int
    ids: tuple[int, ...]
    pending: deque[int]  # sample indices that have no row yet
    logits: Tensor  # (V,) what the prefill says of the first new token


@dataclass
class _Row:
    slot: int
    prompt: _Prompt
    sample: Sample
    text: _TextStream | None
    asked: int = 0  # tokens that a device was asked for, those on their way among them


class _TextStream:
    """Turns tokens into text as they come, and finds stop strings in it.

    Bytes of a character may be spread over tokens, so text is given out only when decoding no longer ends in a
    replacement character; text that could be the beginning of a stop string is held back too.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.ids: list[int] = []
        self.decoded_from = 0  # ids before this one are decoded for good
        self.text = ""  # decoded so far, a stop string cut off
        self.given = 0  # characters given out
        self.stopped = False

    def push(self, token_id: int) -> None:
        self.ids.append(token_id)
        piece = self.tokenizer.decode(self.ids[self.decoded_from :])
        if piece and not piece.endswith("\ufffd"):
            self._append(piece)
            self.decoded_from = len(self.ids)

    def finish(self) -> None:
        """No more tokens come: what was held back is text now."""
        if not self.stopped and self.decoded_from < len(self.ids):
            self._append(self.tokenizer.decode(self.ids[self.decoded_from :]))
            self.decoded_from = len(self.ids)
        self.stop_strings = ()

    def _append(self, piece: str) -> None:
        searched = max(0, len(self.text) - max(map(len, self.stop_strings), default=0))
        self.text += piece
        found = [at for stop in self.stop_strings if (at := self.text.find(stop, searched)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def take(self) -> str:
        """The text that is certain by now and was not given out yet."""
        certain = len(self.text)
        if not self.stopped:
            for stop in self.stop_strings:
                for length in range(min(len(stop) - 1, certain), 0, -1):
                    if self.text.endswith(stop[:length]):
                        certain = min(certain, len(self.text) - length)
                        break
        new, self.given = self.text[self.given : certain], max(self.given, certain)
        return new


def _run(
    model: GPT2,
    prompts: Prompts,
    *,
    num_samples: int = 1,
    batch_size: int = 32,
    sample_ids: Iterable[int] | None = None,
    skip: Container[tuple[int, int]] = (),
    sampling: SamplingConfig | None = None,
    pack_weights: bool = True,
    want_text: bool = False,
    **fields: Any,
) -> Iterator[TokenEvent]:
    if sampling is not None and fields:
        raise TypeError(
            f"generate: give sampling or its fields, not both; got sampling and {', '.join(sorted(fields))}"
        )
    unknown = sorted(set(fields) - set(SamplingConfig.__dataclass_fields__))
    if unknown:
        known = "num_samples, batch_size, sample_ids, skip, sampling, pack_weights and the fields of SamplingConfig"
        raise TypeError(f"generate: unknown argument {', '.join(unknown)}; there are {known}")
    if sampling is None:
        sampling = SamplingConfig(**fields)
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"generate: {name} must be an int >= 1; got {value!r}")
    if sampling.stop_strings and model.tokenizer is None:
        raise ValueError("generate: stop_strings need a tokenizer; set model.tokenizer or use stop_token_ids")
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Sized):
        batch_size = max(1, min(batch_size, len(prompts) * num_samples))
    source = _read_prompts(model, prompts, num_samples, sample_ids, skip)
    return _Engine(model, source, sampling, batch_size, pack_weights, want_text).run()


def _read_prompts(
    model: GPT2, prompts: Prompts, num_samples: int, sample_ids: Iterable[int] | None, skip: Container[tuple[int, int]]
) -> Iterator[tuple[int, int, tuple[int, ...], deque[int]]]:
    """(index, identity, token ids, sample indices) of every prompt that has samples to generate, checked."""
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.is_floating_point():
            raise ValueError(
                f"generate: a tensor of prompts must be (B, T) integers; got {prompts.dtype} {tuple(prompts.shape)}"
            )
        prompts = prompts.tolist()
    identities = iter(sample_ids) if sample_ids is not None else None
    for index, prompt in enumerate(prompts):
        identity = index if identities is None else next(identities, None)
        if identity is None:
            raise ValueError(
                f"generate: sample_ids must have one id for every prompt; there is none for prompt {index}"
            )
        if not isinstance(identity, int) or not 0 <= identity < 2**64:
            raise ValueError(f"generate: sample_ids must be ints in [0, 2**64); got {identity!r} for prompt {index}")
        pending = deque(s for s in range(num_samples) if (identity, s) not in skip)
        if pending:
            yield index, identity, prompt_token_ids(model, prompt, f"prompt {index}"), pending


def prompt_token_ids(model: GPT2, prompt: str | Sequence[int], name: str) -> tuple[int, ...]:
    """The token ids of a prompt (text or ids), checked against the model; ValueError calls it by `name`."""
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError(
                f"generate: {name} is text, but the model has no tokenizer; set model.tokenizer or give ids"
            )
        ids = tuple(model.tokenizer.encode(prompt))
    else:
        try:
            ids = tuple(int(token) for token in prompt)
        except TypeError:
            raise TypeError(
                f"generate: a prompt must be text or a sequence of token ids; {name} is {type(prompt).__name__}"
            ) from None
    config = model.config
    if not ids and config.bos_token_id is not None:
        ids = (config.bos_token_id,)
    if not ids:
        raise ValueError(f"generate: {name} is empty, and the model has no bos_token_id to begin with; give a token")
    if len(ids) > config.context_length:
        raise ValueError(
            f"generate: {name} has {len(ids)} tokens; the context holds {config.context_length}; shorten the prompt"
        )
    bad = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise ValueError(f"generate: {name} holds the token id {bad}; ids must be in [0, {config.vocab_size})")
    return ids


class _Engine:
    """The rows of a run and their cache. One step: fill free slots, choose a token for every row, append them."""

    def __init__(
        self,
        model: GPT2,
        source: Iterator[tuple[int, int, tuple[int, ...], deque[int]]],
        sampling: SamplingConfig,
        batch_size: int,
        pack_weights: bool,
        want_text: bool,
    ) -> None:
        self.model, self.source, self.sampling = model, source, sampling
        self.pack_weights = pack_weights
        self.want_text = want_text or bool(sampling.stop_strings)
        stop = sampling.stop_token_ids
        self.stop_ids = frozenset(model.config.eos_token_ids if stop is None else stop)
        self.session = None
        if why_not_decode(model) is None:
            self.session = take_session(model, batch_size, sampling, sorted(self.stop_ids))
            self.cache = self.session.cache
        else:
            dtype = KVCache.best_dtype(model.dtype, model.device)
            self.cache = KVCache(model.config, batch_size, 1, dtype=dtype, device=model.device)
        self.free = list(reversed(range(batch_size)))
        self.rows: list[_Row] = []
        self.on_device: tuple[list[_Row], Results] | None = None  # the step that is on its way
        # Which tokens each slot's sequence holds, for the repetition penalty; a session keeps its own.
        penalized = sampling.repetition_penalty != 1.0 and self.session is None
        self.seen = torch.zeros(batch_size, model.config.vocab_size, dtype=torch.bool) if penalized else None
        if self.seen is not None:
            self.seen = self.seen.to(model.device)

    def run(self) -> Iterator[TokenEvent]:
        training = self.model.training
        self.model.eval()
        self.packed = self.pack_weights and self.session is None and self.model.pack()
        try:
            while True:
                # Prompts whose samples all end on their first token free their slots at once, so fill until full.
                while started := self._start_rows():
                    yield from self._choose(started, [row.prompt.logits for row in started])
                if self.session is not None:
                    if not (yield from self._step_ahead(self.session)):
                        return
                    continue
                if not self.rows:
                    return
                rows = self.rows
                yield from self._choose(rows, self._decode(rows))
        finally:
            self.model.train(training)
            if self.session is not None:
                give_back(self.model, self.session)

    def _step_ahead(self, session: DecodeSession) -> Generator[TokenEvent, None, bool]:
        """Ask the device for a step, and read the one before it while this one runs. False when nothing is left."""
        rows = [row for row in self.rows if row.asked < self._limit(row)]
        for row in rows:
            row.asked += 1
        asked = (rows, session.step([row.slot for row in rows])) if rows else None
        ready, self.on_device = self.on_device, asked
        if ready is not None:
            rows, results = ready
            still_here = {id(row) for row in self.rows}
            tokens, logprobs = results.read()
            chosen = [(row, tokens[row.slot], logprobs[row.slot]) for row in rows if id(row) in still_here]
            successors: list[_Row] = []
            yield from self._accept_all(chosen, successors)
            yield from self._choose(successors, [row.prompt.logits for row in successors])
        return ready is not None or asked is not None

    def _limit(self, row: _Row) -> int:
        """The most new tokens that the row can have: the last one needs no room in the context."""
        return min(self.sampling.max_new_tokens, self.model.config.context_length - len(row.prompt.ids) + 1)

    # -- rows ---------------------------------------------------------------------------------------------------

    def _start_rows(self) -> list[_Row]:
        """Prefill prompts into the free slots and give their samples rows; the rows that still need a first token."""
        started: list[_Row] = []
        fresh: list[tuple[int, tuple[int, int, tuple[int, ...], deque[int]]]] = []
        free = len(self.free)
        tokens = 0
        while free > 0 and tokens < PREFILL_TOKENS and (item := next(self.source, None)) is not None:
            fresh.append((self.free.pop(), item))
            free -= len(item[3])
            tokens += len(item[2])
        if not fresh:
            return started
        logits = self._prefill([slot for slot, _ in fresh], [item[2] for _, item in fresh])
        for (slot, (index, identity, ids, pending)), row_logits in zip(fresh, logits, strict=True):
            prompt = _Prompt(index, identity, ids, pending, row_logits)
            started.append(self._new_row(slot, prompt))
            forks = [self.free.pop() for _ in range(min(len(pending), len(self.free)))]
            self.cache.fork(slot, forks)
            started.extend(self._new_row(fork, prompt) for fork in forks)
        self.rows = self.rows + started
        return started

    def _new_row(self, slot: int, prompt: _Prompt) -> _Row:
        if self.seen is not None:
            self.seen[slot] = False
            self.seen[slot, list(prompt.ids)] = True
        tokenizer = self.model.tokenizer
        text = _TextStream(tokenizer, self.sampling.stop_strings) if self.want_text and tokenizer else None
        return _Row(slot, prompt, Sample(prompt.index, prompt.pending.popleft(), prompt.ids), text)

    def _leave(self, row: _Row) -> _Row | None:
        """`row` has ended: its slot goes to its prompt's next sample, which is returned, or is free."""
        if not row.prompt.pending:
            self.cache.free(row.slot)
            self.free.append(row.slot)
            return None
        self.cache.lengths[row.slot] = len(row.prompt.ids)
        return self._new_row(row.slot, row.prompt)

    # -- the model ----------------------------------------------------------------------------------------------

    def _prefill(self, slots: list[int], prompts: list[tuple[int, ...]]) -> Tensor:
        """Logits (R, V) of the first new token of each prompt."""
        counts = [len(ids) for ids in prompts]
        # The whole way of the longest at once: growing step by step would copy the cache each time.
        self.cache.reserve(min(max(counts) + self.sampling.max_new_tokens, self.model.config.context_length))
        plan = ops.plan_rows(slots, counts, [0] * len(slots), self.model.device)
        token_ids = torch.tensor([token for ids in prompts for token in ids], device=self.model.device)
        hidden = self.model.extend(token_ids, plan, self.cache, packed=self.packed)
        last = torch.tensor(counts, device=hidden.device).cumsum(0) - 1
        return self._head(hidden[last])

    def _decode(self, rows: list[_Row]) -> Tensor:
        """Append each row's latest token; logits (R, V) of the next."""
        slots = [row.slot for row in rows]
        lengths = [self.cache.lengths[slot] for slot in slots]
        plan = ops.plan_rows(slots, [1] * len(rows), lengths, self.model.device)
        token_ids = torch.tensor([row.sample.token_ids[-1] for row in rows], device=self.model.device)
        return self._head(self.model.extend(token_ids, plan, self.cache, packed=self.packed))

    @torch.no_grad()
    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden, packed=self.packed).float()

    # -- tokens -------------------------------------------------------------------------------------------------

    def _choose(self, rows: list[_Row], logits: Tensor | list[Tensor]) -> Iterator[TokenEvent]:
        """Choose the next token of `rows` from logits (R, V); rows that end leave, and their slots are taken over.

        A row that takes a slot over has its first logits at hand, so it chooses its first token here as well.
        """
        while rows:
            stacked = torch.stack(logits) if isinstance(logits, list) else logits
            successors: list[_Row] = []
            yield from self._accept_all(list(zip(rows, *self._sample(rows, stacked), strict=True)), successors)
            rows, logits = successors, [row.prompt.logits for row in successors]

    def _accept_all(self, chosen: list[tuple[_Row, int, float]], successors: list[_Row]) -> Iterator[TokenEvent]:
        """Add a token to each row's sample; rows that take over the slots of those that end go to `successors`."""
        for row, _, logprob in chosen:
            if math.isnan(logprob):
                raise RuntimeError(
                    f"generate: the model's logits for prompt {row.prompt.index} after {len(row.sample.token_ids)} "
                    "tokens are NaN or infinite; check the weights, or use a wider dtype"
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
        if self.session is not None:
            return self._begin_on_device(self.session, rows, logits)
        lse = logits.logsumexp(-1)
        if not bool(torch.isfinite(lse).all()):
            return [0] * len(rows), lse.where(torch.isfinite(lse), math.nan).tolist()
        uniform = None
        if not self.sampling.is_greedy:
            uniform = uniforms(
                self.sampling.seed,
                [row.prompt.identity for row in rows],
                [row.sample.sample_index for row in rows],
                [len(row.sample.token_ids) for row in rows],
            )
        slots = torch.tensor([row.slot for row in rows], device=logits.device)
        ids = sample(logits, self.sampling, uniform, None if self.seen is None else self.seen[slots])
        if self.seen is not None:
            self.seen[slots, ids] = True
        logprobs = logits.gather(-1, ids[:, None]).squeeze(-1) - lse
        return ids.tolist(), logprobs.tolist()

    def _begin_on_device(
        self, session: DecodeSession, rows: list[_Row], logits: Tensor
    ) -> tuple[list[int], list[float]]:
        """The first tokens of new rows, which the device goes on from."""
        identities = [row.prompt.identity for row in rows]
        keys = ops.row_keys(self.sampling.seed, identities, [row.sample.sample_index for row in rows]).tolist()
        new = [
            NewRow(row.slot, row.prompt.ids, (key[0], key[1]), self._limit(row))
            for row, key in zip(rows, keys, strict=True)
        ]
        tokens, logprobs = session.begin(new, logits).read()
        for row in rows:
            row.asked = 1
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
        elif (
            len(current.token_ids) == self.sampling.max_new_tokens
            or len(current.prompt_ids) + len(current.token_ids) > self.model.config.context_length
        ):
            current.finish_reason = "length"
        finished = current if current.finish_reason is not None else None
        if finished is not None:
            self._finish_text(row, is_stop)
        piece = row.text.take() if row.text is not None else ""
        return TokenEvent(current.prompt_index, current.sample_index, token, logprob, piece, finished)

    def _finish_text(self, row: _Row, is_stop: bool) -> None:
        if row.text is not None:
            row.text.finish()
            if row.text.stopped:  # in text that was held back until now
                row.sample.finish_reason = "stop"
            row.sample.text = row.text.text
        elif self.model.tokenizer is not None:
            ids = row.sample.token_ids
            row.sample.text = self.model.tokenizer.decode(ids[:-1] if is_stop else ids)
