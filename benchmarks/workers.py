"""Runs a contender in a process of its own, because other engines bring their own threads.

In a single process the engines would slow each other down permanently. As soon as a process has more OpenMP threads
than there are processors, GNU's OpenMP stops spinning between parallel regions, and PyTorch's decoding steps take half
as long again. Also, if a process dies, only its own contender has no result.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
from collections.abc import Callable, Hashable
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import torch

Call = Callable[[], Any]


class LeftOutError(Exception):
    """A contender cannot take part here. The message is the status in its row of the table."""


def attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Call a function; returns (result, None), or (None, the status for its row) if it failed.

    Contenders are other projects' code or candidates of a search, and may raise anything. The failure is shown in the
    contender's row, and the other contenders keep their results.
    """
    try:
        return function(), None
    except LeftOutError as left_out:
        return None, str(left_out)
    except Exception as error:
        return None, f"failed: {type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:160]}"


def context() -> BaseContext:
    """Fork children from a server that has imported the libraries and started no threads. So they import nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "transformers.models.gpt2.modeling_gpt2"])
    return server


class Worker:
    """The process of one contender. It is kept for the next cases."""

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        # The process ends when its pipe closes, so that a killed parent leaves none behind.
        self.process = context().Process(target=_serve, args=(theirs, torch.get_num_threads()), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """Send (build, inputs) to build the call there, or nothing to make the call; returns the result.

        LeftOutError has the status for the contender's row if the call raised an error or the process died.
        """
        try:
            self.connection.send(request)
            result, failure = self.connection.recv()
        except (EOFError, OSError):
            self.close()
            raise LeftOutError(f"failed: its process ended with exit code {self.process.exitcode}") from None
        if failure is not None:
            raise LeftOutError(failure)
        return result

    def close(self) -> None:
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    call: Call | None = None
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request:
            call = None
            gc.collect()  # frees the last case's caches
            build, inputs = request
            call, failure = attempt(functools.partial(build, inputs))
            connection.send((None, failure))
        else:
            connection.send(attempt(call) if call is not None else (None, "failed: it was not built"))


_workers: dict[Hashable, Worker] = {}


def isolated(key: Hashable, build: Callable[[Any], Call]) -> Callable[[Any], Call]:
    """Wrap `build`, so that it builds in the process of this key and returns a call that runs there.

    `build` and the inputs are pickled. Each call takes tens of microseconds longer, and its result is pickled.
    """
    if key not in _workers or not _workers[key].process.is_alive():
        _workers[key] = Worker()
    worker = _workers[key]

    def build_there(inputs: Any) -> Call:
        worker.ask(build, inputs)
        return worker.ask

    return build_there


def dismiss(key: Hashable) -> None:
    """End the process of a contender, if it has one."""
    if worker := _workers.pop(key, None):
        worker.close()


def close() -> None:
    """End all processes."""
    while _workers:
        dismiss(next(iter(_workers)))
