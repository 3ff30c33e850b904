"""The zoo: a folder in which the tests run commands. Each file is bad in one way; a few are good."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgpt2.checkpoint import load_pretrained, save_nanogpt

ROW = {"prompt_index": 0, "sample_index": 0, "text": "a", "finish_reason": "length", "logprob": -1, "perplexity": 2.0}
RUN = {"step": 1, "loss": 2.0, "lr": 0.1, "tokens_per_s": 3.0}


def build(folder: Path, checkpoint: Path) -> None:
    """Write the whole zoo into an empty folder; `checkpoint` is a good model with a tokenizer."""
    shutil.copytree(checkpoint, folder / "model")
    for write in (_texts, _tables, _records, _models, _weights, _tokenizers, _runs, _data):
        write(folder)


def _write(path: Path, content: str | bytes | Any) -> None:
    """Write bytes and text unchanged, and anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def _texts(folder: Path) -> None:
    _write(folder / "p.txt", "def\n")
    _write(folder / "text.txt", "def add(a, b):\n    return a + b\n" * 100)
    _write(folder / "empty.txt", "")
    _write(folder / "latin.txt", b"a\xff\n")
    _write(folder / "zeros.txt", b"a\0b\n")
    _write(folder / "long.txt", "x = 1\n" * 5 + "def add(a, b): " * 200 + "\n")
    _write(folder / "file.bin", b"\x80\x02.")  # an empty pickle, for which the unpickler raises IndexError
    _write(folder / "taken", "a file where a folder is wanted\n")
    os.symlink("/dev/zero", folder / "zero.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "empty").mkdir()
    (folder / "folder.txt").mkdir()
    os.symlink("loop.txt", folder / "loop.txt")


def _tables(folder: Path) -> None:
    for name, content in {
        "list.jsonl": "[1]\n",
        "deep.jsonl": "[" * 99_999 + "\n",
        "digits.jsonl": '{"prompt_ids": [1' + "0" * 5000 + "]}\n",
        "id-of-100-digits.jsonl": '{"prompt_ids": [1' + "0" * 99 + "]}\n",
        "float-ids.jsonl": '{"prompt_ids": [1, 1.7]}\n',
        "whole-float-ids.jsonl": '{"prompt_ids": [1.0]}\n',
        "string-ids.jsonl": '{"prompt_ids": ["1"]}\n',
        "bool-ids.jsonl": '{"prompt_ids": [true]}\n',
        "negative-ids.jsonl": '{"prompt_ids": [-1]}\n',
        "high-ids.jsonl": '{"prompt_ids": [280]}\n',
        "digit-text-ids.jsonl": '{"prompt_ids": "12"}\n',
        "both.jsonl": '{"prompt": "a", "prompt_ids": [1]}\n',
        "neither.jsonl": '{"prompts": "a"}\n',
        "number.jsonl": '{"prompt": 3, "text": 3}\n',
        "null.jsonl": '{"prompt": null, "text": null}\n',
        "bad-id.jsonl": '{"prompt": "a", "text": "ab", "id": [1]}\n',
        "surrogate.jsonl": '{"prompt": "\\ud800", "text": "\\ud800"}\n',
        "half.jsonl": '{"prompt": "a", "te',
        "short.jsonl": '{"text": ""}\n',
        "good.jsonl": '{"text": "def add", "prompt": "def"}\n',
        "text.jsonl": '{"text": "def add"}\n',
        "ids.jsonl": '{"token_ids": [1, 2]}\n',
        "text-of-ids.jsonl": '{"text": [1, 2]}\n',
        "other.csv": "a,b\n1,2\n",
        "double.csv": "prompt,prompt\n1,2\n",
        "open.csv": 'prompt,text\n"a,b\n',
        "ragged.csv": "prompt,text\na\n",
        "torn.parquet": "PAR1 and no more",
        "headless.fasta": "MKV\n>a\nMK\n",
        "x.doc": "text",
        "plain.txt.gz": "no gzip",
        "plain.jsonl.zst": "no zstd",
        "double.parquet.gz": "",
    }.items():
        _write(folder / name, content)
    _write(folder / "latin.csv", b"prompt,text\n\xff,a\n")
    _write(folder / "latin.jsonl", b'{"prompt": "\xff"}\n')
    _write(folder / "torn.txt.gz", gzip.compress(b"def\n" * 1000)[:-9])
    _write(folder / "bomb.txt.gz", gzip.compress(b"x" * (1 << 20)))
    _write(folder / "blank.jsonl.gz", gzip.compress(b"\n" * (1 << 20)))
    _write(folder / "bomb.fasta.gz", gzip.compress(b">a\n" + b"MKV\n" * (1 << 18)))
    _write(folder / "bomb.csv.gz", gzip.compress(b"prompt,text\n" + b"," * (1 << 20)))
    _write(folder / "blank.csv.gz", gzip.compress(b"prompt,text\n" + b"\n" * (1 << 20)))
    _write(folder / "quoted.csv.gz", gzip.compress(b'prompt,text\n"' + b"a\n" * (1 << 19)))


def _records(folder: Path) -> None:
    """Write outputs of generate and score, with their files of settings."""
    _write(folder / "rows.jsonl", "".join(json.dumps({**ROW, "sample_index": i}) + "\n" for i in range(3)))
    for name, changes in {
        "no-text": {"text": None},
        "no-perplexity": {"perplexity": "x"},
        "bool-perplexity": {"perplexity": True},
        "no-reason": {"finish_reason": 3},
        "list-logprob": {"logprob": [1]},
    }.items():
        _write(folder / f"rows-{name}.jsonl", json.dumps({**ROW, **changes}) + "\n")
    _write(folder / "rows-bare.jsonl", "{}\n")
    _write(folder / "rows-list.jsonl", "[1]\n")
    _write(folder / "rows-deep.jsonl", "[" * 99_999 + "\n")
    _write(folder / "rows-latin.jsonl", b'{"text": "\xff"}\n')
    _write(folder / "rows.txt", "0\t0\ta\n")
    _write(folder / "foreign.jsonl", json.dumps(ROW) + "\n")
    _write(folder / "foreign.jsonl.run.json", {"weights": "0"})
    _write(folder / "unsettled.jsonl", json.dumps(ROW) + "\n")
    _write(folder / "listed.jsonl", json.dumps(ROW) + "\n")
    _write(folder / "listed.jsonl.run.json", [])
    _write(folder / "broken.jsonl", json.dumps(ROW) + "\n")
    _write(folder / "broken.jsonl.run.json", "{")
    _write(folder / "nested.jsonl", json.dumps(ROW) + "\n")
    _write(folder / "nested.jsonl.run.json", "[" * 99_999)


# By folder: changes to a good config.json, or the whole contents of a bad one.
CONFIGS: dict[str, Any] = {
    "empty": "",
    "torn": "{",
    "list": [],
    "null": "null",
    "number": "3",
    "nested": "[" * 99_999,
    "latin": b'{"model_type": "\xff"}',
    "digits": '{"n_embd": 1' + "0" * 5000 + "}",
    "llama": {"model_type": "llama"},
    "cross": {"add_cross_attention": True},
    "pruned": {"pruned_heads": {"0": [1]}},
    "wide": {"n_embd": "wide"},
    "float-width": {"n_embd": 32.5},
    "bool-width": {"n_embd": True},
    "no-width": {"n_embd": 0},
    "negative-width": {"n_embd": -32},
    "null-width": {"n_embd": None},
    "100-digits": {"n_embd": 10**99, "n_head": 1},
    "past-64-bits": {"vocab_size": 2**70},
    "tensors-past-64-bits": {"n_inner": 2**62},
    "layers": {"n_layer": 10**7},
    "no-layers": {"n_layer": 0},
    "heads": {"n_head": 3},
    "no-heads": {"n_head": 0},
    "no-vocab": {"vocab_size": 0},
    "no-context": {"n_positions": 0},
    "epsilon": {"layer_norm_epsilon": 0},
    "infinite-epsilon": '{"layer_norm_epsilon": Infinity}',
    "nan-epsilon": '{"layer_norm_epsilon": NaN}',
    "text-epsilon": {"layer_norm_epsilon": "1e-5"},
    "dropout": {"resid_pdrop": 1.5},
    "activation": {"activation_function": "gleu"},
    "list-activation": {"activation_function": ["gelu"]},
    "range": {"initializer_range": -1},
    "text-eos": {"eos_token_id": "end"},
    "bool-pad": {"pad_token_id": True},
    "list-bos": {"bos_token_id": [1]},
    "text-in-eos": {"eos_token_id": [1, "end"]},
}


def _models(folder: Path) -> None:
    """Write a folder configs/NAME for each bad configuration, with the good model's weights."""
    good = json.loads((folder / "model/config.json").read_text(encoding="utf-8"))
    for name, content in CONFIGS.items():
        path = folder / "configs" / name
        _write(path / "config.json", {**good, **content} if isinstance(content, dict) else content)
        os.link(folder / "model/model.safetensors", path / "model.safetensors")


def _weights(folder: Path) -> None:
    """Write a folder for each bad file of weights: in weights/, bins/, indices/ and nanogpt-NAME."""
    good = (folder / "model/model.safetensors").read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])

    def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
        copy = json.loads(json.dumps(header))
        change(copy)
        text = json.dumps(copy).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + size :]

    name = next(name for name in header if name != "__metadata__")
    for kind, content in {
        "empty": b"",
        "torn": good[: len(good) // 2],
        "short": good[:-1],
        "header-past-the-end": (1 << 40).to_bytes(8, "little") + good[8:],
        "header-of-2-64": b"\xff" * 8 + good[8:],
        "no-json": good[:8] + b"x" * size + good[8 + size :],
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "missing": changed(lambda h: h.pop(name)),
        "shape": changed(lambda h: h[name].update(shape=[*h[name]["shape"][::-1], 1])),
        "dtype": changed(lambda h: h[name].update(dtype="F9")),
        "integers": changed(lambda h: h[name].update(dtype="I32")),
        "overlap": changed(lambda h: h[name].update(data_offsets=[0, 4])),
        "negative": changed(lambda h: h[name].update(data_offsets=[-4, 4])),
        "outside": changed(lambda h: h[name].update(data_offsets=[0, 1 << 60])),
    }.items():
        _copy_model(folder, folder / "weights" / kind, without="model.safetensors")
        _write(folder / "weights" / kind / "model.safetensors", content)
    for kind, state in {"list": [1], "text": {"a": "b"}, "code": {"a": _copy_model}, "bare": {}}.items():
        _copy_model(folder, folder / "bins" / kind, without="model.safetensors")
        torch.save(state, folder / "bins" / kind / "pytorch_model.bin")
    for kind, index in {
        "no-map": {},
        "list-map": {"weight_map": [1]},
        "outside": {"weight_map": {"a": "../model/model.safetensors"}},
        "absent": {"weight_map": {"a": "model-00001.safetensors"}},
        "torn": "{",
    }.items():
        _copy_model(folder, folder / "indices" / kind, without="model.safetensors")
        _write(folder / "indices" / kind / "model.safetensors.index.json", index)
    _copy_model(folder, folder / "weightless", without="model.safetensors")
    _copy_model(folder, folder / "no-config", without="config.json")
    _copy_model(folder, folder / "no-tokenizer", without="tokenizer.json")
    _copy_model(folder, folder / "bad-generation-config", without="generation_config.json")
    _write(folder / "bad-generation-config/generation_config.json", "?")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nanoGPT has another activation, which does not matter here
        save_nanogpt(load_pretrained(folder / "model"), folder / "nanogpt")
    good_pt = (folder / "nanogpt/ckpt.pt").read_bytes()
    _write(folder / "nanogpt-torn/ckpt.pt", good_pt[: len(good_pt) // 2])
    _write(folder / "nanogpt-empty/ckpt.pt", b"")
    for kind, state in {
        "no-args": {"model": {}},
        "rope": {"model": {}, "model_args": {"rope": 1}},
        "list": [1],
    }.items():
        (folder / f"nanogpt-{kind}").mkdir()
        torch.save(state, folder / f"nanogpt-{kind}/ckpt.pt")


def _copy_model(folder: Path, to: Path, without: str) -> None:
    to.mkdir(parents=True)
    for path in (folder / "model").iterdir():
        if path.name != without:
            os.link(path, to / path.name)


def _tokenizers(folder: Path) -> None:
    """Write a folder tokenizers/NAME for each bad tokenizer, with the good model."""
    good = json.loads((folder / "model/tokenizer.json").read_text(encoding="utf-8"))
    model = good["model"]
    for name, content in {
        "empty": "",
        "torn": "{",
        "list": [],
        "nested": "[" * 99_999,
        "latin": b"\xff\xfe",
        "no-model": {key: value for key, value in good.items() if key != "model"},
        "other-model": {**good, "model": {"type": "Morse"}},
        "negative-id": {**good, "model": {**model, "vocab": {**model["vocab"], "a": -1}}},
        "huge-id": {**good, "model": {**model, "vocab": {**model["vocab"], "a": 2**32}}},
        "merges": {**good, "model": {**model, "merges": [["", ""]]}},
        "prefix": {**good, "model": {**model, "continuing_subword_prefix": "#" * 50}},
        "dropout": {**good, "model": {**model, "dropout": 5.0}},
        "normalizer": {**good, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    }.items():
        _copy_model(folder, folder / "tokenizers" / name, without="tokenizer.json")
        _write(folder / "tokenizers" / name / "tokenizer.json", content)


def _runs(folder: Path) -> None:
    """Write folders of training runs."""
    for name, content in {
        "empty": "",
        "text": "x\n",
        "list": "[1]\n",
        "nested": "[" * 99_999 + "\n",
        "no-step": '{"loss": 1.0}\n',
        "text-step": '{"step": "1", "loss": 2.0}\n',
        "text-loss": '{"step": 1, "loss": "x"}\n',
        "list-loss": '{"step": 1, "loss": [1]}\n',
        "torn": json.dumps(RUN) + '\n{"step": 2, "lo\n{"step": 3}\n',
        "latin": b'{"step": 1, "\xff": 2}\n',
    }.items():
        _write(folder / "runs" / name / "metrics.jsonl", content)
    _write(folder / "runs/good/metrics.jsonl", json.dumps(RUN) + "\n")
    for name, checkpoint in {"zero": b"", "junk": b"\x80\x02.", "torn": b"PK\x03\x04" + b"x" * 100}.items():
        _write(folder / f"resumed-{name}/checkpoints/step-00000001.pt", checkpoint)
    for name, state in {"list": [1], "bare": {}, "format": {"format": 99}, "lacking": {"format": 2}}.items():
        path = folder / f"resumed-{name}/checkpoints/step-00000001.pt"
        path.parent.mkdir(parents=True)
        torch.save(state, path)
    for run in folder.glob("resumed-*"):
        for part in ("train", "val"):
            _write(run / f"data/{part}.bin", bytes(400))
    for name, options in {"torn": "{", "list": [], "nested": "[" * 99_999, "foreign": {"colour": 3}}.items():
        _write(folder / f"begun-{name}/run.json", options)


def _data(folder: Path) -> None:
    """Write folders of token shards."""
    tokens = b"".join(i.to_bytes(2, "little") for i in range(200))
    for name, train, val in (
        ("good", tokens, tokens),
        ("odd", tokens[:-1], tokens),
        ("few", tokens[:4], tokens),
        ("none", b"", tokens),
        ("odd-val", tokens, tokens[:-1]),
        ("high", b"\xff\xff" * 200, tokens),
    ):
        _write(folder / f"data-{name}/train.bin", train)
        _write(folder / f"data-{name}/val.bin", val)
    for name, meta in {"torn": "{", "list": [], "bare": {}, "nested": "[" * 99_999}.items():
        for part in ("train", "val"):
            _write(folder / f"data-meta-{name}/{part}.bin", tokens)
        _write(folder / f"data-meta-{name}/meta.json", meta)
