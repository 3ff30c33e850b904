"""Choosing the device that a command runs on, and what that device can do."""

from __future__ import annotations

import torch


def find_device(name: str) -> torch.device:
    """The device with this name; "auto" is a GPU if there is one. Raises ValueError if this machine lacks it."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # a name that PyTorch does not know: refused below, as no machine has "meta"
    count = {"cpu": 1, "cuda": gpus, "mps": int(mps)}.get(device.type, 0)
    if (device.index or 0) >= count:
        there = ["auto", "cpu", *(f"cuda:{index}" for index in range(gpus)), *(["mps"] if mps else [])]
        raise ValueError(f"device must be one that this machine has; got {name}: use {', '.join(there)}")
    return device


def why_not_bfloat16(device: torch.device) -> str | None:
    """Why a device lacks bfloat16, in one sentence; None if it has it. Without it PyTorch emulates it slowly."""
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"bfloat16 needs compute capability 8.0; this GPU has {major}.{minor}"
