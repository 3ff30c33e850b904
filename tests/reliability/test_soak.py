"""A process that makes thousands of calls stops growing. `python -m tests.reliability.soak` runs it at any length."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.soak import ROOM_MB, State, growth

ROOT = Path(__file__).resolve().parents[2]

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def soak(seed: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    command = [sys.executable, "-m", "tests.reliability.soak", "--seed", str(seed), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@linux
@pytest.mark.slow
def test_a_long_process_stops_growing(seed: int) -> None:
    done = soak(seed, "--calls", 2000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("nothing grew\n")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("leak", ["memory", "files", "threads"])
def test_the_soak_sees_a_leak_in_every_tenth_call(leak: str, seed: int) -> None:
    done = soak(seed, "--calls", 600 if leak == "memory" else 120, "--leak", leak)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(leak)


def test_growth_is_told_from_peaks() -> None:
    level = [State(400 + peak, 8, 3) for peak in (0, 90, 5)]
    assert growth([level] * 4) == []
    assert growth([level, level, level, [State(400 + ROOM_MB, 8, 3)]]) == []
    assert growth([level, [State(401 + ROOM_MB, 9, 4)]]) == [
        "memory_mb grew: 400, 417",
        "files grew: 8, 9",
        "threads grew: 3, 4",
    ]
