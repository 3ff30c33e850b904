"""Loading a checkpoint: find its files, check them against its configuration, copy the weights into a model.

A file with `model_args` is treated as nanoGPT's, every other file as Hugging Face's.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgpt2.config import GPT2Config
from fastgpt2.files import check_archive
from fastgpt2.formats import nanogpt
from fastgpt2.formats.hub import download
from fastgpt2.formats.huggingface import WEIGHT_FILES, read_hf_config, shard_names
from fastgpt2.formats.tensor_files import copy_out, open_tensors, torch_load
from fastgpt2.formats.weights import (
    FLOAT_DTYPES,
    HEAD,
    WPE,
    WTE,
    canonical_name,
    check_keys,
    checked_dtype,
    is_mask_buffer,
    named_weights,
)
from fastgpt2.messages import listed
from fastgpt2.model import GPT2Base
from fastgpt2.tokenizer import Tokenizer

# The name of the small model that is included in the package.
EMBEDDED = "embedded"
_ASSETS = Path(__file__).parent.parent / "assets"
# Fields of the configuration that may be set below the file's value, and the weights whose last rows are then dropped.
_ROW_FIELDS = {"vocab_size": (WTE, HEAD), "context_length": (WPE,)}

ModelT = TypeVar("ModelT", bound=GPT2Base)


def load_model(
    model_class: type[ModelT],
    name_or_path: str | PathLike[str],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    backend: str,
    revision: str | None,
    config_changes: Mapping[str, Any],
) -> ModelT:
    """Load a `model_class` in eval mode; see `GPT2.from_pretrained`.

    The files are memory-mapped and copied tensor by tensor, so memory never holds more than one copy of the weights.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"load_pretrained: dtype must be a floating-point torch.dtype; got {dtype}")
    unknown = sorted(set(config_changes) - {field.name for field in fields(GPT2Config)})
    if unknown:
        raise TypeError(f"load_pretrained: unknown argument {', '.join(unknown)}; see GPT2Config for the fields")
    source = _find(name_or_path, revision)
    config = source.config.replace(**config_changes)
    contents = {path: open_tensors(path) for path in source.files}
    where = {
        canonical: (path, name)
        for path, tensors in contents.items()
        for name in tensors
        if not is_mask_buffer(canonical := canonical_name(name))
    }
    config = _resolve_tie(config, where, contents, source.name)
    with torch.device("meta"):
        model = model_class(config, backend=backend)
    shapes = {canonical: contents[path][name].shape for canonical, (path, name) in where.items()}
    cut = {name for field, names in _ROW_FIELDS.items() if field in config_changes for name in names}
    transpose = not source.is_nanogpt
    check_keys(model, shapes, source.name, transpose=transpose, has_biases=source.has_biases, cut=cut)

    wte_path, wte_name = where[WTE]
    model.to(dtype=dtype or checked_dtype(contents[wte_path][wte_name], source.name)).to_empty(device=device)
    model.tie_weights()
    targets: dict[Path, dict[str, Tensor]] = {path: {} for path in source.files}
    for canonical, tensor in named_weights(model, transpose=transpose):
        if canonical in where:
            path, name = where[canonical]
            targets[path][name] = tensor
        else:
            tensor.zero_()  # a bias that the nanoGPT model does not have
    while contents:
        path, tensors = contents.popitem()
        copy_out(path, tensors, targets[path])
    if source.folder is not None:
        model.tokenizer = Tokenizer.from_folder(source.folder)
    return model.eval()


def read_config(name_or_path: str | PathLike[str], *, revision: str | None = None) -> GPT2Config:
    """Read the configuration of a checkpoint. For a hub name, only the configuration is downloaded.

    Args:
        name_or_path: A folder, a file, a name on the hub, or "embedded".
        revision: A branch, tag or commit on the hub.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: The configuration is not that of a supported GPT-2.
        ImportError: A hub name was given without the extra, `pip install "fastgpt2[hub]"`.
    """
    path = _local(name_or_path, revision)
    folder = download(os.fspath(name_or_path), revision, config_only=True) if path is None else path
    return read_hf_config(folder) if (folder / "config.json").exists() else _find(folder, None).config


