"""Options that several commands share: the model, the shard of a process, and the selection of records."""

from __future__ import annotations

import argparse
import json
import os
import sys
import zlib
from pathlib import Path
from typing import BinaryIO

import torch

from fastgpt2.checkpoint import EMBEDDED, load_pretrained
from fastgpt2.devices import find_device
from fastgpt2.gpt2 import GPT2
from fastgpt2.input_files import Source
from fastgpt2.messages import counted
from fastgpt2.record_files import Shard, settings_path
from fastgpt2.selection import BY, Selected, Selection, check_output, select

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# -- the model ----------------------------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser, *, has_backend: bool = True) -> argparse._ArgumentGroup:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default=EMBEDDED,
        metavar="NAME_OR_PATH",
        help="a folder, a checkpoint or a hub name (default: %(default)s)",
    )
    model.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the checkpoint's)")
    model.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    if has_backend:
        model.add_argument(
            "--backend", default="auto", choices=("auto", "triton", "native", "torch"), help="which kernels to use"
        )
    return model


def load(args: argparse.Namespace) -> GPT2:
    dtype = DTYPES[args.dtype] if args.dtype is not None else None
    device = find_device(args.device)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:  # one process per GPU
        device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
    return load_pretrained(args.model, dtype=dtype, device=device, backend=getattr(args, "backend", "auto"))


def weights_digest(model: GPT2) -> str:
    """A hash of a model's configuration and weights, the same on every device."""
    code = zlib.crc32(json.dumps(model.config.to_hf(), sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        code = zlib.crc32(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode(), code)
        weights = parameter.detach().cpu().contiguous().view(torch.uint8)
        code = zlib.crc32(weights.numpy().data, code)
    return f"{code:08x}"


def special_tokens(model: GPT2) -> list[str]:
    """The spellings of a tokenizer's special tokens."""
    if model.tokenizer is None:
        return []
    added = model.tokenizer.backend.get_added_tokens_decoder().values()
    return sorted(token.content for token in added if token.special)


# -- processes ----------------------------------------------------------------------------------------------------


def add_shard_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--shard",
        metavar="I/N",
        help="do share I of N, counted from 0; the last process to finish merges the output "
        "(default: one share for each of torchrun's processes)",
    )


def find_shard(args: argparse.Namespace) -> Shard:
    """This process's share: the one that --shard names, or else the one that torchrun assigned."""
    if args.shard is not None:
        return Shard.parse(args.shard)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return Shard.parse(f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']}")
    return Shard()


def say_unfinished(out: Path, shard: Shard) -> None:
    print(
        f"fastgpt2: share {shard.index} of {shard.count} is done; {out} will be merged when the others are done too",
        file=sys.stderr,
    )


# -- standard input -----------------------------------------------------------------------------------------------


def stdin_source(most_bytes: int, instead: str) -> Source:
    """Read all of standard input as a `.txt` source."""
    if sys.stdin is None:  # Python sets it to None if it is closed
        raise ValueError(f"standard input is closed; {instead}")
    return Source("standard input", ".txt", data=read_at_most(sys.stdin.buffer, "standard input", most_bytes))


def read_at_most(file: BinaryIO, name: str, most_bytes: int) -> bytes:
    data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"{name}: must hold at most {most_bytes:,} bytes; it has more: split it")
    return data


# -- what is kept -------------------------------------------------------------------------------------------------


def add_selection_arguments(parser: argparse.ArgumentParser, *, needs_spellings: bool = False) -> None:
    selection = parser.add_argument_group("selection")
    add = selection.add_argument
    add("--keep-best", metavar="N|P%", help="keep only the best N records, or the best P percent, best first")
    add("--by", choices=BY, help="rank by lower perplexity or by higher log-probability (default: perplexity)")
    add("--drop-truncated", action="store_true", help="drop samples that ended at the length limit")
    add("--dedupe", action="store_true", help="keep only the first of several equal texts")
    add("--min-length", type=int, metavar="N", help="drop texts (in .fasta: sequences) of fewer than N characters")
    add("--max-length", type=int, metavar="N", help="drop texts (in .fasta: sequences) of more than N characters")
    add("--strip-special", action="store_true", help="remove special tokens from the texts")
    if needs_spellings:
        add("--special", action="append", metavar="TEXT", help="a special token; repeatable (default: the tokenizer's)")


def check_needs_no_output(args: argparse.Namespace, shard: Shard, names: tuple[str, ...]) -> None:
    """Raise if options that need --out are given without it: those in `names`, a selection, or several processes."""
    for name in (*names, "shard", *_SELECTION):
        if getattr(args, name) not in (None, False):
            raise ValueError(f"{args.command}: --{name.replace('_', '-')} needs --out FILE; give both")
    if shard.count > 1:
        raise ValueError(f"{args.command}: several processes need an output; name it with --out FILE")


_SELECTION = ("keep_best", "by", "drop_truncated", "min_length", "max_length", "dedupe", "strip_special")


def find_selection(args: argparse.Namespace, special: list[str]) -> Selection:
    if args.by is not None and args.keep_best is None:
        raise ValueError(f"{args.command}: --by needs --keep-best; give both")
    return Selection(
        special=tuple(special) if args.strip_special else (),
        drop_truncated=args.drop_truncated,
        min_length=args.min_length,
        max_length=args.max_length,
        dedupe=args.dedupe,
        keep_best=args.keep_best,
        by=args.by or "perplexity",
    )


def records_path(args: argparse.Namespace, out: Path) -> Path:
    """The file for a run's records: the output itself, or a file beside it if the output will hold a selection."""
    find_selection(args, [])  # raises before any work
    selects = any(getattr(args, name) not in (None, False) for name in _SELECTION)
    if not selects and out.suffix not in (".csv", ".parquet"):
        return out
    check_output(out)
    if out.is_dir() or (out.exists() and not (args.resume or args.overwrite)):
        raise FileExistsError(f"{out}: exists; continue it with --resume or replace it with --overwrite")
    return out.with_name(f"{out.stem}.all.jsonl")


def write_selection(args: argparse.Namespace, records: Path, out: Path, special: list[str]) -> None:
    selected = select(records, out, find_selection(args, special))
    say_selected(selected, records, out)


def say_selected(selected: Selected, records: Path, out: Path) -> None:
    why = (("truncated", selected.truncated), ("of the wrong length", selected.length), ("duplicate", selected.double))
    left_out = [f"{number:,} {name}" for name, number in why if number]
    print(
        f"fastgpt2: {out} has {selected.kept:,} of the {counted(selected.read, 'record')} in {records}"
        + (f" ({', '.join(left_out)})" if left_out else ""),
        file=sys.stderr,
    )


def known_spellings(records: Path) -> list[str]:
    """The spellings of the special tokens, from the settings that a run stored beside its records."""
    try:
        settings = json.loads(settings_path(records).read_text(encoding="utf-8"))
        return list(settings["special_tokens"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"select: --strip-special reads the special tokens from {settings_path(records)}, which cannot be read; "
            "name them with --special TEXT"
        ) from None
