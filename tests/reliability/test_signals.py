"""A command gets SIGKILL, SIGTERM, SIGINT or SIGHUP at a random moment. It prints no traceback, and can be rerun."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import without_rounding

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")

TIMES = 50
COMMANDS = ("generate", "score", "train", "convert")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
TRAIN = "--vocab-size 260 --layers 1 --hidden-size 16 --heads 2 --context 8 --batch-size 2 --dtype fp32 --steps 40"
TRAIN += " --checkpoint-interval 3 --eval-interval 5 --eval-tokens 64 --resume"


def command_line(arguments: list[str], said: str) -> None:
    """Do what the console script does, in a process of its own. Its stderr goes to the file `said`."""
    import torch

    from fastgpt2.cli.main import main

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    errors = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # the test sends signals once this file exists
    os.dup2(errors, 2)
    try:
        status = main(arguments)
    except KeyboardInterrupt:  # it came before or after `main` handles it
        os.write(2, b"fastgpt2: interrupted\n")
        status = 130
    sys.stderr.flush()
    os._exit(status)


class Command:
    """A command that writes to a given path, and a way to read what it wrote."""

    def __init__(self, name: str, folder: Path, checkpoint: Path, server: BaseContext) -> None:
        self.name, self.folder, self.server = name, folder, server
        text = folder / "text.txt"
        text.write_text("".join(f"x{i} = {i * i}\n" for i in range(300)), encoding="utf-8")
        # Several groups of sequences and few tokens per batch, so that records are written throughout the run.
        sequences = folder / "sequences.txt"
        sequences.write_text("".join(f"y{i} = {i}\n" for i in range(400)), encoding="utf-8")
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt_ids": [i, 5, 6]}) + "\n" for i in range(30)), encoding="utf-8")
        self.arguments = {
            "generate": f"generate --model {checkpoint} --prompts {prompts} --num-samples 3 --resume --out",
            "score": f"score {sequences} --model {checkpoint} --batch-tokens 32 --resume --out",
            "train": f"train --data {text} {TRAIN} --out",
            "convert": f"convert {checkpoint} --to nanogpt --force",
        }[name].split()

    def start(self, out: Path) -> Any:
        process = self.server.Process(
            target=command_line, args=([*self.arguments, str(self.target(out))], str(self.said(out)))
        )
        process.start()
        return process

    def target(self, out: Path) -> Path:
        return out.with_suffix(".jsonl") if self.name in ("generate", "score") else out

    def said(self, out: Path) -> Path:
        return out.with_suffix(".stderr")

    def outcome(self, out: Path) -> object:
        assert not list(self.folder.rglob(".*")), "temporary files are left over"
        if self.target(out) != out:
            return without_rounding(self.target(out).read_bytes())
        return (out / ("model.safetensors" if self.name == "train" else "ckpt.pt")).read_bytes()


@pytest.fixture
def command(request, tiny_checkpoint: Path, tmp_path: Path, forkserver: BaseContext) -> Command:
    return Command(request.param, tmp_path, tiny_checkpoint, forkserver)


@pytest.mark.parametrize("command", COMMANDS, indirect=True)
def test_a_signal_at_a_random_moment(command: Command, seed: int) -> None:
    rng = random.Random(seed)
    check(command, getattr(signal, rng.choice(SIGNALS)), 1, rng)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, indirect=True)
@pytest.mark.parametrize("signal_name", SIGNALS)
def test_signals_at_random_moments(command: Command, signal_name: str, seed: int) -> None:
    check(command, getattr(signal, signal_name), TIMES, random.Random(seed))


def check(command: Command, number: int, times: int, rng: random.Random) -> None:
    whole = command.folder / "whole"
    for _ in range(2 if times > 1 else 1):  # the first run only warms the file system's caches
        begun = time.perf_counter()
        process = command.start(whole)
        process.join()
        duration_s = time.perf_counter() - begun
        assert process.exitcode == 0, command.said(whole).read_text(encoding="utf-8")
    expected = command.outcome(whole)
    sent = run = 0
    while sent < times:
        out = command.folder / f"run{run}"
        run += 1
        process = command.start(out)
        while not command.said(out).exists():
            time.sleep(0.001)
        process.join(rng.uniform(0, 1.0) * duration_s)
        if process.exitcode is None:
            os.kill(process.pid, number)
            sent += 1
        process.join(600)  # long enough for a busy machine; a process that hangs would never end
        said = command.said(out).read_text(encoding="utf-8")
        assert process.exitcode in (0, -number, 128 + number), said
        assert "Traceback" not in said
        if process.exitcode == 130:
            assert said.splitlines()[-1].startswith(("fastgpt2: interrupted", "stopped at step")), said
        process = command.start(out)
        process.join()
        assert process.exitcode == 0, command.said(out).read_text(encoding="utf-8")
        assert command.outcome(out) == expected
