"""Checks and measurements on a GPU: `make gpu`, or `python -m benchmarks.gpu [PART ...] [--out DIR]`.

The parts that settle the greatest doubts run first, each in a process of its own with a time limit. When a part ends,
PART.json has its result and PART.txt its output. summary.txt and results.json have the results of all parts. What a
part has found is kept even if it fails or runs out of time. The run can be interrupted at any moment: the next run
continues with the parts that have not ended. The folder of results is small enough to send.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_parts import PARTS, Found, Place, WrongError, summary, without_fallbacks
from fastgpt2 import machine
from fastgpt2.files import atomic_file, locked_folder

ROOT = Path(__file__).parents[1]
MOST_OUTPUT = 200_000  # of a part's output, the last bytes are kept
REPEATED = ("running", "cut off", "out of time")  # a part with such a result runs again: it may end this time
# Every process of a part has this variable. It names the folder of results.
MARK = "FASTGPT2_GPU_RESULTS"
# Linux ends the process when its parent dies, even if the parent could not do anything about it. The setting stays when
# the process becomes the part's command. If the parent has died before, nobody would end it. A job in the background
# ignores SIGINT, and so would the command, which is to be interrupted when its time is over.
WITH_PARENT = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


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
        name: Part(summary(name), part.seconds, _module("benchmarks.gpu", "--run", name, "--out", "{out}"))
        for name, part in PARTS.items()
    }
    # With -v every test is named when it ends. An interrupted pytest still prints its failures, at most 20.
    tests = ("pytest", "tests/kernels", "--ignore", "tests/kernels/test_compile.py", "-m", "not slow")
    shown = ("-v", "-rfE", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider")
    quick = ("benchmarks", "all", "--quick", "--seconds", "1", "--json", "{out}/benchmarks.jsonl")
    tune = ("benchmarks", "attention", "--tune", "--seconds", "25")  # for each of three rows
    return {
        **own,
        "tests": Part("The kernels' tests, on the GPU.", 300, _module(*tests, *shown)),
        "benchmarks": Part("The benchmark suite's quick run.", 300, _module(*quick)),
        "tune": Part("A search for launch rows of attention.", 150, _module(*tune)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"a part to run, even if it has a result: {', '.join(all_parts())} (default: all that have not ended)",
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
        return run_own(args.run, args.toy, args.out)
    parts = all_parts()
    if unknown := [name for name in args.parts if name not in parts]:
        parser.error(f"there is no part {unknown[0]}; the parts are {', '.join(parts)}")
    chosen = {name: part for name, part in parts.items() if name in args.parts or not args.parts}
    if args.toy:
        chosen = {
            name: part._replace(command=(*part.command, "--toy")) for name, part in chosen.items() if name in PARTS
        }
    return run_parts(chosen, args.out, args.again or bool(args.parts))


class _Kept(dict[str, Any]):
    """What a part finds. Each figure is on disk as soon as it is there."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        with atomic_file(self.path) as file:
            file.write(json.dumps(self).encode())


def run_own(name: str, is_toy: bool, out: Path) -> int:
    """Run a part in this process. What it finds, and in the end its status, go into a file beside the results."""
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    found: Found = _Kept(_figures(out, name))
    try:
        with without_fallbacks():
            PARTS[name].run(Place(device, is_toy), found)
        found["status"] = "skipped" if "skipped" in found else "ok"
    except WrongError as wrong:
        traceback.print_exc()
        found["wrong"], found["status"] = str(wrong), "wrong"
    except Exception as error:  # a kernel, a compiler or a driver can raise anything
        traceback.print_exc()
        found["error"], found["status"] = f"{type(error).__name__}: {error}"[:2000], "failed"
    return 0 if found["status"] in ("ok", "skipped") else 1


def _figures(out: Path, name: str) -> Path:
    """The file in which a part notes what it finds. run_part moves its contents into the part's result."""
    return out / f"{name}.figures"


