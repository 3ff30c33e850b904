"""A long process that makes calls with random shapes. Its memory, open files and threads must stop growing.

`python -m tests.reliability.soak --calls 4000` makes random calls to the library and the command line. The first third
is a warm-up that fills all caches. After that, nothing may grow.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt2 import GPT2
from fastgpt2.cli import main as command_line
from fastgpt2.generate import stream
from fastgpt2.loss import train_step
from fastgpt2.scoring import score
from fastgpt2.tokenizer import Tokenizer

WINDOWS = 6  # of equal length; the first two are the warm-up
# Memory may grow by this much from the third window to the last, because the heap fragments.
ROOM_MB = 16.0


@dataclass(frozen=True)
class State:
    """The resources that a process holds at one moment."""

    memory_mb: float
    files: int
    threads: int


def measure() -> State:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return State(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files, threads)


def growth(windows: Sequence[Sequence[State]]) -> list[str]:
    """Describe what grew from the first window to the last, one line each.

    Windows are compared by their minimum, because a peak is not a leak.
    """

    def least(name: str) -> list[float]:
        return [min(getattr(state, name) for state in window) for window in windows]

    rooms = {"memory_mb": ROOM_MB, "files": 0, "threads": 0}
    return [
        f"{name} grew: {', '.join(f'{value:.0f}' for value in least(name))}"
        for name, room in rooms.items()
        if least(name)[-1] - least(name)[0] > room
    ]


class Calls:
    """Random calls to everything that a long process uses."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.count = folder, rng, 0
        tokenizer = Tokenizer.train(["def add(a, b):\n    return a + b\n"] * 4, 280)
        self.tiny = GPT2(vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=2, context_length=128)
        self.tiny.tokenizer = tokenizer
        self.tiny.save_pretrained(folder / "tiny")
        # So wide, and with such an odd vocabulary, that oneDNN computes the loss's products.
        self.wide = GPT2(vocab_size=4501, hidden_size=256, num_layers=1, num_heads=4, context_length=192)
        self.optimizer = torch.optim.AdamW(self.wide.parameters(), lr=1e-4)
        self.kinds: dict[str, Callable[[], Any]] = {
            name: getattr(self, name) for name in ("generate", "stop_early", "score", "train", "load", "write_file")
        }

    def ids(self, model: GPT2, most: int) -> list[int]:
        return [self.rng.randrange(model.config.vocab_size) for _ in range(self.rng.randint(2, most))]

    def options(self) -> dict[str, Any]:
        rng = self.rng
        return {
            "num_samples": rng.randint(1, 4),
            "max_new_tokens": rng.randint(1, 12),
            "seed": rng.randrange(1000),
            "temperature": rng.choice((0.0, 0.7, 1.0)),
            "top_k": rng.choice((None, rng.randint(1, 50))),
            "top_p": rng.choice((None, rng.uniform(0.1, 1.0))),
            "repetition_penalty": rng.choice((1.0, 1.2)),
            "batch_size": rng.choice(("auto", rng.randint(1, 8))),
        }

    def generate(self) -> None:
        model = self.rng.choice((self.tiny, self.wide)).eval()
        model.generate([self.ids(model, 100) for _ in range(self.rng.randint(1, 4))], **self.options())

    def stop_early(self) -> None:
        events = stream(self.tiny, [self.ids(self.tiny, 100)], **self.options())
        next(events)  # the other tokens are never requested

    def score(self) -> None:
        model = self.rng.choice((self.tiny, self.wide)).eval()
        sequences = [self.ids(model, 100) for _ in range(self.rng.randint(1, 5))]
        score(model, sequences, batch_tokens=self.rng.choice((64, 512, 4096)))

    def train(self) -> None:
        ids = torch.randint(self.wide.config.vocab_size, (self.rng.randint(1, 3), self.rng.randint(2, 128)))
        train_step(self.wide.train(), ids, self.optimizer)

    def load(self) -> None:
        GPT2.from_pretrained(self.folder / "tiny").generate(["def"], **self.options())

    def write_file(self) -> None:
        out = self.folder / f"out.{self.rng.choice(('jsonl', 'fasta', 'txt'))}"
        mode = self.rng.choice(("--overwrite", "--resume")) if out.exists() else "--resume"
        arguments = [
            "generate",
            "def",
            "--model",
            str(self.folder / "tiny"),
            "--device",
            "cpu",
            "--max-new-tokens",
            "5",
        ]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = command_line([*arguments, "--out", str(out), mode])
        if status:
            raise AssertionError(f"generate {mode} ended with status {status}")


_LEFT: list[Any] = []


def _leave_thread() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


# Deliberate leaks. Each call leaks once.
LEAKS: dict[str, Callable[[], object]] = {
    "memory": lambda: _LEFT.append(torch.ones(250_000)),
    "files": lambda: _LEFT.append(os.open(os.devnull, os.O_RDONLY)),
    "threads": _leave_thread,
}


def run(num_calls: int, rng: random.Random, leak: str | None = None, every: int = 10) -> list[str]:
    """Make random calls, and describe what grew. With `leak`, every `every`-th call also leaks."""
    windows: list[list[State]] = [[] for _ in range(WINDOWS)]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        calls = Calls(Path(folder), rng)
        for number in range(num_calls):
            rng.choice(list(calls.kinds.values()))()
            if leak is not None and number % every == 0:
                LEAKS[leak]()
            window = windows[number * WINDOWS // num_calls]
            if number % max(1, num_calls // 120) == 0:
                window.append(measure())
                if len(window) % 10 == 1:
                    print(f"{number:6,} calls, {time.monotonic() - begun:4.0f} s: {window[-1]}", flush=True)
    return growth(windows[WINDOWS // 3 :])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--leak", choices=LEAKS, help="leak this deliberately")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    print(f"seed {args.seed}")
    found = run(args.calls, random.Random(args.seed), args.leak)
    print("\n".join(found) or "nothing grew")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
