"""Compile the Triton kernels ahead of time, even for a GPU that this machine does not have."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from fastgpt2_kernels.backends import TRITON_IS_INSTALLED


def _ahead() -> Any:
    if not TRITON_IS_INSTALLED:
        raise ImportError("compiling ahead needs Triton: pip install 'fastgpt2[triton]'")
    return importlib.import_module("fastgpt2_kernels.triton.ahead")


def this_target() -> str:
    """The compilation target of the current GPU, such as "sm_90".

    Raises:
        RuntimeError: There is no GPU.
        ImportError: Triton is not installed.
    """
    return _ahead().this_target()


def find_variants(target: str, run: Callable[[], None]) -> list[Any]:
    """Record every kernel variant that `run` launches, without compiling any.

    Args:
        target: The compilation target, such as "sm_90".
        run: A function that launches the kernels on CPU tensors.

    Returns:
        The variants as they are compiled for `target`. The attribute `kernel` of a variant is its kernel's name.

    Raises:
        ValueError: `target` is not a known target.
        ImportError: Triton is not installed.
    """
    with _ahead().recorded(target) as variants:
        run()
    return variants


def compile_variants(variants: list[Any], jobs: int | None = None) -> None:
    """Compile variants into Triton's cache.

    Args:
        variants: What `find_variants` returned.
        jobs: How many are compiled at a time; None means one per processor.

    Raises:
        ImportError: Triton is not installed.
    """
    _ahead().compile_all(variants, jobs)
