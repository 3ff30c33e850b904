"""FLOPs and bytes agree with counts on the model itself."""

from __future__ import annotations

import itertools
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastgpt2 import GPT2, GPT2Config, KVCache, accounting
from fastgpt2.accounting import (
    cache_bytes_per_token,
    forward_flops_per_token,
    matmul_parameters,
    measured_matmul_flops,
    peak_flops,
    training_bytes,
    training_flops_per_token,
    weight_bytes,
)

DOCS = Path(__file__).resolve().parent.parent / "docs" / "training.md"
CONFIG = GPT2Config(vocab_size=101, context_length=16, hidden_size=24, num_layers=3, num_heads=2, feedforward_dim=40)


def test_matmul_parameters_are_the_matrices_of_the_model() -> None:
    matrices = [p for name, p in GPT2(CONFIG).named_parameters() if p.dim() == 2 and "wpe" not in name]
    assert matmul_parameters(CONFIG) == sum(p.numel() for p in matrices)
    assert weight_bytes(CONFIG, torch.bfloat16) == 2 * matmul_parameters(CONFIG)


def test_forward_flops_are_what_pytorch_counts() -> None:
    model, ids = GPT2(CONFIG).eval(), torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    attention = 4.0 * CONFIG.num_layers * CONFIG.hidden_size * 16
    products = forward_flops_per_token(CONFIG, 16) - attention
    counted = counter.get_total_flops() / ids.numel()
    # Whether PyTorch counts attention depends on the operator that it chooses on this CPU.
    assert counted == pytest.approx(products) or counted == pytest.approx(products + attention)
    assert training_flops_per_token(CONFIG, 16) == 3 * forward_flops_per_token(CONFIG, 16)


@pytest.mark.parametrize(
    "fields", [{}, {"activation_function": "prelu", "tie_word_embeddings": False}, {"activation_function": "xielu"}]
)
def test_training_bytes_are_the_models(fields: dict[str, Any]) -> None:
    config = CONFIG.replace(**fields)
    whole = 4 * GPT2(config).num_parameters()
    alone = training_bytes(config)
    assert (alone.weights, alone.gradients, alone.optimizer, alone.sent) == (whole, whole, 2 * whole, 0)
    assert training_bytes(config, 4).held == 4 * whole
    assert training_bytes(config, 4, parallel="fsdp").held == whole


def test_the_documented_plan_is_this_arithmetic() -> None:
    """The table in docs/training.md is what `training_bytes` computes.

    Its columns are GB of memory, GB of messages, and the GB/s that hide the messages behind 8 rows of 1024 tokens.
    """
    rows = re.findall(r"^\| (gpt2\S*) \| (\w+) \| (\d+) \| (.*) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 12
    for preset, parallel, processes, figures in rows:
        config = GPT2Config.preset(preset)
        expected = training_bytes(config, int(processes), parallel=parallel)
        seconds = 8 * 1024 * training_flops_per_token(config, 1024) / (0.4 * 989e12)
        numbers = (expected.held, expected.passing, expected.sent, expected.sent / seconds)
        assert figures.split(" | ") == [f"{number / 1e9:.3g}" for number in numbers], (preset, parallel, processes)


def test_cache_bytes_are_those_of_the_cache() -> None:
    cache = KVCache(CONFIG, 1, 16, dtype=torch.float16)
    assert cache_bytes_per_token(CONFIG, torch.float16) * 16 == cache.keys.nbytes + cache.values.nbytes


def test_gpt2_small_has_85_million_block_weights_and_its_head() -> None:
    assert matmul_parameters(GPT2Config.preset("gpt2")) == 84_934_656 + 50257 * 768


def test_an_unknown_device_is_measured() -> None:
    speed = measured_matmul_flops("cpu", torch.float32, repeats=1)
    assert 1e8 < speed < 1e15
    assert 1e8 < peak_flops("cpu", torch.float32) < 1e15


@pytest.mark.parametrize(("seconds", "runs"), [(0.01, 6), (0.3, 4), (2.0, 1)])
def test_a_slow_device_is_measured_for_a_second(seconds: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, started = itertools.count(), []
    monkeypatch.setattr("time.perf_counter", lambda: next(clock) * seconds)
    monkeypatch.setattr(torch, "mm", lambda a, b: started.append(a.dtype))
    assert measured_matmul_flops("cpu", torch.bfloat16) == pytest.approx(2 * 1024**3 / seconds)
    assert started == [torch.bfloat16] * runs


class Gpu:
    """Stands in for a GPU with its own clock: it runs what was queued, in order, while the host's clock goes on."""

    CYCLES = 1e9  # per second

    def __init__(self, kernel: float, host: list[float]) -> None:
        self.kernel, self.host = kernel, host  # seconds of the timed kernel, and of queueing it, call by call
        self.now = self.free = 0.0  # the host's time, and the time at which the GPU has done all that is queued
        self.calls = 0

    def queue(self, seconds: float) -> None:
        self.free = max(self.free, self.now) + seconds

    def call(self) -> None:
        self.now += self.host[min(self.calls, len(self.host) - 1)]
        self.calls += 1
        self.queue(self.kernel)

    def wait(self) -> None:
        self.now = max(self.now, self.free)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.now += 1e-6
                gpu.queue(0.0)
                self.at = gpu.free

            def synchronize(self) -> None:
                gpu.wait()

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) * 1e3

        class Buffer:
            def zero_(self) -> None:
                gpu.queue(80e-6)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.queue(cycles / self.CYCLES))
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: gpu.wait())
        monkeypatch.setattr(accounting.time, "perf_counter", lambda: gpu.now)
        monkeypatch.setattr(accounting, "_flush_buffer", lambda device: Buffer())
        accounting._cycles_per_second.cache_clear()


@pytest.mark.parametrize(
    "host",
    [
        [1e-6],  # quicker than the GPU
        [700e-6],  # forward and backward through autograd
        [30e-6, 800e-6, 800e-6],  # slower than when it was measured first
        [5.0, 200e-6],  # the first call compiles
    ],
)
def test_gpu_seconds_are_without_the_host(host: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(50e-6, host)
    gpu.install(monkeypatch)
    try:
        assert accounting.gpu_seconds(gpu.call, torch.device("cuda"), 3) == pytest.approx(50e-6)
    finally:
        accounting._cycles_per_second.cache_clear()
    assert gpu.now < 5.3  # a long first call does not make every wait long


def test_a_call_that_waits_for_the_gpu_is_still_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It then waits for the hold too, which is bounded."""
    gpu = Gpu(50e-6, [1e-3])
    gpu.install(monkeypatch)

    def waits() -> None:
        gpu.call()
        gpu.wait()

    try:
        assert accounting.gpu_seconds(waits, torch.device("cuda"), 2) > 0
    finally:
        accounting._cycles_per_second.cache_clear()
    assert gpu.now < 0.4
