"""What float32 may be rounded to in a matrix product."""

from __future__ import annotations

import torch


def is_float32_exact() -> bool:
    """Whether products of float32 must not be rounded to tf32.

    PyTorch has two switches, `torch.set_float32_matmul_precision` and `torch.backends.cuda.matmul.fp32_precision`. The
    first sets the second as well, and cannot be read once the second was set by itself.
    """
    return torch.backends.cuda.matmul.fp32_precision != "tf32"


# torch.compile calls it and does not trace it; see `backends._load`.
is_float32_exact._dynamo_marked_constant = True  # type: ignore[attr-defined]
