"""Launch rows compile for every target without a GPU: no spills, shared memory within limits, wide accesses.

By default one row is compiled for each kernel and dtype, and fewer for targets that are close to another target. With
`--all-rows` every row of the tables is compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import compile_report
from fastgpt2_kernels.triton import launch
from tests.kernels.races import REVIEWED
from tests.kernels.test_versions import PINNED

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> list[dict]:
    """Every row, with the results of those that were compiled."""
    pytest.importorskip("triton")
    # Triton compiles nothing in a process whose interpreter is on. The other process imports the same Triton.
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    options = [] if pytestconfig.getoption("--all-rows") else ["--representative"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_rows", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows(table: list[dict]) -> list[dict]:
    """The rows that were compiled."""
    return [row for row in table if "registers" in row]


def is_older(rows: list[dict]) -> bool:
    """Whether the rows were compiled by another Triton than the compile report's, which is the newest."""
    return compile_report.triton_version(rows) != compile_report.committed()[0]


def test_every_row_is_there(table, rows, pytestconfig):
    assert {row["target"] for row in rows} == set(launch.ARCHITECTURES)
    assert rows == table or not pytestconfig.getoption("--all-rows")
    kinds = Counter(row["case"].split()[0] for row in table)
    num_targets = len(launch.ARCHITECTURES)
    num_tf32 = sum(kind.startswith("tf32") for _, kind, _ in launch.attention_rows())
    num_without_tf32 = sum(not launch.has_tf32(arch) for arch in launch.ARCHITECTURES)
    with_documents, exact_with_dropout = 6, 3
    num_attention = num_targets * (len(list(launch.attention_rows())) + with_documents + exact_with_dropout)
    half = [key for key in launch.attention_rows() if key[1] == "half"]
    num_packed = sum(
        launch.attention_row(key[0], arch, *key[1:]).use_tma for arch in launch.ARCHITECTURES for key in half
    )
    assert kinds["attention"] == num_attention + num_packed - num_without_tf32 * num_tf32
    assert num_packed == 6
    assert kinds["cross_entropy"] >= num_targets * 32
    assert kinds["scale_rows"] == num_targets * 2
    assert kinds["sample"] == num_targets * 11
    assert kinds["decode_attention"] == num_targets * 15
    assert kinds["decode_combine"] == num_targets * 2
    assert kinds["decode_begin"] == num_targets
    num_pdl = 3  # targets with programmatic dependent launch
    assert kinds["linear_decode"] == num_targets * 17 + num_pdl + 2 * (num_targets - num_without_tf32)
    assert kinds["layer_norm"] == num_targets * 22
    assert kinds["bias_activation"] == num_targets * 8
    assert kinds["partial_sums"] == num_targets


def test_a_row_stands_for_each_kernel_and_dtype(table, rows):
    def is_near(row: dict) -> bool:
        return launch.ARCHITECTURES[row["target"]].like is not None

    def kinds(of: list[dict]) -> set[tuple[str, ...]]:
        return {(row["target"], row["kernel"], *row["dtypes"]) for row in of if not is_near(row)}

    def kernels(of: list[dict]) -> set[str]:
        return {row["kernel"] for row in of if is_near(row)}

    assert kinds(rows) == kinds(table)
    assert kernels(rows) == kernels(table)


def test_no_spills(rows):
    """There are no spills in loops. Outside loops attention may spill, except its forward on Hopper.

    On sm_120, sampling kernels with every filter and a small vocabulary may spill 8 bytes, and so may all kernels of an
    older Triton.
    """
    for row in rows:
        assert row["loop_spills"] == 0, row
        may_spill = row["case"].startswith("attention") and (row["target"] != "sm_90" or "forward" not in row["case"])
        is_small_sample = row["target"] == "sm_120" and row["case"].startswith(
            ("sample fp32 block 1024", "sample fp32 block 256")
        )
        assert row["spills"] <= (8 if is_small_sample or is_older(rows) else 0) or may_spill, row


def test_warps_do_not_race(rows):
    """No warp may load what another warp may already have overwritten. `races.py` lists reviewed exceptions."""
    found, reviewed = set(), {(kernel, *pair) for kernel, pairs in REVIEWED.items() for pair in pairs}
    for row in rows:
        for load, store, own in row.get("races", ()):
            assert own, f"{row['case']}: {load} is loaded by every warp and {store} stored without a barrier between"
            found.add((row["kernel"], load, store))
    assert found == reviewed


def test_shared_memory_fits(rows):
    assert [row for row in rows if row["shared"] > launch.ARCHITECTURES[row["target"]].shared] == []


def test_rows_move_in_128_bits(rows):
    """So do the rows of cross-entropy with an odd vocabulary, although its signatures promise no alignment."""
    for row in rows:
        if row["case"].startswith(("decode_", "scale_rows")):
            continue
        # Sampling holds 4 logits per thread, which are 64 bits in bf16.
        assert row["wide_loads"] > 0 or row["case"].startswith("sample bf16"), row
        # On AMD a thread holds four neighbours of an attention tile, which are 64 bits of 16-bit numbers.
        is_narrow = row["case"].startswith(("cross_entropy forward", "linear_decode", "sample", "partial_sums"))
        narrow = is_narrow or (launch.is_amd(row["target"]) and "half" in row["case"])
        assert row["wide_stores"] > 0 or narrow, row


