"""Outputs that show what a kernel left unwritten, and what it wrote beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

CANARY = -7.5
MARGIN = 512  # elements on either side: room for a row too many


class Poison:
    """While it is in force, `Tensor.new_empty` gives NaN between canaries; `check` looks whether those are alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffers: list[Tensor] = []
        self.new_empty = torch.Tensor.new_empty
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda like, *args, **kwargs: self.make(like, *args, **kwargs))

    def make(self, like: Tensor, shape: Sequence[int] | int, **options: Any) -> Tensor:
        if isinstance(shape, int):  # Triton's interpreter, for itself
            return self.new_empty(like, shape, **options)
        numel = torch.Size(shape).numel()
        buffer = like.new_full((numel + 2 * MARGIN,), CANARY, **options)
        buffer[MARGIN : MARGIN + numel] = torch.nan
        self.buffers.append(buffer)
        return buffer[MARGIN : MARGIN + numel].view(shape)

    def check(self) -> None:
        for buffer in self.buffers:
            assert (buffer[:MARGIN] == CANARY).all()
            assert (buffer[-MARGIN:] == CANARY).all()
        self.buffers.clear()
