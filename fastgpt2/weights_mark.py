"""Noticing that a model's weights have changed, without reading all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# How many numbers of a large tensor are compared. Of a smaller tensor all are.
SAMPLES = 1024


class WeightsMark:
    """What a model's parameters were at one moment.

    PyTorch counts the changes that it makes to a tensor in place, so an optimizer's step, `load_state_dict` and `copy_`
    are noticed by that count, and a replaced parameter by its address. What is written through `.data` is not counted:
    it is noticed if it changes one of `SAMPLES` numbers of a tensor, spread over its rows and columns. A permutation or
    a rescaling changes nearly all of them; a change of a few numbers may go unseen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._identity = _identity(model)
        self._samples = _samples(model)

    def still_holds(self, model: nn.Module) -> bool:
        return self._identity == _identity(model) and torch.equal(self._samples, _samples(model))


class ChangeCounts:
    """PyTorch's counts of in-place changes of a model's parameters; cheap enough to look at before every step."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if not p.is_inference()]
        self._counts = self._now()

    def still_hold(self) -> bool:
        return self._counts == self._now()

    def _now(self) -> list[int]:
        return [p._version for p in self._parameters]


def _identity(model: nn.Module) -> list[tuple[object, ...]]:
    # Inference tensors have no count: what changes them is noticed by the samples alone.
    return [
        (p.data_ptr(), p.dtype, p.shape, p.stride(), 0 if p.is_inference() else p._version) for p in model.parameters()
    ]


def _samples(model: nn.Module) -> Tensor:
    """Some numbers of every parameter, as bits: NaN is equal to itself."""
    return torch.cat([_bits(p.detach()) for p in model.parameters()])


def _bits(values: Tensor) -> Tensor:
    numel = values.numel()
    if numel > SAMPLES:
        # An even step would skip whole columns of a matrix, because its width is even. An odd one spreads over them.
        step = numel // SAMPLES | 1
        flat = values.reshape(-1) if values.is_contiguous() else values.t().reshape(-1)
        values = flat[::step]
    return values.reshape(-1).float().view(torch.int32)
