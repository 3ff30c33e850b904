"""The losses: softmax cross-entropy of logits, and of hidden states whose logits are never stored."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import linear_cross_entropy as linear
from fastgpt2_kernels import reference
from fastgpt2_kernels.backends import call_allowing_fallback, choose_backend, run_operator
from fastgpt2_kernels.host import to_device
from fastgpt2_kernels.ops.checks import check_same, describe, only_float32
from fastgpt2_kernels.types import CrossEntropyOptions, LossOptions

REDUCTIONS = ("mean", "sum", "none")


class TargetCheck:
    """Finds targets that are neither ignored nor in the vocabulary, without synchronising with the device.

    Pass one as `check_targets` to any number of calls. Call `raise_if_bad` where a synchronisation is acceptable.

    Args:
        device: where the targets are.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.flag = torch.zeros((), dtype=torch.int32, device=device)

    def raise_if_bad(self) -> None:
        """Wait for the device, and raise if any target was bad since the last call.

        Raises:
            ValueError: A target was neither `ignore_index` nor in the vocabulary.
        """
        if int(self.flag):
            self.flag.zero_()
            raise ValueError("cross_entropy: a target was neither ignore_index nor in [0, V); its row's loss is NaN")

    def look(self, targets: Tensor, vocab_size: int, ignore_index: int, shift: bool) -> None:
        """Note, without waiting, whether one of these targets is bad."""
        self.flag |= _are_bad(_used(targets, shift), vocab_size, ignore_index).any().int()


