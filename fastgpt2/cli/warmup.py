"""Compile a model's GPU kernels ahead of time into Triton's cache: in parallel, and even for a GPU you do not have."""

from __future__ import annotations

import argparse
import time
from collections import Counter

import torch

from fastgpt2.checkpoint import EMBEDDED, read_config
from fastgpt2.warmup import ROWS, warm_up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=EMBEDDED,
        metavar="NAME",
        help="a checkpoint's folder, file or name on the hub (default: %(default)s)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--target", help="GPU to compile for: sm_90, gfx942 ... (default: this machine's)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="dtype of the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=ROWS,
        metavar="N",
        help=f"numbers of rows that will be decoded together (default: {' '.join(map(str, ROWS))})",
    )
    parser.add_argument("--train", action="store_true", help="also compile the kernels of a training step")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="kernels to compile at a time (default: one per processor)"
    )


def run(args: argparse.Namespace) -> int:
    if any(count < 1 for count in args.rows) or (args.jobs is not None and args.jobs < 1):
        raise ValueError(f"warmup: --rows and --jobs must be 1 or more; got {list(args.rows)} and {args.jobs}")
    start, config = time.perf_counter(), read_config(args.model, revision=args.revision)
    kernels = warm_up(
        config, args.target, dtype=getattr(torch, args.dtype), rows=args.rows, trains=args.train, jobs=args.jobs
    )
    for kernel, count in sorted(Counter(kernels).items()):
        print(f"{count:4}  {kernel.strip('_')}")
    print(f"{len(kernels):4}  variants for {args.target or 'this GPU'} in {time.perf_counter() - start:.0f} s")
    return 0
