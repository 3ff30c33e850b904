"""Compiling the kernels of the checks side by side, before the checks would compile them one after the other.

It runs in a process of its own, whose kernels only note what they would be compiled for, on tensors of the CPU:
`python -m fastgpt2.selfcheck.ahead sm_90`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from fastgpt2.selfcheck import models
from fastgpt2.selfcheck.operators import SEED, dtypes_of
from fastgpt2_kernels import ops
from fastgpt2_kernels.checking.cases import Case, Inputs, cases_of

_GPU, _CPU = torch.device("cuda"), torch.device("cpu")


def compile_ahead(target: str, operators: Sequence[str] = (), timeout: float = 600.0) -> str | None:
    """Compile the kernels of the checks into Triton's cache, in a process of its own. It needs no GPU.

    Args:
        target: The compilation target, such as "sm_90".
        operators: Only the cases of these operators; none means all checks.
        timeout: The most seconds that it may take.

    Returns:
        Why it failed, or None. The checks then compile their kernels themselves, which only takes longer.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # On a GPU the process would only take memory.
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "fastgpt2.selfcheck.ahead", target, *operators]
    try:
        subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
            timeout=timeout,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        return (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def find_variants(target: str, operators: Sequence[str] = ()) -> list:
    """The kernel variants that the checks compile on a GPU of this target. It takes what `compile_ahead` takes."""

    def run() -> None:
        for launch in _launches(target, operators):
            # The results of kernels that did not run may end a check. What it launched until then is noted.
            with contextlib.suppress(ArithmeticError, LookupError, RuntimeError, ValueError):
                launch()

    return ops.find_variants(target, run)


def _launches(target: str, operators: Sequence[str]) -> Iterator[Callable[[], object]]:
    """What launches kernels in the checks of a GPU."""
    for case in cases_of(_GPU):
        if "triton" in ops.backends_of(case.operator) and (not operators or case.operator in operators):
            for dtype in case.dtypes or dtypes_of("triton", _GPU):
                yield functools.partial(_launch, case, dtype)
    if not operators:
        number = target.removeprefix("sm_")
        yield from models.launches(_GPU, _CPU, with_pdl=number.isdigit() and int(number) >= 90)


def _launch(case: Case, dtype: torch.dtype) -> None:
    """Launch the kernels of a case on tensors of the CPU."""
    case.run(Inputs(SEED, _CPU, dtype), "triton")


if __name__ == "__main__":
    ops.compile_variants(find_variants(sys.argv[1], sys.argv[2:]))
