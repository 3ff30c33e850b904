"""Processes that share a run and are killed. `python -m tests.reliability.shares` runs the same check at any size."""

from __future__ import annotations

import random
import sys

import pytest

from tests.reliability.shares import check, write_prompts


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_processes_lose_nothing(tmp_path, tiny_checkpoint, seed):
    rng = random.Random(seed)
    prompts = tmp_path / "prompts.jsonl"
    write_prompts(prompts, 60, rng)
    arguments = ["--model", str(tiny_checkpoint), "--prompts", str(prompts), "--num-samples", "2"]
    arguments += ["--truncate", "left"]  # random prompts may be longer than the tiny model's context
    check(tmp_path, [*arguments, "--max-new-tokens", "8", "--device", "cpu"], 120, 4, rng)
