"""The door to the losses: softmax cross-entropy of logits, and of hidden states whose logits are never stored."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import torch_backend
from fastgpt2_kernels.ops.backend import check_same, describe, use_triton

REDUCTIONS = ("mean", "sum", "none")


class TargetCheck:
    """Collects, on the device, whether a target was neither ignored nor in the vocabulary; looks only when it is asked.

    Pass one as `check_targets` to any number of calls, and call `raise_if_bad` where waiting for the device is fine.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.flag = torch.zeros((), dtype=torch.int32, device=device)

    def raise_if_bad(self) -> None:
        """ValueError if a target was bad since the last look. Waits for the device."""
        if int(self.flag):
            self.flag.zero_()
            raise ValueError("cross_entropy: a target was neither ignore_index nor in [0, V); its row's loss is NaN")


class CrossEntropyStats(NamedTuple):
    """Of every row, in the shape of targets, without gradients, zeros where the target is ignored.

    lse: log sum exp of the logits. logprob: natural-log probability of the target. entropy: of the softmax, in nats.
    correct: whether no logit is above the target's.
    """

    lse: Tensor
    logprob: Tensor
    entropy: Tensor
    correct: Tensor


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    z_loss: float = 0.0, class_weight: Tensor | None = None, shift: bool = False, empty: str = "nan",
    check_targets: bool | TargetCheck = False, fuse_backward: bool = False, inplace_backward: bool = False,
    return_stats: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, CrossEntropyStats]:  # fmt: skip
    """Softmax cross-entropy of logits (N, V) or (B, T, V) against integer targets (N,) or (B, T), in float32.

    As `F.cross_entropy`, and: `z_loss` adds z_loss * lse^2 to every counted row (Chowdhery et al. 2022). `shift=True`
    takes a row's target from one position on, without a copy; the last position of each row of B counts for nothing.
    `empty="zero"` makes a mean over no rows 0 instead of NaN. With `class_weight` (V,) a mean divides by the sum of the
    counted targets' weights. A target that is neither `ignore_index` nor in [0, V) is never used as an index: its row's
    loss and gradient are NaN; `check_targets=True` raises ValueError instead, which waits for the device, and a
    `TargetCheck` waits where you choose.

    For the Triton backend: `fuse_backward=True` computes the gradient in the forward's launch, for when backward is
    sure to follow (not with reduction "none"); `inplace_backward=True` lets backward write the gradient over the
    logits. After either, a second backward raises. PyTorch's operators make no use of the two.

    Returns the loss, with `return_stats=True` also `CrossEntropyStats`. ValueError for arguments that do not fit.
    """
    name = "cross_entropy"
    if logits.dim() not in (2, 3) or not logits.is_floating_point():
        raise ValueError(f"{name}: logits must be floating-point (N, V) or (B, T, V); got {describe(logits)}")
    if targets.shape != logits.shape[:-1] or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name}: targets must be int64 or int32 of shape {tuple(logits.shape[:-1])}; got {describe(targets)}"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"{name}: the vocabulary must not be empty; got logits {tuple(logits.shape)}")
    if shift and logits.dim() != 3:
        raise ValueError(f"{name}: shift=True needs to know the rows: logits (B, T, V); got {tuple(logits.shape)}")
    _check_loss_options(name, reduction, label_smoothing)
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{name}: z_loss must be finite and >= 0; got {z_loss}")
    if empty not in ("nan", "zero"):
        raise ValueError(f"{name}: empty must be 'nan' or 'zero'; got {empty!r}")
    if class_weight is not None and (class_weight.shape != logits.shape[-1:] or not class_weight.is_floating_point()):
        raise ValueError(
            f"{name}: class_weight must be floating-point ({logits.shape[-1]},); got {describe(class_weight)}"
        )
    if fuse_backward and reduction == "none":
        raise ValueError(
            f"{name}: fuse_backward needs reduction 'mean' or 'sum': with 'none' every row's factor is open"
        )
    if fuse_backward and inplace_backward:
        raise ValueError(f"{name}: choose fuse_backward or inplace_backward; both were given")
    given = {
        "logits": logits,
        "targets": targets,
        **({"class_weight": class_weight} if class_weight is not None else {}),
    }
    check_same(name, check_dtype=False, **given)
    check = TargetCheck(logits.device) if check_targets is True else check_targets or None

    counted = _counted(targets, ignore_index, shift)
    counted_weight = None if reduction != "mean" else _counted_weight(targets, counted, class_weight, shift, empty)
    if use_triton(name, logits.device, backend) and logits.dtype != torch.float64:
        loss, stats = _triton_cross_entropy(
            logits, targets, ignore_index, reduction, label_smoothing, z_loss, class_weight, shift, counted,
            counted_weight, fuse_backward, inplace_backward, return_stats,
        )  # fmt: skip
    else:
        own = torch.cat((targets[:, 1:], torch.full_like(targets[:, :1], ignore_index)), 1) if shift else targets
        rows = torch_backend.cross_entropy_rows(
            logits, own, ignore_index=ignore_index, class_weight=class_weight, label_smoothing=label_smoothing,
            z_loss=z_loss, with_stats=return_stats,
        )  # fmt: skip
        loss = _reduce(rows.loss, reduction, counted_weight)
        stats = tuple(t for t in rows[1:] if t is not None)
    if check is not None:
        check.flag |= _bad_targets(targets, logits.shape[-1], ignore_index, shift).int()
    if check_targets is True and check is not None:
        check.raise_if_bad()
    return (loss, CrossEntropyStats(*stats)) if return_stats else loss


