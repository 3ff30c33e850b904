"""Searches launch rows on this GPU: checks every candidate, and times the best ones in turns with the present row.

A module that can be tuned has `tunables(settings)`, which yields `Tunable`s.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import report
from benchmarks.harness import Case, Settings, attempt, clock_for, error_of, out_of_budget

FINALISTS = 3


@dataclass(frozen=True)
class Tunable:
    """One row of launch.py that can be tuned.

    Attributes:
        key: The row's key in its table, as it is printed.
        present: The present row.
        candidates: The rows to try.
        using: Returns a context in which launches use a given row.
        case: The computation that uses the row.
    """

    key: str
    present: Any
    candidates: Sequence[Any]
    using: Callable[[Any], AbstractContextManager[Any]]
    case: Case


@dataclass
class Tuned:
    """Seconds of the present row and of the best one, the number of candidates tried, and those that failed."""

    tunable: Tunable
    best: Any
    before: float
    after: float
    tried: int
    refused: dict[Any, str]


def near_first(present: Any, candidates: Iterable[Any]) -> list[Any]:
    """The present row, then the rows that differ from it in one field, in two and so on, because time may run out."""
    others = (row for row in candidates if row != present)
    return [present, *sorted(others, key=lambda row: sum(a != b for a, b in zip(row, present, strict=True)))]


def tune(tunable: Tunable, settings: Settings, seconds: float) -> Tuned:
    """Try rows for `seconds`, then time the best of them in turns with the present one."""
    case, device = tunable.case, torch.device(settings.device)
    clock = clock_for(case, device)
    inputs = case.inputs()
    exact = case.exact(inputs) if case.exact is not None else []
    plain, ours = (next(c for c in case.contenders if c.name == name) for name in ("eager", "ours triton"))
    plain_error = error_of(case.sample(plain.build(inputs)()), exact)
    call = ours.build(inputs)

    def timed(row: Any, times: int) -> list[float]:
        with tunable.using(row):
            return [clock(call, device, 1) for _ in range(times)]

    def examined(row: Any) -> float:
        """The row's median time; ValueError if its result is wrong."""
        with tunable.using(row):
            error = error_of(case.sample(call()), exact)
        if (why := out_of_budget(error, plain_error, exact, case.dtype)) is not None:
            raise ValueError(why)
        return statistics.median(timed(row, 5))

    rows = near_first(tunable.present, tunable.candidates)
    deadline = time.perf_counter() + seconds
    medians: dict[Any, float] = {}
    refused: dict[Any, str] = {}
    tried = 0
    for row in rows:
        if row != tunable.present and time.perf_counter() > deadline:
            break
        # A row may not compile, or need more shared memory or registers than there are.
        median, why = attempt(functools.partial(examined, row))
        tried += 1
        if why is None:
            medians[row] = median
        else:
            refused[row] = why
    if tunable.present in refused:
        raise RuntimeError(f"{tunable.key}: the present row is refused: {refused[tunable.present]}")
    finalists = {tunable.present, *sorted(medians, key=lambda row: medians[row])[:FINALISTS]}
    final: dict[Any, list[float]] = {row: [] for row in finalists}
    for _ in range(settings.pick(50, 20, 3)):
        for row, taken in final.items():
            taken += timed(row, 1)
    medians = {row: statistics.median(taken) for row, taken in final.items()}
    best = min(medians, key=lambda row: medians[row])
    return Tuned(tunable, best, medians[tunable.present], medians[best], tried, refused)


def lines(tuned: Tuned) -> Iterable[str]:
    key, case = tuned.tunable.key, tuned.tunable.case
    before, after = report.seconds(tuned.before), report.seconds(tuned.after)
    yield f"{case.title}: {tuned.tried} rows tried, {len(tuned.refused)} refused"
    for row, why in tuned.refused.items():
        yield f"  refused {row}: {why}"
    if tuned.before / tuned.after < 1 + report.NOISE:
        yield f"  the present row stays, {before}: {key}: {tuned.tunable.present}"
    else:
        yield f"  {key}: {tuned.best},  # {before} -> {after}"


def main(modules: Sequence[str], settings: Settings, seconds: float) -> int:
    if not settings.on_gpu:
        print("--tune needs a GPU, because it times the launch rows on it")
        return 2
    for name in modules:
        tunables = getattr(importlib.import_module(f"benchmarks.{name}"), "tunables", None)
        if tunables is None:
            print(f"{name}: no launch rows of its own")
            continue
        for tunable in tunables(settings):
            print("\n".join(lines(tune(tunable, settings, seconds))), flush=True)
    return 0
