"""Run tasks of the LM Evaluation Harness on a model; needs the extra `fastgpt2[eval]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastgpt2.cli import options
from fastgpt2.files import atomic_file
from fastgpt2.integrations.lm_eval import evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_arguments(parser, has_backend=False)
    what = parser.add_argument_group("tasks")
    what.add_argument(
        "--tasks", nargs="+", required=True, metavar="NAME", help="tasks such as lambada_openai, hellaswag, wikitext"
    )
    what.add_argument("--include-path", type=Path, metavar="FOLDER", help="a folder with more tasks (YAML files)")
    what.add_argument(
        "--num-fewshot", type=int, metavar="N", help="solved examples before each question (default: the task's)"
    )
    what.add_argument(
        "--limit", type=float, metavar="N", help="ask only N questions of each task, or a share of them if N is below 1"
    )
    what.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="requests per forward pass (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all results to this .json file")


def run(args: argparse.Namespace) -> int:
    if args.batch_size < 1 or (args.num_fewshot or 0) < 0 or (args.limit is not None and not args.limit > 0):
        raise ValueError(
            "eval: --batch-size must be 1 or more, --num-fewshot 0 or more and --limit above 0; "
            f"got {args.batch_size}, {args.num_fewshot} and {args.limit}"
        )
    if args.include_path is not None and not args.include_path.is_dir():
        raise NotADirectoryError(f"eval: --include-path must be a folder; got {args.include_path}")
    results = evaluate(
        options.load(args),
        [name for names in args.tasks for name in names.split(",") if name],
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
        include_path=args.include_path,
    )
    from lm_eval.utils import make_table

    if args.out is not None:
        with atomic_file(args.out) as file:
            file.write(json.dumps(results, indent=2, default=str).encode())
    print(make_table(results))
    return 0
