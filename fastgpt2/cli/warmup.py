"""Compile a model's GPU kernels ahead of time into Triton's cache: in parallel, and even for a GPU you do not have.

Generation is covered: greedy or sampled, with every combination of --top-k, --top-p, --min-p and --repetition-penalty,
with a stop token and without, and with prompts that share a prefix. For GPT-2 124M these are 77 kernels on sm_90 and 62
on gfx942. Training adds 13.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import torch

from fastgpt2.checkpoint import EMBEDDED, read_config, read_dtype
from fastgpt2.cli.options import DTYPES
from fastgpt2.warmup import ROWS, warm_up

# Every GPU that the kernels run on has bfloat16, so that is what training takes there by default.
_TRAIN_DTYPES = {"auto": torch.bfloat16, **DTYPES}


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
        "--dtype", choices=DTYPES, help="dtype of the weights that generate will have (default: the checkpoint's)"
    )
    parser.add_argument("--weights", choices=("int8",), dest="weight_dtype", help="for generate with --weights int8")
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=ROWS,
        metavar="N",
        help=f"numbers of rows that will be decoded together (default: {' '.join(map(str, ROWS))})",
    )
    parser.add_argument(
        "--train",
        choices=_TRAIN_DTYPES,
        nargs="?",
        const="auto",
        dest="train_dtype",
        help="also compile the kernels of train with this --dtype (without a value: auto, which is bf16)",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="kernels to compile at a time (default: one per processor)"
    )


def run(args: argparse.Namespace) -> int:
    if any(count < 1 for count in args.rows) or (args.jobs is not None and args.jobs < 1):
        raise ValueError(f"warmup: --rows and --jobs must be 1 or more; got {list(args.rows)} and {args.jobs}")
    start, config = time.perf_counter(), read_config(args.model, revision=args.revision)
    kernels = warm_up(
        config,
        args.target,
        dtype=DTYPES[args.dtype] if args.dtype else read_dtype(args.model, revision=args.revision),
        rows=args.rows,
        weight_dtype=torch.int8 if args.weight_dtype else None,
        train_dtype=None if args.train_dtype is None else _TRAIN_DTYPES[args.train_dtype],
        jobs=args.jobs,
    )
    for kernel, count in sorted(Counter(kernels).items()):
        print(f"{count:4}  {kernel.strip('_')}")
    print(f"{len(kernels):4}  variants for {args.target or 'this GPU'} in {time.perf_counter() - start:.0f} s")
    return 0
