"""How tokens are chosen: `SamplingConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from fastgpt2.config.checks import is_int, is_number, require


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen and when a sample ends.

    temperature=0 (or top_k=1) is greedy. Filters apply in this order, as in transformers: repetition penalty
    (Keskar et al. 2019), temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024).
    `stop_token_ids=None` means the model's end-of-text ids; `()` means none. The stop token ends the sample and is
    not part of its text; a stop string ends it at the string's first character.
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

    def __post_init__(self) -> None:
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
            all(is_int(i) and i >= 0 for i in self.stop_token_ids or ()),
            f"SamplingConfig: stop_token_ids must be ints >= 0; got {self.stop_token_ids!r}",
        )
        require(
            all(isinstance(s, str) and s for s in self.stop_strings),
            f"SamplingConfig: stop_strings must be non-empty strings; got {self.stop_strings!r}",
        )
        require(
            is_int(self.seed) and 0 <= self.seed < 2**64,
            f"SamplingConfig: seed must be an int in [0, 2**64); got {self.seed!r}",
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1
