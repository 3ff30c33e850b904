"""The command line's parser. It imports only the module of the command that runs, because most modules load PyTorch.

Each command is a module of this package with `add_arguments(parser)` and `run(args) -> int`. Its docstring is the first
paragraph of its help.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import fastgpt2

COMMANDS = {
    "generate": "continue prompts with a model",
    "score": "log-probability and perplexity of given sequences",
    "select": "keep the best of generated or scored records",
    "train": "train a model on text",
    "plot": "draw the loss, learning rate and speed of training runs",
    "eval": "run tasks of the LM Evaluation Harness",
    "check": "check that the kernels are correct on this machine, and time them",
    "warmup": "compile a model's GPU kernels ahead of time",
    "info": "show versions, backends and a model's configuration",
    "convert": "convert a checkpoint (Hugging Face, nanoGPT)",
}


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, as the commands do. Only `--help` shows the usage."""

    def error(self, message: str) -> NoReturn:
        said = " ".join(message.split())
        said = said if len(said) <= 600 else f"{said[:300]}... ({len(said)} characters)"
        self.exit(2, f"fastgpt2: {said}; see {self.prog} --help\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, by default that of this process. The result's `run` runs the command."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(prog="fastgpt2", description="A Triton-accelerated GPT-2 for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastgpt2 {fastgpt2.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text)
        if name == command:
            module = importlib.import_module(f"fastgpt2.cli.{name}")
            sub.description = module.__doc__
            sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser.parse_args(arguments)
