"""Softmax cross-entropy on PyTorch's own operators, with statistics of its rows, and the loss of a chunk of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import reference
from fastgpt2_kernels.types import CrossEntropyOptions, LossOptions, LossRows


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    class_weight: Tensor | None,
    options: CrossEntropyOptions,
    counted: Tensor,
    divisor: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The reduced loss, and with `return_stats` (lse, logprob, entropy, correct) of every row."""
    rows = cross_entropy_rows(
        logits,
        reference.shift_targets(targets, options.ignore_index) if options.shift else targets,
        ignore_index=options.ignore_index,
        class_weight=class_weight,
        label_smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        with_stats=options.return_stats,
    )
    return reference.reduce_loss(rows.loss, options.reduction, divisor), tuple(t for t in rows[1:] if t is not None)


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    class_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    with_stats: bool,
) -> LossRows:
    """The loss of every row, for logits (..., V) and targets (...), in float32 (float64 for float64 logits)."""
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
        # With a bad target the loss is NaN times the sum of the row's logits, so their gradient is NaN too.
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


def chunk_loss(
    logits_nV: Tensor, targets: Tensor, class_weight: Tensor | None, row_grad: Tensor | None, options: LossOptions
) -> Tensor:
    """The loss (n,) of contiguous logits (n, V), which are overwritten, with `row_grad` (n,) by their gradient."""
    V, smoothing = logits_nV.shape[-1], options.label_smoothing
    wide = options.wide_dtype
    target_n = targets.long()
    counted_n = target_n != options.ignore_index
    is_valid_n = (target_n >= 0) & (target_n < V)
    index_n1 = torch.where(counted_n & is_valid_n, target_n, 0)[:, None]
    # A bad target has the factor NaN, which makes its loss and its row of the gradient NaN.
    row_n = counted_n.to(wide).masked_fill_(counted_n & ~is_valid_n, float("nan"))
    wide_nV = logits_nV.to(wide)  # the chunk itself if the dtypes are the same
    max_n, argmax_n = wide_nV.max(-1) if options.z_loss else (None, None)
    logprob_nV = torch.log_softmax(wide_nV, -1, out=wide_nV)
    logprob_n = logprob_nV.gather(-1, index_n1).squeeze(-1)
    weight_V = None if class_weight is None else class_weight.to(wide)
    weight_n = 1.0 if weight_V is None else weight_V[index_n1.squeeze(-1)]
    loss_n = (smoothing - 1) * weight_n * logprob_n
    if smoothing:
        loss_n -= smoothing / V * (logprob_nV.sum(-1) if weight_V is None else logprob_nV @ weight_V)
    lse_n = None
    if max_n is not None and argmax_n is not None:
        lse_n = max_n - logprob_nV.gather(-1, argmax_n[:, None]).squeeze(-1)
        loss_n += options.z_loss * lse_n.square()
    loss_n = torch.where(counted_n, loss_n, 0.0) * row_n
    if row_grad is None:
        return loss_n
    # As in the kernel's `_gradient_step`. expm1 computes the target's p - 1 accurately even for p close to 1.
    row_n = torch.where(counted_n, row_grad, 0.0) * row_n
    target_factor_n, prob_n = (1 - smoothing) * weight_n * row_n, logprob_n.exp()
    at_target_n, prob_factor_n = target_factor_n * logprob_n.expm1(), target_factor_n
    if lse_n is not None:
        z_factor_n = 2 * options.z_loss * lse_n * row_n
        at_target_n, prob_factor_n = at_target_n + z_factor_n * prob_n, prob_factor_n + z_factor_n
    smooth_factor_n = row_n * (smoothing / V)
    if smoothing:
        weight_sum = V if weight_V is None else weight_V.sum()
        at_target_n = at_target_n + smooth_factor_n * (weight_sum * prob_n - weight_n)
        prob_factor_n = prob_factor_n + smooth_factor_n * weight_sum
    grad_nV = logprob_nV.exp_().mul_(prob_factor_n[:, None])
    if smoothing and weight_V is None:
        grad_nV -= smooth_factor_n[:, None]
    elif smoothing and weight_V is not None:
        grad_nV.addr_(smooth_factor_n, weight_V, alpha=-1)
    grad_nV.scatter_(-1, index_n1, at_target_n[:, None])
    if logits_nV.dtype != wide:
        logits_nV.copy_(grad_nV)
    return loss_n
