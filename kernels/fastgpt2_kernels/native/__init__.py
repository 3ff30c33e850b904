"""The "native" backend: decoding on a CPU by C++ kernels, compiled for several instruction sets when it is installed.

`import torch` comes before the extension: both then share the OpenMP library that PyTorch has loaded, and its threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import mmap
import os
from typing import Any

import torch
from torch import Tensor

ISA_VARIABLE = "FASTGPT2_NATIVE_ISA"
MAX_HEAD_SIZE = 256
LARGE_PAGE = 2 << 20
# The values of the C++ enum; ops.TRITON_ACTIVATIONS maps the names of configurations to them.
ACTIVATIONS = (
    "linear", "gelu_tanh", "silu", "quick_gelu", "gelu", "gelu_10", "laplace", "sigmoid", "tanh", "mish", "relu",
    "relu2", "relu6", "leaky_relu", "hardswish",
)  # fmt: skip


@functools.cache
def _extension() -> tuple[Any, str | None]:
    """The extension module, or why there is none."""
    try:
        return importlib.import_module("fastgpt2_kernels.native._native"), None
    except ModuleNotFoundError:
        return None, "it was not compiled, for fastgpt2 was installed without a C++ compiler that serves it"
    except ImportError as error:
        return None, f"its extension cannot be loaded: {error}"


def isas() -> dict[str, bool]:
    """The instruction sets that were compiled, the best one first, and whether this processor has them."""
    extension, _ = _extension()
    return {} if extension is None else dict(extension.isas())


@functools.cache
def _choice() -> tuple[str, str | None]:
    """The instruction set in use, and why there is none. Looked at once: packed weights lie as it needs them."""
    wanted = os.environ.get(ISA_VARIABLE, "")
    _, reason = _extension()
    if reason is not None:
        return "", reason
    known = isas()
    if wanted and wanted not in known:
        return "", f"{ISA_VARIABLE} is {wanted!r}; it must be one of {', '.join(known)}"
    if wanted and not known[wanted]:
        return "", f"{ISA_VARIABLE} is {wanted!r}, which this processor does not have"
    usable = [name for name, is_usable in known.items() if is_usable]
    if not usable:
        return "", f"this processor has none of {', '.join(known)}"
    return wanted or usable[0], None


def why_not_native() -> str | None:
    """Why nothing can run on the native backend of this machine, in one sentence; None if it can."""
    return _choice()[1]


def isa() -> str:
    """The instruction set in use; RuntimeError where there is none."""
    name, reason = _choice()
    if reason is not None:
        raise RuntimeError(f"the native backend cannot be used: {reason}")
    return name


def call(operation: int, arguments: ctypes.Structure) -> None:
    """Run an operation of the extension on its arguments' struct, without Python's lock."""
    extension, _ = _extension()
    extension.call(isa(), operation, ctypes.addressof(arguments), ctypes.sizeof(arguments))


def use_large_pages(tensor: Tensor) -> Tensor:
    """The tensor, with the system asked for large pages under it: fewer entries of the page tables to walk.

    Only a hint, for memory that nothing was written to yet. On a GPU, and where there is no such hint, nothing happens.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and tensor.device.type == "cpu":
        first = -(-tensor.data_ptr() // LARGE_PAGE) * LARGE_PAGE
        size = (tensor.data_ptr() + tensor.nbytes) // LARGE_PAGE * LARGE_PAGE - first
        if size > 0:
            _process().madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)
    return tensor


@functools.cache
def _process() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def num_threads() -> int:
    return torch.get_num_threads()
