"""Plots of results: a roofline, speed against length or rows, memory against N. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Result
from benchmarks.report import title_of

OURS = "#d1495b"
PEERS = ("#30638e", "#00798c", "#edae49", "#8d6a9f", "#5b8e55", "#6f6f6f", "#9c6644", "#3c91c2")
MEMORY_CASES = ("attention backward", "cross_entropy", "linear_cross_entropy")


def draw(results: Iterable[Result], folder: Path) -> list[Path]:
    """Write the plots of these results as SVG; returns the files written."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install 'fastgpt2[bench]'") from None
    mpl.use("agg")
    done = [r for r in results if r.status == "ok"]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    kernels = [r for r in done if r.tflops and r.intensity]
    if kernels:
        written.append(_roofline(kernels, folder / "roofline.svg"))
    cases: dict[str, list[Result]] = defaultdict(list)
    for r in done:
        cases[r.case].append(r)
    for case, rows in cases.items():
        stem = case.replace(" ", "_")
        if any(r.tokens_per_second for r in rows):
            written.append(_bars(rows, folder / f"{stem}.svg"))
        else:
            written.append(_lines(rows, _speed, "calls per second", folder / f"{stem}.svg"))
        if case in MEMORY_CASES and any(r.peak_bytes for r in rows):
            written.append(_lines(rows, _megabytes, "peak memory per call, MB", folder / f"{stem}_memory.svg"))
    return written


def _speed(r: Result) -> float | None:
    return None if r.median is None else 1 / r.median


def _megabytes(r: Result) -> float | None:
    return None if r.peak_bytes is None else max(r.peak_bytes / 1e6, 1.0)


def _styles(rows: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """The style of each contender's line: ours are red and wide, and every peer has a colour of its own."""
    styles: dict[str, dict[str, Any]] = {}
    dashes = iter(("-", "--", ":", "-."))
    colours = iter(PEERS * 3)
    for r in rows:
        if r.contender not in styles:
            ours = {"color": OURS, "linewidth": 2.4, "linestyle": next(dashes, "-"), "zorder": 3}
            styles[r.contender] = ours if r.is_ours else {"color": next(colours), "linewidth": 1.3}
    return styles


def _roofline(rows: list[Result], path: Path) -> Path:
    import matplotlib.pyplot as plt

    dtypes = sorted({r.dtype for r in rows if r.machine.get("limits", {}).get(r.dtype)})
    figure, axes = plt.subplots(1, len(dtypes), figsize=(6.4 * len(dtypes), 4.4), squeeze=False, layout="constrained")
    styles = _styles(rows)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        shown = [r for r in rows if r.dtype == dtype]
        limit = shown[0].machine["limits"][dtype]
        low, high = (f(r.intensity or 1.0 for r in shown) for f in (min, max))
        corner = limit["flops"] / limit["bandwidth"]
        span = [min(low, corner) / 2, corner, max(high, corner) * 2]
        axis.loglog(span, [min(x * limit["bandwidth"], limit["flops"]) / 1e12 for x in span], color="black")
        axis.annotate(f"{limit['bandwidth'] / 1e9:.3g} GB/s", (span[0], span[0] * limit["bandwidth"] / 1e12))
        axis.annotate(f"{limit['flops'] / 1e12:.3g} TFLOP/s", (span[2], limit["flops"] / 1e12), ha="right", va="bottom")
        for name, style in styles.items():
            points = [(r.intensity, r.tflops) for r in shown if r.contender == name]
            if points:
                ours = style["color"] == OURS
                axis.scatter(
                    *zip(*points, strict=True), color=style["color"], marker="D" if ours else "o",
                    s=34 if ours else 18, label=name, zorder=3 if ours else 2,
                )  # fmt: skip
        axis.set(title=dtype, xlabel="arithmetic intensity, FLOP/byte", ylabel="TFLOP/s")
    return _finish(figure, axes[0], rows, path)


def _lines(rows: list[Result], value: Callable[[Result], float | None], label: str, path: Path) -> Path:
    """Plot against the size with the most values, with a panel for every dtype and every choice of the other sizes."""
    import matplotlib.pyplot as plt

    across = max(rows[0].shape, key=lambda key: len({r.shape[key] for r in rows}))
    panels: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for r in rows:
        rest = tuple(f"{k}={v}" for k, v in r.shape.items() if k != across and len({x.shape[k] for x in rows}) > 1)
        panels[(r.dtype, *rest)].append(r)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    styles = _styles(rows)
    for axis, (panel, shown) in zip(axes.flat, panels.items(), strict=False):
        for name, style in styles.items():
            points = sorted((r.shape[across], y) for r in shown if r.contender == name and (y := value(r)) is not None)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=name, **style)
        axis.set_xscale("log", base=2)
        lengths = sorted({r.shape[across] for r in shown})
        axis.set_xticks(lengths, map(str, lengths))
        axis.set_yscale("log")
        axis.set(title=" ".join(panel), xlabel=across, ylabel=label)
    return _finish(figure, axes.flat, rows, path)


def _bars(rows: list[Result], path: Path) -> Path:
    """Plot the tokens per second of every contender, with a panel for every shape."""
    import matplotlib.pyplot as plt

    panels: dict[str, list[Result]] = defaultdict(list)
    for r in rows:
        panels[title_of(r)].append(r)
    tallest = max(map(len, panels.values()))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 1.2 + 0.3 * tallest), squeeze=False, layout="constrained"
    )
    for axis, (title, shown) in zip(axes[0], panels.items(), strict=True):
        # The base of the ratios is in the cases of both dtypes. Its first result is shown.
        first = {f"{r.contender} {r.dtype}": r for r in reversed(shown)}
        names = sorted(first, key=lambda name: first[name].tokens_per_second or 0.0)
        shown = [first[name] for name in names]
        bars = axis.barh(
            names, [r.tokens_per_second for r in shown], color=[OURS if r.is_ours else PEERS[0] for r in shown]
        )
        axis.bar_label(bars, [f"{r.tokens_per_second:.3g}" for r in shown], padding=2, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("tokens per second")
        axis.margins(x=0.12)
    return _finish(figure, [], rows, path)


def _finish(figure: Any, axes: Iterable[Any], rows: Sequence[Result], path: Path) -> Path:
    import matplotlib.pyplot as plt

    labelled: dict[str, Any] = {}
    for axis in axes:
        axis.grid(alpha=0.25)
        labelled |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if labelled:
        figure.legend(labelled.values(), labelled.keys(), loc="outside right upper", frameon=False, fontsize=8)
    machine = rows[0].machine
    figure.suptitle(f"{rows[0].case if path.stem != 'roofline' else 'roofline'}, {machine.get('device')}", fontsize=10)
    figure.savefig(path)
    plt.close(figure)
    return path
