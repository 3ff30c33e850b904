"""Log-probabilities of given sequences. They are packed end to end without padding, and logits are never stored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt2.messages import shown
from fastgpt2.model import GPT2Base
from fastgpt2.operators import operator_backend
from fastgpt2.tokenizer import as_token_id
from fastgpt2_kernels import ops

# Tokens per forward pass: enough for efficient matrix products, few enough for the activations to fit in memory.
BATCH_TOKENS = 4096

Sequence_ = str | Sequence[int] | Tensor


@dataclass(frozen=True)
class Score:
    """The log-probabilities of one sequence under a model.

    Attributes:
        index: The sequence's number, from 0.
        token_ids: All tokens of the sequence, its prefix included.
        start: The number of the first token that counts.
        logprobs: The natural log-probability, at temperature 1, of each token from `start` on, given all tokens before
            it.
    """

    index: int
    token_ids: tuple[int, ...]
    start: int
    logprobs: list[float]

    @property
    def logprob(self) -> float:
        """The sum of `logprobs`: the log-probability of everything that counts."""
        return math.fsum(self.logprobs)

    @property
    def mean_logprob(self) -> float:
        """The mean of `logprobs`."""
        return self.logprob / len(self.logprobs)

    @property
    def perplexity(self) -> float | None:
        """exp(-mean log-probability), or None if that overflows."""
        return math.exp(-self.mean_logprob) if abs(self.mean_logprob) < 700 else None


def score(
    model: GPT2Base,
    sequences: Iterable[Sequence_],
    *,
    prefixes: Iterable[Sequence_] | str | None = None,
    after_prefix: bool = False,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Score]:
    """Compute the log-probabilities of sequences under a model.

    Args:
        model: The model.
        sequences: See `score_iter`.
        prefixes: See `score_iter`.
        after_prefix: See `score_iter`.
        batch_tokens: See `score_iter`.

    Returns:
        The scores, in the order of the sequences.

    Raises:
        ValueError: See `score_iter`.

    Example:
        >>> [s.perplexity for s in score(model, ["def add(a, b):", "add def b ):a"])]
    """
    return list(score_iter(model, sequences, prefixes=prefixes, after_prefix=after_prefix, batch_tokens=batch_tokens))


def score_iter(
    model: GPT2Base,
    sequences: Iterable[Sequence_],
    *,
    prefixes: Iterable[Sequence_] | str | None = None,
    after_prefix: bool = False,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[Score]:
    """Compute the log-probabilities of sequences under a model, in order, while they are read.

    The first token of a sequence has no token before it, and does not count. Sequences of any lengths are packed into
    one batch without padding.

    Args:
        model: The model.
        sequences: Texts, for which the model needs a tokenizer, or token ids.
        prefixes: What comes before the sequences: one text for all of them, or a text or token ids for each. Prefix and
            sequence are tokenized separately.
        after_prefix: Whether only the tokens after the prefix count. By default those of the prefix count too.
        batch_tokens: The most tokens per forward pass. A longer sequence gets a forward pass of its own.

    Yields:
        A score for each sequence.

    Raises:
        TypeError: A sequence is neither text nor token ids.
        ValueError: A sequence does not fit in the context, or none of its tokens can be scored. Scores that were
            yielded before stay valid.
    """
    if not isinstance(batch_tokens, int) or isinstance(batch_tokens, bool) or batch_tokens < 1:
        raise ValueError(f"score: batch_tokens must be an int >= 1; got {shown(batch_tokens)}")
    if isinstance(sequences, str):
        sequences = [sequences]
    before: Iterator[Sequence_] = (
        iter(prefixes) if not isinstance(prefixes, str | None) else itertools.repeat(prefixes or "")
    )

    def read() -> Iterator[Score]:
        for index, sequence in enumerate(sequences):
            prefix = next(before, None)
            if prefix is None:
                raise ValueError(f"score: prefixes must have one for every sequence; there is none for {index}")
            name = f"sequence {index}"
            yield unscored(model, index, sequence, prefix, name, after_prefix=after_prefix)

    return score_all(model, read(), batch_tokens)


def unscored(
    model: GPT2Base, index: int, sequence: Sequence_, prefix: Sequence_, name: str, *, after_prefix: bool
) -> Score:
    """Tokenize and check a sequence, which errors call `name`. Returns a score that has no log-probabilities yet."""
    first = token_ids(model, prefix, name)
    ids = first + token_ids(model, sequence, name)
    start = max(1, len(first) if after_prefix else 1)
    # The last token is predicted but predicts nothing, so it needs no position in the context.
    if len(ids) > model.config.context_length + 1:
        raise ValueError(
            f"score: {name} has {len(ids)} tokens; the context scores at most {model.config.context_length + 1}; "
            "shorten it"
        )
    if len(ids) <= start:
        raise ValueError(f"score: {name} has no token with another one before it; give it a prefix, or leave it out")
    return Score(index, ids, start, [])


def token_ids(model: GPT2Base, sequence: Sequence_, name: str) -> tuple[int, ...]:
    """The token ids of a sequence, which errors call `name`. They are checked against the model's vocabulary."""
    if isinstance(sequence, str):
        if not sequence:
            return ()
        if model.tokenizer is None:
            raise ValueError(f"score: {name} is text, but the model has no tokenizer; set model.tokenizer or give ids")
        ids = tuple(model.tokenizer.encode(sequence))
    else:
        if isinstance(sequence, (bytes, bytearray)) or not isinstance(sequence, Iterable):
            raise TypeError(f"score: a sequence must be text or token ids; {name} is {type(sequence).__name__}")
        ids = tuple(as_token_id(token, "score", name) for token in sequence)
    bad = next((token for token in ids if not 0 <= token < model.config.vocab_size), None)
    if bad is not None:
        raise ValueError(
            f"score: {name} holds the token id {shown(bad)}; ids must be in [0, {model.config.vocab_size})"
        )
    return ids


