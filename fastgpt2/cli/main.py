"""The entry point: it parses the arguments, runs a command, and reports an error in one line on stderr."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

# Each command is a module of this package with `HELP`, `add_arguments(parser)` and `run(args) -> int`.
COMMANDS = ("generate", "score", "select", "train", "plot", "eval", "check", "warmup", "info", "convert")


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, like the commands do; only `--help` shows the usage."""

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
    """Run a command.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        The exit status: the command's own (0 if all went well), 2 after an error, 130 after Ctrl-C.
    """
    debug = False
    with _noticed_interrupts() as interrupts:
        try:
            args = build_parser().parse_args(argv)  # loads the commands' modules
            debug = args.debug
            return args.run(args)
        except Exception as error:
            # PyTorch and safetensors turn a Ctrl-C within their C++ into other errors.
            if not interrupts:
                return _failed(error, debug)
        except KeyboardInterrupt:
            pass
        print("fastgpt2: interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _noticed_interrupts() -> Iterator[list[int]]:
    """Yield a list that records every Ctrl-C in the block. A Ctrl-C still raises KeyboardInterrupt."""
    interrupts: list[int] = []

    def on_interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_ours:
        signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupts
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _failed(error: Exception, debug: bool) -> int:
    """Report an error of the input or the machine and return the exit status; raise any other error again."""
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone, as in `fastgpt2 generate | head`. There is nothing to report.
        sys.stderr.close()
        return 0
    expected = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)
    if debug or not isinstance(error, expected):
        raise error
    print(f"fastgpt2: {_sentence(error)}", file=sys.stderr)
    return 2


def _sentence(error: Exception) -> str:
    """The message of an error, in one line."""
    text = " ".join(str(error).split())
    # On a GPU PyTorch raises torch.OutOfMemoryError, on a CPU a plain RuntimeError.
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_memory or "can't allocate memory" in text or "not enough memory" in text:
        return "there is not enough memory for this; use a smaller model, batch or context"
    return text or type(error).__name__
