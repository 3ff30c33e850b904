"""The next token of every row of logits on PyTorch's own operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt2_kernels import reference


def sample(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    slots: Tensor | None,
    settings: dict[str, Tensor | None],
    seen: Tensor | None,
    mark_seen: bool,
) -> None:
    """Choose a token for every row of logits (R, V), into ids and logprobs (S,) at `slots`."""
    at = torch.arange(len(logits), device=logits.device) if slots is None else slots.long()
    rows = {name: None if t is None else t[at] for name, t in settings.items()}
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen, row_logprobs = reference.sample(wide, seen=None if seen is None else seen[at], **rows)
    ids[at], logprobs[at] = chosen.to(ids.dtype), row_logprobs.float()
    if mark_seen and seen is not None:
        seen[at, chosen] |= ~row_logprobs.isnan()
