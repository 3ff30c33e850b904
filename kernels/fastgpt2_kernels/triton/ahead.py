"""Which variants of the kernels a run compiles, found without a GPU; and compiling them ahead, into Triton's cache.

A run on CPU tensors goes through Triton's own binding of arguments, which decides what a kernel is compiled for; the
compiler and the launch are stood in for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from fastgpt2_kernels import backends
from fastgpt2_kernels.triton import cross_entropy, launch


class Variant(NamedTuple):
    """A kernel as it is compiled for one kind of arguments."""

    kernel: str
    source: Any
    target: Any
    options: dict[str, Any]


class _Driver:
    """Stands in for a GPU's driver."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Launched:
    """Stands in for a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        return None


# Every GPU that the kernels run on and Triton compiles for.
_NVIDIA = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
_AMD = ("gfx90a", "gfx942", "gfx950")


def gpu_target(name: str) -> GPUTarget:
    """The target of a name like "sm_90" or "gfx942". Raises ValueError for any other name."""
    if name not in (*_NVIDIA, *_AMD):  # for a GPU that it does not know LLVM ends the process
        raise ValueError(f"a target must be like sm_90 or gfx942, one of {', '.join((*_NVIDIA, *_AMD))}; got {name!r}")
    return GPUTarget("hip", name, 64) if name in _AMD else GPUTarget("cuda", int(name[3:]), 32)


def this_target() -> str:
    """The name of the current GPU's target. RuntimeError where there is none."""
    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here; name a target, such as sm_90")
    if torch.version.hip:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _column(target: GPUTarget) -> str:
    """The column of the launch tables for such a GPU, as far as its name tells: `launch.architecture` asks the GPU."""
    name = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
    if name in launch.ARCHITECTURES or target.backend != "cuda":
        return name if name in launch.ARCHITECTURES else "gfx942"
    return launch.nearest_architecture((target.arch // 10, target.arch % 10), launch.MOST_SHARED)


@contextmanager
def recorded(target_name: str) -> Iterator[list[Variant]]:
    """While it is open, kernels take tensors on the CPU, and what would be compiled for the target is noted, once."""
    variants: list[Variant] = []
    target = gpu_target(target_name)

    def note(source: Any, target: Any = None, options: Any = None, **_: Any) -> _Launched:
        variants.append(Variant(source.fn.__name__, source, target, dict(options)))
        return _Launched()

    if backends.interpreter_is_on():
        raise RuntimeError("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    column, capability = _column(target), (target.arch // 10, target.arch % 10) if target.backend == "cuda" else None
    with ExitStack() as stack:
        stack.callback(_forget_kernels)
        _forget_kernels()
        for owner, name, value in (
            (triton.runtime.driver, "_active", _Driver(target)),
            (triton.compiler, "compile", note),
            (backends, "_takes_cpu_tensors", True),
            (launch, "architecture", lambda device: column),
            (launch, "multiprocessors", lambda device: 132),
            (cross_entropy, "_capability", lambda x: capability),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield variants


def _forget_kernels() -> None:
    """Drop what was compiled in this process, the stand-ins' too; Triton's cache on disk stays."""
    for operator in backends.OPERATORS:
        if "triton" in backends.backends_of(operator):
            backends.implementation(operator, "triton")  # loads its module
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{__package__}."):
            for value in vars(module).values():
                if hasattr(value, "device_caches"):
                    value.device_caches.clear()


def compile_all(variants: Sequence[Variant], jobs: int | None = None) -> None:
    """Compile the variants side by side, into Triton's cache."""
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        for _ in pool.map(lambda v: triton.compile(v.source, target=v.target, options=v.options), variants):
            pass
