"""Which device a kernel is launched on, what a launch may raise, and how the device multiplies float32.

Triton launches on the process's current device, wherever the tensors are.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.errors import TritonError

from fastgpt2_kernels.precision import is_float32_exact
from fastgpt2_kernels.triton import launch

# CUDA's errors, and Triton's: too little shared memory, a kernel that does not compile.
LAUNCH_ERRORS: tuple[type[Exception], ...] = (RuntimeError, TritonError)


def launch_kernel(device: torch.device, kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """Launch `kernel` on the current stream of `device`, where its tensors are: all launches go through here."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](**arguments)
        return
    with torch.cuda.device(device):
        kernel[grid](**arguments)


def float32_precision(device: torch.device) -> str:
    """What a kernel's products of float32 are rounded to: as PyTorch's own are, where the GPU can."""
    return "tf32" if not is_float32_exact() and launch.has_tf32(launch.architecture(device)) else "ieee"
