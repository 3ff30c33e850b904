"""The default batch size of decoding: as many rows as fit in memory and still raise the tokens per second."""

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
# A trial of a batch size decodes this many tokens per row. It is run this many times, and the fastest run counts.
_TRIAL_TOKENS, _TRIALS = 5, 2
_LEAST_GAIN = 1.05  # a larger batch must raise the tokens per second by at least this factor
_COST = 20  # trials decode at most 1/20 of the tokens that were asked for

_measured: WeakKeyDictionary[GPT2Base, dict[tuple[torch.dtype | None, int], float]] = WeakKeyDictionary()


def find_batch_size(
    model: GPT2Base,
    prompts: Iterable[object],
    rows: int | None,
    sampling: SamplingConfig,
    pack_weights: bool,
    weight_dtype: torch.dtype | None,
) -> int:
    """Choose how many rows to decode together.

    Measurements decide only for the native backend. PyTorch's operators round a row differently for different batch
    sizes, so there the batch size must not depend on a measurement.

    Args:
        model: The model.
        prompts: The prompts.
        rows: The number of samples of the run; None if it is not known.
        sampling: How tokens are sampled.
        pack_weights: Whether the weights are packed for the native backend.
        weight_dtype: The dtype of the packed weights; None is the model's.
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
    """The number of rows whose cache and logits fit in half of the free memory."""
    free = free_memory(model.device)
    if free is None:
        return max(MEASURED_ROWS)
    config = model.config
    longest = config.context_length
    if isinstance(prompts, Collection) and rows is not None:  # a token is at least one byte of text
        sizes = (len(p.encode()) if isinstance(p, str) else len(p) for p in prompts if isinstance(p, Collection))
        longest = min(longest, max(sizes, default=0) + sampling.max_new_tokens)
    return int(free / 2 / (cache_bytes_per_token(config, torch.float32) * longest + 4 * config.vocab_size))


def _seconds(model: GPT2Base, rows: int, sampling: SamplingConfig, weight_dtype: torch.dtype | None) -> float:
    """Measure the seconds that a decode step of this many rows takes."""
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
