"""`fastgpt2 generate` is killed at random moments and resumed. No sample is lost, repeated or changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import without_rounding

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")

NUM_PROMPTS, NUM_SAMPLES = 16, 3


def command_line(arguments: list[str]) -> None:
    """Run the console script's code in a process of its own."""
    import torch

    from fastgpt2.cli.main import main

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os._exit(main(arguments))


def records(path: Path) -> list[bytes]:
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return sorted(re.split(rb"\n(?=>)", data[:-1]) if path.suffix == ".fasta" else data[:-1].split(b"\n"))


def wait_for(path: Path, size: int, process: multiprocessing.process.BaseProcess) -> None:
    """Wait until the output holds `size` bytes, or until the run has ended."""
    while process.is_alive() and (not path.exists() or path.stat().st_size < size):
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("suffix", "kills"),
    [(".jsonl", 6), (".fasta", 2), (".txt", 2), pytest.param(".jsonl", 14, marks=pytest.mark.slow)],
)
def test_killed_runs_resume_to_what_an_uninterrupted_run_makes(
    suffix, kills, forkserver, tiny_checkpoint, tmp_path, seed
):
    rng = random.Random(seed)
    prompts = tmp_path / "prompts.jsonl"
    # Lengths and samples of many sizes, so that rows finish at different times.
    prompts.write_text(
        "".join(
            json.dumps({"prompt_ids": [rng.randrange(256) for _ in range(rng.randint(1, 40))]}) + "\n"
            for _ in range(NUM_PROMPTS)
        ),
        encoding="utf-8",
    )

    def start(out: Path):
        arguments = ["generate", "--model", tiny_checkpoint, "--prompts", prompts, "--out", out, "--resume"]
        arguments += ["--num-samples", NUM_SAMPLES, "--batch-size", rng.randint(1, 8), "--max-new-tokens", 32]
        process = forkserver.Process(target=command_line, args=([str(argument) for argument in arguments],))
        process.start()
        return process

    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    process = start(whole)
    process.join()
    assert process.exitcode == 0
    size = whole.stat().st_size

    def finish() -> None:
        process = start(out)
        process.join()
        assert process.exitcode == 0
        assert len(records(out)) == NUM_PROMPTS * NUM_SAMPLES
        # The order is the same too.
        assert without_rounding(out.read_bytes()) == without_rounding(whole.read_bytes())

    # Some kills come at the start, while the run loads or opens files. The others come in order, each further into the
    # output.
    moments = sorted(rng.random() * size if rng.random() < 0.8 else 0 for _ in range(kills))
    kept = Counter[bytes]()
    while moments:
        process = start(out)
        wait_for(out, int(moments[0]), process)
        time.sleep(rng.random() * (0.3 if not moments[0] else 0.01))
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:  # it ended first, so the remaining kills go to another output
            assert process.exitcode == 0
            finish()
            out.unlink()
            kept = Counter()
            moments[0] *= rng.random()  # otherwise a moment at the very end might be missed every time
            continue
        del moments[0]
        if out.exists() and (data := out.read_bytes()):
            # No complete record is lost by a later run. Everything up to the last newline is complete records. They are
            # compared without their order, because a run that is killed at its very end has sorted them.
            now = Counter(data.split(b"\n")[:-1])
            assert kept <= now
            kept = now
    finish()
    assert [path.name for path in tmp_path.glob(".*")] == [], "left over from a killed run"
