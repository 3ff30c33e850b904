"""What every launch row compiles to for every target, without a GPU: `python -m benchmarks compile-report [--write]`.

Exact figures of this Triton's code generator, not measurements of speed. `--write` renews COMPILE_REPORT.md, which
tests/kernels/test_compile.py holds against what it compiles itself.
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

from benchmarks.harness import version

ROOT = Path(__file__).parents[1]
REPORT = Path(__file__).with_name("COMPILE_REPORT.md")
COLUMNS = (
    "case", "warps", "registers", "spilled bytes", "shared bytes", "programs", "tensor core", "128-bit loads",
    "128-bit stores",
)  # fmt: skip


class Target(NamedTuple):
    """What a multiprocessor (compute unit) has: registers for a lane of each of its 4 parts, shared memory, warps."""

    name: str
    lane_registers: int
    shared: int
    shared_overhead: int  # of each program
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


def programs(row: dict[str, Any]) -> int:
    """How many programs (CTAs) of a compiled row fit a multiprocessor at once: registers, shared memory, warps."""
    target = TARGETS[row["target"]]
    warps_a_part = target.lane_registers // max(8, row["registers"] + 7 & ~7)
    by_warps = min(4 * warps_a_part, target.max_warps) // row["warps"]
    by_shared = target.shared // (row["shared"] + target.shared_overhead) if row["shared"] else target.max_programs
    return min(by_warps, by_shared, target.max_programs)


def compile_rows(targets: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Compiled anew in a process of its own: nothing compiles where Triton's interpreter is on."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        environment |= {"TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.kernels.compile_rows", *targets],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The part of a row that is the same at every compilation."""
    figures = ("warps", "registers", "spills", "shared")
    instructions = ("tensor_core", "wide_loads", "wide_stores")
    return (row["case"], *(str(row[f]) for f in figures), str(programs(row)), *(str(row[i]) for i in instructions))


def markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of the report. Seconds are of one core of the machine that wrote it."""
    yield "# Compile report"
    yield ""
    yield f"Every launch row as Triton {version('triton')} compiles it, without a GPU:"
    yield "`python -m benchmarks compile-report --write`. Instructions are counted in the code, not as they run."
    yield "Programs: how many fit a multiprocessor at once. Seconds: of compiling, on the machine that wrote this."
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


def main(write: bool) -> int:
    report = "\n".join(markdown(compile_rows())) + "\n"
    if write:
        REPORT.write_text(report, encoding="utf-8")
        print(f"wrote {REPORT}")
    else:
        print(report, end="")
    return 0
