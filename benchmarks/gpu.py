"""Checks and measurements for ten minutes on a GPU: `make gpu`, or `python -m benchmarks.gpu [PART ...] [--out DIR]`.

The parts that settle the greatest doubts run first, each in a process of its own with a time limit. When a part ends,
PART.json has its result and PART.txt its output. summary.txt and results.json have the results of all parts. The run
can be interrupted at any moment: the next run continues with the first part that has no result. The folder of results
is small enough to send.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_parts import PARTS, Place, WrongError, summary
from fastgpt2 import machine
from fastgpt2.files import atomic_file

ROOT = Path(__file__).parents[1]
MOST_OUTPUT = 60_000  # of a part's output, the last bytes are kept


class Part(NamedTuple):
    """What a part shows, the most seconds that it may take, and its command. {out} stands for the folder of results."""

    title: str
    seconds: int
    command: tuple[str, ...]


def _module(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


def all_parts() -> dict[str, Part]:
    """The parts, in the order in which they run."""
    own = {
        name: Part(summary(name), seconds, _module("benchmarks.gpu", "--run", name, "--out", "{out}"))
        for name, (seconds, _) in PARTS.items()
    }
    tests = ("pytest", "tests/kernels", "--ignore", "tests/kernels/test_compile.py", "-q", "-m", "not slow")
    quick = ("benchmarks", "all", "--quick", "--seconds", "1", "--json", "{out}/benchmarks.jsonl")
    return {
        **own,
        "check": Part("`fastgpt2 check`.", 180, _module("fastgpt2", "check", "--json")),
        "tests": Part("The kernels' tests, on the GPU.", 300, _module(*tests)),
        "benchmarks": Part("The benchmark suite's quick run.", 300, _module(*quick)),
        "tune": Part("A search for launch rows of attention.", 120, _module("benchmarks", "attention", "--tune")),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"a part to run, even if it has a result: {', '.join(all_parts())} (default: all without a result)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="the folder of results (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="also run the parts that have a result")
    parser.add_argument("--toy", action="store_true", help="use tiny sizes, also without a GPU, to test the parts")
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not args.toy:
        print("There is no GPU here: `make gpu` needs one that PyTorch finds.", file=sys.stderr)
        return 1
    if args.run is not None:
        return run_own(args.run, args.toy)
    parts = all_parts()
    if unknown := [name for name in args.parts if name not in parts]:
        parser.error(f"there is no part {unknown[0]}; the parts are {', '.join(parts)}")
    chosen = {name: part for name, part in parts.items() if name in args.parts or not args.parts}
    if args.toy:
        chosen = {
            name: part._replace(command=(*part.command, "--toy")) for name, part in chosen.items() if name in PARTS
        }
    return run_parts(chosen, args.out, args.again or bool(args.parts))


def run_own(name: str, is_toy: bool) -> int:
    """Run a part in this process, and print its result as the last line. A part that fails ends in a traceback."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = PARTS[name][1](Place(device, is_toy))
        result = {"status": "skipped" if "skipped" in found else "ok", "found": found}
    except WrongError as wrong:
        result = {"status": "wrong", "found": {"wrong": str(wrong)}}
    print(json.dumps(result), flush=True)
    return 0 if result["status"] in ("ok", "skipped") else 1


def run_parts(parts: dict[str, Part], out: Path, again: bool = False) -> int:
    """Run the parts that have no result from this machine and version yet. Returns 0 if all are ok or skipped."""
    out.mkdir(parents=True, exist_ok=True)
    key = describe_run()
    try:
        for name, part in parts.items():
            old = read_result(out, name)
            if not again and old is not None and old["run"] == key and old["status"] not in ("running", "cut"):
                print(f"{name}: done before: {old['status']}", flush=True)
                continue
            print(f"{name} (at most {part.seconds} s): {part.title}", flush=True)
            result = run_part(name, part, out, key)
            print(f"  {result['status']} in {result['seconds']:.0f} s", flush=True)
            write_summary(out)
    except KeyboardInterrupt:
        write_summary(out)
        print(f"interrupted; the results so far are in {out}, and the same command continues", file=sys.stderr)
        return 130
    write_summary(out)
    print((out / "summary.txt").read_text("utf-8"))
    results = [read_result(out, name) for name in parts]
    return 0 if all(r is not None and r["status"] in ("ok", "skipped") for r in results) else 1


def describe_run() -> dict[str, Any]:
    """What a result is valid for: the commit, the versions and the machine."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    found = {"commit": done.stdout.strip(), "versions": machine.versions(), "machine": machine.describe(device)}
    return json.loads(json.dumps(found, default=str))  # equal to what is read from a file


def run_part(name: str, part: Part, out: Path, key: dict[str, Any]) -> dict[str, Any]:
    """Run a part in its own process group, write its result, and end whatever it leaves running."""
    command = [argument.replace("{out}", str(out.resolve())) for argument in part.command]
    result: dict[str, Any] = {
        "part": name, "title": part.title, "status": "running", "seconds": 0.0, "found": {},
        "command": " ".join(part.command).replace(sys.executable, "python"), "run": key,
    }  # fmt: skip
    write_result(out, name, result)  # shows that the part has begun, even if the machine crashes
    begin, text = time.perf_counter(), out / f"{name}.txt"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    with open(text, "wb") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "ok" if child.wait(part.seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        except KeyboardInterrupt:
            result["status"] = "cut"
            raise
        finally:
            end_group(child)
            if result["status"] == "cut":
                result["seconds"] = time.perf_counter() - begin
                write_result(out, name, result)
    kept = text.read_bytes()[-MOST_OUTPUT:]
    text.write_bytes(kept)
    found = last_object(kept.decode("utf-8", "replace")) if status != "out of time" else None
    if name in PARTS and found is not None:
        status, result["found"] = found["status"], found["found"]
    elif status == "failed" and (lines := kept.decode("utf-8", "replace").strip().splitlines()):
        result["found"] = {"error": lines[-1][:2000]}
    result |= {"status": status, "seconds": time.perf_counter() - begin}
    write_result(out, name, result)
    return result


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a process and everything that it started."""
    for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 30)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:  # all have ended
            break
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def last_object(text: str) -> dict[str, Any] | None:
    """The JSON object in the last line, if there is one."""
    try:
        found = json.loads(text.rstrip().rpartition("\n")[2])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def write_result(out: Path, name: str, result: dict[str, Any]) -> None:
    with atomic_file(out / f"{name}.json") as file:
        file.write(json.dumps(result, indent=1).encode())


def read_result(out: Path, name: str) -> dict[str, Any] | None:
    try:
        return json.loads((out / f"{name}.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_summary(out: Path) -> None:
    """Write all results in the folder as results.json, for programs, and as summary.txt, for people."""
    results = [found for name in all_parts() if (found := read_result(out, name)) is not None]
    others = sorted(path.stem for path in out.glob("*.json") if path.stem not in {*all_parts(), "results"})
    results += [found for name in others if (found := read_result(out, name)) is not None]
    lines = []
    for result in results:
        lines.append(f"{result['part']}: {result['status']} in {result['seconds']:.0f} s. {result['title']}")
        lines += [f"    {name}: {_shown(value)}" for name, value in result["found"].items()]
    if results:
        last = results[-1]["run"]
        lines += ["", json.dumps(last["machine"]), json.dumps(last["versions"]), f"commit {last['commit']}"]
    for name, text in (("results.json", json.dumps(results, indent=1)), ("summary.txt", "\n".join(lines) + "\n")):
        with atomic_file(out / name) as file:
            file.write(text.encode())


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]


if __name__ == "__main__":
    sys.exit(main())
