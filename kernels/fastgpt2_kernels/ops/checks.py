"""Checks that several operators share. Each error or reason is one sentence: what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor


def check_same(operator: str, *, check_dtype: bool = True, **tensors: Tensor) -> None:
    """Raise ValueError unless the tensors share one device and, with `check_dtype`, one dtype."""
    if len({t.device for t in tensors.values()}) > 1:
        got = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"{operator}: all tensors must be on one device; got {got}")
    if check_dtype and len({t.dtype for t in tensors.values()}) > 1:
        got = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise ValueError(f"{operator}: all tensors must have one dtype; got {got}")


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def only_float32(dtype: torch.dtype) -> str | None:
    """Why a kernel that computes in float32 cannot take tensors of `dtype`; None if it can."""
    return "it computes in float32; got float64" if dtype == torch.float64 else None
