"""The automatic batch size depends on memory and measured time, and does not change the samples."""

from __future__ import annotations

import random

import pytest
import torch

from fastgpt2 import SamplingConfig, batching
from fastgpt2.batching import find_batch_size
from fastgpt2.decode import why_not_decode
from fastgpt2.machine import free_memory
from tests.helpers import random_model

V = 61
PLENTY = 1 << 40


@pytest.fixture
def model(seed):
    model = random_model(seed)
    if (reason := why_not_decode(model)) is not None:
        pytest.skip(reason)
    return model


def find(model, rows: int | None, new: int = 200, prompts: object = (), **changes: object) -> int:
    options = {"pack_weights": True, "weight_dtype": None, **changes}
    return find_batch_size(model, prompts, rows, SamplingConfig(max_new_tokens=new), **options)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({32: 1.0, 64: 1.2, 128: 1.8, 256: 3.7}, 128),
        ({32: 1.0, 64: 2.0}, 32),
        ({32: 1.0, 64: 1.0, 128: 1.0, 256: 1.0}, 256),
    ],
)
def test_the_rows_with_most_tokens_a_second_are_taken(model, seconds, best, monkeypatch):
    asked = []

    def measured(_, rows, *rest):
        asked.append(rows)
        return seconds[rows]

    monkeypatch.setattr(batching, "_seconds", measured)
    monkeypatch.setattr(batching, "free_memory", lambda device: PLENTY)
    assert find(model, 10_000) == best
    assert asked == list(seconds)
    assert find(model, 10_000) == best
    assert asked == list(seconds), "a batch size was measured twice"
    # A trial is never longer than the run, and never has more rows.
    assert find(model, 10_000, new=1) == 32
    assert find(model, 100, new=10_000) == min(best, 64)
    assert find(model, 7) == 7
    assert find(model, None) == 32
    assert find(model, 10_000, pack_weights=False) == 32


def test_memory_limits_the_rows(model, monkeypatch):
    monkeypatch.setattr(batching, "_seconds", lambda _, rows, *rest: 1.0)
    of_row = 2 * 3 * 32 * 4 * 24 + 4 * V  # keys and values of a whole context, and logits
    for free, rows in ((2 * 5 * of_row, 5), (0, 1), (2 * 100 * of_row, 64), (None, 256)):
        monkeypatch.setattr(batching, "free_memory", lambda device, free=free: free)
        assert find(model, 10_000) == rows
    # Short prompts with short samples need less than a whole context.
    monkeypatch.setattr(batching, "free_memory", lambda device: 2 * 5 * of_row)
    assert find(model, 10_000, new=1, prompts=[[1, 2]] * 10_000) > 5


def test_samples_do_not_depend_on_the_rows_that_are_chosen(model, seed, monkeypatch):
    rng = random.Random(seed)
    prompts = [[rng.randrange(V) for _ in range(rng.randint(1, 12))] for _ in range(100)]
    options = {"max_new_tokens": 6, "num_samples": 3, "seed": seed}
    monkeypatch.setattr(batching, "free_memory", lambda device: PLENTY)
    monkeypatch.setattr(batching, "_COST", 0)  # run trials however short the run is
    found = []
    for times in ({32: 1.0, 64: 9.0}, {32: 1.0, 64: 1.0, 128: 1.0, 256: 1.0}):
        monkeypatch.setattr(batching, "_seconds", lambda _, rows, *rest, times=times: times[rows])
        batching._measured.clear()
        found.append(model.generate(prompts, **options))
    monkeypatch.undo()
    monkeypatch.setattr(batching, "_COST", 0)
    batching._measured.clear()
    found.append(model.generate(prompts, **options))  # this time with real measurements
    assert batching._measured[model]
    assert found[0] == found[1] == found[2] == model.generate(prompts, batch_size=rng.randint(1, 9), **options)
    assert all(seconds > 0 for seconds in batching._measured[model].values())


def test_free_memory_is_some_of_the_machine_s():
    free = free_memory(torch.device("cpu"))
    assert free is None or 0 <= free < 1 << 50
