"""The whole self-check: `check`."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastgpt2 import machine
from fastgpt2.devices import find_device
from fastgpt2.selfcheck.ahead import compile_ahead
from fastgpt2.selfcheck.models import check_models
from fastgpt2.selfcheck.operators import check_operators, why_not
from fastgpt2.selfcheck.report import Finding, Report, Timing
from fastgpt2.selfcheck.speed import measured_limits, time_operators, untimed
from fastgpt2_kernels import ops


def check(
    device: str = "auto", *, speed: bool = True, progress: Callable[[Finding | Timing], None] | None = None
) -> Report:
    """Check every operator, decoding and whole models on this machine, then time the kernels.

    Operators and their gradients are compared with float64, on every available backend. The cases are random but fixed,
    and run in poisoned memory. Triton kernels run on a GPU, or on a CPU if TRITON_INTERPRET=1 is set. An error in a
    check is a failed finding, and the next check runs.

    Args:
        device: The device to check; "auto" is a GPU if there is one.
        speed: Whether to time the kernels too.
        progress: Called with every finding and timing as soon as it is there.

    Returns:
        The report; its `ok` says whether nothing failed.

    Raises:
        ValueError: This machine has no such device.

    Example:
        >>> fastgpt2.check(speed=False).ok
        True
    """
    start, where = time.perf_counter(), find_device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    report = Report(machine.versions(), machine.describe(where if where.type == "cuda" else None))
    tell = progress or (lambda _: None)
    with _interpreter_without_warnings():
        for findings in (_compiled_ahead(where), check_operators(where), check_models(where)):
            for finding in findings:
                report.findings.append(finding)
                tell(finding)
        if speed:
            for result in _timings(where, report):
                if isinstance(result, Timing):
                    report.timings.append(result)
                else:
                    report.findings.append(result)
                tell(result)
    report.seconds = time.perf_counter() - start
    return report


def _compiled_ahead(device: torch.device) -> Iterator[Finding]:
    """Compile the kernels of a GPU side by side. The checks would compile them one after the other."""
    if device.type != "cuda" or why_not("decode_step", "triton", device) is not None:
        return
    try:
        with torch.cuda.device(device):
            target = ops.this_target()
        reason = compile_ahead(target)
    except Exception as error:  # whatever it is, the checks can run
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        detail = f"kernels are compiled one after the other: {' '.join(reason.split())[:400]}"
        yield Finding("compiling ahead", "triton", "skipped", None, detail)


def _timings(device: torch.device, report: Report) -> Iterator[Timing | Finding]:
    """Measure the limits of the device, then time the operators. What was not timed is a finding."""
    try:
        report.limits = measured_limits(device)
    except Exception as error:  # after an invalid access to a GPU's memory, all that follows fails
        yield untimed("limits", "torch", "", error)
    else:
        yield from time_operators(device, report.limits)


@contextmanager
def _interpreter_without_warnings() -> Iterator[None]:
    """Silence NumPy's warnings about masked lanes, which Triton's interpreter causes."""
    with warnings.catch_warnings():
        if os.environ.get("TRITON_INTERPRET") == "1":
            warnings.simplefilter("ignore", RuntimeWarning)
        yield
