"""Pictures of training runs: loss, learning rate and speed over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from fastgpt2.files import atomic_file
from fastgpt2.train.run_folder import read_metrics

# A panel's label, and the entries of metrics.jsonl that it shows, each with its line style.
_PANELS = (
    ("loss (nats per token)", (("loss", "-"), ("val_loss", "o--"))),
    ("learning rate", (("lr", "-"),)),
    ("tokens per second", (("tokens_per_s", "-"),)),
)
FORMATS = (".png", ".svg")


def plot_runs(runs: Sequence[str | PathLike[str]], path: str | PathLike[str]) -> None:
    """Draw the loss, learning rate and speed of one or more runs into a .png or .svg.

    Args:
        runs: The runs' folders.
        path: The picture; its suffix chooses the format.

    Raises:
        FileNotFoundError: A folder has no metrics.jsonl.
        ValueError: The suffix is neither, or a metrics.jsonl is empty or has a line that no training run wrote.
        ImportError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: must end in .png or .svg; name another")
    lines = {Path(run): _read(Path(run)) for run in runs}
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'{path}: plots need matplotlib; install it with: pip install "fastgpt2[plot]"') from error

    figure = Figure(figsize=(7, 9), layout="constrained")
    axes = figure.subplots(len(_PANELS), sharex=True)
    names = [run.resolve().name for run in lines]
    for i, (run, values) in enumerate(lines.items()):
        name = names[i] if names.count(names[i]) == 1 else str(run)
        for panel, (_, entries) in zip(axes, _PANELS, strict=True):
            for entry, style in entries:
                points = [(line["step"], line[entry]) for line in values if line.get(entry) is not None]
                if not all(isinstance(value, (int, float)) for _, value in points):
                    raise ValueError(f'{run / "metrics.jsonl"}: "{entry}" must be a number in every line; it is not')
                label = f"{name}, validation" if entry == "val_loss" else name
                if points:
                    panel.plot(*zip(*points, strict=True), style, color=f"C{i % 10}", label=label, markersize=3)
    for panel, (label, _) in zip(axes, _PANELS, strict=True):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    axes[0].legend()
    axes[-1].set_xlabel("step")
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def _read(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; name the folder of a training run")
    values = [values for _, values in read_metrics(path)]
    if not values:
        raise ValueError(f"{path}: is empty; a run writes its first line after log_interval steps")
    return values