def score_all(model: GPT2Base, sequences: Iterable[Score], batch_tokens: int = BATCH_TOKENS) -> Iterator[Score]:
    """Compute the log-probabilities of the scores that `unscored` made, in batches of up to `batch_tokens` tokens."""
    batch: list[Score] = []
    size = 0
    for sequence in sequences:
        length = len(sequence.token_ids) - 1
        if batch and size + length > batch_tokens:
            yield from _score_batch(model, batch)
            batch, size = [], 0
        batch.append(sequence)
        size += length
    if batch:
        yield from _score_batch(model, batch)


@torch.no_grad()
def _score_batch(model: GPT2Base, batch: list[Score]) -> list[Score]:
    inputs: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    ends = [0]
    for item in batch:
        rows.extend(range(ends[-1] + item.start - 1, ends[-1] + len(item.token_ids) - 1))
        inputs.extend(item.token_ids[:-1])
        targets.extend(item.token_ids[item.start :])
        ends.append(len(inputs))
    device = model.device
    training = model.training
    model.eval()
    try:
        documents = ops.to_device(ends, device, torch.int32)
        hidden_NC = model.hidden_states(ops.to_device([inputs], device), cu_seqlens=documents)[0]
        if len(rows) < len(inputs):
            hidden_NC = hidden_NC[ops.to_device(rows, device)]
        loss_N = ops.linear_cross_entropy(
            hidden_NC,
            model.lm_head.weight,
            ops.to_device(targets, device),
            reduction="none",
            backend=operator_backend(model.backend),
        )
    finally:
        model.train(training)
    logprobs = iter((-loss_N).tolist())
    scored = []
    for item in batch:
        own = list(itertools.islice(logprobs, len(item.token_ids) - item.start))
        if not all(map(math.isfinite, own)):
            raise RuntimeError(
                f"score: the model's logits for sequence {item.index} are NaN or infinite; check the weights, or use a "
                "wider dtype"
            )
        scored.append(Score(item.index, item.token_ids, item.start, own))
    return scored
