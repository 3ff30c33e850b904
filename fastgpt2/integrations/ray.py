"""Classes for Ray Data's `Dataset.map_batches`. Each actor holds a model, and maps columns to columns.

Ray repeats a batch whose actor was killed. A sample depends only on the seed and on its prompt's number, so the
repeated batch gives the same samples. This module does not import Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastgpt2.devices import find_device
from fastgpt2.gpt2 import GPT2
from fastgpt2.scoring import score

Batch = Mapping[str, Any]


class _Worker:
    """Loads a model once, onto the GPU that Ray assigned to the actor, or onto the CPU."""

    def __init__(self, model: str | GPT2, device: str = "auto") -> None:
        self.model = model if isinstance(model, GPT2) else GPT2.from_pretrained(model, device=find_device(device))


class Generate(_Worker):
    """Continues the prompts of a batch. The result has one row per sample, which keeps the prompt's other columns.

    Args:
        model: A model, or a name or path for `GPT2.from_pretrained`.
        column: The column of the prompts, as text or token ids.
        index: The column of a number that is unique to the prompt in the whole data set. Samples depend on it and on
            the seed. Without it (None) they depend on the prompt's text and the seed, so equal prompts get equal
            samples.
        device: The device; "auto" is a GPU if there is one.
        options: Options of `GPT2.generate` (num_samples, max_new_tokens, seed ...).
    """

    def __init__(
        self,
        model: str | GPT2,
        *,
        column: str = "prompt",
        index: str | None = None,
        device: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(model, device)
        self.column, self.index, self.options = column, index, options

    def __call__(self, batch: Batch) -> dict[str, Any]:
        prompts = _values(batch, self.column)
        numbers = [_number(prompt) for prompt in prompts]
        if self.index is not None:
            numbers = [int(number) for number in _values(batch, self.index)]
        samples = self.model.generate(prompts, sample_ids=numbers, **self.options)
        rows = [sample.prompt_index for sample in samples]
        out = {name: np.asarray(values)[rows] for name, values in batch.items()}
        out["sample_index"] = np.array([sample.sample_index for sample in samples], dtype=np.int64)
        if self.model.tokenizer is not None:
            out["text"] = np.array([sample.text for sample in samples], dtype=object)
        out["token_ids"] = _ragged([sample.token_ids for sample in samples])
        out["finish_reason"] = np.array([sample.finish_reason for sample in samples], dtype=object)
        out["logprob"] = np.array([sum(sample.logprobs) for sample in samples])
        return out


class Score(_Worker):
    """Scores the sequences of a batch. The result has the columns "logprob", "num_tokens" and "perplexity" in addition.

    Args:
        model: A model, or a name or path for `GPT2.from_pretrained`.
        column: The column of the sequences, as text or token ids.
        prefix_column: The column of what comes before them, if anything does.
        after_prefix: Whether to score only the tokens after the prefix.
        device: The device; "auto" is a GPU if there is one.
    """

    def __init__(
        self,
        model: str | GPT2,
        *,
        column: str = "text",
        prefix_column: str | None = None,
        after_prefix: bool = False,
        device: str = "auto",
    ) -> None:
        super().__init__(model, device)
        self.column, self.prefix_column, self.after_prefix = column, prefix_column, after_prefix

    def __call__(self, batch: Batch) -> dict[str, Any]:
        prefixes = None if self.prefix_column is None else _values(batch, self.prefix_column)
        scores = score(self.model, _values(batch, self.column), prefixes=prefixes, after_prefix=self.after_prefix)
        return {
            **batch,
            "logprob": np.array([one.logprob for one in scores]),
            "num_tokens": np.array([len(one.logprobs) for one in scores], dtype=np.int64),
            "perplexity": np.array([np.inf if one.perplexity is None else one.perplexity for one in scores]),
        }


def _values(batch: Batch, column: str) -> Sequence[Any]:
    if column not in batch:
        raise ValueError(f"the batch must have a column {column!r}; it has {', '.join(batch)}")
    return [value if isinstance(value, str) else np.asarray(value).tolist() for value in batch[column]]


def _number(prompt: Any) -> int:
    """A hash of a prompt, which is the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(prompt).encode(), digest_size=8).digest(), "big")


def _ragged(rows: list[list[int]]) -> np.ndarray:
    out = np.empty(len(rows), dtype=object)
    for index, row in enumerate(rows):
        out[index] = np.array(row, dtype=np.int64)
    return out
