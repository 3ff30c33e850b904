"""Which device a kernel is launched on. Triton takes the process's current one, wherever the tensors are."""

from __future__ import annotations

from typing import Any

import torch


def launch_kernel(device: torch.device, kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """Launch `kernel` on the current stream of `device`, where its tensors are: all launches go through here."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](**arguments)
        return
    with torch.cuda.device(device):
        kernel[grid](**arguments)
