"""GPT2Config: presets, reading and writing Hugging Face's config.json, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from fastgpt2 import GPT2, GPT2Config, SamplingConfig
from fastgpt2.config import PRESETS

PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        assert GPT2.from_config(name).num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_change_and_go_through_hugging_faces_form(name: str) -> None:
    config = GPT2Config.preset(name, residual_dropout=0.25)
    assert config.residual_dropout == 0.25
    assert config.eos_token_ids == (50256,)
    assert GPT2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_every_field_goes_through_hugging_faces_form() -> None:
    """Every field survives the round trip with a value that is not its default."""
    changed = GPT2Config(
        vocab_size=61, context_length=24, hidden_size=32, num_layers=3, num_heads=4, feedforward_dim=40,
        activation_function="relu", residual_dropout=0.2, embedding_dropout=0.3, attention_dropout=0.4,
        layer_norm_epsilon=1e-3, initializer_range=0.5, scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True, tie_word_embeddings=False, bos_token_id=1, eos_token_id=(2, 3), pad_token_id=4,
    )  # fmt: skip
    default = GPT2Config()
    for field in dataclasses.fields(GPT2Config):
        assert getattr(changed, field.name) != getattr(default, field.name), field.name
    assert GPT2Config.from_hf(json.loads(json.dumps(changed.to_hf()))) == changed


def test_what_transformers_writes_and_reads() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Config(n_embd=48, n_head=3, n_inner=100, attn_pdrop=0.25, eos_token_id=7)
    ours = GPT2Config.from_hf(theirs.to_dict())
    assert (ours.hidden_size, ours.num_heads, ours.inner_dim, ours.attention_dropout) == (48, 3, 100, 0.25)
    again = transformers.GPT2Config(**ours.to_hf())
    for name in ours.to_hf():
        assert getattr(again, name) == getattr(theirs, name) or name == "architectures", name
    silent = transformers.GPT2Config()
    assert GPT2Config.from_hf({}) == GPT2Config.from_hf(silent.to_dict())


def test_old_names_and_unknown_fields() -> None:
    assert GPT2Config.from_hf({"hidden_size": 36, "num_hidden_layers": 2}).hidden_size == 36
    with pytest.warns(UserWarning, match=r"unknown fields have no effect here: rotary_dim"):
        GPT2Config.from_hf({"rotary_dim": 4})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive int; got 0"),
        ({"num_layers": 2.0}, r"num_layers must be a positive int; got 2\.0"),
        ({"num_heads": True}, "num_heads must be a positive int; got True"),
        ({"hidden_size": 30, "num_heads": 4}, "hidden_size must be a multiple of num_heads; got 30 and 4"),
        ({"feedforward_dim": -1}, "feedforward_dim must be a positive int or None; got -1"),
        ({"residual_dropout": 1.0}, r"residual_dropout must be in \[0, 1\); got 1\.0"),
        ({"attention_dropout": -0.1}, r"attention_dropout must be in \[0, 1\); got -0\.1"),
        ({"embedding_dropout": "0"}, r"embedding_dropout must be in \[0, 1\); got '0'"),
        ({"layer_norm_epsilon": 0.0}, r"layer_norm_epsilon must be a positive number; got 0\.0"),
        ({"activation_function": "gleu"}, "activation_function must be one of .*; got 'gleu'"),
    ],
)
def test_refused_sizes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        GPT2Config(**fields)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "field",
    [
        {"add_cross_attention": True},
        {"is_encoder_decoder": True},
        {"pruned_heads": {"0": [1]}},
        {"quantization_config": {"bits": 4}},
        {"multi_query": True},
        {"position_embedding_type": "relative_key"},
        {"rope_scaling": {"type": "linear"}},
        {"model_type": "gpt_neo"},
    ],
    ids=str,
)
def test_what_would_change_the_maths_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        GPT2Config.from_hf(field)


def test_no_such_preset() -> None:
    with pytest.raises(ValueError, match="no preset 'gpt3'; there are gpt2, gpt2-medium"):
        GPT2Config.preset("gpt3")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an int >= 1; got 0"),
        ({"temperature": -1.0}, "temperature must be finite and >= 0"),
        ({"temperature": float("nan")}, "temperature must be finite and >= 0"),
        ({"top_k": 0}, "top_k must be an int >= 1 or None; got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\] or None; got 0\.0"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\] or None; got 1\.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and > 0"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids must be ints in"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list; got 5"),
        ({"stop_strings": ("",)}, "stop_strings must be non-empty strings"),
        ({"stop_strings": "end"}, "stop_strings must be a list; got 'end'"),
        ({"seed": -1}, r"seed must be an int in \[0, 2\*\*64\); got -1"),
    ],
)
def test_refused_sampling(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)
