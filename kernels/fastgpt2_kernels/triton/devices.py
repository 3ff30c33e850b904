"""Which device a kernel is launched on, and what a launch may raise.

Triton launches on the process's current device, wherever the tensors are.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.errors import TritonError

# CUDA's errors, and Triton's: too little shared memory, a kernel that does not compile.
LAUNCH_ERRORS: tuple[type[Exception], ...] = (RuntimeError, TritonError)


def launch_kernel(device: torch.device, kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """Launch `kernel` on the current stream of `device`, where its tensors are: all launches go through here."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](**arguments)
        return
    with torch.cuda.device(device):
        kernel[grid](**arguments)
