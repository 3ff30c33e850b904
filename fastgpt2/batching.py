"""How many rows are decoded together where nobody says so: what memory holds, and what raises tokens a second."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Collection, Iterable
from weakref import WeakKeyDictionary

import torch

from fastgpt2.accounting import cache_bytes_per_token
from fastgpt2.config import SamplingConfig
from fastgpt2.decode import decode_backend, why_not_decode
from fastgpt2.machine import free_memory
from fastgpt2.model import GPT2Base
from fastgpt2.scheduler import Request, Scheduler

DEFAULT_ROWS = 32
MEASURED_ROWS = (32, 64, 128, 256)
# Of each number of rows: the tokens of a trial, the first of which are warm-up; the runs, of which the faster counts.
_TRIAL_TOKENS, _TRIALS = 5, 2
_LEAST_GAIN = 1.05  # more rows are taken for so many times the tokens a second
_COST = 20  # trials make at most one in so many of the tokens that are asked for

_measured: WeakKeyDictionary[GPT2Base, dict[tuple[torch.dtype | None, int], float]] = WeakKeyDictionary()


def find_batch_size(
    model: GPT2Base,
    prompts: Iterable[object],
    rows: int | None,
    sampling: SamplingConfig,
    pack_weights: bool,
    weight_dtype: torch.dtype | None,
) -> int:
    """The rows to decode together of a run of `rows` samples; None: nobody knows how many.

    PyTorch's operators round a row by how many there are, so that there no measurement decides.
    """
    fits = _rows_that_fit(model, prompts, rows, sampling)
    best = max(1, min(DEFAULT_ROWS, fits))
    if rows is None or rows <= best:
        return max(1, min(best, rows or best))
    if best < DEFAULT_ROWS or not pack_weights or why_not_decode(model) or decode_backend(model) != "native":
        return best
    known = _measured.setdefault(model, {})
    spent = 0
    for count in MEASURED_ROWS:
        spent += count * _TRIAL_TOKENS * _TRIALS
        if count > min(rows, fits) or spent * _COST > rows * sampling.max_new_tokens:
            break
        if (weight_dtype, count) not in known:
            known[weight_dtype, count] = count / _seconds(model, count, sampling, weight_dtype)
        if known[weight_dtype, count] < known[weight_dtype, best] * _LEAST_GAIN and count > best:
            break
        best = count
    return best


def _rows_that_fit(model: GPT2Base, prompts: Iterable[object], rows: int | None, sampling: SamplingConfig) -> int:
    """How many rows' cache and logits half of the free memory holds."""
    free = free_memory(model.device)
    if free is None:
        return max(MEASURED_ROWS)
    config = model.config
    longest = config.context_length
    if isinstance(prompts, Collection) and rows is not None:  # a token is a byte or more
        sizes = (len(p.encode()) if isinstance(p, str) else len(p) for p in prompts if isinstance(p, Collection))
        longest = min(longest, max(sizes, default=0) + sampling.max_new_tokens)
    return int(free / 2 / (cache_bytes_per_token(config, torch.float32) * longest + 4 * config.vocab_size))


def _seconds(model: GPT2Base, rows: int, sampling: SamplingConfig, weight_dtype: torch.dtype | None) -> float:
    """What a step of so many rows takes."""
    trial = dataclasses.replace(
        sampling, max_new_tokens=_TRIAL_TOKENS, min_new_tokens=0, stop_token_ids=(), stop_strings=()
    )
    times = []
    for _ in range(_TRIALS):
        source = (Request(index, index, (0,), deque([0])) for index in range(rows))
        run = Scheduler(model, source, trial, rows, True, weight_dtype, None, False).run()
        start = time.perf_counter()
        deque(run, maxlen=0)
        times.append(time.perf_counter() - start)
    return min(times) / _TRIAL_TOKENS
