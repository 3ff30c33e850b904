"""Training in processes: two of gloo, with whole or shared weights, are one with twice the accumulation."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Job:
    """A training run, begun or resumed; `stop_at` is a step after which it is asked to stop."""

    out: Path
    resume: bool = False
    stop_at: int = -1
    changes: dict[str, Any] = field(default_factory=dict)

    def do(self, folder: Path, processes: Processes | None = None) -> Trainer:
        torch.set_num_threads(1)
        data = TokenData.open(folder)
        if self.resume:
            trainer = Trainer.resume(self.out, data, processes=processes, **self.changes)
        else:
            config = TrainConfig(**{**CONFIG, **self.changes})
            trainer = Trainer(make_model(), data, config, self.out, processes=processes)
        for report in trainer.run():
            if report.step == self.stop_at:
                trainer.stop()
        return trainer


def worker(rank: int, count: int, port: int, folder: Path, jobs: list[Job]) -> None:
    """What torchrun starts: the environment tells the process who it is."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    os.environ["LOCAL_RANK"] = "0"
    os.fsync = lambda descriptor: None
    processes = Processes.start("cpu")
    try:
        with processes.first_goes_first():
            (folder / f"rank-{rank}").mkdir(exist_ok=True)
            assert (folder / "rank-0").exists()
        for job in jobs:
            job.do(folder, processes)
    finally:
        processes.close()


def in_processes(target: Any, count: int, *arguments: object) -> None:
    """Call `target(rank, count, port, *arguments)` in processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [SERVER.Process(target=target, args=(rank, count, port, *arguments)) for rank in range(count)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    assert [process.exitcode for process in workers] == [0] * count


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
    """With the whole weights in each process, and with shares of them; also where the number of processes changes."""
    shared = {"parallel": "fsdp", "accumulate": 2}
    Job(folder / "one", changes={"accumulate": 4}).do(folder)
    Job(folder / "begun alone", stop_at=2, changes={"accumulate": 4}).do(folder)
    jobs = [
        Job(folder / "ddp", changes={"accumulate": 2}),
        Job(folder / "begun by two", stop_at=2, changes={"accumulate": 2}),
        Job(folder / "fsdp", changes={**shared, "recompute": True, "sample_interval": 6}),
        Job(folder / "begun by two that share", stop_at=2, changes=shared),
        Job(folder / "begun alone", resume=True, changes=shared),
    ]
    in_processes(worker, 2, folder, jobs)
    for name in ("begun by two", "begun by two that share"):
        (path,) = checkpoint_paths(folder / name)
        assert path.stem == "step-00000003"
        assert path.is_dir() == ("share" in name)
        Job(folder / name, resume=True, changes={"accumulate": 4, "parallel": "ddp"}).do(folder)
    for name in ("ddp", "begun by two", "fsdp", "begun by two that share", "begun alone"):
        assert_equal_to_rounding(folder / "one", folder / name)
        assert GPT2.from_pretrained(folder / name).config.vocab_size == 23
    with pytest.raises(ValueError, match=r"must stay 8 rows a step as in step-00000006.pt; got 2"):
        Job(folder / "ddp", resume=True, changes={"accumulate": 1}).do(folder)
    with pytest.raises(ValueError, match=r"parallel 'fsdp' shares the weights among torchrun's processes; start the"):
        Job(folder / "fsdp", resume=True, changes={"accumulate": 4}).do(folder)
