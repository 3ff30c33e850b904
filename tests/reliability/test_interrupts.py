"""Ctrl-C at any moment after the command line is entered gives exit status 130, and no traceback."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")

ROOT = Path(__file__).resolve().parent.parent.parent
# Writes a dot to stdout when the command sets its handler of Ctrl-C. Earlier signals would interrupt Python's startup.
_TELLS = """
import os, signal, sys
def tell(number, handler, set_handler=signal.signal):
    before = set_handler(number, handler)
    signal.signal = set_handler
    os.write(1, b".")
    return before
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background test run inherits an ignored SIGINT
signal.signal = tell
sys.argv[0] = "fastgpt2"
"""
ENTRIES = {
    "the console script": "from fastgpt2.cli import main; sys.exit(main())",
    "python -m fastgpt2": "import runpy; runpy.run_module('fastgpt2', run_name='__main__', alter_sys=True)",
}
COMMANDS = {
    "info": ["info"],
    "generate": ["generate", "x", "--max-new-tokens", "40", "--batch-size", "1"],
    "help": ["generate", "--help"],
}


def start(entry: str, command: str) -> subprocess.Popen[bytes]:
    """Start a process, and wait until its command line has set its handler."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    process = subprocess.Popen(
        [sys.executable, "-c", _TELLS + ENTRIES[entry], *COMMANDS[command]],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.read(1) != b".":
        raise AssertionError(process.communicate())
    return process


def check(entry: str, command: str, share: float, duration_s: float) -> int:
    """Interrupt a run after this share of its usual duration. Return its exit status."""
    process = start(entry, command)
    time.sleep(share * duration_s)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=600)[1].decode()
    assert process.returncode in (0, 130), said
    assert "Traceback" not in said
    assert "Exception" not in said
    if process.returncode == 130:
        assert said.endswith("fastgpt2: interrupted\n")
    return process.returncode


def duration_s(entry: str, command: str) -> float:
    process = start(entry, command)
    begun = time.perf_counter()
    said = process.communicate(timeout=600)[1].decode()
    assert process.returncode == 0, said
    return time.perf_counter() - begun


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_interrupt_while_modules_load(entry: str, seed: int) -> None:
    rng = random.Random(seed)
    assert check(entry, "info", 0.0, 1.0) == 130
    check(entry, "info", rng.random(), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_an_interrupt_at_any_moment(entry: str, command: str, seed: int) -> None:
    rng = random.Random(seed)
    whole_s = max(duration_s(entry, command) for _ in range(2))
    statuses = [check(entry, command, rng.uniform(0, 1.1), whole_s) for _ in range(20)]
    assert 130 in statuses
