"""The training loss and a training step, without ever storing the (B, T, V) logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt2.model import GPT2Base

IGNORE_INDEX = -100


def shift_targets(input_tensor: Tensor, *, ignore_index: int = IGNORE_INDEX, pad_token_id: int | None = None) -> Tensor:
    """Build next-token targets: each position's target is the next token. The last position is ignored.

    Args:
        input_tensor: Token ids, (B, T).
        ignore_index: The target of ignored positions.
        pad_token_id: Positions whose target is this token are ignored too. By default every token is learned.

    Returns:
        Targets, (B, T).
    """
    last = torch.full_like(input_tensor[:, :1], ignore_index)
    targets = torch.cat((input_tensor[:, 1:], last), dim=1)
    if pad_token_id is not None and pad_token_id != ignore_index:
        targets = targets.masked_fill(targets == pad_token_id, ignore_index)
    return targets


def calculate_loss(
    model: torch.nn.Module,
    input_tensor: Tensor,
    target_tensor: Tensor,
    ignore_index: int = IGNORE_INDEX,
    **options: Any,
) -> Tensor:
    """Mean cross-entropy of predicting the targets from the input. The softmax is float32 whatever the model's dtype.

    Args:
        model: A `GPT2`, or a wrapper that calls one. DistributedDataParallel and FSDP synchronize the gradients as
            usual, and a model from `torch.compile` runs compiled.
        input_tensor: Token ids, (B, T).
        target_tensor: Targets, (B, T): `target_tensor[b, t]` is the token that should follow
            `input_tensor[b, : t + 1]`. They are already shifted; `shift_targets` makes them.
        ignore_index: Targets equal to this do not count. The default, -100, is no token. Some introductory texts use
            0, but in GPT-2's vocabulary 0 is a real token ("!"), which would then never be learned.
        options: Options of `fastgpt2.kernels.linear_cross_entropy` (reduction, label_smoothing, z_loss,
            num_items_in_batch ...).

    Returns:
        The loss, a float32 scalar; `reduction` changes this.

    Raises:
        TypeError: The model is not a `GPT2` or a wrapper of one.
        ValueError: The targets have another shape than the input.
    """
    if not any(isinstance(module, GPT2Base) for module in model.modules()):
        raise TypeError(
            f"calculate_loss: model must be a fastgpt2.GPT2, or a wrapper of one; got {type(model).__name__}"
        )
    if target_tensor.shape != input_tensor.shape:
        raise ValueError(
            f"calculate_loss: target_tensor must have the shape {tuple(input_tensor.shape)} of input_tensor; "
            f"got {tuple(target_tensor.shape)}"
        )
    return model(input_tensor, targets=target_tensor, ignore_index=ignore_index, **options)


def train_step(
    model: torch.nn.Module,
    input_tensor: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    pad_token_id: int | None = None,
    max_grad_norm: float | None = None,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Run one step of next-token training: the loss, the backward pass and the optimizer's step.

    The targets are the input shifted by one. The last position has no target.

    Args:
        model: The model, as for `calculate_loss`.
        input_tensor: Token ids, (B, T).
        optimizer: The optimizer. With None, gradients are added to those in `.grad`, for gradient accumulation.
        ignore_index: As for `calculate_loss`.
        pad_token_id: Targets equal to this are ignored.
        max_grad_norm: Clip the gradients to this norm; None does not clip.
        num_items_in_batch: The number of targets that count in all accumulated batches together. Each batch's loss is
            then its sum divided by this number, so that batches with different counts add up to the overall mean.

    Returns:
        The detached loss.
    """
    targets = shift_targets(input_tensor, ignore_index=ignore_index, pad_token_id=pad_token_id)
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)
    loss = calculate_loss(
        model, input_tensor, targets, ignore_index=ignore_index, num_items_in_batch=num_items_in_batch
    )
    loss.backward()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if optimizer is not None:
        optimizer.step()
    return loss.detach()
