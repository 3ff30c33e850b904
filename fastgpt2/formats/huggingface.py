"""Hugging Face model folders: config.json, weights in one or more files, and tokenizer files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2.config import GPT2Config
from fastgpt2.files import staged_folder
from fastgpt2.formats.tensor_files import read_json
from fastgpt2.formats.weights import (
    HEAD,
    WTE,
    canonical_name,
    check_keys,
    is_linear_weight,
    is_mask_buffer,
    named_weights,
    written,
)
from fastgpt2.messages import first_line, listed
from fastgpt2.model import GPT2Base

# In order of preference. An index lists the files ("shards") that hold the weights.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


def save_pretrained(model: GPT2Base, path: str | PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Save a folder that `load_pretrained` and transformers' `GPT2LMHeadModel.from_pretrained` load bit for bit.

    The folder gets config.json, model.safetensors, generation_config.json and the model's tokenizer, if it has one. If
    the model has none but the folder does, that tokenizer stays, with a warning.

    All files are written in full before the first one gets its final name, and each replaces an older file atomically.
    A crash while writing leaves the previous checkpoint.

    Args:
        model: The model.
        path: The folder; it is created if it is missing.
        dtype: The dtype to save the weights in; None keeps the model's.

    Raises:
        OSError: The folder cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with staged_folder(path) as stage:
        state = {name: written(tensor, dtype) for name, tensor in hf_state_dict(model).items()}
        try:
            save_file(state, stage / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: the weights cannot be written: {first_line(error)}") from error
        config = model.config.to_hf()
        _write_json(stage / "config.json", {**config, "dtype": str(dtype or model.dtype).removeprefix("torch.")})
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
        # Written even without ids: otherwise the end-of-text id of an older model in this folder would stay in force.
        _write_json(stage / "generation_config.json", ids)
        if model.tokenizer is not None:
            model.tokenizer.save(stage)
    older = [name for name in TOKENIZER_FILES if Path(path).expanduser().joinpath(name).exists()]
    if model.tokenizer is None and older:
        # Another library may have saved it there for this model. Only the caller knows.
        warnings.warn(
            f"save_pretrained: {path} holds a tokenizer ({listed(older)}) that will be loaded with this model, which "
            "has none; set model.tokenizer, or remove the file if it is another model's",
            stacklevel=2,
        )


def hf_state_dict(model: GPT2Base) -> dict[str, Tensor]:
    """The weights under Hugging Face's names and in its layout, without copying them.

    Args:
        model: The model.

    Returns:
        Views of the model's weights by name. A tied head is left out.
    """
    return dict(named_weights(model, transpose=True))


def load_hf_views(model: GPT2Base, state: Mapping[str, Tensor]) -> None:
    """Replace a model's weights by views of a Hugging Face state dict, without copying.

    Args:
        model: The model; it may be on the meta device.
        state: Tensors with Hugging Face's names and layout.

    Raises:
        ValueError: Keys or shapes do not fit the model.
    """
    by_name = {canonical_name(name): tensor for name, tensor in state.items()}
    by_name = {name: tensor for name, tensor in by_name.items() if not is_mask_buffer(name)}
    if model.config.tie_word_embeddings:
        by_name.pop(HEAD, None)
    shapes = {name: tensor.shape for name, tensor in by_name.items()}
    check_keys(model, shapes, "the model's state_dict", transpose=True)
    views = {name: t.t() if is_linear_weight(name) else t for name, t in by_name.items()}
    if model.config.tie_word_embeddings:
        views[HEAD] = views[WTE]
    model.load_state_dict(views, assign=True)
    model.tie_weights()


def read_hf_config(folder: Path) -> GPT2Config:
    """The configuration in a folder's config.json, with the end-of-text ids of its generation_config.json if any."""
    try:
        config = GPT2Config.from_hf(read_json(folder / "config.json"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from error
    generation = folder / "generation_config.json"
    # If both files have end-of-text ids, transformers' generate uses these.
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    return config if eos is None else config.replace(eos_token_id=eos)


def shard_names(index: Path) -> list[str]:
    """The files that an index lists, without repetitions."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(f, str) and Path(f).name == f for f in weight_map.values()
    ):
        raise ValueError(f'{index}: must map every weight to a file of its folder under "weight_map"')
    return sorted(set(weight_map.values()))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
