"""Changes to a row's logits before a token is sampled: banned tokens, biases and the user's logits processor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastgpt2.config import SamplingConfig
from fastgpt2.messages import shown
from fastgpt2_kernels import ops

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""Maps the token ids so far (1, T) int64 and logits (1, V) float32 to logits (1, V), as in transformers."""


class Constraints:
    """The parts of a `SamplingConfig` that a decode step cannot apply by itself, and the user's logits processor.

    Applied in this order: biases of single tokens and suppressed tokens; biases of token sequences; n-grams that must
    not repeat; stop tokens that come too early; the processor.
    """

    def __init__(
        self,
        config: SamplingConfig,
        processor: LogitsProcessor | None,
        stop_ids: Iterable[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._processor = processor
        self._ngram_size, self._min_new_tokens = config.no_repeat_ngram_size, config.min_new_tokens
        biases = [*config.sequence_bias, *((word, -math.inf) for word in config.bad_words_ids)]
        named = [*(token for ids, _ in biases for token in ids), *config.suppress_tokens]
        if bad := [token for token in named if token >= vocab_size]:
            raise ValueError(
                f"generate: sequence_bias, bad_words_ids and suppress_tokens must name ids in [0, {vocab_size}); "
                f"got {shown(bad[0])}"
            )
        always = torch.zeros(vocab_size, dtype=torch.float32)
        for ids, bias in biases:
            if len(ids) == 1:
                always[ids[0]] += bias
        always[list(config.suppress_tokens)] = -math.inf
        self._always = always.to(device) if always.any() else None
        self._after = [(ids[:-1], ids[-1], bias) for ids, bias in biases if len(ids) > 1]
        self._stops = ops.to_device([i for i in stop_ids if i < vocab_size], device, torch.int64)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to apply."""
        has_bans = self._always is not None or self._after or self._ngram_size or self._min_new_tokens
        return self._processor is None and not has_bans

    @torch.no_grad()
    def apply(self, logits: Tensor, ids: Sequence[Sequence[int]], num_new: Sequence[int]) -> Tensor:
        """Return the changed logits, (R, V) float32.

        Args:
            logits: The logits of R rows, (R, V) float32; they are left as they are.
            ids: All tokens of each row, its prompt included.
            num_new: How many tokens of each row were generated.

        Raises:
            ValueError: The user's processor returned something other than logits of one row.
        """
        changed = logits.clone() if self._always is None else logits + self._always
        for row, (tokens, count) in enumerate(zip(ids, num_new, strict=True)):
            for prefix, token, bias in self._after:
                if tuple(tokens[-len(prefix) :]) == prefix:
                    changed[row, token] += bias
            if self._ngram_size and (banned := _ends_of_ngrams(tokens, self._ngram_size)).numel():
                changed[row, ops.to_device(banned, changed.device)] = -math.inf
            if count < self._min_new_tokens:
                changed[row, self._stops] = -math.inf
            if self._processor is not None:
                changed[row] = _processed(self._processor, changed[row], tokens)
        return changed


def _processed(processor: LogitsProcessor, logits: Tensor, tokens: Sequence[int]) -> Tensor:
    result = processor(ops.to_device([tokens], logits.device), logits[None].clone())
    if not isinstance(result, Tensor) or result.shape != (1, len(logits)):
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"generate: logits_processor must return logits of shape (1, {len(logits)}); got {got}")
    return result[0]


def _ends_of_ngrams(tokens: Sequence[int], size: int) -> Tensor:
    """The tokens that would complete an n-gram which has occurred before."""
    ids = torch.tensor(tokens)
    if len(ids) < size:
        return ids[:0]
    ngrams = ids.unfold(0, size, 1)
    return ngrams[(ngrams[:, :-1] == ids[len(ids) - size + 1 :]).all(1), -1]
