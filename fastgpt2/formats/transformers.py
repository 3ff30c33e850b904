"""Conversion to and from transformers' `GPT2LMHeadModel` in memory. The models share their weights without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from fastgpt2.config import GPT2Config
from fastgpt2.formats.huggingface import hf_state_dict, load_hf_views
from fastgpt2.model import GPT2Base

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

Model = TypeVar("Model", bound=GPT2Base)


def from_transformers(cls: type[Model], hf_model: GPT2LMHeadModel, *, backend: str = "auto") -> Model:
    """Wrap the weights of a `GPT2LMHeadModel` in a `cls`; see `GPT2.from_transformers`."""
    from transformers import GPT2LMHeadModel

    if not isinstance(hf_model, GPT2LMHeadModel):
        raise TypeError(
            f"from_transformers: the model must be transformers' GPT2LMHeadModel; got {type(hf_model).__name__}"
        )
    tied = hf_model.lm_head.weight.data_ptr() == hf_model.transformer.wte.weight.data_ptr()
    config = GPT2Config.from_hf({**hf_model.config.to_dict(), "tie_word_embeddings": tied})
    with torch.device("meta"):
        model = cls(config, backend=backend)
    load_hf_views(model, hf_model.state_dict())
    frozen = {name for name, parameter in hf_model.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model.train(hf_model.training)


def to_transformers(model: GPT2Base) -> GPT2LMHeadModel:
    """Wrap our weights in transformers' GPT2LMHeadModel; see `GPT2.to_transformers`."""
    import transformers

    config = transformers.GPT2Config(**model.config.to_hf())
    with torch.device("meta"):
        hf_model = transformers.GPT2LMHeadModel(config)
    state = hf_state_dict(model)
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    hf_model.load_state_dict(state, assign=True)
    hf_model.tie_weights()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in hf_model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return hf_model.train(model.training)
