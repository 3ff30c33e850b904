"""Compiling Triton's kernels before they are needed, also for a GPU that is not there."""

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
    """The target of the current GPU, such as "sm_90". RuntimeError where there is none."""
    return _ahead().this_target()


def find_variants(target: str, run: Callable[[], None]) -> list[Any]:
    """Every variant of a kernel that `run` launches on CPU tensors, as it is compiled for `target`; none is compiled.

    Each has `kernel`, its name. ValueError for a target that is none.
    """
    with _ahead().recorded(target) as variants:
        run()
    return variants


def compile_variants(variants: list[Any], jobs: int | None = None) -> None:
    """Compile what `find_variants` found into Triton's cache, `jobs` at a time (None: one for each processor)."""
    _ahead().compile_all(variants, jobs)
