"""Select generated or scored records (the best, the complete ones, each text once) and write them in any format."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastgpt2.cli.options import add_selection_arguments, find_selection, known_spellings, say_selected
from fastgpt2.selection import check_output, select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", metavar="IN", help="a .jsonl that fastgpt2 generate or score wrote")
    parser.add_argument("out", metavar="OUT", help=".jsonl, .fasta, .txt, .csv or .parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    add_selection_arguments(parser, needs_spellings=True)


def run(args: argparse.Namespace) -> int:
    records, out = Path(args.records), Path(args.out)
    check_output(out)
    if args.special and not args.strip_special:
        raise ValueError("select: --special needs --strip-special; give both")
    if out.exists() and not args.overwrite:
        raise FileExistsError(f"{out}: exists; replace it with --overwrite")
    special = args.special or (known_spellings(records) if args.strip_special else [])
    say_selected(select(records, out, find_selection(args, special)), records, out)
    return 0
