"""Entry point: runs a command, with errors as one line on stderr and exit status 2, and 130 after Ctrl-C.

All other modules are imported by `main`, where a Ctrl-C is expected: PyTorch takes a second to load.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading

TYPE_CHECKING = False  # as in fastgpt2/__init__.py
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

_INTERRUPTED = "fastgpt2: interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Its arguments; None: those of this process, which is to end when the command has ended.

    Returns:
        The exit status: 0, 2 for an error, 130 after Ctrl-C.
    """
    debug = False
    with _Interrupts(is_whole_process=argv is None) as interrupts:
        try:
            args = importlib.import_module("fastgpt2.cli.parser").parse(argv)  # loads the command's modules
            debug = args.debug
            interrupts.raise_from_now()
            return args.run(args)
        except Exception as error:
            # PyTorch and safetensors turn a Ctrl-C within their C++ into other errors.
            if not interrupts.came:
                return _failed(error, debug)
        except KeyboardInterrupt:
            pass
        interrupts.ignore_from_now()
        print(_INTERRUPTED, file=sys.stderr)
        return 130


class _Interrupts:
    """What Ctrl-C does within the block: it raises KeyboardInterrupt, and is noted in `came`.

    Where the process is nothing but this command, a Ctrl-C before `raise_from_now` ends it at once: modules are being
    loaded, nothing has begun that would have to be ended well, and an exception out of the middle of an import is often
    reported as another one. When the block has ended, Ctrl-C is ignored: all that remains to be done is Python's own
    clearing up, which would print a traceback.
    """

    def __init__(self, *, is_whole_process: bool) -> None:
        self.came = False
        self._is_whole_process = self._ends_process = is_whole_process
        self._is_ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )

    def __enter__(self) -> _Interrupts:
        if self._is_ours:
            signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if self._ends_process:
            os.write(2, f"{_INTERRUPTED}\n".encode())
            os._exit(130)
        raise KeyboardInterrupt

    def raise_from_now(self) -> None:
        self._ends_process = False

    def ignore_from_now(self) -> None:
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def __exit__(self, *exc: object) -> None:
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.SIG_IGN if self._is_whole_process else signal.default_int_handler)


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
