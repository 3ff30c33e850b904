"""Results as a table, as JSON lines, and compared with an earlier run."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.harness import NEEDS_GPU, Result

NOISE = 0.03  # a smaller change is never reported

Key = tuple[str, ...]


def write_json(results: Iterable[Result], path: Path) -> None:
    """Append a line for each result."""
    with path.open("a", encoding="utf-8") as file:
        for result in results:
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")


def read_json(path: Path) -> list[Result]:
    """Read results from JSON lines; ValueError names a line that is not a result."""
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            results.append(Result(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: must be a result of `python -m benchmarks --json`: {error}"
            ) from None
    return results


# -- the table ----------------------------------------------------------------------------------------------------

COLUMNS = (
    "contender", "median", "p20 .. p80", "vs base", "vs peer", "TFLOP/s", "GB/s", "of limit", "tokens/s", "memory",
    "launches", "cold",
)  # fmt: skip


def table(results: Iterable[Result]) -> Iterator[str]:
    """The lines of one table per case, without empty columns. Below each table are the contenders that did not run.

    Those that need a GPU are left to `without_gpu`.
    """
    for title, group in itertools.groupby(results, key=title_of):
        rows = list(group)
        base = next((r.base for r in rows if r.base), "")
        done = [_cells(r) for r in rows if r.status == "ok"]
        yield f"{title}{f'   (base: {base})' if base else ''}" if done else title
        used = [i for i, _ in enumerate(COLUMNS) if any(cells[i] for cells in done)]
        lines = [COLUMNS, *done] if done else []
        widths = {i: max(len(line[i]) for line in lines) for i in used}
        for line in lines:
            yield "  " + "  ".join(f"{line[i]:<{widths[i]}}" if i == 0 else f"{line[i]:>{widths[i]}}" for i in used)
        for row in rows:
            if row.status not in ("ok", NEEDS_GPU):
                yield f"  {row.contender}: {row.status}"
        yield ""


def without_gpu(results: Iterable[Result]) -> Iterator[str]:
    """The lines that list the cases and contenders that need a GPU."""
    cases, contenders = {}, {}
    for r in results:
        if r.status == NEEDS_GPU and r.contender == "all":
            cases.setdefault(f"{title_of(r)}", []).append(r.dtype)
        elif r.status == NEEDS_GPU:
            contenders.setdefault(r.module, {})[r.contender] = None
    if cases or contenders:
        yield "Needs a GPU, and was not run here:"
    for module, names in contenders.items():
        yield f"  {module}: {', '.join(names)}"
    for title, dtypes in cases.items():
        yield f"  {title} ({', '.join(dtypes)})"


def title_of(result: Result) -> str:
    return " ".join([result.case, *(f"{key}={value}" for key, value in result.shape.items())])


def _cells(r: Result) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    peer = "" if r.ratio_peer is None else f"{r.ratio_peer:.2f}x {r.peer}"
    return (
        f"{r.contender} {r.dtype}", seconds(r.median), f"{seconds(r.p20)} .. {seconds(r.p80)}",
        number(r.ratio_base, ".2f") + ("x" if r.ratio_base else ""), peer,
        number(r.tflops, ".3g"), number(r.gbps, ".3g"), number(r.share, ".0%"), number(r.tokens_per_second, ".4g"),
        "" if r.peak_bytes is None else f"{r.peak_bytes / 1e6:.0f} MB", number(r.launches, "d"),
        "" if r.cold_seconds is None else seconds(r.cold_seconds),
    )  # fmt: skip


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


# -- old and new --------------------------------------------------------------------------------------------------


def key_of(r: Result) -> Key:
    return (r.module, title_of(r), r.dtype, r.contender, str(r.machine.get("device")))


def compare(old: Iterable[Result], new: Iterable[Result]) -> Iterator[tuple[str, Key, str]]:
    """(verdict, key, explanation) of every contender: "same", "faster", "slower", "broken", "mended", "new" or "gone".

    If both runs have the same base of the case, speeds relative to it are compared, so that it does not matter how fast
    the machine was that day. Otherwise calls per second are compared. A change counts if it is over 3% and the ranges
    from the 20th to the 80th percentile do not overlap.
    """
    olds, news = ({key_of(r): r for r in results} for results in (old, new))
    for key, now in news.items():
        was = olds.get(key)
        if was is None:
            yield "new", key, now.status
        elif (was.status == "ok") != (now.status == "ok"):
            yield ("broken" if was.status == "ok" else "mended"), key, f"{was.status} -> {now.status}"
        elif now.status == "ok":
            yield _verdict(was, now, key)
    for key in olds.keys() - news.keys():
        yield "gone", key, olds[key].status


def _verdict(was: Result, now: Result, key: Key) -> tuple[str, Key, str]:
    relative = was.base == now.base != now.contender and now.ratio_base is not None
    old_range, new_range = (_speed(r, relative) for r in (was, now))
    change = new_range[0] / old_range[0]
    apart = new_range[1] > old_range[2] or new_range[2] < old_range[1]
    verdict = "same" if abs(change - 1) < NOISE or not apart else "faster" if change > 1 else "slower"
    measure = f"of {now.base}'s speed" if relative else "calls per second"
    spread = "{:.3g} ({:.3g} .. {:.3g})"
    return verdict, key, f"{spread.format(*old_range)} -> {spread.format(*new_range)} {measure}, {change:.2f}x"


def _speed(r: Result, relative: bool) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the speed."""
    if relative:
        return r.ratio_base, r.ratio_base_p20, r.ratio_base_p80
    return 1 / r.median, 1 / r.p80, 1 / r.p20
