"""The same cases under pytest-benchmark: `pytest benchmarks/ --benchmark-only` (BENCHMARK_SCALE: toy, quick or full).

This gives pytest-benchmark's statistics, comparisons and history. `python -m benchmarks` times the contenders in turns.
"""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

from benchmarks import MODULES
from benchmarks.harness import Case, Contender, LeftOutError, Settings, agree, load

pytest.importorskip("pytest_benchmark")
FOLDER = tempfile.TemporaryDirectory()
SETTINGS = Settings(
    device="cuda" if torch.cuda.is_available() else "cpu",
    scale=os.environ.get("BENCHMARK_SCALE", "quick"),
    folder=FOLDER.name,
)
PAIRS = [
    pytest.param(case, contender, id=f"{case.title}-{contender.name}-{contender.dtype or case.dtype}")
    for module in MODULES
    for case in load(module, SETTINGS)
    for contender in case.contenders
]


@pytest.mark.parametrize(("case", "contender"), PAIRS)
def test_speed(benchmark, case: Case, contender: Contender):
    try:
        call = agree(case, contender, torch.device(SETTINGS.device))
    except LeftOutError as left_out:  # for example, a peer is not installed or there is no GPU
        pytest.skip(str(left_out))
    benchmark.group = case.title
    benchmark(call)
