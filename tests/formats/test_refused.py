"""Checkpoints that cannot be loaded, and arguments that make no sense, give one sentence each."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt2 import GPT2
from fastgpt2.checkpoint import hf_state_dict, load_pretrained, save_pretrained
from tests.formats.helpers import assert_same, one_sentence, write_folder
from tests.helpers import TINY


def compress_archive(path: Path) -> None:
    """Compress the records of an archive, as a tool that repacks files would."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def spoil(folder: Path, kind: str, state: dict[str, Tensor]) -> Path:
    """Make a folder or file that cannot be loaded, from good weights."""
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
        (good / "config.json").write_text("{", encoding="utf-8")
    elif kind == "config.json is a list":
        (good / "config.json").write_text("[]", encoding="utf-8")
    elif kind == "another model_type":
        (good / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    elif kind == "cross-attention":
        (good / "config.json").write_text('{"add_cross_attention": true}', encoding="utf-8")
    elif kind == "a size that is no number":
        (good / "config.json").write_text('{"n_embd": "wide"}', encoding="utf-8")
    elif kind == "a size of 100 digits":
        (good / "config.json").write_text(json.dumps({"n_embd": 10**99, "n_head": 1}), encoding="utf-8")
    elif kind == "a size past 64 bits":
        (good / "config.json").write_text(json.dumps({**TINY.to_hf(), "vocab_size": 2**70}), encoding="utf-8")
    elif kind == "a size whose tensors pass 64 bits":
        (good / "config.json").write_text(json.dumps({**TINY.to_hf(), "n_inner": 2**62}), encoding="utf-8")
    elif kind == "ten million layers":
        (good / "config.json").write_text(json.dumps({**TINY.to_hf(), "n_layer": 10**7}), encoding="utf-8")
    elif kind == "deeply nested config.json":
        (good / "config.json").write_text("[" * 99_999, encoding="utf-8")
    elif kind == "truncated safetensors":
        file = good / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "a pointer instead of the file":
        (good / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8"
        )
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
    elif kind == "bin with compressed records":
        compress_archive(good / "pytorch_model.bin")
    elif kind == "bin with a flipped bit":
        file = good / "pytorch_model.bin"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif kind == "file of other bytes":
        (good / "notes.txt").write_bytes(b"\x80\x02.")  # an empty pickle, for which the unpickler raises IndexError
        return good / "notes.txt"
    elif kind == "missing shard":
        (good / "pytorch_model-00002-of-00003.bin").unlink()
    elif kind == "shard index without a map":
        (good / "pytorch_model.bin.index.json").write_text("{}", encoding="utf-8")
    elif kind == "shard outside the folder":
        (good / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../b.bin"}}', encoding="utf-8")
    elif kind == "file without its configuration":
        (good / "config.json").unlink()
        return good / "model.safetensors"
    elif kind == "broken generation_config.json":
        (good / "generation_config.json").write_text("?", encoding="utf-8")
    elif kind == "broken tokenizer.json":
        (good / "tokenizer.json").write_text("{}", encoding="utf-8")
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
    "a size of 100 digits": (ValueError, r"hidden_size must be at most 2147483647; got 10+\.\.\. \(100 characters\)"),
    "a size past 64 bits": (ValueError, "vocab_size must be at most 2147483647; got 1180591620717411303424"),
    "a size whose tensors pass 64 bits": (
        ValueError,
        "feedforward_dim must be at most 2147483647; got 4611686018427387904",
    ),
    "ten million layers": (ValueError, "num_layers must be at most 10000; got 10000000"),
    "deeply nested config.json": (ValueError, r"config\.json: not a JSON file \(maximum recursion"),
    "truncated safetensors": (ValueError, r"model\.safetensors: not a readable safetensors file"),
    "a pointer instead of the file": (ValueError, r"model\.safetensors: not a readable safetensors file"),
    "empty safetensors": (ValueError, r"model\.safetensors: not a readable safetensors file"),
    "truncated bin": (ValueError, r"pytorch_model\.bin: not a readable file of tensors"),
    "empty bin": (ValueError, r"pytorch_model\.bin: not a readable file of tensors"),
    "bin with code": (ValueError, r"pytorch_model\.bin: not a readable file of tensors"),
    "bin with a list": (ValueError, r"pytorch_model\.bin: must hold a dictionary of tensors; got list"),
    "bin with other values": (ValueError, r"pytorch_model\.bin: must map names to tensors; other entries: step"),
    "bin with compressed records": (
        ValueError,
        r"records must be uncompressed, as torch\.save writes them; .* is comp",
    ),
    "bin with a flipped bit": (ValueError, r"pytorch_model\.bin: is damaged \(Bad CRC-32"),
    "file of other bytes": (ValueError, r"notes\.txt: not a readable file of tensors"),
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


def test_checksums_that_were_never_written_are_not_missed(tmp_path: Path, model: GPT2) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        folder = write_folder(tmp_path, hf_state_dict(model), form="bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(load_pretrained(folder), model)


def test_bad_arguments(tmp_path: Path, model: GPT2) -> None:
    save_pretrained(model, tmp_path / "good")
    with pytest.raises(TypeError, match="unknown argument n_layers"):
        load_pretrained(tmp_path / "good", n_layers=3)
    with pytest.raises(ValueError, match=r"dtype must be a floating-point torch.dtype; got torch.int64"):
        load_pretrained(tmp_path / "good", dtype=torch.int64)
    with pytest.raises(ValueError, match="revision needs a name on the hub"):
        load_pretrained(tmp_path / "good", revision="main")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="must be a folder, as a checkpoint is one"):
        save_pretrained(model, tmp_path / "file")
