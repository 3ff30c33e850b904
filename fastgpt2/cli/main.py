"""Entry point: the subcommands' parsers, and errors as one line on stderr with exit status 2."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

# Each command is a module of this package with `HELP`, `add_arguments(parser)` and `run(args) -> int`.
COMMANDS = ("generate", "train", "info", "convert")


class _Parser(argparse.ArgumentParser):
    """Its errors are one line too, like all others; the usage is for `--help`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastgpt2: {' '.join(message.split())}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastgpt2", description="A Triton-accelerated GPT-2 for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name in COMMANDS:
        module = importlib.import_module(f"fastgpt2.cli.{name}")
        sub = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (0, 2 for an error, 130 after Ctrl-C)."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("fastgpt2: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has left (`fastgpt2 generate | head`): nothing to say, and nobody to say it to.
        sys.stderr.close()
        return 0
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if args.debug:
            raise
        print(f"fastgpt2: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
