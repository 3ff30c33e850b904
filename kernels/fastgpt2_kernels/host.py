"""Copies numbers from the host to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# A CPU build of PyTorch has none; a "cuda" device there is a stand-in of the tests.
_HAS_PINNED_MEMORY = bool(torch.version.cuda or torch.version.hip)


def to_device(numbers: Sequence[Any] | Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Make `numbers` a tensor on `device`. The copy to a GPU goes through pinned memory, so the host does not wait.

    Args:
        numbers: numbers, or a tensor.
        device: where the result is to be.
        dtype: the result's dtype. None keeps the dtype of a tensor, and takes PyTorch's default for numbers.

    Returns:
        The tensor on `device`.
    """
    device = torch.device(device)
    if isinstance(numbers, Tensor) and numbers.device.type != "cpu":
        return numbers.to(device, dtype)
    held = torch.as_tensor(numbers, dtype=dtype)
    if device.type == "cpu":
        return held
    if device.type == "cuda" and _HAS_PINNED_MEMORY:
        held = held.pin_memory()
    return held.to(device, non_blocking=True)