def read_dtype(name_or_path: str | PathLike[str], *, revision: str | None = None) -> torch.dtype:
    """Read the dtype that a model loaded from a checkpoint has by default. For a hub name, the weights are downloaded.

    Args:
        name_or_path: A folder, a file, a name on the hub, or "embedded".
        revision: A branch, tag or commit on the hub.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: The files do not hold a supported GPT-2.
        ImportError: A hub name was given without the extra, `pip install "fastgpt2[hub]"`.
    """
    source = _find(name_or_path, revision)
    found = {canonical_name(name): tensor for path in source.files for name, tensor in open_tensors(path).items()}
    embeddings = found.get(WTE, found.get(HEAD))  # a tied weight may be under either name
    if embeddings is None:
        raise ValueError(f"{source.name}: holds no token embeddings; name a dtype, or another checkpoint")
    return checked_dtype(embeddings, source.name)


# -- finding the files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """The files and the configuration of a checkpoint; its weights have not been read yet."""

    name: str  # what errors call it
    config: GPT2Config
    files: tuple[Path, ...]
    folder: Path | None  # the folder that may hold a tokenizer
    is_nanogpt: bool = False
    has_biases: bool = True


def _find(name_or_path: str | PathLike[str], revision: str | None) -> _Source:
    path = _local(name_or_path, revision)
    if path is None:
        return _find_in_folder(download(os.fspath(name_or_path), revision))
    return _find_in_folder(path) if path.is_dir() else _find_file(path)


def _local(name_or_path: str | PathLike[str], revision: str | None) -> Path | None:
    """The file or folder with this name; None if there is none and the name could be one on the hub."""
    path = _ASSETS if name_or_path == EMBEDDED else Path(name_or_path).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(
                f"load_pretrained: revision needs a name on the hub; {path} is on this machine: leave revision out"
            )
        if not (path.is_dir() or path.is_file()):  # a device or a pipe, which may be endless
            raise ValueError(f"{path}: must be a folder or an ordinary file; it is neither")
        return path
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", os.fspath(name_or_path))
    if not is_hub_name or path.suffix in (".safetensors", ".bin", ".pt"):
        raise FileNotFoundError(f"{path}: no such file or folder (and no name of a model on the hub, like owner/name)")
    return None


def _find_in_folder(folder: Path) -> _Source:
    if not (folder / "config.json").exists():
        if (folder / nanogpt.CHECKPOINT_FILE).exists():
            return _find_file(folder / nanogpt.CHECKPOINT_FILE)
        raise FileNotFoundError(
            f"{folder}: has neither config.json (Hugging Face) nor {nanogpt.CHECKPOINT_FILE} (nanoGPT)"
        )
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            names = shard_names(folder / name) if name.endswith(".index.json") else [name]
            missing = [name for name in names if not (folder / name).exists()]
            if missing:
                raise FileNotFoundError(f"{folder}: the index names files that are missing: {listed(missing)}")
            for name in names:
                if not name.endswith(".safetensors"):
                    check_archive(folder / name)
            return _Source(str(folder), read_hf_config(folder), tuple(folder / name for name in names), folder)
    raise FileNotFoundError(f"{folder}: has a config.json but no weights; looked for {', '.join(WEIGHT_FILES)}")


def _find_file(path: Path) -> _Source:
    contents = {}
    if path.suffix != ".safetensors":
        check_archive(path)
        contents = torch_load(path)
    if "model_args" in contents and "model" in contents:
        config, has_biases = nanogpt.read_config(contents, path)
        return _Source(str(path), config, (path,), path.parent, is_nanogpt=True, has_biases=has_biases)
    if not (path.parent / "config.json").exists():
        raise FileNotFoundError(f"{path}: needs the model's config.json beside it; there is none in {path.parent}")
    return _Source(str(path), read_hf_config(path.parent), (path,), path.parent)


# -- tied weights ---------------------------------------------------------------------------------------------------


def _resolve_tie(
    config: GPT2Config, where: dict[str, tuple[Path, str]], contents: Mapping[Path, Mapping[str, Tensor]], source: str
) -> GPT2Config:
    """Keep only one of a tied weight's two names in `where`.

    If the file holds two different weights, untie them, as transformers does.
    """
    if not config.tie_word_embeddings or HEAD not in where:
        return config
    if WTE in where:
        wte, head = (contents[path][name] for path, name in (where[WTE], where[HEAD]))
        if wte.shape != head.shape or not _equal(wte, head):
            warnings.warn(
                f"{source}: tie_word_embeddings is true, but the file holds two different weights; they stay untied",
                stacklevel=4,  # the caller of GPT2.from_pretrained
            )
            return config.replace(tie_word_embeddings=False)
        where.pop(HEAD)
    else:
        where[WTE] = where.pop(HEAD)
    return config


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)
