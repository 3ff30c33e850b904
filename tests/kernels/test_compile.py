"""Every launch row compiles for every target without a GPU: no spills, shared memory within limits, wide accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Bytes of shared memory that one program may have.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("compiled in the run without the interpreter")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_rows"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_row_is_there(rows):
    assert {row["target"] for row in rows} == set(SHARED_LIMIT)
    assert len(rows) >= 4 * 32


def test_no_spills(rows):
    assert [row for row in rows if row["spills"]] == []


def test_shared_memory_fits(rows):
    assert [row for row in rows if row["shared"] > SHARED_LIMIT[row["target"]]] == []


def test_rows_move_in_128_bits(rows):
    """At an odd vocabulary too: the signatures know no row stride to be a multiple of anything."""
    for row in rows:
        assert row["wide_loads"] > 0, row
        assert row["wide_stores"] > 0 or "forward" in row["case"], row


def test_three_programs_or_more_fit_a_multiprocessor(rows):
    """Of the largest blocks, plain, in bf16: 8 warps, 65536 registers; 4 unless fused, and on Ampere."""
    for row in rows:
        if row["case"].endswith("bf16 block 8192") and row["target"].startswith("sm_"):
            programs = 65536 // (8 * 32 * (row["registers"] + 7 & ~7))
            assert programs >= (4 if row["target"] == "sm_80" or "fused" not in row["case"] else 3), row
