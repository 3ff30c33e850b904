"""The backend "native": C++ kernels for decoding on a CPU, compiled for several instruction sets at installation.

`import torch` comes before the extension, so that both share PyTorch's OpenMP library and its threads.
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
# In the order of the C++ enum. `ops.TRITON_ACTIVATIONS` maps the names in a model's configuration to these.
ACTIVATIONS = (
    "linear", "gelu_tanh", "silu", "quick_gelu", "gelu", "gelu_10", "laplace", "sigmoid", "tanh", "mish", "relu",
    "relu2", "relu6", "leaky_relu", "hardswish",
)  # fmt: skip


@functools.cache
def _extension() -> tuple[Any, str | None]:
    """The extension module and None, or None and the reason why there is none."""
    try:
        return importlib.import_module("fastgpt2_kernels.native._native"), None
    except ModuleNotFoundError:
        return None, "it was not compiled, because fastgpt2 was installed without a suitable C++ compiler"
    except ImportError as error:
        return None, f"its extension cannot be loaded: {error}"


def isas() -> dict[str, bool]:
    """The instruction sets that were compiled, the best first, and whether this processor has each of them."""
    extension, _ = _extension()
    return {} if extension is None else dict(extension.isas())


@functools.cache
def _choice() -> tuple[str, str | None]:
    """The instruction set in use, or the reason why there is none.

    It is chosen only once, because the layout of packed weights depends on it.
    """
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
    """Why the native backend cannot run on this machine, in one sentence; None if it can."""
    return _choice()[1]


def isa() -> str:
    """The name of the instruction set in use.

    Raises:
        RuntimeError: The native backend cannot run on this machine.
    """
    name, reason = _choice()
    if reason is not None:
        raise RuntimeError(f"the native backend cannot be used: {reason}")
    return name


def call(operation: int, arguments: ctypes.Structure) -> None:
    """Run an operation of the extension on the struct of its arguments. Releases Python's global lock meanwhile."""
    extension, _ = _extension()
    extension.call(isa(), operation, ctypes.addressof(arguments), ctypes.sizeof(arguments))


def use_large_pages(tensor: Tensor) -> Tensor:
    """Ask the operating system to back a tensor with large pages, which need fewer page-table entries.

    Call it before anything is written to the tensor. It is only a hint. It does nothing for a tensor on a GPU or on a
    system without this hint.

    Args:
        tensor: a tensor that nothing was written to yet.

    Returns:
        The same tensor.
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
