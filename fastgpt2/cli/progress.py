"""The line on a terminal that shows the progress of `generate` and `score`."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from fastgpt2.messages import counted
from fastgpt2.record_files import Key

# Seconds between two updates of the line.
_INTERVAL = 0.1


def is_shown() -> bool:
    """Whether stderr is a terminal, which can show the line."""
    return sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """Shows records done and left, tokens per second, rows in flight and the time left. It needs a terminal.

    Args:
        total: How many records there will be.
        done: How many of them exist already.
        unit: What a record is called.
    """

    def __init__(self, total: int, done: int, unit: str) -> None:
        layout = f"{{percentage:3.0f}}%|{{bar}}| {{n_fmt}}/{{total_fmt}} {unit}s [{{elapsed}}<{{remaining}}{{postfix}}]"
        self._bar = tqdm(total=total, initial=done, disable=not is_shown(), dynamic_ncols=True, bar_format=layout)
        self._rows: set[Key] = set()
        self._tokens = 0
        self._started = time.perf_counter()
        self._shown = 0.0

    def add(self, row: Key, tokens: int, *, ends: bool = False) -> None:
        """Note that a row in flight has this many new tokens, and whether it ends with them."""
        if self._bar.disable:
            return
        self._tokens += tokens
        self._rows.add(row)
        if ends:
            self._rows.discard(row)
            self._bar.n += 1  # `update` could redraw the line while its other numbers are out of date
        now = time.perf_counter()
        if now - self._shown >= _INTERVAL:
            self._show(now)

    def leave_out(self) -> None:
        """Note that one of the records will not be written."""
        if not self._bar.disable:
            self._bar.total -= 1

    def _show(self, now: float) -> None:
        self._shown = now
        rate = self._tokens / max(1e-9, now - self._started)
        in_flight = counted(len(self._rows), "row")
        left = self._bar.total - self._bar.n
        self._bar.set_postfix_str(f"{left:,} left, {rate:,.0f} tokens/s, {in_flight} in flight")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._bar.disable:
            self._show(time.perf_counter())
        self._bar.close()