def _triton_cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float,
    class_weight: Tensor | None, shift: bool, counted: Tensor,
    counted_weight: Tensor | None, fuse_backward: bool, inplace_backward: bool, return_stats: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    from fastgpt2_kernels import cross_entropy as kernel

    shape = targets.shape
    if logits.dim() == 2:
        logits, targets, counted = logits[None], targets[None], counted[None]
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    options = (ignore_index, label_smoothing, z_loss, shift, return_stats)
    will_differentiate = logits.requires_grad and torch.is_grad_enabled()
    if fuse_backward and will_differentiate and not torch.compiler.is_compiling():
        dloss = counted.float() if counted_weight is None else counted / counted_weight
        loss, *rows = kernel.FusedCrossEntropy.apply(logits, targets, dloss, class_weight, *options)
    else:
        row_loss, *rows = kernel.cross_entropy_op(logits, targets, class_weight, *options, inplace_backward)
        loss = _reduce(row_loss.view(shape), reduction, counted_weight)
    row_max, log_sum, logprob, entropy, correct = (r.detach() for r in rows)
    if not return_stats:
        return loss, ()
    return loss, ((row_max + log_sum).view(shape), logprob.view(shape), entropy.view(shape), correct.view(shape).bool())


def _counted(targets: Tensor, ignore_index: int, shift: bool) -> Tensor:
    """Which rows count, bool in the shape of targets."""
    counted = targets != ignore_index
    return F.pad(counted[:, 1:], (0, 1)) if shift else counted


def _bad_targets(targets: Tensor, vocab_size: int, ignore_index: int, shift: bool) -> Tensor:
    targets = targets[:, 1:] if shift else targets
    return ((targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))).any()


def _counted_weight(targets: Tensor, counted: Tensor, class_weight: Tensor | None, shift: bool, empty: str) -> Tensor:
    """What a mean divides by."""
    if class_weight is None:
        total = counted.sum().float()
    else:
        index = F.pad(targets[:, 1:], (0, 1)) if shift else targets
        index = index.long().clamp(0, class_weight.shape[0] - 1)
        total = class_weight.float()[index].where(counted, 0.0).sum()
    return total.where(total != 0, 1.0) if empty == "zero" else total


def _reduce(loss: Tensor, reduction: str, counted_weight: Tensor | None) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if counted_weight is None else loss.sum() / counted_weight


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0, chunk_rows: int | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """`F.cross_entropy(x @ weight.T + bias, targets)` without ever holding the (N, V) logits.

    x (N, C) or (B, T, C), weight (V, C), bias (V,), targets (N,) or (B, T) integers; rows whose target is
    `ignore_index` count for nothing. The softmax is computed in float32 (float64 for float64 inputs), the loss is
    returned in it. reduction "mean" (over counted rows; NaN when there are none, as `F.cross_entropy`), "sum", or
    "none" (shape of targets). At most `chunk_rows` rows of logits exist at a time. Differentiable once in x, weight,
    bias; frozen ones cost nothing. Under autocast the matrix products run in the autocast dtype.
    """
    if x.dim() not in (2, 3) or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "linear_cross_entropy: x must be (N, C) or (B, T, C) and weight (V, C); "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: targets must have shape {tuple(x.shape[:-1])} as x; got {tuple(targets.shape)}"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"linear_cross_entropy: targets must be int64 or int32; got {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_cross_entropy: bias must be ({weight.shape[0]},); got {tuple(bias.shape)}")
    _check_loss_options("linear_cross_entropy", reduction, label_smoothing)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"linear_cross_entropy: chunk_rows must be >= 1; got {chunk_rows}")
    tensors = {"x": x, "weight": weight, **({"bias": bias} if bias is not None else {})}
    check_same("linear_cross_entropy", check_dtype=not torch.is_autocast_enabled(x.device.type), **tensors)
    if targets.device != x.device:
        raise ValueError(f"linear_cross_entropy: targets are on {targets.device}, x is on {x.device}")
    flat_x, flat_targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    _check_targets(flat_targets, weight.shape[0], ignore_index)
    on_triton = use_triton("linear_cross_entropy", x.device, backend) and x.dtype != torch.float64
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    options = torch_backend.LossOptions(
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        chunk_rows=chunk_rows or torch_backend.loss_chunk_rows(flat_x.shape[0], weight.shape[0], x.device),
        compute_dtype=torch.get_autocast_dtype(x.device.type) if autocast else x.dtype,
        use_triton=on_triton,
    )
    with torch.autocast(x.device.type, enabled=False):
        loss = torch_backend.LinearCrossEntropy.apply(flat_x, weight, bias, flat_targets, options)
    return loss.view(targets.shape) if reduction == "none" else loss


def _check_loss_options(operator: str, reduction: str, label_smoothing: float) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{operator}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{operator}: label_smoothing must be in [0, 1); got {label_smoothing}")


def _check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or not targets.numel():
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"linear_cross_entropy: targets must be in [0, {vocab_size}) or ignore_index={ignore_index}; "
            f"got {int(targets[row])} in row {row}"
        )
