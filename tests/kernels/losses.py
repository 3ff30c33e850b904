"""The losses in plain PyTorch, with every option of ours. In float64 they are the reference of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_cross_entropy(
    logits: Tensor, targets: Tensor, *, wide: torch.dtype, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, z_loss: float = 0.0, class_weight: Tensor | None = None,
    num_items: float | None = None,
) -> Tensor:  # fmt: skip
    """The loss of logits (..., V) and targets (...), in the dtype `wide`."""
    V = logits.shape[-1]
    counted = targets != ignore_index
    safe = targets.long().masked_fill(~counted, -100).reshape(-1)
    weight = None if class_weight is None else class_weight.to(wide)
    flat = logits.to(wide).reshape(-1, V)
    loss = F.cross_entropy(flat, safe, weight, reduction="none", label_smoothing=label_smoothing)
    loss = loss.view(targets.shape)
    if z_loss:
        loss = loss + z_loss * flat.logsumexp(-1).view(targets.shape).square() * counted
    if reduction != "mean":
        return loss if reduction == "none" else loss.sum()
    if num_items is not None:
        return loss.sum() / num_items
    return loss.sum() / (counted.sum() if weight is None else (weight[targets.long().clamp(0, V - 1)] * counted).sum())


def shifted(targets: Tensor, ignore_index: int) -> Tensor:
    """The targets that `shift=True` uses: the next position's. The last position has none."""
    return torch.cat((targets[:, 1:], torch.full_like(targets[:, :1], ignore_index)), 1)


def as_the_oracle_sees(result: Tensor) -> Tensor:
    """The result with tiny values set to 0.

    If all other classes of a row have less than 1e-16 of the probability, its loss and p - 1 are 0 in float64. The
    kernel keeps these tiny values.
    """
    return result.where((result.abs() > 1e-15) | result.isnan(), 0.0)
