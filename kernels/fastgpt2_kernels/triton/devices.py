"""Which device a kernel is launched on, what happens where it does not compile or launch, and float32's products.

Triton launches on the process's current device, wherever the tensors are.
"""

from __future__ import annotations

import subprocess
from typing import Any

import torch
from triton.errors import TritonError

from fastgpt2_kernels.backends import KernelFailedError
from fastgpt2_kernels.precision import is_float32_exact
from fastgpt2_kernels.triton import launch

# CUDA's errors, and Triton's: too little shared memory, a kernel that does not compile.
LAUNCH_ERRORS: tuple[type[Exception], ...] = (RuntimeError, TritonError)
# Also those of the files and programs that a first launch needs: the cache, ptxas, a C compiler, the driver's library.
_FIRST_LAUNCH_ERRORS: tuple[type[Exception], ...] = (
    *LAUNCH_ERRORS,
    OSError,
    subprocess.SubprocessError,
    AssertionError,
    ImportError,
)
# What a message says, and what to do about it; the first that fits counts.
_ADVICE = (
    (("out of resource",), "this GPU has too little of it for this size; please report the GPU and the size"),
    (("c compiler", "gcc", "clang", "'cc'"), "Triton needs a C compiler: install gcc, or name one in CC"),
    (
        ("cache dir", "permission denied", "read-only file system", "not a directory", "no space left"),
        "Triton needs a folder to write to: name one in TRITON_CACHE_DIR",
    ),
    (("libcuda", "driver", "ptxas", "unsupported"), "GPU, driver and this Triton do not go together: update them"),
)  # fmt: skip
_OTHERWISE = "please report it with the output of `fastgpt2 check --json`"


def launch_kernel(device: torch.device, kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """Launch `kernel` on the current stream of `device`, where its tensors are: all launches go through here.

    KernelFailedError, which names the kernel and says what to do, where it does not compile or launch.
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
    advice = next((advice for words, advice in _ADVICE if any(word in said.lower() for word in words)), _OTHERWISE)
    name = getattr(kernel, "__name__", type(kernel).__name__)
    return f"Triton cannot launch {name} ({type(error).__name__}: {said[:300].rstrip('. ')}); {advice}"


def float32_precision(device: torch.device) -> str:
    """What a kernel's products of float32 are rounded to: as PyTorch's own are, where the GPU can."""
    return "tf32" if not is_float32_exact() and launch.has_tf32(launch.architecture(device)) else "ieee"
