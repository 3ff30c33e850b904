"""Checkpoints: every form in, Hugging Face and nanoGPT out, errors, memory, crashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2 import GPT2, GPT2Config
from fastgpt2.checkpoint import hf_state_dict, load_pretrained, save_nanogpt, save_pretrained
from tests.helpers import TINY, assert_close, random_ids, random_model, redraw

safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture
def model(seed: int) -> GPT2:
    return random_model(seed)


def write_folder(
    folder: Path, state: dict[str, Tensor], config: GPT2Config = TINY, *, form: str = "safetensors"
) -> Path:
    """A Hugging Face folder of `state`, as transformers (or somebody else) would have written it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    names = list(state)
    if form == "safetensors":
        safetensors_torch.save_file(state, folder / "model.safetensors")
    elif form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif form == "bin before PyTorch 1.6":
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif form in ("sharded safetensors", "sharded bin"):
        stem, suffix = ("model", "safetensors") if "safetensors" in form else ("pytorch_model", "bin")
        files = {name: f"{stem}-0000{1 + i % 3}-of-00003.{suffix}" for i, name in enumerate(names)}
        for file in sorted(set(files.values())):
            shard = {name: state[name] for name in names if files[name] == file}
            save = safetensors_torch.save_file if suffix == "safetensors" else torch.save
            save(shard, folder / file)
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def assert_same(loaded: GPT2, model: GPT2) -> None:
    """The same weights bit for bit, and the same tie."""
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    got, expected = loaded.state_dict(), model.state_dict()
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    tied = loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
    assert tied == model.config.tie_word_embeddings


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
    assert_same(load_pretrained(tmp_path), model)  # the file did not change under the training


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
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6, 7]}')
    assert load_pretrained(tmp_path).config.eos_token_ids == (6, 7)
    assert load_pretrained(tmp_path, eos_token_id=None).config.eos_token_ids == ()


def test_tokenizer_comes_and_goes_with_the_folder(tmp_path: Path, model: GPT2) -> None:
    from fastgpt2.tokenizer import Tokenizer

    model.tokenizer = Tokenizer.train(["a few words, a few more words"] * 4, 280)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("more words") == model.tokenizer.encode("more words")


# -- nanoGPT -----------------------------------------------------------------------------------------------------------


class NanoBlock(torch.nn.Module):
    """nanoGPT's block, its names and its maths (github.com/karpathy/nanoGPT, model.py), written anew."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = torch.nn.LayerNorm(width, bias=bias)
        self.attn = torch.nn.ModuleDict(
            {"c_attn": torch.nn.Linear(width, 3 * width, bias), "c_proj": torch.nn.Linear(width, width, bias)}
        )
        self.ln_2 = torch.nn.LayerNorm(width, bias=bias)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(width, 4 * width, bias), "c_proj": torch.nn.Linear(4 * width, width, bias)}
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in qkv)
        scores = (q @ k.transpose(-2, -1)) * (C // self.heads) ** -0.5
        scores = scores.masked_fill(torch.ones(T, T).tril() == 0, float("-inf"))
        x = x + self.attn["c_proj"]((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp["c_proj"](torch.nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(torch.nn.Module):
    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        width, bias = args["n_embd"], args["bias"]
        self.transformer = torch.nn.ModuleDict(
            {
                "wte": torch.nn.Embedding(args["vocab_size"], width),
                "wpe": torch.nn.Embedding(args["block_size"], width),
                "h": torch.nn.ModuleList(NanoBlock(width, args["n_head"], bias) for _ in range(args["n_layer"])),
                "ln_f": torch.nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = torch.nn.Linear(width, args["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def nano_checkpoint(path: Path, seed: int, *, bias: bool = True, prefix: str = "", vocab_size: int = 61) -> NanoGPT:
    """Write a ckpt.pt as nanoGPT's train.py does; returns the model."""
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": vocab_size}
    args = {**sizes, "bias": bias, "dropout": 0.1}
    nano = NanoGPT(args)
    redraw(nano, seed)
    optimizer = torch.optim.AdamW(nano.parameters())
    nano(random_ids(seed, 2, 5)).square().mean().backward()
    optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "model": {prefix + name: tensor for name, tensor in nano.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "model_args": args,
            "iter_num": 7,
            "best_val_loss": torch.tensor(3.2),
            "config": {"dataset": "text", "device": "cpu"},
        },
        path,
    )
    return nano.eval()


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoints_compute_the_same(tmp_path: Path, seed: int, bias: bool, prefix: str) -> None:
    nano = nano_checkpoint(tmp_path / "ckpt.pt", seed, bias=bias, prefix=prefix).double()
    ids = random_ids(seed, 2, 24)
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        model = load_pretrained(source, dtype=torch.float64)
        assert model.config.residual_dropout == model.config.attention_dropout == 0.1
        assert_close(model(ids), nano(ids), "logits")


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_round_trip(tmp_path: Path, seed: int, bias: bool) -> None:
    nano = nano_checkpoint(tmp_path / "in" / "ckpt.pt", seed, bias=bias)
    save_nanogpt(load_pretrained(tmp_path / "in"), tmp_path / "out")
    back = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    again = NanoGPT(back["model_args"])
    again.load_state_dict(back["model"])  # strict
    for name, tensor in nano.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    zero = [name for name in again.state_dict() if name not in nano.state_dict()]
    assert bool(zero) == (not bias)
    assert all(not again.state_dict()[name].any() for name in zero)


