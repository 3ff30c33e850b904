"""python -m benchmarks [attention|cross_entropy|layers|decode|decode_step|train|huggingface|generate|
                      huggingface_generate|score|prefixes|all]
                     [--quick] [--json FILE] [--plot DIR]
python -m benchmarks attention|cross_entropy --tune
python -m benchmarks plot FILE.jsonl DIR
python -m benchmarks compare OLD.jsonl NEW.jsonl
python -m benchmarks compile-report [--write | --summary]

Each case first checks that the contenders agree, then times them in turns. Without a GPU, the cases and contenders that
need one are skipped and listed at the end. On a GPU the same command runs them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks import MODULES, report, workers
from benchmarks.harness import NEEDS_GPU, Result, Settings, load, machine, run_case


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        nargs="?",
        default="all",
        choices=[*MODULES, "all", "plot", "compare", "compile-report"],
        metavar="WHAT",
        help="the part or command to run, one of those above (default: all)",
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="arguments of plot and compare, as above")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases and fewer turns, to take minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also append the results to this file, one per line")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="also draw the results into this folder")
    parser.add_argument("--tune", action="store_true", help="instead search for faster launch rows on this GPU")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="time for each case (default: 20, with --quick 2), or for each launch row with --tune (default: 60)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    parser.add_argument("--only", metavar="TEXT", help="run only the cases whose title contains this text")
    parser.add_argument("--no-memory", action="store_true", help="on a CPU, start no processes to measure memory")
    parser.add_argument("--write", action="store_true", help="compile-report: renew benchmarks/COMPILE_REPORT.md")
    parser.add_argument(
        "--summary", action="store_true", help="compile-report: renew the installed Triton's part of COMPILE_SUMMARY.md"
    )
    args = parser.parse_args(arguments)
    if len(args.files) != (2 if args.what in ("plot", "compare") else 0):
        parser.error("compare takes two files, plot takes a file and a folder, and nothing else takes any")
    if args.what == "compare":
        return compare(*args.files)
    if args.what == "plot":
        return plot(report.read_json(args.files[0]), args.files[1])
    if args.what == "compile-report":
        from benchmarks import compile_report

        return compile_report.main(args.write, args.summary)
    with tempfile.TemporaryDirectory() as folder:
        return measure(args, folder)


def measure(args: argparse.Namespace, folder: str) -> int:
    settings = Settings(
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        scale="quick" if args.quick else "full",
        seconds=args.seconds or (2.0 if args.quick else 20.0),
        memory=not args.no_memory,
        folder=folder,
    )
    modules = MODULES if args.what == "all" else (args.what,)
    if args.tune:
        from benchmarks import tune

        return tune.main(modules, settings, args.seconds or 60.0)
    results = run(modules, settings, args.json, args.only)
    if args.plot is not None:
        plot(results, args.plot)
    # A peer that is wrong or fails does not fail the run.
    return 1 if any(r.is_ours and r.status.startswith(("wrong", "failed")) for r in results) else 0


def run(modules: tuple[str, ...], settings: Settings, json_file: Path | None, only: str | None = None) -> list[Result]:
    """Run every case, and print and write its results at once."""
    start, device = time.perf_counter(), torch.device(settings.device)
    here = machine(device)
    print(f"{here['device']}, {here['threads']} threads, {here['platform']}")
    print(", ".join(f"{name} {version}" for name, version in here["versions"].items()))
    for dtype, measured in here["limits"].items():
        print(f"{dtype}: {measured['flops'] / 1e12:.3g} TFLOP/s, {measured['bandwidth'] / 1e9:.3g} GB/s at most")
    print(flush=True)
    results: list[Result] = []
    with contextlib.closing(workers):
        for module, case in itertools.chain.from_iterable(((m, c) for c in load(m, settings)) for m in modules):
            if only is not None and only not in case.title:
                continue
            rows = run_case(module, case, settings)
            results += rows
            if rows[0].status != NEEDS_GPU:
                print("\n".join(report.table(rows)), flush=True)
            if json_file is not None:
                report.write_json(rows, json_file)
    print("\n".join(report.without_gpu(results)))
    counts = Counter(r.status.split(":")[0] for r in results)
    print(f"{', '.join(f'{n} {status}' for status, n in counts.items())}; {time.perf_counter() - start:.0f} s")
    return results


def plot(results: list[Result], folder: Path) -> int:
    from benchmarks import plots

    for path in plots.draw(results, folder):
        print(f"drew {path}")
    return 0


def compare(old: Path, new: Path) -> int:
    """Compare two files of results. Returns 1 if something became slower or no longer runs."""
    verdicts = list(report.compare(report.read_json(old), report.read_json(new)))
    for verdict, key, explanation in sorted(verdicts):
        print(f"{verdict:7} {' | '.join(key[1:4])}: {explanation}")
    counts = Counter(verdict for verdict, _, _ in verdicts)
    print(", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())) or "nothing to compare")
    return 1 if counts["slower"] or counts["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
