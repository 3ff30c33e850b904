"""Gradients on PyTorch's operators, as a fallback for backward kernels that do not compile or launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgpt2_kernels.backends import KernelFailedError, Size, note_failure


def gradients(
    operator: str,
    size: Size | None,
    error: KernelFailedError,
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    dout: Tensor,
) -> list[Tensor | None]:
    """The gradients of `function(*inputs)` in the inputs that need one.

    Raises `error` again if `size` is None, which means that the caller did not ask for "auto".
    """
    if size is None:
        raise error
    note_failure(operator, dout.device, error, size)
    with torch.enable_grad():
        leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        out = function(*leaves)
        found = iter(torch.autograd.grad(out, wanted, dout.to(out.dtype)) if wanted else ())
    return [next(found) if t is not None and t.requires_grad else None for t in leaves]
