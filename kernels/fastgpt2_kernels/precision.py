"""Whether float32 matrix products may be rounded to tf32."""

from __future__ import annotations

import torch


def is_float32_exact() -> bool:
    """Whether float32 matrix products must not be rounded to tf32.

    PyTorch has two switches, `torch.set_float32_matmul_precision` and `torch.backends.cuda.matmul.fp32_precision`. The
    first also sets the second. It cannot be read after the second was set on its own, so this reads the second.
    """
    return torch.backends.cuda.matmul.fp32_precision != "tf32"


# torch.compile calls it and does not trace it; see `backends._load`.
is_float32_exact._dynamo_marked_constant = True  # type: ignore[attr-defined]
