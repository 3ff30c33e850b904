"""A run that is killed at any moment and resumed ends like an uninterrupted one, with nothing lost or repeated."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2.cli import train as command
from fastgpt2.train import checkpoint_paths, read_checkpoint, sharding

SERVER = multiprocessing.get_context("forkserver")
OPTIONS = "--vocab-size 260 --layers 1 --hidden-size 16 --heads 2 --context 8 --batch-size 2 --dtype fp32 --dropout 0.1"
OPTIONS += " --steps 60 --log-interval 2 --checkpoint-interval 3 --eval-interval 5 --eval-tokens 64 --resume"

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forks are POSIX's"),
    pytest.mark.usefixtures("forkserver"),
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"x{i} = {i * i}\n" for i in range(400)), encoding="utf-8")
    return path


def run(text: Path, out: Path, shared: bool = False) -> None:
    """Run `fastgpt2 train`. With `shared` it acts as torchrun's only process, and its checkpoints are sharded."""
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # it does not affect what a kill leaves, but takes most of a run's time
    options = OPTIONS.split()
    if shared:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), RANK="0", WORLD_SIZE="1")
        os.environ["TORCHELASTIC_RUN_ID"] = "a test"
        options += ["--parallel", "fsdp"]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([*options, "--data", str(text), "--out", str(out)])
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the process ends with it
    sys.exit(command.run(args))


def run_and_die(text: Path, out: Path, where: str, call: int, shared: bool = False) -> None:
    """Call `run`, and die in the `call`-th call of one function.

    `where` names it: "save" is torch.save, after half of the bytes are written; "link" is os.link; "tensors" is the
    checksum of written tensors; "removal" is the removal of a checkpoint folder, after one of its files is gone. Any
    other name is os.replace; "after replace" dies when it has succeeded.
    """
    owners = {"save": (torch, "save"), "link": (os, "link"), "tensors": (sharding, "_checksum")}
    owner, name = {**owners, "removal": (shutil, "rmtree")}.get(where, (os, "replace"))
    original, calls = getattr(owner, name), 0

    def deadly(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < call:
            return original(*args, **options)
        if where == "save":
            original(*args, **options)
            args[1].truncate(args[1].tell() // 2)
            args[1].flush()
        elif where == "removal":
            next(args[0].iterdir()).unlink()
        elif where == "after replace":
            original(*args, **options)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, deadly)
    run(text, out, shared)


def child(target: Any, *args: object) -> Any:
    process = SERVER.Process(target=target, args=args)
    process.start()
    return process


def finish(text: Path, out: Path, shared: bool = False) -> None:
    process = child(run, text, out, shared)
    process.join()
    assert process.exitcode == 0


def outcome(out: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], bytes]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{k: v for k, v in line.items() if k not in ("tokens_per_s", "mfu")} for line in lines]
    return kept, read_checkpoint(checkpoint_paths(out)[-1])["model"], (out / "model.safetensors").read_bytes()


def assert_same_outcome(out: Path, expected: tuple[Any, dict[str, torch.Tensor], bytes]) -> None:
    metrics, weights, exported = outcome(out)
    assert metrics == expected[0]
    assert all(torch.equal(weights[name], value) for name, value in expected[1].items())
    assert exported == expected[2]
    assert list(out.rglob(".*")) == [], "left over from a killed run"


@pytest.mark.parametrize("kill_count", [8, pytest.param(24, marks=pytest.mark.slow)])
def test_killed_at_random_moments(text: Path, tmp_path: Path, seed: int, kill_count: int) -> None:
    rng = random.Random(seed)
    finish(text, tmp_path / "warm")
    started = time.perf_counter()
    finish(text, tmp_path / "whole")
    duration_s = time.perf_counter() - started
    expected = outcome(tmp_path / "whole")
    kills, runs = 0, 0
    while kills < kill_count:
        out = tmp_path / f"killed-{runs}"
        while True:
            process = child(run, text, out)
            process.join(rng.uniform(0.1, 0.9) * duration_s if kills < kill_count else None)
            if process.exitcode is None:
                process.kill()
                process.join()
            if process.exitcode != -signal.SIGKILL:
                break  # it had already ended
            kills += 1
        assert process.exitcode == 0
        assert_same_outcome(out, expected)
        runs += 1


def test_killed_in_the_middle_of_writing(text: Path, tmp_path: Path) -> None:
    finish(text, tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    out = tmp_path / "killed"
    moments = [("replace", 1), ("replace", 4), ("after replace", 5), ("save", 1), ("save", 2), ("replace", 5)]
    moments += [("replace", 6), ("after replace", 6), ("after replace", 7), ("save", 3)]
    for where, call in moments:
        process = child(run_and_die, text, out, where, call)
        process.join()
        assert process.exitcode == -signal.SIGKILL, (where, call)
    assert checkpoint_paths(out)
    finish(text, out)
    assert_same_outcome(out, expected)


@pytest.mark.slow
def test_killed_in_the_middle_of_writing_shares(text: Path, tmp_path: Path) -> None:
    """The same holds for checkpoints that are folders. A single process takes bit-identical steps with them."""
    finish(text, tmp_path / "whole", shared=True)
    expected = outcome(tmp_path / "whole")
    finish(text, tmp_path / "plain")
    assert_same_outcome(tmp_path / "plain", expected)
    out = tmp_path / "killed"
    moments = [("tensors", 1), ("tensors", 2), ("replace", 6), ("replace", 5), ("after replace", 5), ("removal", 1)]
    moments += [("tensors", 3), ("replace", 7), ("after replace", 7), ("removal", 2), ("after replace", 8)]
    for where, call in moments:
        process = child(run_and_die, text, out, where, call, True)
        process.join()
        assert process.exitcode == -signal.SIGKILL, (where, call)
    assert checkpoint_paths(out)
    assert all(path.is_dir() for path in checkpoint_paths(out))
    finish(text, out, shared=True)
    assert_same_outcome(out, expected)


def test_killed_between_the_best_checkpoint_and_its_link(text: Path, tmp_path: Path) -> None:
    """The kill comes at the last best checkpoint, whose weights are exported. No later one makes the missing link."""
    finish(text, tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    losses = [line["val_loss"] for line in expected[0] if "val_loss" in line]
    bests = [loss for i, loss in enumerate(losses) if loss < min(losses[:i], default=float("inf"))]
    assert len(bests) > 1
    out = tmp_path / "killed"
    process = child(run_and_die, text, out, "link", len(bests))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finish(text, out)
    assert_same_outcome(out, expected)


def test_sigterm_writes_a_checkpoint_and_ends(text: Path, tmp_path: Path) -> None:
    finish(text, tmp_path / "whole")
    out = tmp_path / "stopped"
    process = child(run, text, out)
    while process.is_alive() and not checkpoint_paths(out):
        time.sleep(0.005)
    process.terminate()
    process.join()
    # Otherwise the run finished before the signal came, or was about to.
    assert process.exitcode == 128 + signal.SIGTERM or (out / "model.safetensors").exists()
    finish(text, out)
    assert_same_outcome(out, outcome(tmp_path / "whole"))
