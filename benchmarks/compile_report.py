"""What every launch row compiles to for every target, without a GPU: `python -m benchmarks compile-report [--write]`.

The figures describe the code that the installed Triton generates; they do not measure speed. `--write` renews
COMPILE_REPORT.md, which tests/kernels/test_compile.py compares with what it compiles itself. It also renews the part of
COMPILE_SUMMARY.md for the installed Triton. `--summary` renews only that part, for a Triton that is not the newest:

    pip install --no-deps --target DIR triton==3.7.1
    PYTHONPATH=DIR python -m benchmarks compile-report --summary
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt2_kernels.triton import launch

ROOT = Path(__file__).parents[1]
REPORT = Path(__file__).with_name("COMPILE_REPORT.md")
SUMMARY = Path(__file__).with_name("COMPILE_SUMMARY.md")
SUMMARY_HEAD = """# What compiles where

Every launch row is compiled for every target, without a GPU. There is a table for each version of Triton that a PyTorch
for GPUs pins, and for the newest version. The columns are targets, with their limit of shared memory. A cell holds four
figures: how many rows compile; the most shared memory that one of them needs; how many operations spill registers in a
loop; and how many rows use tensor cores (AMD: matrix cores). COMPILE_REPORT.md has every row, for the newest version.

`python -m benchmarks compile-report --summary` renews the table of the installed Triton. It fails if a row does not
compile.
"""
COLUMNS = (
    "case", "warps", "registers", "spilled bytes", "shared bytes", "programs", "tensor core", "128-bit loads",
    "128-bit stores",
)  # fmt: skip


class Target(NamedTuple):
    """What a multiprocessor (compute unit) has: registers per lane in each of its 4 parts, shared memory, warps."""

    name: str
    lane_registers: int
    shared: int
    shared_overhead: int  # bytes that every program takes besides its own
    max_warps: int
    max_programs: int


TARGETS = {
    "sm_80": Target("NVIDIA A100", 512, 167_936, 1024, 64, 32),
    "sm_86": Target("NVIDIA A40, RTX 30", 512, 102_400, 1024, 48, 16),
    "sm_89": Target("NVIDIA L40, RTX 40", 512, 102_400, 1024, 48, 24),
    "sm_90": Target("NVIDIA H100, H200", 512, 233_472, 1024, 64, 32),
    "sm_100": Target("NVIDIA B200", 512, 233_472, 1024, 64, 32),
    "sm_120": Target("NVIDIA RTX 50", 512, 102_400, 1024, 48, 24),
    "gfx90a": Target("AMD MI200", 512, 65_536, 0, 32, 16),
    "gfx942": Target("AMD MI300X", 512, 65_536, 0, 32, 16),
    "gfx950": Target("AMD MI350", 512, 163_840, 0, 32, 16),
}


# The most shared memory of a program. The multiprocessor has more, because it also holds other things.
LIMITS = {name: architecture.shared for name, architecture in launch.ARCHITECTURES.items()}


def programs(row: dict[str, Any]) -> int:
    """How many programs (CTAs) of a compiled row fit on a multiprocessor, by registers, shared memory and warps."""
    target = TARGETS[row["target"]]
    warps_a_part = target.lane_registers // max(8, row["registers"] + 7 & ~7)
    by_warps = min(4 * warps_a_part, target.max_warps) // row["warps"]
    by_shared = target.shared // (row["shared"] + target.shared_overhead) if row["shared"] else target.max_programs
    return min(by_warps, by_shared, target.max_programs)


def compile_rows(targets: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Compile all rows in a separate process, because nothing compiles while Triton's interpreter is on.

    That process has the `sys.path` of this one, so that it imports the same Triton.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}
        environment |= {"TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.kernels.compile_rows", *targets],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a row that are the same at every compilation; compile time is not."""
    figures = ("warps", "registers", "spills", "shared")
    instructions = ("tensor_core", "wide_loads", "wide_stores")
    return (row["case"], *(str(row[f]) for f in figures), str(programs(row)), *(str(row[i]) for i in instructions))


def triton_version(rows: Sequence[dict[str, Any]]) -> str:
    """The version of the Triton that compiled the rows."""
    (version,) = {row["triton"] for row in rows}
    return version


def markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of the report. Seconds are compile times on one core of the machine that wrote it."""
    yield "# Compile report"
    yield ""
    yield f"Every launch row as Triton {triton_version(rows)} compiles it, without a GPU:"
    yield "`python -m benchmarks compile-report --write`. Instructions are counted in the code, not while it runs."
    yield "Programs: how many fit on a multiprocessor at once. Seconds: compile time on the machine that wrote this."
    for name, target in TARGETS.items():
        yield ""
        yield f"## {name} ({target.name})"
        yield ""
        yield f"| {' | '.join(COLUMNS)} | seconds |"
        yield f"|-|{'-:|' * len(COLUMNS)}"
        for row in rows:
            if row["target"] == name:
                yield f"| {' | '.join(cells(row))} | {row['seconds']:.1f} |"


def committed() -> tuple[str, dict[tuple[str, str], tuple[str, ...]]]:
    """The Triton version of COMPILE_REPORT.md, and its cells by (target, case)."""
    text = REPORT.read_text(encoding="utf-8")
    found, target = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            target = line.split()[1]
        elif line.startswith("| ") and not line.startswith("| case"):
            row = tuple(cell.strip() for cell in line.strip("|").split("|"))
            found[target, row[0]] = row[:-1]
    return text.split("as Triton ")[1].split()[0], found


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of one version's part of COMPILE_SUMMARY.md: a table of kernels and targets, and every spill in a loop."""
    names = [name for name in TARGETS if any(row["target"] == name for row in rows)]
    yield f"## Triton {triton_version(rows)}"
    yield ""
    yield "| kernel | " + " | ".join(f"{name} ({LIMITS[name] // 1024} KB)" for name in names) + " |"
    yield f"|-|{'-|' * len(names)}"
    for kernel in sorted({row["kernel"] for row in rows}):
        cells = [_summed([r for r in rows if (r["kernel"], r["target"]) == (kernel, name)]) for name in names]
        yield f"| {kernel.strip('_').removesuffix('_kernel')} | {' | '.join(cells)} |"
    spilling = [row for row in rows if row["loop_spills"]]
    yield ""
    yield "Spills in a loop:" if spilling else "No row spills in a loop."
    if spilling:
        yield ""
    for case in dict.fromkeys(row["case"] for row in spilling):
        where = [f"{r['target']} ({r['loop_spills']} operations)" for r in spilling if r["case"] == case]
        yield f"- {case}: {', '.join(where)}"


def _summed(rows: Sequence[dict[str, Any]]) -> str:
    """A cell: rows, the most shared memory, operations that spill in loops, rows with tensor-core instructions."""
    if not rows:
        return "-"
    cores, spills = sum(row["tensor_core"] > 0 for row in rows), sum(row["loop_spills"] for row in rows)
    return f"{len(rows)}; {max(row['shared'] for row in rows) / 1024:.0f} KB; {spills}; {cores}"


def write_summary(rows: Sequence[dict[str, Any]]) -> None:
    """Rewrite this version's part of COMPILE_SUMMARY.md, and keep those of other versions."""
    old = SUMMARY.read_text(encoding="utf-8").split("\n## Triton ")[1:] if SUMMARY.exists() else []
    parts = {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip("\n") for part in old}
    parts[triton_version(rows)] = "\n".join(summary(rows)).split("\n", 1)[1].strip("\n")
    ordered = sorted(parts, key=lambda v: [int(n) for n in v.split(".")[:3]], reverse=True)
    text = SUMMARY_HEAD + "".join(f"\n## Triton {name}\n\n{parts[name]}\n" for name in ordered)
    SUMMARY.write_text(text, encoding="utf-8")


def main(write: bool, summarise: bool = False) -> int:
    rows = compile_rows()
    if write:
        REPORT.write_text("\n".join(markdown(rows)) + "\n", encoding="utf-8")
        print(f"wrote {REPORT}")
    if write or summarise:
        write_summary(rows)
        print(f"wrote {SUMMARY}")
    else:
        print("\n".join(markdown(rows)))
    return 0
