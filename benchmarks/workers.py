"""A contender in a process of its own, for engines that bring threads of their own.

In one process they slow each other down for good: as soon as it holds more OpenMP threads than there are processors,
GNU's OpenMP stops spinning between parallel regions, and PyTorch's steps of decoding take half as long again.
A process that dies costs one row and not the results of the others.
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
    """(result, None), or (None, what stands in the row instead).

    Contenders are other people's code and candidates of a search, which raise whatever they raise: one's failure is a
    named row and must not cost the others' results.
    """
    try:
        return function(), None
    except LeftOutError as left_out:
        return None, str(left_out)
    except Exception as error:
        return None, f"failed: {type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:160]}"


def context() -> BaseContext:
    """Fork from a process that has imported the libraries and started no threads. So a child imports nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "transformers.models.gpt2.modeling_gpt2"])
    return server


class Worker:
    """The process of one contender. It also serves the cases that follow."""

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        # A daemon that ends when its pipe closes, so a killed parent leaves no process behind.
        self.process = context().Process(target=_serve, args=(theirs, torch.get_num_threads()), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """Call it in the process. LeftOutError, with the status for its row, if it raised or its process died."""
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
    """`build`, which builds in the process of that key and returns a call that runs there.

    `build` and the inputs go there by pickle; a call's round trip is tens of microseconds and its result's pickling.
    """
    if key not in _workers or not _workers[key].process.is_alive():
        _workers[key] = Worker()
    worker = _workers[key]

    def build_there(inputs: Any) -> Call:
        worker.ask(build, inputs)
        return worker.ask

    return build_there


def dismiss(key: Hashable) -> None:
    """End the process of a contender that takes no further part, if it has one."""
    if worker := _workers.pop(key, None):
        worker.close()


def close() -> None:
    """End all processes."""
    while _workers:
        dismiss(next(iter(_workers)))
