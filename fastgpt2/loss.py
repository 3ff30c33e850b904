"""The training loss and one training step, without ever holding the (B, T, V) logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt2.model import GPT2Base

IGNORE_INDEX = -100


def shift_targets(input_tensor: Tensor, *, ignore_index: int = IGNORE_INDEX, pad_token_id: int | None = None) -> Tensor:
    """Next-token targets (B, T) of token ids (B, T): each position's target is the next id; the last has none.

    Args:
        pad_token_id: positions whose target is this id are ignored too. Without it every id is a token to learn.
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
    """Mean cross-entropy of predicting `target_tensor` (B, T) from `input_tensor` (B, T), in float32.

    The softmax is float32 whatever the model's dtype.

    Args:
        model: a `GPT2`, or what wraps one and calls it: DistributedDataParallel and FSDP synchronise the gradients, and
            what `torch.compile` made runs compiled.
        target_tensor: `target_tensor[b, t]` is the token that should follow `input_tensor[b, : t + 1]`; the targets are
            shifted already (`shift_targets` makes them).
        ignore_index: targets equal to it count for nothing. The default of -100 ignores no token. With 0, as
            introductory texts have it, token 0 is never learnt; in GPT-2's vocabulary it is a real token ("!").
        options: go to `fastgpt2.kernels.linear_cross_entropy` (reduction, label_smoothing, z_loss,
            num_items_in_batch ...).
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
    """One step of next-token training on token ids (B, T): loss, backward, and the optimizer's step.

    The targets are the input shifted by one; the last position has none.

    Args:
        model: as in `calculate_loss`.
        optimizer: None leaves the gradients in `.grad`, added to what is there (accumulation).
        pad_token_id: targets equal to it are ignored.
        num_items_in_batch: the number of targets that count in all the batches that are accumulated. Each loss is then
            its sum over that number, and batches of unequal counts add up to the mean of all.

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
