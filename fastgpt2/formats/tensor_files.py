"""Reading tensors from safetensors files and from files of `torch.save`, through a memory map."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2.files import load_torch_file
from fastgpt2.formats.weights import canonical_name, checked_dtype, is_mask_buffer
from fastgpt2.messages import first_line, listed

# Bytes to read before the memory map is reopened. Pages that were read count as this process's memory until then.
_MAPPED_BYTES = 32 * 2**20


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, memory-mapped if the format allows it. Their contents are not read yet."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({first_line(error)}); is it whole?") from error
    else:
        contents = torch_load(path)
        tensors = contents["model"] if "model_args" in contents and "model" in contents else contents
        others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
        if others:
            raise ValueError(f"{path}: must map names to tensors; other entries: {listed(others)}")
    for name, tensor in tensors.items():
        if not is_mask_buffer(canonical_name(name)):
            checked_dtype(tensor, f"{path}: {name}")
    return tensors


def torch_load(path: Path) -> dict[str, Any]:
    """Load a file that `torch.save` wrote; ValueError if it is not a dictionary whose keys are strings."""
    contents = load_torch_file(path, mmap=True, what="file of tensors", advice="is it whole?")
    if not isinstance(contents, dict) or not all(isinstance(key, str) for key in contents):
        raise ValueError(f"{path}: must hold a dictionary of tensors; got {type(contents).__name__}")
    return contents


def copy_out(path: Path, tensors: dict[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file into `targets`, block by block, while few pages of the memory map are resident."""
    is_mapped = path.suffix == ".safetensors" or zipfile.is_zipfile(path)
    resident = 0
    with torch.no_grad():
        for name, target in targets.items():
            if target.dim() == 0:
                target.copy_(tensors[name])
                continue
            row_bytes = tensors[name][:1].numel() * tensors[name].element_size()
            rows = max(1, _MAPPED_BYTES // max(row_bytes, 1))
            for start in range(0, target.shape[0], rows):
                if is_mapped and resident >= _MAPPED_BYTES:
                    tensors.clear()
                    tensors, resident = open_tensors(path), 0
                block = target[start : start + rows]
                block.copy_(tensors[name][start : start + block.shape[0]])
                resident += block.shape[0] * row_bytes
            if not is_mapped:
                tensors.pop(name)


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; ValueError if it does not hold one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply
        raise ValueError(f"{path}: not a JSON file ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object; got {type(value).__name__}")
    return value
