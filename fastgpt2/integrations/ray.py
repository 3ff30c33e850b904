"""Classes for Ray Data's `Dataset.map_batches`: a model in each actor, columns in and out.

Ray repeats a batch whose actor was killed; a sample depends on the seed and on its prompt's number alone, so nothing
changes. Nothing of Ray is imported here.
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
    """A model, loaded once, on the GPU that Ray gave to the actor or on the CPU."""

    def __init__(self, model: str | GPT2, device: str = "auto") -> None:
        self.model = model if isinstance(model, GPT2) else GPT2.from_pretrained(model, device=find_device(device))


class Generate(_Worker):
    """Continue the prompts of a batch: for every prompt its samples' rows, which keep the prompt's other columns.

    Args:
        model: a name or path, as for `GPT2.from_pretrained`.
        column: of the prompts, text or token ids.
        index: the column of a number that is the prompt's own in the whole data set, which its samples depend on beside
            the seed. Without one (None) samples depend on the prompt's text and on the seed, so that equal prompts get
            equal samples.
        options: go to `GPT2.generate` (num_samples, max_new_tokens, seed ...).
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
    """Score the sequences of a batch: its columns and "logprob", "num_tokens" and "perplexity".

    Args:
        model: a name or path, as for `GPT2.from_pretrained`.
        column: of the sequences, text or token ids.
        prefix_column: of what stands before them, if anything does.
        after_prefix: score the tokens after the prefix only.
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
    """A number that every process has for the same prompt."""
    return int.from_bytes(hashlib.blake2b(repr(prompt).encode(), digest_size=8).digest(), "big")


def _ragged(rows: list[list[int]]) -> np.ndarray:
    out = np.empty(len(rows), dtype=object)
    for index, row in enumerate(rows):
        out[index] = np.array(row, dtype=np.int64)
    return out
