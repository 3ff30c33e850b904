"""Every launch row compiles for every target without a GPU: no spills, shared memory within limits, wide accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastgpt2_kernels import launch

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
    kinds = Counter(row["case"].split()[0] for row in rows)
    assert kinds["attention"] == 4 * (len(list(launch.attention_rows())) + 3)
    assert kinds["cross_entropy"] >= 4 * 32
    assert kinds["layer_norm"] == 4 * 22
    assert kinds["bias_activation"] == 4 * 8
    assert kinds["partial_sums"] == 4


def test_no_spills(rows):
    """None in a loop; none at all but in attention kernels of other architectures than Hopper, beside their loops."""
    for row in rows:
        assert row["loop_spills"] == 0, row
        may_spill = "attention" in row["case"] and (row["target"] != "sm_90" or "forward" not in row["case"])
        assert row["spills"] == 0 or may_spill, row


def test_shared_memory_fits(rows):
    assert [row for row in rows if row["shared"] > SHARED_LIMIT[row["target"]]] == []


def test_rows_move_in_128_bits(rows):
    """Cross-entropy at an odd vocabulary too: its signatures know no row stride to be a multiple of anything."""
    for row in rows:
        assert row["wide_loads"] > 0, row
        # On AMD a thread holds four neighbours of an attention tile: 64 bits of 16-bit numbers.
        narrow = (
            "partial_sums" in row["case"]
            or "cross_entropy forward" in row["case"]
            or (row["target"] == "gfx942" and "half" in row["case"])
        )
        assert row["wide_stores"] > 0 or narrow, row


def test_attention_multiplies_on_tensor_cores(rows):
    for row in rows:
        if "attention" in row["case"] and "ieee" not in row["case"]:
            assert row["tensor_core"] > 0, row


def test_three_programs_or_more_fit_a_multiprocessor(rows):
    """Of the largest blocks, plain, in bf16: 8 warps, 65536 registers; 4 unless fused, and on Ampere."""
    for row in rows:
        if row["case"].endswith("bf16 block 8192") and row["target"].startswith("sm_"):
            programs = 65536 // (8 * 32 * (row["registers"] + 7 & ~7))
            assert programs >= (4 if row["target"] == "sm_80" or "fused" not in row["case"] else 3), row
