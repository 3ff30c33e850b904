"""The 2x rule: the error against float64 is at most 2 x (the plain expression's error + eps x max|exact|)."""

from __future__ import annotations

import torch
from torch import Tensor


def error_budget(plain_error: float, exact: Tensor, dtype: torch.dtype, terms: float = 0.0) -> float:
    """The largest error allowed where the plain PyTorch expression in `dtype` has the error `plain_error`.

    Args:
        plain_error: The plain expression's error.
        exact: The result in float64.
        dtype: The dtype under test, whose eps is used.
        terms: The magnitude of the terms that `exact` sums. It replaces max|exact| where over nine tenths of it cancel.
    """
    scale = exact.abs().max().item() if exact.numel() else 0.0
    scale = max(scale, terms if scale < terms / 10 else 0.0)
    return 2 * (plain_error + torch.finfo(dtype).eps * scale)


def largest_error(got: Tensor, exact: Tensor) -> float:
    """max|got - exact|; NaN if either contains NaN. Raises ValueError if their shapes differ."""
    return _difference(got, exact).abs().max().item() if exact.numel() else 0.0


def rms_error(got: Tensor, exact: Tensor) -> float:
    """The root mean square of got - exact. It averages many roundings, so it varies far less than the largest error."""
    return _difference(got, exact).square().mean().sqrt().item() if exact.numel() else 0.0


def _difference(got: Tensor, exact: Tensor) -> Tensor:
    if got.shape != exact.shape:
        raise ValueError(f"the result must have shape {tuple(exact.shape)}; got {tuple(got.shape)}")
    return got.detach().double() - exact
