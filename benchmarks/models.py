"""A random GPT-2 and its twin in transformers, the same for every contender."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.harness import Settings
from benchmarks.peers import need
from fastgpt2 import GPT2, GPT2Config
from fastgpt2.checkpoint import hf_state_dict


def fresh(settings: Settings, config: GPT2Config, dtype: torch.dtype = torch.float32) -> GPT2:
    """A new model with the weights of seed 0 in evaluation mode, on the device."""
    torch.manual_seed(0)
    return GPT2(config).eval().to(settings.device, dtype)


def transformers_twin(model: GPT2) -> Any:
    """transformers' model with a copy of the weights, in transformers' own memory layout."""
    transformers = need("transformers")
    config = transformers.GPT2Config(**model.config.to_hf(), loss_type="ForCausalLM")
    twin = transformers.GPT2LMHeadModel(config).to(model.device, model.dtype)
    state = hf_state_dict(model)
    twin.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
    return twin.train(model.training)


@functools.cache
def shared(settings: Settings, config: GPT2Config, dtype: torch.dtype) -> GPT2:
    """The model of `fresh`, made once per process. Callers must not change it."""
    return fresh(settings, config, dtype)


@functools.cache
def shared_twin(settings: Settings, config: GPT2Config, dtype: torch.dtype) -> Any:
    return transformers_twin(shared(settings, config, torch.float32)).to(dtype)
