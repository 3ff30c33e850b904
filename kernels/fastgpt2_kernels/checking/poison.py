"""Poisoned memory. It shows what a kernel did not write, and what it read or wrote outside its tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

CANARY = -7.5
MARGIN = 512  # elements on either side, so that one row too many still lies inside


class Poison:
    """Makes tensors of NaN between canaries, in place of `Tensor.new_empty`. `is_intact` checks the canaries.

    Integer tensors hold -1 between canaries of -7.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.new_empty = torch.Tensor.new_empty

    def make(self, like: Tensor, shape: Sequence[int] | int, **options: Any) -> Tensor:
        if isinstance(shape, int):  # a call by Triton's interpreter, for its own use
            return self.new_empty(like, shape, **options)
        numel = torch.Size(shape).numel()
        is_float = options.get("dtype", like.dtype).is_floating_point
        buffer = self.new_empty(like, (numel + 2 * MARGIN,), **options)
        buffer.fill_(CANARY if is_float else int(CANARY))
        buffer[MARGIN : MARGIN + numel] = torch.nan if is_float else -1
        self.buffers.append(buffer)
        return buffer[MARGIN : MARGIN + numel].view(shape)

    def is_intact(self) -> bool:
        """Whether nothing was written outside the tensors that were made since the last call."""
        buffers = self.buffers.copy()
        self.buffers.clear()
        canaries = (CANARY if buffer.is_floating_point() else int(CANARY) for buffer in buffers)
        return all(
            bool((buffer[:MARGIN] == canary).all() and (buffer[-MARGIN:] == canary).all())
            for buffer, canary in zip(buffers, canaries, strict=True)
        )


@contextmanager
def canaries() -> Iterator[Poison]:
    """While the context is open, `Tensor.new_empty` returns NaN between canaries."""
    poison = Poison()

    def make(like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return poison.make(like, *args, **kwargs)

    with patch.object(torch.Tensor, "new_empty", make):
        yield poison


@contextmanager
def nan_memory() -> Iterator[None]:
    """While the context is open, new memory holds NaN until it is written.

    PyTorch fills it like this when deterministic algorithms are on.
    """
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)


def within_poison(values: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of `values` between two margins of NaN (-7 for integers), and the whole buffer."""
    canary = torch.nan if values.is_floating_point() else int(CANARY)
    buffer = values.new_full((values.numel() + 2 * MARGIN,), canary)
    inside = buffer[MARGIN : MARGIN + values.numel()].view(values.shape)
    inside.copy_(values)
    return inside, buffer


def is_untouched(buffer: Tensor) -> bool:
    """Whether the margins of a buffer that `within_poison` made are unchanged."""
    edges = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
    return bool((edges.isnan() if buffer.is_floating_point() else edges == int(CANARY)).all())