def test_half_precision_multiplies_on_tensor_cores(rows):
    for row in rows:
        is_half = " fp32 " not in row["case"] and " ieee " not in row["case"]
        if is_half and row["case"].startswith(("attention", "decode_attention dot", "linear_decode")):
            assert row["tensor_core"] > 0, row


def test_decoding_reads_keys_and_values_in_128_bits(rows):
    """This includes keys and values whose address is loaded from memory."""
    for row in rows:
        if row["case"].startswith("decode_attention"):
            fields = row["case"].split()
            element_size, head_size = (4 if fields[4] == "fp32" else 2), int(fields[6])
            threads = row["warps"] * (64 if launch.is_amd(row["target"]) else 32)
            block_d = max(16, 1 << (head_size - 1).bit_length())
            tile = launch.decode_row(element_size, block_d).split_s * block_d * element_size
            assert row["wide_loads"] >= 2 * tile // (16 * threads), row


def test_linear_rows_add_up_in_one_order(rows):
    """In LayerNorm before a linear layer, the same parts of a row are in the same lanes, whatever the other rows."""
    orders: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        if row["case"].startswith("linear_decode layer_norm"):
            product, inputs, *_, last = row["case"].split()[2:]
            orders.setdefault((row["target"], product, inputs, last == "tf32"), set()).add(str(row["reductions"]))
    assert len(orders) >= 4 * 2
    assert all(len(found) == 1 and found != {"[]"} for found in orders.values()), orders


def test_three_programs_or_more_fit_a_multiprocessor(rows):
    """This holds for the largest plain blocks in bf16, with 8 warps and 65536 registers. Unless fused, 4 fit.

    With an older Triton 3 fit.
    """
    for row in rows:
        capability = launch.ARCHITECTURES[row["target"]].capability
        if row["case"].endswith("bf16 block 8192") and capability is not None:
            programs = 65536 // (8 * 32 * (row["registers"] + 7 & ~7))
            assert programs >= (3 if "fused" in row["case"] or is_older(rows) else 4), row


def test_the_compile_report_is_current(table, rows):
    """The names of all rows are checked always, and results only under the Triton version that wrote the report."""
    renew = "renew it: python -m benchmarks compile-report --write"
    version, written = compile_report.committed()
    names = {(row["target"], row["case"]) for row in table}
    assert len(names) == len(table), "two rows have the same name"
    assert written.keys() == names, renew
    if version == compile_report.triton_version(table):
        compiled = {(row["target"], row["case"]): compile_report.cells(row) for row in rows}
        assert {key: written[key] for key in compiled} == compiled, renew


def test_the_summary_names_every_version_and_row(table):
    """The summary covers each Triton that a supported PyTorch for GPUs pins. The newest part agrees with the report."""
    text = compile_report.SUMMARY.read_text(encoding="utf-8")
    parts = {part.split("\n", 1)[0]: part for part in text.split("\n## Triton ")[1:]}
    pinned = {version for torch, version in PINNED.items() if tuple(map(int, torch.split("."))) >= (2, 10)}
    assert parts.keys() >= pinned | {compile_report.committed()[0]}
    counts = Counter((row["kernel"], row["target"]) for row in table)
    for version, part in parts.items():
        lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
        targets = [cell.split()[0] for cell in lines[0][1:]]
        found = {(row[0], target): cell for row in lines[1:] for target, cell in zip(targets, row[1:], strict=True)}
        named = {(kernel.strip("_").removesuffix("_kernel"), target): n for (kernel, target), n in counts.items()}
        assert {key: int(cell.split(";")[0]) for key, cell in found.items() if cell != "-"} == named, version
        for (_, target), cell in found.items():
            if cell != "-":
                assert float(cell.split("; ")[1].split()[0]) <= compile_report.LIMITS[target] / 1024, version


def test_rows_are_compiled_by_the_triton_that_is_imported_here(monkeypatch):
    """PYTHONPATH names the Triton to report on, so the process that compiles must have it too."""
    given = {}

    def run(command, env, **rest):
        given.update(env)
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(compile_report.subprocess, "run", run)
    monkeypatch.syspath_prepend("/another/triton")
    compile_report.compile_rows()
    assert "/another/triton" in given["PYTHONPATH"].split(os.pathsep)


def test_a_version_renews_its_part_of_the_summary(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_report, "SUMMARY", tmp_path / "summary.md")
    row = {"target": "sm_90", "kernel": "_a_kernel", "case": "a", "shared": 2048, "loop_spills": 0, "tensor_core": 3}
    row |= {"triton": "3.9.0"}
    compile_report.write_summary([row])
    row |= {"triton": "3.10.0"}
    compile_report.write_summary([{**row, "loop_spills": 2}])
    first = (tmp_path / "summary.md").read_text()
    assert first.index("## Triton 3.10.0") < first.index("## Triton 3.9.0")
    assert "| a | 1; 2 KB; 2; 1 |" in first
    assert "- a: sm_90 (2 operations)" in first
    compile_report.write_summary([row])
    again = (tmp_path / "summary.md").read_text()
    assert again.count("| a | 1; 2 KB; 0; 1 |") == 2
    compile_report.write_summary([row])
    assert (tmp_path / "summary.md").read_text() == again
