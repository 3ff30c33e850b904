"""Pairs of models with the same weights: transformers' own, and ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import TINY, draw_parameters

transformers = pytest.importorskip("transformers")


def config(**changes: Any) -> Any:
    """A tiny configuration without dropout, whose special tokens are within its vocabulary."""
    fields = {**TINY.to_hf(), "n_layer": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes}
    return transformers.GPT2Config(**fields)


def pair(seed: int, name: str = "GPT2LMHeadModel", attention: str = "eager", **changes: Any) -> tuple[Any, Any]:
    """transformers' model of that class name and ours, in float64 and eval mode, with the same random weights.

    attention: the attention implementation of transformers' model.
    """
    import fastgpt2.transformers

    theirs = getattr(transformers, name)(config(**changes, attn_implementation=attention))
    draw_parameters(theirs, seed)
    ours = getattr(fastgpt2.transformers, name)(config(**changes))
    ours.load_state_dict(theirs.state_dict())
    ours.tie_weights()
    return theirs.double().eval(), ours.double().eval()


def masks(seed: int, rows: int, tokens: int) -> dict[str, Tensor]:
    """Padding masks (rows, tokens) of every kind. Each row keeps at least one token, and some row drops one."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randint(1, tokens, (rows, 1), generator=generator)
    right = (torch.arange(tokens) < kept).long()
    holes = torch.randint(2, (rows, tokens), generator=generator)
    holes[:, 0] = 1
    holes[0, -1] = 0
    return {"right": right, "left": right.flip(1), "holes": holes, "none": torch.ones_like(right)}
