"""Kernel launches: on which device, what happens if a kernel does not compile or launch, and the precision of float32.

Triton by itself launches on the current device of the process, wherever the tensors are.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import torch
from triton.errors import TritonError

from fastgpt2_kernels.backends import KernelFailedError
from fastgpt2_kernels.precision import is_float32_exact
from fastgpt2_kernels.triton import launch

# Errors of CUDA, and of Triton: too little shared memory, or a kernel that does not compile.
LAUNCH_ERRORS: tuple[type[Exception], ...] = (RuntimeError, TritonError)
# Also errors of what a first launch needs: the cache folder and its files, ptxas, a C compiler, the driver's library.
_FIRST_LAUNCH_ERRORS: tuple[type[Exception], ...] = (
    *LAUNCH_ERRORS,
    OSError,
    subprocess.SubprocessError,
    AssertionError,
    ImportError,
    json.JSONDecodeError,
)
# Words in an error message, and what to do about the error. The first entry that matches counts.
_ADVICE = (
    (("out of resource",), "this GPU has too few resources for this size; please report the GPU and the size"),
    (("c compiler", "gcc", "clang", "'cc'"), "Triton needs a C compiler: install gcc, or name one in CC"),
    (
        ("cache dir", "permission denied", "read-only file system", "not a directory", "no space left"),
        "Triton needs a folder to write to: name one in TRITON_CACHE_DIR",
    ),
    (("jsondecodeerror",), "a file in Triton's cache is damaged: delete the folder, by default ~/.triton/cache"),
    (("libcuda", "driver", "ptxas", "unsupported"), "the GPU, its driver and Triton are not compatible: update them"),
)  # fmt: skip
_OTHERWISE = "please report it with the output of `fastgpt2 check --json`"


def launch_kernel(device: torch.device, kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """Launch `kernel` on the current stream of `device`, where its tensors are. Every kernel launch goes through here.

    Raises KernelFailedError if the kernel does not compile or launch. The error names the kernel and says what to do.
    """
    try:
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            kernel[grid](**arguments)
            return
        with torch.cuda.device(device):
            kernel[grid](**arguments)
    except _FIRST_LAUNCH_ERRORS as error:
        raise KernelFailedError(_sentence(kernel, error)) from error


def _sentence(kernel: Any, error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    text = f"{type(error).__name__} {said}".lower()
    advice = next((advice for words, advice in _ADVICE if any(word in text for word in words)), _OTHERWISE)
    name = getattr(kernel, "__name__", type(kernel).__name__)
    return f"Triton cannot launch {name} ({type(error).__name__}: {said[:300].rstrip('. ')}); {advice}"


def float32_precision(device: torch.device) -> str:
    """The precision of a kernel's float32 products: "tf32" if PyTorch allows it and the GPU has it, else "ieee"."""
    return "tf32" if not is_float32_exact() and launch.has_tf32(launch.architecture(device)) else "ieee"
