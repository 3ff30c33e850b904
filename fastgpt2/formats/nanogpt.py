"""nanoGPT's `ckpt.pt`: reading its model_args as our configuration, and saving our models in its format."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fastgpt2.config import GPT2Config
from fastgpt2.files import staged_folder
from fastgpt2.formats.weights import HEAD, WTE, named_weights, written
from fastgpt2.messages import first_line, listed
from fastgpt2.model import GPT2Base

CHECKPOINT_FILE = "ckpt.pt"

# nanoGPT's model_args and our fields. `dropout` sets all three of our dropouts; the loader handles `bias`.
_MODEL_ARGS = {
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "hidden_size",
    "block_size": "context_length",
    "vocab_size": "vocab_size",
    "dropout": "residual_dropout",
}
# What nanoGPT always computes and has no setting for.
_FIXED_FIELDS: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "tie_word_embeddings": True,
}
_EXACT_GELU = ("gelu", "gelu_python")
_TANH_GELU = ("gelu_new", "gelu_accurate", "gelu_fast", "gelu_python_tanh", "gelu_pytorch_tanh")
# The entry of a ckpt.pt in which `save_nanogpt` stores the whole configuration.
_OUR_CONFIG = "fastgpt2_config"


def save_nanogpt(model: GPT2Base, path: str | PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Save a `ckpt.pt` that nanoGPT's sample.py can load. It holds no optimizer state.

    nanoGPT always computes the exact GELU. A model with the tanh approximation is saved with a warning: nanoGPT's
    activations differ by about 1e-3, as they do when it loads OpenAI's weights. Settings that nanoGPT's format cannot
    hold go into an extra entry, so that `load_pretrained` restores the same model.

    Args:
        model: The model.
        path: The folder to write `ckpt.pt` into; it is created if it is missing.
        dtype: The dtype to save the weights in; None keeps the model's.

    Raises:
        ValueError: nanoGPT's only architecture would compute this model differently; the error names the fields.
        OSError: The file cannot be written.
    """
    config = model.config
    wrong = [name for name, value in _FIXED_FIELDS.items() if getattr(config, name) != value]
    if config.inner_dim != 4 * config.hidden_size:
        wrong.append("feedforward_dim")
    if not config.residual_dropout == config.embedding_dropout == config.attention_dropout:
        wrong.append(
            "embedding_dropout" if config.residual_dropout == config.attention_dropout else "attention_dropout"
        )
    if config.activation_function not in (*_EXACT_GELU, *_TANH_GELU):
        wrong.append("activation_function")
    if wrong:
        got = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
        raise ValueError(
            f"save_nanogpt: nanoGPT cannot run this model, as it has no setting for {got}; use save_pretrained"
        )
    if config.activation_function in _TANH_GELU:
        warnings.warn(
            "save_nanogpt: nanoGPT computes the exact GELU; this model was made with its tanh approximation",
            stacklevel=2,
        )
    args = {theirs: getattr(config, ours) for theirs, ours in _MODEL_ARGS.items()}
    state = {name: written(tensor, dtype) for name, tensor in named_weights(model, transpose=False)}
    state[HEAD] = state[WTE]
    with staged_folder(path) as stage:
        contents = {"model_args": {**args, "bias": True}, "model": state, _OUR_CONFIG: config.to_hf()}
        try:
            torch.save(contents, stage / CHECKPOINT_FILE)
        except RuntimeError as error:  # PyTorch's writer does not tell the reason
            raise OSError(f"{path}: the weights cannot be written: {first_line(error)}; is the disk full?") from error
        if model.tokenizer is not None:
            model.tokenizer.save(stage)


def read_config(contents: Mapping[str, Any], path: Path) -> tuple[GPT2Config, bool]:
    """Return the configuration that a `ckpt.pt` holds, and whether its layers have biases."""
    args = contents["model_args"]
    unknown = sorted(set(args) - set(_MODEL_ARGS) - {"bias"})
    missing = sorted(set(_MODEL_ARGS) - set(args) - {"dropout"})
    if unknown or missing:
        raise ValueError(
            f"{path}: model_args must be nanoGPT's; missing: {listed(missing)}; unknown: {listed(unknown)}"
        )
    has_biases = bool(args.get("bias", True))
    if _OUR_CONFIG in contents:
        return GPT2Config.from_hf(contents[_OUR_CONFIG]), has_biases
    dropout = args.get("dropout", 0.0)
    config = {ours: args[theirs] for theirs, ours in _MODEL_ARGS.items() if theirs in args}
    config |= {"embedding_dropout": dropout, "attention_dropout": dropout, "activation_function": "gelu"}
    return GPT2Config(**config), has_biases
