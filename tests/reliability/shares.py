"""Processes that share one output and are killed at random moments: no record may be lost or written twice.

`python -m tests.reliability.shares --prompts 10000 --kills 20` generates with 1, 2 and 4 processes, which must write
the same bytes. Then it kills the processes of a run at random moments, and resumes the run with another number of
processes, again and again. No complete record may disappear, and the final output must have the same bytes once more.
With `--folder DIR` an interrupted check continues after the kills that it has already done.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.helpers import without_rounding

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["def", "class", "return", "import", "for", "if", "while", "with", "self", "name", "path", "data", "value"]


def write_prompts(path: Path, count: int, rng: random.Random) -> None:
    """Write prompts of many lengths. Some of them begin with the same words."""
    stems = [" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(1 + count // 8)]
    rows = (
        {"prompt": f"{rng.choice(stems)} {' '.join(rng.choices(WORDS, k=rng.randint(0, 4)))}"} for _ in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Run:
    """The processes of one run. Each generates its own share."""

    def __init__(self, arguments: list[str], out: Path, count: int) -> None:
        command = [sys.executable, "-m", "fastgpt2", "generate", *arguments, "--out", str(out), "--resume"]
        paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        self.errors = [tempfile.TemporaryFile("w+") for _ in range(count)]  # noqa: SIM115 (`close` closes them)
        self.processes = [
            subprocess.Popen([*command, "--shard", f"{index}/{count}"], env=environment, stderr=error)
            for index, error in enumerate(self.errors)
        ]

    @property
    def is_running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def kill(self, index: int) -> bool:
        """Kill a process. Return whether it was still running."""
        process = self.processes[index]
        was_running = process.poll() is None
        process.kill()
        process.wait()
        return was_running

    def finish(self) -> None:
        for process, error in zip(self.processes, self.errors, strict=True):
            status = process.wait()
            error.seek(0)
            if status != 0:
                raise AssertionError(f"a process ended with status {status}: {error.read()}")

    def close(self) -> None:
        for index, error in enumerate(self.errors):
            self.kill(index)
            error.close()


def files(out: Path) -> list[Path]:
    return [path for path in (out, *out.parent.glob(out.name + ".part-*")) if path.exists()]


def written(out: Path) -> int:
    size = 0
    for path in files(out):
        try:
            size += path.stat().st_size
        except FileNotFoundError:  # another process has merged it into the output
            continue
    return size


def whole_records(out: Path) -> Counter[bytes]:
    return Counter(line for path in files(out) for line in path.read_bytes().split(b"\n")[:-1])


def check(folder: Path, arguments: list[str], num_records: int, kills: int, rng: random.Random) -> None:
    """Raise AssertionError if several processes write other bytes than one, or if a kill loses or repeats a record."""
    outputs = {}
    for count in (1, 2, 4):
        out = folder / f"{count}.jsonl"
        started, run = time.monotonic(), Run(arguments, out, count)
        try:
            run.finish()
        finally:
            run.close()
        outputs[count] = without_rounding(out.read_bytes())
        assert files(out) == [out], "parts of the output are left over"
        lines = len(outputs[count].splitlines())
        assert lines == num_records, f"{lines} records of {num_records}"
        assert outputs[count] == outputs[1], f"{count} processes wrote other bytes than one"
        print(f"{count} processes: {lines} equal records, {time.monotonic() - started:.0f} s", flush=True)

    out, size = folder / "killed.jsonl", (folder / "1.jsonl").stat().st_size
    state = folder / "kills"
    done = int(state.read_text()) if state.exists() else 0
    kept = whole_records(out)
    while done < kills:
        counts = [count for count in (1, 2, 3, 4) if count == 1 or count <= kills - done + 1]
        count = rng.choice(counts)
        run = Run(arguments, out, count)
        try:
            # A random point in this kill's equal part of what is left to write, so that every kill finds work to stop.
            target = written(out) + (size - written(out)) * rng.random() / max(1, kills - done)
            while run.is_running and written(out) < target:
                time.sleep(0.005)
            for index in rng.sample(range(count), count):
                done += run.kill(index)
                time.sleep(rng.random() * 0.2)
        finally:
            run.close()
        now = whole_records(out)
        assert kept <= now, f"{(kept - now).total()} complete records were lost"
        assert max(now.values(), default=1) == 1, "a record was written twice"
        kept = now
        print(f"{done} kills, the last among {count} processes: {kept.total()} records", flush=True)
        if kept.total() == num_records and files(out) == [
            out
        ]:  # the run has finished, so the next kill needs a new one
            out.unlink()
            kept = Counter()
        state.write_text(str(done))
    run = Run(arguments, out, rng.choice((1, 2, 3, 4)))
    try:
        run.finish()
    finally:
        run.close()
    assert without_rounding(out.read_bytes()) == outputs[1], "the resumed output differs"
    assert files(out) == [out], "parts of the output are left over"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--folder", type=Path, help="keep the outputs here; a check with the same --seed continues")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    rng = random.Random(args.seed)
    with contextlib.ExitStack() as stack:
        name = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
        Path(name).mkdir(exist_ok=True)
        prompts = Path(name) / "prompts.jsonl"
        write_prompts(prompts, args.prompts, rng)
        arguments = ["--prompts", str(prompts), "--num-samples", str(args.samples), "--device", "cpu"]
        arguments += ["--max-new-tokens", str(args.new_tokens)]
        check(Path(name), arguments, args.prompts * args.samples, args.kills, rng)
    print("the same bytes; no record lost or repeated")


if __name__ == "__main__":
    main()
