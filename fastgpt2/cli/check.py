"""Check on this machine that every kernel is correct, then time it: the first thing to run on a new GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from fastgpt2.selfcheck import check
from fastgpt2.selfcheck.report import Finding, Report, Timing

_SIGNS = {"ok": "ok", "failed": "FAILED", "skipped": "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="the device to check: auto (a GPU if there is one), cpu, cuda, cuda:1 ..."
    )
    parser.add_argument("--no-speed", action="store_true", help="check the kernels, but do not time them")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for a bug report")


def run(args: argparse.Namespace) -> int:
    """Run the command. The exit status is 1 if a check failed."""
    shows = sys.stderr.isatty()

    def tell(found: Finding | Timing) -> None:
        if shows:
            print(f"\r\033[K{found.name}, {found.backend} ...", end="", file=sys.stderr, flush=True)

    if shows:
        print("compiling kernels ...", end="", file=sys.stderr, flush=True)
    try:
        report = check(args.device, speed=not args.no_speed, progress=tell)
    finally:
        if shows:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        _print(report)
    return 0 if report.ok else 1


def _print(report: Report) -> None:
    device = report.device
    on = device["gpu"] or device["cpu"]
    more = (
        f", {device['gpu_runtime']}, driver {device['gpu_driver']}" if device["gpu"] else f" ({device['cpu_native']})"
    )
    print(f"{on}{more}; fastgpt2 {report.versions['fastgpt2']}, torch {report.versions['torch']}", end="")
    print(f", triton {report.versions['triton']}\n")
    table = [("check", "backend", "ok?", "error", "details")]
    table += [
        (f.name, f.backend, _SIGNS[f.status], "" if f.share is None else f"{f.share:.0%}", f.detail)
        for f in report.findings
    ]
    _print_table(table)
    print('\nerror: a share of the error budget, which is twice the error of plain PyTorch; "-": skipped\n')
    if report.timings:
        limits = ", ".join(
            f"{value / 1e9:.0f} GB/s" if name == "bandwidth" else f"{value / 1e12:.2f} TFLOP/s in {name}"
            for name, value in report.limits.items()
        )
        times = [("operator", "backend", "size", "time", "TFLOP/s", "GB/s", "of limit", "speedup over")]
        for t in report.timings:
            rate, moved = ("" if value is None else f"{value:.3g}" for value in (t.tflops, t.gbps))
            speedup = f"{t.peer_seconds / t.seconds:.2f}x {t.peer}"
            times.append((t.name, t.backend, t.size, _time(t.seconds), rate, moved, f"{t.limit_share:.0%}", speedup))
        _print_table(times)
        print(
            f"\nlimit: what this device was measured to do, {limits}; above 100%: the data were in a cache\n"
            f"All times are in {report.timings[0].dtype}.\n"
        )
    failed = [finding for finding in report.findings if finding.status == "failed"]
    checked = sum(finding.status == "ok" for finding in report.findings) + len(failed)
    print(f"{checked} checks in {report.seconds:.0f} s, ", end="")
    if failed:
        print(f"{len(failed)} failed: {', '.join(f'{f.name} on {f.backend}' for f in failed)}")
        print(
            "Please report this with the output of `fastgpt2 check --json`. Until it is fixed, backend='torch' runs "
            "without fastgpt2's kernels."
        )
    else:
        print("none failed")


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
