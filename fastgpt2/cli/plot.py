"""Draw the loss, learning rate and speed of training runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastgpt2.train import plot_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a training run")
    parser.add_argument(
        "--out", metavar="FILE", help="a .png or .svg file (default for a single run: metrics.png in its folder)"
    )


def run(args: argparse.Namespace) -> int:
    if args.out is None and len(args.runs) > 1:
        raise ValueError("plot: a picture of several runs needs a name; give it with --out FILE")
    out = Path(args.runs[0], "metrics.png") if args.out is None else Path(args.out)
    plot_runs(args.runs, out)
    print(out)
    return 0
