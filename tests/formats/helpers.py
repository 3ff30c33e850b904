"""Write Hugging Face folders as other programs do, and compare two models."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fastgpt2 import GPT2, GPT2Config
from tests.helpers import TINY


def write_folder(
    folder: Path, state: dict[str, Tensor], config: GPT2Config = TINY, *, form: str = "safetensors"
) -> Path:
    """Write a Hugging Face folder of `state` as transformers or another program would."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    names = list(state)
    if form == "safetensors":
        safetensors.torch.save_file(state, folder / "model.safetensors")
    elif form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif form == "bin before PyTorch 1.6":
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif form in ("sharded safetensors", "sharded bin"):
        stem, suffix = ("model", "safetensors") if "safetensors" in form else ("pytorch_model", "bin")
        files = {name: f"{stem}-0000{1 + i % 3}-of-00003.{suffix}" for i, name in enumerate(names)}
        for file in sorted(set(files.values())):
            shard = {name: state[name] for name in names if files[name] == file}
            save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
            save(shard, folder / file)
        (folder / f"{stem}.{suffix}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8"
        )
    return folder


def assert_same(loaded: GPT2, model: GPT2) -> None:
    """Assert that two models have bit-identical weights, and that their heads are both tied or both not."""
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    got, expected = loaded.state_dict(), model.state_dict()
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    tied = loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
    assert tied == model.config.tie_word_embeddings


def one_sentence(error: BaseException) -> str:
    """Return the text of an error, and assert that it is one short line."""
    text = str(error)
    assert text, type(error)
    assert "\n" not in text
    assert len(text) < 500
    return text
