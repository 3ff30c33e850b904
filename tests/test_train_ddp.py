"""Data-parallel training: two gloo processes give the same result as one process with twice the accumulation."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fastgpt2 import GPT2
from fastgpt2.config import TrainConfig
from fastgpt2.data import TokenData
from fastgpt2.train import Processes, Trainer, checkpoint_paths, read_checkpoint

SERVER = multiprocessing.get_context("forkserver")
CONFIG = {
    "steps": 6, "batch_size": 2, "log_interval": 1, "eval_interval": 3, "checkpoint_interval": 3, "warmup_steps": 2,
    "dtype": "fp32", "lr": 1e-2,
}  # fmt: skip

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.usefixtures("forkserver"),
]


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name, size in (("train", 600), ("val", 100)):
        rng.integers(23, size=size).astype("<u2").tofile(tmp_path / f"{name}.bin")
    return tmp_path


def train(folder: Path, out: Path, processes: Processes | None, resume: bool, stop_at: int, **changes: Any) -> None:
    torch.set_num_threads(1)
    data = TokenData.open(folder)
    if resume:
        trainer = Trainer.resume(out, data, processes=processes, **changes)
    else:
        trainer = Trainer(make_model(), data, TrainConfig(**{**CONFIG, **changes}), out, processes=processes)
    for report in trainer.run():
        if report.step == stop_at:
            trainer.stop()


def worker(rank: int, port: int, folder: Path, out: Path, resume: bool, stop_at: int, changes: dict[str, Any]) -> None:
    """What torchrun starts: the environment tells the process who it is."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
    processes = Processes.start("cpu")
    try:
        with processes.first_goes_first():
            (out / f"rank-{rank}").mkdir(parents=True)
            assert (out / "rank-0").exists()
        train(folder, out, processes, resume, stop_at, **changes)
    finally:
        processes.close()


def train_in_two(folder: Path, out: Path, resume: bool = False, stop_at: int = -1, **changes: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        SERVER.Process(target=worker, args=(rank, port, folder, out, resume, stop_at, changes)) for rank in range(2)
    ]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    assert [process.exitcode for process in workers] == [0, 0]


def make_model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(vocab_size=23, context_length=8, hidden_size=16, num_layers=2, num_heads=2, dropout_rate=0.0)


def assert_equal_to_rounding(one: Path, two: Path) -> None:
    """The same losses, and the same way from the first weights to the last.

    The way as a whole: AdamW divides a gradient by its own size, so where a gradient is all rounding, so is its step.
    """
    first = make_model().state_dict()
    last = [read_checkpoint(checkpoint_paths(out)[-1])["model"] for out in (one, two)]
    ways = [torch.cat([(weights[name] - first[name]).flatten() for name in first]) for weights in last]
    assert (ways[0] - ways[1]).norm() < 1e-3 * ways[0].norm()
    lines = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for out in (one, two)
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for mine, other in zip(*lines, strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            assert mine.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-4), (name, mine["step"])


def test_two_processes_are_one_with_twice_the_accumulation(folder: Path) -> None:
    train(folder, folder / "one", None, False, -1, accumulate=4)
    train_in_two(folder, folder / "two", accumulate=2)
    assert_equal_to_rounding(folder / "one", folder / "two")
    assert GPT2.from_pretrained(folder / "two").config.vocab_size == 23


def test_a_run_goes_on_with_another_number_of_processes(folder: Path) -> None:
    train(folder, folder / "one", None, False, -1, accumulate=2)
    train_in_two(folder, folder / "two", stop_at=2, accumulate=1)
    assert checkpoint_paths(folder / "two")[-1].name == "step-00000003.pt"
    train(folder, folder / "two", None, True, -1, accumulate=2)
    assert_equal_to_rounding(folder / "one", folder / "two")
    with pytest.raises(ValueError, match=r"must stay 4 rows a step as in step-00000006.pt; got 2"):
        train(folder, folder / "two", None, True, -1, accumulate=1)
