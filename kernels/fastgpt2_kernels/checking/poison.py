"""Poisoned memory. It shows what a kernel did not write, and what it read or wrote outside its tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

CANARY = -7.5
MARGIN = 512  # elements on either side, so that one row too many still lies inside


class Poison:
    """Makes tensors between canaries, in place of PyTorch's functions for new tensors. `is_intact` checks the canaries.

    New memory holds NaN. Integers hold -1 between canaries of -7.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.originals: dict[str, Callable[..., Tensor]] = {}

    def make(self, name: str, *args: Any, **options: Any) -> Tensor:
        """Call the function `name`, and put its tensor between canaries."""
        made = self.originals[name](*args, **options)
        is_interpreters = name == "new_empty" and isinstance(args[1], int)  # a call by Triton's interpreter
        if is_interpreters or not self._can_surround(made):
            return made
        # The new tensor takes the place of `made`. The strides stay, so this many elements lie between its ends.
        length = 1 + sum((size - 1) * stride for size, stride in zip(made.shape, made.stride(), strict=True))
        canary = _canary(made.dtype)
        buffer = torch.full((length + 2 * MARGIN,), canary, dtype=made.dtype, device=made.device)
        inside = torch.as_strided(buffer, made.shape, made.stride(), MARGIN)
        if "zeros" in name:
            inside.zero_()
        elif made.dtype != torch.bool:
            buffer[MARGIN : MARGIN + length] = torch.nan if made.is_floating_point() else canary + 6
        self.buffers.append(buffer)
        return inside

    @staticmethod
    def _can_surround(made: Tensor) -> bool:
        """Not a tensor that torch.compile traces, one without memory, or one that the host and a GPU share."""
        return (
            type(made) is Tensor
            and made.numel() > 0
            and made.layout == torch.strided
            and made.device.type in ("cpu", "cuda")
            and not (made.requires_grad or made.dtype.is_complex or made.is_pinned())
        )

    def is_intact(self) -> bool:
        """Whether nothing was written outside the tensors that were made since the last call."""
        buffers = self.buffers.copy()
        self.buffers.clear()
        return all(
            bool((buffer[:MARGIN] == canary).all() and (buffer[-MARGIN:] == canary).all())
            for buffer, canary in ((buffer, _canary(buffer.dtype)) for buffer in buffers)
        )


def _canary(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    if dtype.is_floating_point:
        return CANARY
    return int(CANARY) if dtype.is_signed else torch.iinfo(dtype).max + 1 + int(CANARY)


# Each is replaced while `canaries` is open.
_TORCH_FUNCTIONS = ("empty", "empty_like", "empty_strided", "zeros", "zeros_like")
_TENSOR_METHODS = ("new_empty", "new_zeros")


@contextmanager
def canaries() -> Iterator[Poison]:
    """While the context is open, PyTorch's functions for new and zeroed tensors put them between canaries."""
    poison = Poison()
    with ExitStack() as stack:
        for owner, names in ((torch, _TORCH_FUNCTIONS), (torch.Tensor, _TENSOR_METHODS)):
            for name in names:
                poison.originals[name] = getattr(owner, name)
                stack.enter_context(patch.object(owner, name, _replacement(poison, name)))
        yield poison


def _replacement(poison: Poison, name: str) -> Callable[..., Tensor]:
    def make(*args: Any, **options: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return poison.originals[name](*args, **options)
        return poison.make(name, *args, **options)

    return make


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
