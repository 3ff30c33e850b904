"""Softmax cross-entropy and the figures of its rows on PyTorch's own operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels.types import LossRows


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, *, ignore_index: int, class_weight: Tensor | None, label_smoothing: float,
    z_loss: float, with_stats: bool,
) -> LossRows:  # fmt: skip
    """Loss of every row of logits (..., V), targets (...), in float32 (float64 for float64 logits)."""
    V = logits.shape[-1]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    counted = targets != ignore_index
    is_bad = counted & ((targets < 0) | (targets >= V))
    safe = targets.long().masked_fill(~counted | is_bad, -100)
    flat = logits.reshape(-1, V).to(wide)
    loss = F.cross_entropy(
        flat,
        safe.reshape(-1),
        None if class_weight is None else class_weight.to(wide),
        reduction="none",
        label_smoothing=label_smoothing,
    ).view(targets.shape)
    lse = flat.logsumexp(-1).view(targets.shape).where(counted, 0.0) if z_loss or with_stats else None
    if z_loss and lse is not None:
        loss = loss + z_loss * lse.square()
    if logits.device.type != "cpu" or torch.compiler.is_compiling() or is_bad.any():
        # A bad target makes its row NaN: the loss, and through the sum of its logits the gradient.
        rows = flat.masked_fill(~is_bad.reshape(-1, 1), 0.0).sum(-1).view(targets.shape)
        loss = torch.where(is_bad, rows * float("nan"), loss)
    if not with_stats or lse is None:
        return LossRows(loss)
    with torch.no_grad():
        log_probs = flat.log_softmax(-1).view(logits.shape)
        index = safe.clamp_min(0)[..., None]
        logprob = log_probs.gather(-1, index).squeeze(-1).where(counted, 0.0)
        entropy = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1).where(counted, 0.0)
        correct = counted & ~is_bad & (logits.gather(-1, index).squeeze(-1) >= logits.amax(-1))
    return LossRows(loss, lse.detach(), logprob.masked_fill(is_bad, float("nan")), entropy, correct)
