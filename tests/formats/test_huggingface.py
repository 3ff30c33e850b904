"""Reading and writing Hugging Face folders: every form, old names, and exchange with transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2 import GPT2
from fastgpt2.checkpoint import hf_state_dict, load_pretrained, save_pretrained
from fastgpt2.tokenizer import Tokenizer
from tests.formats.helpers import assert_same, write_folder
from tests.helpers import TINY, random_ids, random_model

FORMS = ("safetensors", "sharded safetensors", "bin", "bin before PyTorch 1.6", "sharded bin")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_folders(tmp_path: Path, seed: int, form: str, tied: bool) -> None:
    model = random_model(seed, tie_word_embeddings=tied)
    loaded = load_pretrained(write_folder(tmp_path, hf_state_dict(model), model.config, form=form))
    assert_same(loaded, model)
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.tokenizer is None


LEGACY = {
    "no transformer. prefix": lambda s: {name.removeprefix("transformer."): t for name, t in s.items()},
    "causal mask buffers": lambda s: {
        **s,
        **{f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril().bool() for i in range(3)},
        **{f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)},
    },
    "tied head saved too": lambda s: {**s, "lm_head.weight": s["transformer.wte.weight"].clone()},
    "only the head of the tied pair": lambda s: {
        ("lm_head.weight" if name == "transformer.wte.weight" else name): t for name, t in s.items()
    },
    "DistributedDataParallel": lambda s: {f"module.{name}": t for name, t in s.items()},
    "torch.compile": lambda s: {f"_orig_mod.{name}": t for name, t in s.items()},
    "both": lambda s: {f"module._orig_mod.{name}": t for name, t in s.items()},
    "no prefix, masks": lambda s: {
        **{name.removeprefix("transformer."): t for name, t in s.items()},
        "h.0.attn.bias": torch.ones(1, 1, 24, 24),
    },
}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("legacy", LEGACY)
def test_legacy_names(tmp_path: Path, model: GPT2, legacy: str, form: str) -> None:
    folder = write_folder(tmp_path, LEGACY[legacy](hf_state_dict(model)), form=form)
    assert_same(load_pretrained(folder), model)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_single_file_beside_its_config(tmp_path: Path, model: GPT2, file: str) -> None:
    write_folder(tmp_path, hf_state_dict(model), form="safetensors" if "safe" in file else "bin")
    assert_same(load_pretrained(tmp_path / file), model)


def test_two_different_weights_under_a_tied_configuration_stay_two(tmp_path: Path, seed: int) -> None:
    model = random_model(seed, tie_word_embeddings=False)
    with pytest.warns(UserWarning, match="two different weights"):
        loaded = load_pretrained(write_folder(tmp_path, hf_state_dict(model), TINY))
    assert_same(loaded, model)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_dtypes(tmp_path: Path, model: GPT2, saved: torch.dtype, asked: torch.dtype | None) -> None:
    save_pretrained(model, tmp_path, dtype=saved)
    loaded = load_pretrained(tmp_path, dtype=asked)
    assert loaded.dtype == (asked or saved)
    assert_same(loaded, model.to(saved).to(asked or saved))


def test_loaded_weights_can_be_trained(tmp_path: Path, model: GPT2, seed: int) -> None:
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path).train()
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(random_ids(seed, 2, 9)).square().mean().backward()
    optimizer.step()
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for p in loaded.parameters())
    assert all(not torch.equal(p, before[name]) for name, p in loaded.named_parameters())
    assert_same(load_pretrained(tmp_path), model)  # training did not change the file


def test_a_subclass_loads_as_itself(tmp_path: Path, model: GPT2) -> None:
    class Mine(GPT2):
        pass

    model.save_pretrained(tmp_path)
    assert type(Mine.from_pretrained(tmp_path)) is Mine
    assert type(load_pretrained(tmp_path)) is GPT2


# -- to and from transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"tie_word_embeddings": False}, torch.float32),
        ({"activation_function": "prelu"}, torch.float32),
        ({"activation_function": "xielu"}, torch.bfloat16),  # transformers always builds it in bfloat16
    ],
)
def test_transformers_loads_what_we_save_and_we_what_it_saves(
    tmp_path: Path, seed: int, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_model(seed, eos_token_id=(3, 4), feedforward_dim=40, **changes).to(dtype)
    save_pretrained(model, tmp_path / "ours")
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == dtype
    expected = hf_state_dict(model)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, expected.get(name, expected["transformer.wte.weight"])), name
    assert theirs.generation_config.eos_token_id == [3, 4]
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_pretrained(tmp_path / "theirs")
    assert_same(back, model)
    assert back.config == model.config
    assert_same(load_pretrained(tmp_path / "ours"), model)


def test_end_of_text_is_what_transformers_would_stop_at(tmp_path: Path, model: GPT2) -> None:
    write_folder(tmp_path, hf_state_dict(model), TINY.replace(eos_token_id=5))
    assert load_pretrained(tmp_path).config.eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6, 7]}', encoding="utf-8")
    assert load_pretrained(tmp_path).config.eos_token_ids == (6, 7)
    assert load_pretrained(tmp_path, eos_token_id=None).config.eos_token_ids == ()


def test_tokenizer_comes_and_goes_with_the_folder(tmp_path: Path, model: GPT2) -> None:
    from fastgpt2.tokenizer import Tokenizer

    model.tokenizer = Tokenizer.train(["a few words, a few more words"] * 4, 280)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("more words") == model.tokenizer.encode("more words")


def test_an_older_models_end_of_text_is_not_kept_and_its_tokenizer_not_in_silence(tmp_path: Path, seed: int) -> None:
    older = random_model(seed, vocab_size=300, eos_token_id=5)
    older.tokenizer = Tokenizer.train(["a b"], 257)
    save_pretrained(older, tmp_path)
    newer = random_model(seed)
    with pytest.warns(UserWarning, match=r"holds a tokenizer \(tokenizer\.json\) that will be loaded with this model"):
        save_pretrained(newer, tmp_path)
    assert load_pretrained(tmp_path).config.eos_token_id == newer.config.eos_token_id
    older.tokenizer.save(tmp_path / "fresh")
    with pytest.warns(UserWarning, match="holds a tokenizer"):
        save_pretrained(newer, tmp_path / "fresh")
    assert (
        Tokenizer.from_folder(tmp_path / "fresh") is not None
    )  # it might belong to the new model, so it is not removed
