"""Numbers of the host on their way to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# False in a build of PyTorch for CPUs, whose "cuda" can only be a stand-in.
_HAS_PINNED_MEMORY = bool(torch.version.cuda or torch.version.hip)


def to_device(numbers: Sequence[Any] | Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`numbers` as a tensor on `device`. A GPU gets them from pinned memory, and the host does not wait for it."""
    device = torch.device(device)
    if isinstance(numbers, Tensor) and numbers.device.type != "cpu":
        return numbers.to(device, dtype)
    held = torch.as_tensor(numbers, dtype=dtype)
    if device.type == "cpu":
        return held
    if device.type == "cuda" and _HAS_PINNED_MEMORY:
        held = held.pin_memory()
    return held.to(device, non_blocking=True)