def run_parts(parts: dict[str, Part], out: Path, again: bool = False) -> int:
    """Run the parts that have not ended on this machine and version yet. Returns 0 if all are ok or skipped."""
    try:
        with locked_folder(out), _signals_interrupt() as received:
            try:
                end_leftovers(out)
                key = describe_run()
                for name, part in parts.items():
                    old = read_result(out, name)
                    if not again and old is not None and old["run"] == key and old["status"] not in REPEATED:
                        print(f"{name}: done before: {old['status']}", flush=True)
                        continue
                    print(f"{name} (at most {part.seconds} s): {part.title}", flush=True)
                    result = run_part(name, part, out, key)
                    print(f"  {result['status']} in {result['seconds']:.0f} s", flush=True)
                    write_summary(out)
            except KeyboardInterrupt:
                write_summary(out)
                print(f"interrupted; the results so far are in {out}, and the same command continues", file=sys.stderr)
                return 128 + (received[0] if received else signal.SIGINT)
            write_summary(out)
    except BlockingIOError as error:
        print(error, file=sys.stderr)
        return 1
    print((out / "summary.txt").read_text("utf-8"))
    results = [read_result(out, name) for name in parts]
    return 0 if all(r is not None and r["status"] in ("ok", "skipped") for r in results) else 1


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP interrupt the run as Ctrl-C does. Then no signal interrupts how the part is ended."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    # A signal that is ignored here stays so: `nohup` ignores SIGHUP.
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: it was not set by Python, and was not changed here
                signal.signal(number, handler)


def end_leftovers(out: Path) -> None:
    """End the processes of an earlier run into this folder that was killed. They would be measured too.

    They are recognized by their environment. The folder is locked, so no other run is using it.
    """
    mark, deadline = f"{MARK}={out.resolve()}".encode(), time.monotonic() + 10

    def ended() -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if int(process.name) != os.getpid() and mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
                    found.append(process.name)
            except OSError:  # it has ended, or is not ours
                continue
        return found

    if first := ended():
        print(f"ended what an earlier run has left: {', '.join(first)}", flush=True)
    while ended() and time.monotonic() < deadline:  # until they have given back their memory
        time.sleep(0.1)


def describe_run() -> dict[str, Any]:
    """What a result is valid for: the commit, the versions and the machine."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    found = {"commit": _commit(), "versions": machine.versions(), "machine": machine.describe(device)}
    return json.loads(json.dumps(found, default=str))  # equal to what is read from a file


def _commit() -> str:
    """The commit, and whether files differ from it; "unknown" without git, or outside a repository."""
    said = []
    for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.SubprocessError):
            return "unknown"
        said.append(done.stdout.strip())
    return f"{said[0]}, changed" if said[1] else said[0]


def run_part(name: str, part: Part, out: Path, key: dict[str, Any]) -> dict[str, Any]:
    """Run a part in its own process group, write its result, and end whatever it leaves running."""
    command = [argument.replace("{out}", str(out.resolve())) for argument in part.command]
    result: dict[str, Any] = {
        "part": name, "title": part.title, "status": "running", "seconds": 0.0, "found": {},
        "command": " ".join(part.command).replace(sys.executable, "python"), "run": key,
    }  # fmt: skip
    write_result(out, name, result)  # shows that the part has begun, even if the machine crashes
    figures, text = _figures(out, name), out / f"{name}.txt"
    for old in (figures, out / f"{name}.jsonl"):  # of an earlier run
        old.unlink(missing_ok=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, MARK: str(out.resolve())}
    if torch.cuda.is_available():
        environment.pop("TRITON_INTERPRET", None)  # under the interpreter nothing would run on the GPU
    begin, child = time.perf_counter(), None
    status = "cut off"
    try:
        with open(text, "wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-c", WITH_PARENT, str(os.getpid()), *command],
                cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = "ok" if child.wait(part.seconds) == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "out of time"
    finally:
        if child is not None:
            end_group(child)
        kept = text.read_bytes()[-MOST_OUTPUT:]
        text.write_bytes(kept)
        with contextlib.suppress(FileNotFoundError, ValueError):
            result["found"] = json.loads(figures.read_text("utf-8"))
        figures.unlink(missing_ok=True)
        own = result["found"].pop("status", None)
        if status == "failed":
            status = own if own in ("failed", "wrong") else "failed"
            if own is None and (lines := kept.decode("utf-8", "replace").strip().splitlines()):
                result["found"]["error"] = lines[-1][:2000]
        elif status == "ok" and name in PARTS:
            status = own or "failed"
        result |= {"status": status, "seconds": time.perf_counter() - begin}
        write_result(out, name, result)
    return result


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a process and everything that it started. First it is interrupted, so that it can still say what it knows."""
    for number, seconds in ((signal.SIGINT, 10), (signal.SIGTERM, 5), (signal.SIGKILL, 30)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:  # all have ended
            break
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


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
