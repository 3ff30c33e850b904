"""Every launch row compiles for every target without a GPU: no spills, shared memory within limits, wide accesses."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import compile_report
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
    assert kinds["linear_decode"] == 4 * 17 + 2


def test_no_spills(rows):
    """None in a loop; none at all but in attention kernels of other architectures than Hopper, beside their loops."""
    for row in rows:
        assert row["loop_spills"] == 0, row
        may_spill = row["case"].startswith("attention") and (row["target"] != "sm_90" or "forward" not in row["case"])
        assert row["spills"] == 0 or may_spill, row


def test_shared_memory_fits(rows):
    assert [row for row in rows if row["shared"] > SHARED_LIMIT[row["target"]]] == []


def test_rows_move_in_128_bits(rows):
    """Cross-entropy at an odd vocabulary too: its signatures know no row stride to be a multiple of anything."""
    for row in rows:
        if row["case"].startswith("decode_"):
            continue
        # Sampling holds 4 logits a thread: 64 bits in bf16.
        assert row["wide_loads"] > 0 or row["case"].startswith("sample bf16"), row
        # On AMD a thread holds four neighbours of an attention tile: 64 bits of 16-bit numbers.
        narrow = "cross_entropy forward" in row["case"] or (row["target"] == "gfx942" and "half" in row["case"])
        # A linear map's few outputs are next to nothing beside its weight.
        narrow = narrow or "linear_decode" in row["case"]
        assert row["wide_stores"] > 0 or narrow, row


def test_half_precision_multiplies_on_tensor_cores(rows):
    for row in rows:
        is_half = " fp32 " not in row["case"] and " ieee " not in row["case"]
        if is_half and row["case"].startswith(("attention", "decode_attention dot", "linear_decode")):
            assert row["tensor_core"] > 0, row


def test_weights_of_a_few_rows_move_in_128_bits(rows):
    """Every one of a program's first weights, of 8 shares, by 256 threads (on AMD 512), and tensor cores take them."""
    for row in rows:
        if "linear_decode" in row["case"]:
            block_n, block_k = (int(n) for n in row["case"].split()[5].split("x")[1:])
            size = 1 if "i8" in row["case"] else 4 if "fp32" in row["case"] else 2
            threads = 512 if row["target"] == "gfx942" else 256
            assert row["wide_loads"] * threads * 16 >= 8 * block_n * block_k * size, row
            assert row["tensor_core"] > 0 or "fp32" in row["case"], row


def test_layer_norm_adds_in_one_order_whatever_the_rows(rows):
    """What lies where along the dimensions that are added up, of each number of inputs: a row alone and in a batch."""
    found: dict[tuple, list] = {}
    for row in rows:
        if "linear_decode layer_norm bf16" in row["case"]:
            tile = row["case"].split()[5]
            # Of two numbers there is but one sum.
            reductions = [reduction for reduction in row["reductions"] if reduction[0] > 2]
            found.setdefault((row["target"], *row["case"].split()[3:5]), []).append((tile, reductions))
    assert len(found) == 4 * 3
    for key, tiles in found.items():
        assert len({tile for tile, _ in tiles}) > 1 or key[0] == "gfx942", key  # AMD has one tile for any rows
        assert len(tiles[0][1]) == 2, key
        assert all(reductions == tiles[0][1] for _, reductions in tiles), (key, tiles)


def test_three_programs_or_more_fit_a_multiprocessor(rows):
    """Of the largest blocks, plain, in bf16: 8 warps, 65536 registers; 4 unless fused, and on Ampere."""
    for row in rows:
        if row["case"].endswith("bf16 block 8192") and row["target"].startswith("sm_"):
            programs = 65536 // (8 * 32 * (row["registers"] + 7 & ~7))
            assert programs >= (4 if row["target"] == "sm_80" or "fused" not in row["case"] else 3), row


def test_the_compile_report_is_current(rows):
    """Its rows always; their figures under the Triton version that it was written with."""
    renew = "renew it: python -m benchmarks compile-report --write"
    version, written = compile_report.committed()
    compiled = {(row["target"], row["case"]): compile_report.cells(row) for row in rows}
    assert len(compiled) == len(rows), "two rows bear one name"
    assert written.keys() == compiled.keys(), renew
    if version == importlib.metadata.version("triton"):
        assert written == compiled, renew
