"""Convert a checkpoint between Hugging Face's layout and nanoGPT's, or to another dtype."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastgpt2.checkpoint import load_pretrained, save_nanogpt, save_pretrained

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_SAVERS = {"hf": save_pretrained, "nanogpt": save_nanogpt}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="a folder, a file (.safetensors, .bin, nanoGPT's ckpt.pt) or a name on the hub"
    )
    parser.add_argument("out", metavar="OUT_FOLDER", type=Path, help="the folder to write")
    parser.add_argument(
        "--to",
        choices=_SAVERS,
        default="hf",
        help="hf: config.json and model.safetensors, as transformers loads them (the default); nanogpt: ckpt.pt",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="dtype to save the weights in (default: unchanged)")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="cut a padded vocabulary to N tokens, such as nanoGPT's 50304 to 50257",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--force", action="store_true", help="write into the folder even if it is not empty")


def run(args: argparse.Namespace) -> int:
    if args.out.is_dir() and any(args.out.iterdir()) and not args.force:
        raise ValueError(f"{args.out}: the folder is not empty; name another, or write into it with --force")
    changes = {} if args.vocab_size is None else {"vocab_size": args.vocab_size}
    dtype = None if args.dtype is None else _DTYPES[args.dtype]
    model = load_pretrained(args.source, dtype=dtype, revision=args.revision, **changes)
    _SAVERS[args.to](model, args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters, {str(model.dtype).removeprefix('torch.')}")
    return 0