class CrossEntropyStats(NamedTuple):
    """Statistics of every row, in the shape of the targets.

    They have no gradients. Rows whose target is ignored hold 0.

    Attributes:
        lse: the log of the sum of exp(logits).
        logprob: the natural-log probability of the target.
        entropy: the entropy of the softmax, in nats.
        correct: whether no logit exceeds the target's.
    """

    lse: Tensor
    logprob: Tensor
    entropy: Tensor
    correct: Tensor


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,
    shift: bool = False,
    empty: str = "nan",
    check_targets: bool | TargetCheck | None = None,
    fuse_backward: bool = False,
    inplace_backward: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """Softmax cross-entropy of logits, in float32: `F.cross_entropy` with the additions below.

    Args:
        logits: (N, V) or (B, T, V), floating-point.
        targets: (N,) or (B, T), int64 or int32.
        ignore_index: rows with this target do not count.
        reduction: "mean" over the rows that count, "sum", or "none" (one loss for each row).
        label_smoothing: in [0, 1), as in PyTorch.
        z_loss: adds z_loss * lse^2 to every counted row (PaLM, Chowdhery et al. 2022).
        class_weight: (V,). A mean then divides by the sum of the counted targets' weights.
        shift: use the next position's target for each row, without a copy. The last position of each row of B
            does not count. Needs (B, T, V).
        empty: the value of a mean over no rows: "nan" (as in PyTorch) or "zero".
        check_targets: what to do with a target that is neither `ignore_index` nor in [0, V). Such a target is never
            used as an index. False makes its row's loss and gradient NaN. True raises an error, and waits for the
            device to find it. A `TargetCheck` raises it when you call `raise_if_bad`. None, the default, is True on a
            CPU and False on a GPU.
        fuse_backward: compute the gradient in the forward kernel launch, for when backward is sure to follow. Not for
            "none". A second backward then raises. PyTorch's operators ignore it.
        inplace_backward: let backward overwrite the logits with their gradient. A second backward then raises.
            PyTorch's operators ignore it.
        return_stats: also return `CrossEntropyStats`.
        backend: "auto", "triton" or "torch".

    Returns:
        The loss, float32. With `return_stats=True` a pair of the loss and `CrossEntropyStats`.

    Raises:
        ValueError: Arguments do not go together, a target is bad (see `check_targets`), or the backend cannot be used.

    Example:
        >>> logits, targets = torch.randn(4, 10, requires_grad=True), torch.tensor([1, 2, -100, 3])
        >>> cross_entropy(logits, targets).backward()
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
        raise ValueError(f"{name}: shift=True needs logits of shape (B, T, V); got {tuple(logits.shape)}")
    _check_loss_options(name, logits.shape[-1], reduction, label_smoothing, z_loss, class_weight, empty)
    if fuse_backward and reduction == "none":
        raise ValueError(
            f"{name}: fuse_backward needs reduction 'mean' or 'sum': with 'none' only backward knows the rows' factors"
        )
    if fuse_backward and inplace_backward:
        raise ValueError(f"{name}: give fuse_backward or inplace_backward, not both")
    given = {
        "logits": logits,
        "targets": targets,
        **({"class_weight": class_weight} if class_weight is not None else {}),
    }
    check_same(name, check_dtype=False, **given)
    _check_targets(name, check_targets, targets, logits.shape[-1], ignore_index, shift)
    counted = _counted(targets, ignore_index, shift)
    counted_weight = None if reduction != "mean" else _counted_weight(targets, counted, class_weight, shift, empty)
    options = CrossEntropyOptions(
        ignore_index, reduction, label_smoothing, z_loss, shift, fuse_backward, inplace_backward, return_stats
    )
    size = (logits.shape[-1], logits.dtype)
    chosen = choose_backend(name, logits.device, backend, lambda: only_float32(logits.dtype), size)
    loss, stats = run_operator(
        name, chosen, backend, logits.device, size, logits, targets, class_weight, options, counted, counted_weight
    )
    return (loss, CrossEntropyStats(*stats)) if return_stats else loss


def _counted(targets: Tensor, ignore_index: int, shift: bool) -> Tensor:
    """Which rows count, bool in the shape of targets."""
    counted = targets != ignore_index
    return F.pad(counted[:, 1:], (0, 1)) if shift else counted


def _used(targets: Tensor, shift: bool) -> Tensor:
    return targets[:, 1:] if shift else targets


def _are_bad(targets: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    return (targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))


def _check_targets(
    operator: str, check: bool | TargetCheck | None, targets: Tensor, vocab_size: int, ignore_index: int, shift: bool
) -> None:
    if isinstance(check, TargetCheck):
        check.look(targets, vocab_size, ignore_index, shift)
        return
    if check is None:
        check = targets.device.type == "cpu" and not torch.compiler.is_compiling()
    if not check or not targets.numel():
        return
    used = _used(targets, shift)
    is_bad = _are_bad(used, vocab_size, ignore_index)
    if is_bad.any():
        place = tuple(is_bad.nonzero()[0].tolist())
        where = f"row {place[0]}" + (f", token {place[1] + shift}" if len(place) == 2 else "")
        raise ValueError(
            f"{operator}: targets must be in [0, {vocab_size}) or ignore_index={ignore_index}; "
            f"got {int(used[place])} in {where}"
        )


def _counted_weight(targets: Tensor, counted: Tensor, class_weight: Tensor | None, shift: bool, empty: str) -> Tensor:
    """What a mean divides by: the number of counted rows, or the sum of their targets' class weights."""
    if class_weight is None:
        total = counted.sum().float()
    else:
        index = F.pad(targets[:, 1:], (0, 1)) if shift else targets
        index = index.long().clamp(0, class_weight.shape[0] - 1)
        total = class_weight.float()[index].where(counted, 0.0).sum()
    return total.where(total != 0, 1.0) if empty == "zero" else total


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    shift: bool = False,
    empty: str = "nan",
    check_targets: bool | TargetCheck | None = None,
    accumulate_into_grad: bool = False,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The cross-entropy of a linear layer's logits, which are never all stored.

    The loss is `cross_entropy(logit_scale * (x @ weight.T + bias), targets)`. It is differentiable in x, weight and
    bias, but has no second derivatives. No gradient is computed for a frozen input.

    Args:
        x: (N, C) or (B, T, C), the hidden states.
        weight: (V, C), the head's weight.
        targets: (N,) or (B, T), int64 or int32.
        bias: (V,), or None.
        ignore_index: rows with this target do not count.
        reduction: "mean" over the rows that count, "sum", or "none".
        num_items_in_batch: what a mean divides by instead of its own count: an int, or a tensor of one element. With
            gradient accumulation, give the number of counted targets in all the batches together, as transformers
            does.
        label_smoothing, z_loss, class_weight, shift, empty, check_targets: as in `cross_entropy`.
        logit_scale: what the logits are multiplied by.
        accumulate_into_grad: let backward add the weight's gradient to an existing float32 `weight.grad`, so that it
            needs no other (V, C) buffer. The weight must be a leaf. Backward computes the logits again. Not under
            torch.compile.
        chunk_rows: how many rows of logits exist at a time. The default on a GPU is a sixteenth of the rows, but 256 to
            2048; on a CPU about 32 MB of float32, but 128 to 512 rows.
        backend: "auto", "triton" or "torch".

    Returns:
        The loss, float32 (float64 for float64 inputs); for "none" in the shape of targets.

    Raises:
        ValueError: Arguments do not go together, a target is bad (see `check_targets` of `cross_entropy`), or the
            backend cannot be used.
        RuntimeError: Backward ran a second time, although the gradients were computed along with the loss.

    Notes:
        The gradients are computed along with the loss, and the first backward uses them up. With "none" or
        `accumulate_into_grad`, backward computes them, and can run again. Under autocast, the matrix products run in
        the autocast dtype.

    Example:
        >>> x, weight = torch.randn(6, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
        >>> linear_cross_entropy(x, weight, torch.randint(100, (6,))).backward()
    """
    name = "linear_cross_entropy"
    if x.dim() not in (2, 3) or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{name}: x must be (N, C) or (B, T, C) and weight (V, C); got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if not x.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"{name}: x and weight must be floating-point; got {x.dtype} and {weight.dtype}")
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"{name}: targets must have shape {tuple(x.shape[:-1])} as x; got {tuple(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: targets must be int64 or int32; got {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be ({weight.shape[0]},); got {tuple(bias.shape)}")
    if shift and x.dim() != 3:
        raise ValueError(f"{name}: shift=True needs x of shape (B, T, C); got {tuple(x.shape)}")
    _check_loss_options(name, weight.shape[0], reduction, label_smoothing, z_loss, class_weight, empty)
    if not -math.inf < logit_scale < math.inf:  # isfinite cannot be traced with dynamic sizes
        raise ValueError(f"{name}: logit_scale must be finite; got {logit_scale}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{name}: chunk_rows must be >= 1; got {chunk_rows}")
    _check_num_items(name, num_items_in_batch, reduction)
    if accumulate_into_grad and (not weight.is_leaf or torch.compiler.is_compiling()):
        raise ValueError(f"{name}: accumulate_into_grad needs a leaf tensor as weight, in eager mode; leave it out")
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    tensors = {"x": x, "weight": weight, **({"bias": bias} if bias is not None else {})}
    check_same(name, check_dtype=not autocast, **tensors)
    tensors = {"x": x, "targets": targets, **({"class_weight": class_weight} if class_weight is not None else {})}
    check_same(name, check_dtype=False, **tensors)
    _check_targets(name, check_targets, targets, weight.shape[0], ignore_index, shift)

    flat_x = x.reshape(-1, x.shape[-1])
    flat_targets = (reference.shift_targets(targets, ignore_index) if shift else targets).reshape(-1)
    compute_dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    size = (weight.shape[0], compute_dtype)
    options = LossOptions(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_scale=logit_scale,
        chunk_rows=chunk_rows or linear.chunk_rows(flat_x.shape[0], weight.shape[0], x.device),
        compute_dtype=compute_dtype,
        use_triton=choose_backend(name, x.device, backend, lambda: only_float32(compute_dtype), size) == "triton",
    )
    fallback_size = size if backend == "auto" else None
    divisor = None
    if isinstance(num_items_in_batch, Tensor):
        divisor = to_device(num_items_in_batch, x.device, torch.float32).reshape(())
    elif num_items_in_batch is not None:
        divisor = torch.full((), num_items_in_batch, dtype=torch.float32, device=x.device)  # no copy, so no wait
    elif reduction == "mean":
        counted = flat_targets != ignore_index
        divisor = _counted_weight(flat_targets, counted, class_weight, False, empty)
    if reduction == "none" or accumulate_into_grad:
        rows_of = linear.AccumulatingRows.apply if accumulate_into_grad else linear.linear_cross_entropy_rows_op
        loss = call_allowing_fallback(
            fallback_size, rows_of, flat_x, weight, bias, flat_targets, class_weight, *options
        )
        return loss.view(targets.shape) if reduction == "none" else reference.reduce_loss(loss, reduction, divisor)
    if divisor is None:
        divisor = torch.ones((), device=x.device)
    arguments = (flat_x, weight, bias, flat_targets, divisor, class_weight)
    if not torch.compiler.is_compiling():
        return call_allowing_fallback(fallback_size, linear.LinearCrossEntropy.apply, *arguments, options)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in arguments[:3]]
    return linear.linear_cross_entropy_op(*arguments, *options, *needs)[0]


def _check_num_items(operator: str, num_items: int | Tensor | None, reduction: str) -> None:
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"{operator}: num_items_in_batch needs reduction 'mean'; got {reduction!r}")
    if num_items.numel() != 1 if isinstance(num_items, Tensor) else num_items < 1:
        got = describe(num_items) if isinstance(num_items, Tensor) else num_items
        raise ValueError(f"{operator}: num_items_in_batch must be >= 1, or a tensor of one element; got {got}")


def _check_loss_options(
    operator: str,
    vocab_size: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    class_weight: Tensor | None,
    empty: str,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{operator}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{operator}: label_smoothing must be in [0, 1); got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{operator}: z_loss must be finite and >= 0; got {z_loss}")
    if empty not in ("nan", "zero"):
        raise ValueError(f"{operator}: empty must be 'nan' or 'zero'; got {empty!r}")
    if class_weight is not None and (class_weight.shape != (vocab_size,) or not class_weight.is_floating_point()):
        raise ValueError(
            f"{operator}: class_weight must be floating-point ({vocab_size},); got {describe(class_weight)}"
        )
