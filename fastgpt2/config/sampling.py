"""`SamplingConfig`: how tokens are sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastgpt2.config.checks import is_int, is_number, require
from fastgpt2.messages import shown


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is sampled and when a sample ends.

    The filters apply in the same order as in transformers: repetition penalty (Keskar et al. 2019), temperature, top-k,
    top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024).

    `min_new_tokens`, `no_repeat_ngram_size`, `suppress_tokens`, `bad_words_ids` and `sequence_bias` change the logits
    before the filters do. The host applies them, which costs some speed.

    Args:
        max_new_tokens: The most tokens that are generated for a sample.
        temperature: What logits are divided by. 0 is greedy, as is `top_k=1`.
        top_k: Sample from the k likeliest tokens only; None is off.
        top_p: Sample from the likeliest tokens whose probabilities add up to p; None is off.
        min_p: Drop tokens less likely than this share of the likeliest token's probability; None is off.
        repetition_penalty: The penalty on tokens that have occurred; 1 is off.
        stop_token_ids: Tokens that end a sample and are not part of its text. None means the model's end-of-text ids,
            `()` means none.
        stop_strings: Strings that end a sample; its text ends before the string.
        seed: The seed of the random numbers.
        min_new_tokens: No stop token is sampled before this many tokens. A stop string may still end the sample.
        no_repeat_ngram_size: No n-gram of this size occurs twice, counting the prompt; 0 is off.
        suppress_tokens: Tokens that are never sampled.
        bad_words_ids: Token sequences that never occur; the same as a bias of minus infinity.
        sequence_bias: Added to the logit of a sequence's last token whenever the tokens before it have just occurred. A
            mapping or pairs, such as `{(5,): 2.0, (6, 7): -1.5}`.

    Raises:
        ValueError: A value is out of range or of the wrong type.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()

    def __post_init__(self) -> None:
        self._set_sequences()
        for name in ("stop_token_ids", "stop_strings"):
            value = getattr(self, name)
            require(
                value is None or isinstance(value, (list, tuple)),
                f"SamplingConfig: {name} must be a list; got {value!r}",
            )
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        require(
            is_int(self.max_new_tokens) and self.max_new_tokens >= 1,
            f"SamplingConfig: max_new_tokens must be an int >= 1; got {self.max_new_tokens!r}",
        )
        require(
            is_number(self.temperature) and 0 <= self.temperature < float("inf"),
            f"SamplingConfig: temperature must be finite and >= 0 (0 is greedy); got {self.temperature!r}",
        )
        require(
            self.top_k is None or (is_int(self.top_k) and self.top_k >= 1),
            f"SamplingConfig: top_k must be an int >= 1 or None; got {self.top_k!r}",
        )
        require(
            self.top_p is None or (is_number(self.top_p) and 0 < self.top_p <= 1),
            f"SamplingConfig: top_p must be in (0, 1] or None; got {self.top_p!r}",
        )
        require(
            self.min_p is None or (is_number(self.min_p) and 0 <= self.min_p <= 1),
            f"SamplingConfig: min_p must be in [0, 1] or None; got {self.min_p!r}",
        )
        require(
            is_number(self.repetition_penalty) and 0 < self.repetition_penalty < float("inf"),
            f"SamplingConfig: repetition_penalty must be finite and > 0 (1 is none); got {self.repetition_penalty!r}",
        )
        require(
            all(is_int(i) and 0 <= i < 2**31 for i in self.stop_token_ids or ()),
            f"SamplingConfig: stop_token_ids must be ints in [0, 2**31); got {shown(self.stop_token_ids)}",
        )
        require(
            all(isinstance(s, str) and s for s in self.stop_strings),
            f"SamplingConfig: stop_strings must be non-empty strings; got {self.stop_strings!r}",
        )
        for name in ("min_new_tokens", "no_repeat_ngram_size"):
            value = getattr(self, name)
            require(is_int(value) and value >= 0, f"SamplingConfig: {name} must be an int >= 0; got {value!r}")
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"SamplingConfig: min_new_tokens must be at most max_new_tokens ({self.max_new_tokens}); "
            f"got {self.min_new_tokens}",
        )
        require(
            is_int(self.seed) and 0 <= self.seed < 2**64,
            f"SamplingConfig: seed must be an int in [0, 2**64); got {self.seed!r}",
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        return self.temperature == 0 or self.top_k == 1

    def _set_sequences(self) -> None:
        """Check the fields that hold token sequences, and convert them to tuples."""
        bias = self.sequence_bias.items() if isinstance(self.sequence_bias, Mapping) else self.sequence_bias
        values: dict[str, Any] = {
            "suppress_tokens": _token_ids(self.suppress_tokens),
            "bad_words_ids": _tuple_of(self.bad_words_ids, lambda ids: _token_ids(ids) or None),
            "sequence_bias": _tuple_of(bias, _biased),
        }
        needed = {
            "suppress_tokens": "a list of token ids",
            "bad_words_ids": "a list of lists of token ids, none empty",
            "sequence_bias": "a mapping of tuples of token ids to numbers, or such pairs",
        }
        for name, value in values.items():
            require(value is not None, f"SamplingConfig: {name} must be {needed[name]}; got {getattr(self, name)!r}")
            object.__setattr__(self, name, value)


def _tuple_of(values: object, convert: Callable[[object], Any]) -> tuple[Any, ...] | None:
    """The converted values; None if they are not iterable, or if one of them converts to None."""
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        return None
    converted = tuple(convert(value) for value in values)
    return None if None in converted else converted


def _token_ids(ids: object) -> tuple[int, ...] | None:
    return _tuple_of(ids, lambda token: token if isinstance(token, int) and is_int(token) and token >= 0 else None)


def _biased(pair: object) -> tuple[tuple[int, ...], float] | None:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return None
    ids = _token_ids(pair[0])
    bias: Any = pair[1]
    # Minus infinity is a ban. Plus infinity is refused: softmax could not choose between tokens.
    return (ids, float(bias)) if ids and is_number(bias) and -math.inf <= bias < math.inf else None