def test_hugging_face_to_nanogpt_and_back(tmp_path: Path, seed: int) -> None:
    model = random_model(seed, activation_function="gelu", eos_token_id=2)
    save_nanogpt(model, tmp_path / "nano")
    loaded = load_pretrained(tmp_path / "nano")
    assert_same(loaded, model)
    assert loaded.config == model.config
    with pytest.warns(UserWarning, match="exact GELU"):
        save_nanogpt(random_model(seed), tmp_path / "tanh")
    assert load_pretrained(tmp_path / "tanh").config == TINY


def test_padded_vocabulary(tmp_path: Path, seed: int) -> None:
    nano = nano_checkpoint(tmp_path / "ckpt.pt", seed, vocab_size=64)
    ids = random_ids(seed, 1, 9)
    whole, cut = load_pretrained(tmp_path), load_pretrained(tmp_path, vocab_size=61, context_length=9)
    assert whole.config.vocab_size == 64
    torch.testing.assert_close(whole(ids), nano(ids))
    torch.testing.assert_close(cut(ids), nano(ids)[..., :61])
    assert cut.transformer.wpe.weight.shape == (9, 32)
    with pytest.raises(ValueError, match=r"wte.weight is \(64, 32\) in the file and \(65, 32\)"):
        load_pretrained(tmp_path, vocab_size=65)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"feedforward_dim": 40}, "feedforward_dim=40"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"scale_attn_weights": False, "tie_word_embeddings": False}, "scale_attn_weights=False, tie_word_embeddings"),
        ({"attention_dropout": 0.5}, "attention_dropout=0.5"),
        ({"embedding_dropout": 0.5}, "embedding_dropout=0.5"),
    ],
)
def test_nanogpt_has_no_setting_for(tmp_path: Path, seed: int, changes: dict[str, Any], named: str) -> None:
    model = random_model(seed, **{"activation_function": "gelu", **changes})
    with pytest.raises(ValueError, match=f"nanoGPT cannot compute this model.*{named}"):
        save_nanogpt(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- bad inputs --------------------------------------------------------------------------------------------------------


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert text, type(error)
    assert "\n" not in text
    assert len(text) < 500
    return text


def spoil(folder: Path, kind: str, state: dict[str, Tensor]) -> Path:
    """A folder (or file) that cannot be loaded, made from good weights."""
    wte = "transformer.wte.weight"
    if kind == "missing key":
        return write_folder(folder, {name: t for name, t in state.items() if "h.1.ln_1" not in name})
    if kind == "unexpected key":
        return write_folder(folder, {**state, "score.weight": torch.ones(2, 32)})
    if kind == "wrong shape":
        return write_folder(folder, {**state, wte: torch.ones(60, 32)})
    if kind == "(out, in) weights in Hugging Face's format":
        return write_folder(folder, {n: t.t() if "c_attn.weight" in n else t for n, t in state.items()})
    if kind == "more layers in the configuration":
        return write_folder(folder, state, TINY.replace(num_layers=9))
    if kind == "integer weights":
        return write_folder(folder, {**state, wte: torch.ones(61, 32, dtype=torch.int8)})
    good = write_folder(
        folder, state, form="bin" if "bin" in kind else "sharded bin" if "shard" in kind else "safetensors"
    )
    if kind == "no weights":
        (good / "model.safetensors").unlink()
    elif kind == "no config.json":
        (good / "config.json").unlink()
    elif kind == "config.json is no JSON":
        (good / "config.json").write_text("{")
    elif kind == "config.json is a list":
        (good / "config.json").write_text("[]")
    elif kind == "another model_type":
        (good / "config.json").write_text('{"model_type": "llama"}')
    elif kind == "cross-attention":
        (good / "config.json").write_text('{"add_cross_attention": true}')
    elif kind == "a size that is no number":
        (good / "config.json").write_text('{"n_embd": "wide"}')
    elif kind == "truncated safetensors":
        file = good / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "a pointer instead of the file":
        (good / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == "empty safetensors":
        (good / "model.safetensors").write_bytes(b"")
    elif kind == "truncated bin":
        file = good / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[:1000])
    elif kind == "empty bin":
        (good / "pytorch_model.bin").write_bytes(b"")
    elif kind == "bin with code":
        torch.save({"a": spoil}, good / "pytorch_model.bin")
    elif kind == "bin with a list":
        torch.save([torch.ones(1)], good / "pytorch_model.bin")
    elif kind == "bin with other values":
        torch.save({**state, "step": 3}, good / "pytorch_model.bin")
    elif kind == "missing shard":
        (good / "pytorch_model-00002-of-00003.bin").unlink()
    elif kind == "shard index without a map":
        (good / "pytorch_model.bin.index.json").write_text("{}")
    elif kind == "shard outside the folder":
        (good / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../b.bin"}}')
    elif kind == "file without its configuration":
        (good / "config.json").unlink()
        return good / "model.safetensors"
    elif kind == "broken generation_config.json":
        (good / "generation_config.json").write_text("?")
    elif kind == "broken tokenizer.json":
        (good / "tokenizer.json").write_text("{}")
    elif kind == "nanoGPT with other arguments":
        torch.save({"model": state, "model_args": {"n_layer": 3, "rope": True}}, good / "ckpt.pt")
        return good / "ckpt.pt"
    elif kind == "no such folder":
        return good / "elsewhere"
    else:
        raise AssertionError(kind)
    return good


BAD: dict[str, tuple[type[Exception], str]] = {
    "missing key": (ValueError, r"missing keys: transformer\.h\.1\.ln_1\.weight, transformer\.h\.1\.ln_1\.bias$"),
    "unexpected key": (ValueError, r"unexpected keys: transformer\.score\.weight"),
    "wrong shape": (ValueError, r"wte\.weight is \(60, 32\) in the file and \(61, 32\) in the configuration"),
    "(out, in) weights in Hugging Face's format": (
        ValueError,
        r"c_attn\.weight is \(96, 32\) in the file and \(32, 96\)",
    ),
    "more layers in the configuration": (ValueError, r"missing keys: .*and \d+ more"),
    "integer weights": (ValueError, r"wte\.weight: weights must be float64, .*; got torch\.int8"),
    "no weights": (FileNotFoundError, "has a config.json but no weights"),
    "no config.json": (FileNotFoundError, "neither config.json"),
    "config.json is no JSON": (ValueError, r"config\.json: not a JSON file"),
    "config.json is a list": (ValueError, r"config\.json: must hold a JSON object; got list"),
    "another model_type": (ValueError, "model_type must be 'gpt2'; got 'llama'"),
    "cross-attention": (ValueError, "add_cross_attention=True is not supported"),
    "a size that is no number": (ValueError, "hidden_size must be a positive int; got 'wide'"),
    "truncated safetensors": (ValueError, r"model\.safetensors: not a readable safetensors file"),
    "a pointer instead of the file": (ValueError, r"model\.safetensors: not a readable safetensors file"),
    "empty safetensors": (ValueError, r"model\.safetensors: not a readable safetensors file"),
    "truncated bin": (ValueError, r"pytorch_model\.bin: not a readable file of tensors"),
    "empty bin": (ValueError, r"pytorch_model\.bin: not a readable file of tensors"),
    "bin with code": (ValueError, r"pytorch_model\.bin: not a readable file of tensors"),
    "bin with a list": (ValueError, r"pytorch_model\.bin: must hold a dictionary of tensors; got list"),
    "bin with other values": (ValueError, r"pytorch_model\.bin: must map names to tensors; other entries: step"),
    "missing shard": (FileNotFoundError, r"the index names files that are missing: pytorch_model-00002-of-00003\.bin"),
    "shard index without a map": (ValueError, r"index\.json: must map every weight to a file"),
    "shard outside the folder": (ValueError, r"index\.json: must map every weight to a file of its folder"),
    "file without its configuration": (FileNotFoundError, r"needs the model's config\.json beside it"),
    "broken generation_config.json": (ValueError, r"generation_config\.json: not a JSON file"),
    "broken tokenizer.json": (ValueError, r"tokenizer\.json"),
    "nanoGPT with other arguments": (ValueError, r"model_args must be nanoGPT's; missing: .*n_head.*; unknown: rope"),
    "no such folder": (FileNotFoundError, "no such file or folder"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoints(tmp_path: Path, model: GPT2, kind: str) -> None:
    error, pattern = BAD[kind]
    with pytest.raises(error, match=pattern) as raised:
        load_pretrained(spoil(tmp_path / "model", kind, hf_state_dict(model)))
    one_sentence(raised.value)


def test_bad_arguments(tmp_path: Path, model: GPT2) -> None:
    save_pretrained(model, tmp_path / "good")
    with pytest.raises(TypeError, match="unknown argument n_layers"):
        load_pretrained(tmp_path / "good", n_layers=3)
    with pytest.raises(ValueError, match=r"dtype must be a floating-point torch.dtype; got torch.int64"):
        load_pretrained(tmp_path / "good", dtype=torch.int64)
    with pytest.raises(ValueError, match="revision is for hub names"):
        load_pretrained(tmp_path / "good", revision="main")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="a checkpoint is a folder"):
        save_pretrained(model, tmp_path / "file")


# -- the hub -----------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for huggingface_hub's download: the files of a folder, counted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched, self.revisions = folder, [], []

    def __call__(self, repo: str, file: str, revision: str | None = None) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        self.revisions.append(revision)
        if not (self.folder / file).exists():
            raise EntryNotFoundError(file)
        self.fetched.append(file)
        return str(self.folder / file)


@pytest.mark.parametrize("form", ["safetensors", "sharded bin", "both"])
def test_hub_fetches_what_it_needs(tmp_path: Path, model: GPT2, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    commit = tmp_path / "snapshots" / "0123abc"
    for one in ("safetensors", "bin") if form == "both" else (form,):
        write_folder(commit, hf_state_dict(model), form=one)
    hub = Hub(commit)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    assert_same(load_pretrained("somebody/tiny-gpt2", revision="v1"), model)
    weights = {file for file in hub.fetched if "model" in file and "index" not in file}
    assert len(weights) == (3 if form == "sharded bin" else 1)
    assert any("safetensors" in file for file in weights) == (form != "sharded bin")
    assert hub.revisions[0] == "v1"
    assert set(hub.revisions[1:]) == {"0123abc"}


def test_hub_errors(tmp_path: Path, model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    write_folder(tmp_path, hf_state_dict(model))
    hub = Hub(tmp_path)

    def offline(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("no connection\nmany words")

    def refused(*args: object, **options: object) -> str:
        raise OfflineModeIsEnabled("refused\nmany words")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(OSError, match="the hub cannot be reached") as raised:
        load_pretrained("somebody/tiny-gpt2")
    one_sentence(raised.value)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    with pytest.raises(OSError, match=r"cannot be loaded from the hub: refused$") as raised:
        load_pretrained("somebody/tiny-gpt2")
    one_sentence(raised.value)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="its repository has no weights"):
        load_pretrained("somebody/tiny-gpt2")
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_pretrained("somebody/tiny-gpt2")


def test_hub_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "fastgpt2\[hub\]"') as raised:
        load_pretrained("somebody/tiny-gpt2")
    one_sentence(raised.value)


# -- memory and crashes ------------------------------------------------------------------------------------------------


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    root = Path(__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "kernels")))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


LOAD_AND_MEASURE = """
import ctypes, sys, torch
from fastgpt2.checkpoint import load_pretrained
import safetensors.torch, fastgpt2.tokenizer
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
load_pretrained(sys.argv[2])  # a tiny model: what loading itself brings in
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
model = load_pretrained(sys.argv[1])
print(status("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("form", ["safetensors", "bin", "nanogpt"])
def test_loading_holds_one_copy(tmp_path: Path, seed: int, form: str) -> None:
    config = TINY.replace(
        vocab_size=50257, hidden_size=512, num_layers=8, context_length=256, activation_function="gelu"
    )
    model = GPT2(config)  # 205 MB, half of it token embeddings
    save_pretrained(random_model(seed), tmp_path / "tiny")
    if form == "nanogpt":
        save_nanogpt(model, tmp_path / "big")
    else:
        write_folder(tmp_path / "big", hf_state_dict(model), config, form=form)
    process = run_python(LOAD_AND_MEASURE, tmp_path / "big", tmp_path / "tiny")
    peak, size = map(int, process.communicate(timeout=60)[0].split())
    assert process.returncode == 0
    assert size > 190e6
    assert size <= peak <= 1.35 * size, f"peak {peak / size:.2f} x the weights"


SAVE_FOREVER = """
import sys
from fastgpt2.checkpoint import save_pretrained
from tests.helpers import random_model
models = [random_model(seed, vocab_size=3000, hidden_size=128) for seed in (1, 2)]
print("ready", flush=True)
while True:
    for model in models:
        save_pretrained(model, sys.argv[1])
"""


def test_a_kill_leaves_a_whole_checkpoint(tmp_path: Path, seed: int) -> None:
    """One process saves two models in turns and is killed at random moments: what is there is one or the other."""
    models = [random_model(s, vocab_size=3000, hidden_size=128) for s in (1, 2)]
    save_pretrained(models[0], tmp_path)
    delays = torch.rand(4, generator=torch.Generator().manual_seed(seed)) * 0.2
    for delay in delays.tolist():
        process = run_python(SAVE_FOREVER, tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.kill()
        process.communicate()
        loaded = load_pretrained(tmp_path)
        equal = [i for i, m in enumerate(models) if all(map(torch.equal, loaded.parameters(), m.parameters()))]
        assert len(equal) == 1


def test_a_failed_save_leaves_the_old_checkpoint_and_no_litter(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(seed)
    save_pretrained(model, tmp_path)
    files = sorted(tmp_path.iterdir())

    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(random_model(seed + 1), tmp_path)
    monkeypatch.undo()
    assert sorted(tmp_path.iterdir()) == files
    assert_same(load_pretrained(tmp_path), model)
