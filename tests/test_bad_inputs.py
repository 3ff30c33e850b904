"""Bad inputs to the whole public API: each raises an error of one clear sentence, and harms nothing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgpt2
from fastgpt2 import GPT2, GPT2Config, KVCache, SamplingConfig, calculate_loss, train_step
from fastgpt2.cli.main import main
from fastgpt2.config import TrainConfig
from fastgpt2.kernels import (
    TargetCheck,
    cached_attention,
    causal_attention,
    causal_attention_packed,
    cross_entropy,
    linear,
    linear_cross_entropy,
    plan_rows,
)
from fastgpt2.tokenizer import Tokenizer

MODEL = GPT2(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2, context_length=6).eval()
IDS = torch.zeros(2, 3, dtype=torch.int64)
X = torch.zeros(4, 8)
W = torch.zeros(11, 8)
T = torch.zeros(4, dtype=torch.int64)
Q = torch.zeros(1, 2, 3, 4)


def hf(**changes: object) -> GPT2Config:
    return GPT2Config.from_hf({"model_type": "gpt2", **changes})


def decode(slots: list[int], counts: list[int], lengths: list[int]) -> torch.Tensor:
    cache = torch.zeros(2, 2, 5, 4)
    return cached_attention(torch.zeros(sum(counts), 24), cache, cache.clone(), plan_rows(slots, counts, lengths))


CASES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    # configuration
    "sizes not ints": (lambda: GPT2Config(hidden_size=1.5), ValueError, "hidden_size must be a positive int; got 1.5"),
    "no layers": (lambda: GPT2Config(num_layers=0), ValueError, "num_layers must be a positive int; got 0"),
    "heads do not divide": (
        lambda: GPT2Config(hidden_size=10, num_heads=3),
        ValueError,
        "hidden_size must be a multiple of num_heads; got 10 and 3",
    ),
    "dropout of 1": (
        lambda: GPT2Config(residual_dropout=1.0),
        ValueError,
        "residual_dropout must be in [0, 1); got 1.0",
    ),
    "epsilon of 0": (lambda: GPT2Config(layer_norm_epsilon=0), ValueError, "layer_norm_epsilon must be a positive"),
    "activation": (lambda: GPT2Config(activation_function="gleu"), ValueError, "activation_function must be one of"),
    "preset": (lambda: GPT2.from_config("gpt3"), ValueError, "no preset 'gpt3'; there are gpt2, gpt2-medium"),
    "cross-attention": (lambda: hf(add_cross_attention=True), ValueError, "add_cross_attention=True is not supported"),
    "pruned heads": (lambda: hf(pruned_heads={"0": [1]}), ValueError, "pruned_heads={'0': [1]} is not supported"),
    "head mask": (lambda: hf(head_mask=[1, 0]), ValueError, "head_mask=[1, 0] is not supported"),
    "another model": (lambda: hf(model_type="llama"), ValueError, "model_type must be 'gpt2'; got 'llama'"),
    "temperature below 0": (lambda: SamplingConfig(temperature=-1), ValueError, "temperature must be finite and >= 0"),
    "top_k of 0": (lambda: SamplingConfig(top_k=0), ValueError, "top_k must be an int >= 1 or None; got 0"),
    "top_p above 1": (lambda: SamplingConfig(top_p=1.1), ValueError, "top_p must be in (0, 1] or None; got 1.1"),
    "min_p below 0": (lambda: SamplingConfig(min_p=-0.1), ValueError, "min_p must be in [0, 1] or None; got -0.1"),
    "penalty of 0": (lambda: SamplingConfig(repetition_penalty=0), ValueError, "repetition_penalty must be finite and"),
    "no new tokens": (
        lambda: SamplingConfig(max_new_tokens=0),
        ValueError,
        "max_new_tokens must be an int >= 1; got 0",
    ),
    "stop as a string": (lambda: SamplingConfig(stop_strings="x"), ValueError, "stop_strings must be a list; got 'x'"),
    "empty stop": (lambda: SamplingConfig(stop_strings=("",)), ValueError, "stop_strings must be non-empty strings"),
    "negative seed": (lambda: SamplingConfig(seed=-1), ValueError, "seed must be an int in [0, 2**64); got -1"),
    "learning rate of 0": (lambda: TrainConfig(lr=0), ValueError, "lr must be a finite number > 0; got 0"),
    "no steps": (lambda: TrainConfig(steps=0), ValueError, "steps must be an int >= 1; got 0"),
    "training dtype": (lambda: TrainConfig(dtype="fp8"), ValueError, "dtype must be one of"),
    # the model
    "unknown argument": (lambda: GPT2(vocabulary=5), TypeError, "unknown argument vocabulary; see GPT2Config"),
    "config and fields": (lambda: GPT2(MODEL.config, num_heads=2), TypeError, "give a config or its fields, not both"),
    "config of another kind": (lambda: GPT2({"vocab_size": 5}), TypeError, "config must be a GPT2Config; got dict"),
    "backend": (
        lambda: GPT2(backend="cuda"),
        ValueError,
        "backend must be one of 'auto', 'triton', 'native', 'torch'; got 'cuda'",
    ),
    "triton on this CPU": (
        lambda: GPT2.from_config(MODEL.config, backend="triton")(IDS),
        ValueError,
        "backend='triton' cannot be used: ",
    ),
    "one-dimensional ids": (
        lambda: MODEL(IDS[0]),
        ValueError,
        "input_ids must be a (B, T) tensor of token ids; got (3,)",
    ),
    "ids as a list": (lambda: MODEL([[1, 2]]), ValueError, "input_ids must be a (B, T) tensor of token ids; got list"),
    "ids as floats": (lambda: MODEL(IDS.float()), ValueError, "input_ids must be int64 or int32; got torch.float32"),
    "id too large": (lambda: MODEL(IDS + 11), ValueError, "token ids must be in [0, 11) (the vocabulary); got 11"),
    "id below 0": (lambda: MODEL(IDS - 1), ValueError, "token ids must be in [0, 11) (the vocabulary); got -1"),
    "too long": (lambda: MODEL(IDS.repeat(1, 3)), ValueError, "9 tokens do not fit in the context of 6"),
    "positions": (
        lambda: MODEL(IDS, position_ids=IDS + 6),
        ValueError,
        "positions must be in [0, 6) (the context); got 6",
    ),
    "positions' shape": (
        lambda: MODEL(IDS, position_ids=IDS[:1]),
        ValueError,
        "position_ids must be integers of shape",
    ),
    "another device": (lambda: MODEL(IDS.to("meta")), ValueError, "input_ids must be on cpu, like the model; got meta"),
    "cache of other rows": (
        lambda: MODEL(IDS, cache=KVCache(MODEL.config, 3)),
        ValueError,
        "input_ids must have a row for each of the cache's 3 slots; got 2 rows",
    ),
    "cache while training": (
        lambda: GPT2(MODEL.config).train()(IDS, cache=KVCache(MODEL.config, 2)),
        ValueError,
        "a cache needs evaluation mode; call model.eval() first",
    ),
    "cache past the context": (lambda: KVCache(MODEL.config, 1, 7), ValueError, "capacity must be in [1, 6]"),
    "cache without slots": (lambda: KVCache(MODEL.config, 0), ValueError, "num_slots must be >= 1; got 0"),
    # loss
    "targets' shape": (
        lambda: calculate_loss(MODEL, IDS, IDS[:1]),
        ValueError,
        "target_tensor must have the shape (2, 3)",
    ),
    "loss of another model": (lambda: train_step(torch.nn.Linear(2, 2), IDS), TypeError, "must be a fastgpt2.GPT2"),
    "target too large": (lambda: linear_cross_entropy(X, W, T + 11), ValueError, "targets must be in [0, 11)"),
    "float targets": (lambda: linear_cross_entropy(X, W, T.float()), ValueError, "targets must be int64 or int32"),
    "fewer targets": (lambda: linear_cross_entropy(X, W, T[:3]), ValueError, "targets must have shape (4,) as x"),
    "other width": (
        lambda: linear_cross_entropy(X, W[:, :7], T),
        ValueError,
        "x must be (N, C) or (B, T, C) and weight",
    ),
    "other dtype": (lambda: linear_cross_entropy(X, W.double(), T), ValueError, "all tensors must have one dtype"),
    "bias length": (lambda: linear_cross_entropy(X, W, T, X[0]), ValueError, "bias must be (11,); got (8,)"),
    "reduction": (
        lambda: linear_cross_entropy(X, W, T, reduction="avg"),
        ValueError,
        "reduction must be one of mean, sum",
    ),
    "smoothing of 1": (
        lambda: cross_entropy(X, T, label_smoothing=1.0),
        ValueError,
        "label_smoothing must be in [0, 1)",
    ),
    "negative z-loss": (
        lambda: cross_entropy(X, T, z_loss=-1.0),
        ValueError,
        "z_loss must be finite and >= 0; got -1.0",
    ),
    "class weights": (
        lambda: cross_entropy(X, T, class_weight=X[0, :7]),
        ValueError,
        "class_weight must be floating-point (8,)",
    ),
    "empty option": (lambda: cross_entropy(X, T, empty="one"), ValueError, "empty must be 'nan' or 'zero'; got 'one'"),
    "shift of rows": (
        lambda: cross_entropy(X, T, shift=True),
        ValueError,
        "shift=True needs logits of shape (B, T, V)",
    ),
    "no vocabulary": (lambda: cross_entropy(X[:, :0], T), ValueError, "the vocabulary must not be empty"),
    "integer logits": (
        lambda: cross_entropy(X.long(), T),
        ValueError,
        "logits must be floating-point (N, V) or (B, T, V)",
    ),
    "checked targets": (
        lambda: cross_entropy(X, T + 8, check_targets=True),
        ValueError,
        "targets must be in [0, 8) or ignore_index=-100; got 8 in row 0",
    ),
    "checked later": (
        lambda: [check := TargetCheck("cpu"), cross_entropy(X, T + 8, check_targets=check), check.raise_if_bad()],
        ValueError,
        "neither ignore_index nor in [0, V)",
    ),
    # attention and layers
    "ranks": (lambda: causal_attention(Q[0], Q[0], Q[0]), ValueError, "q must be (B, H, T, D) and k, v (B, H, S, D)"),
    "fewer keys": (
        lambda: causal_attention(Q, Q[:, :, :2], Q[:, :, :2]),
        ValueError,
        "at least as many keys as queries",
    ),
    "mixed dtypes": (lambda: causal_attention(Q, Q.half(), Q.half()), ValueError, "all tensors must have one dtype"),
    "dropout of all": (
        lambda: causal_attention(Q, Q, Q, dropout_p=1.0),
        ValueError,
        "dropout_p must be in [0, 1); got 1.0",
    ),
    "packed width": (
        lambda: causal_attention_packed(torch.zeros(1, 2, 10), 2),
        ValueError,
        "qkv must be (B, T, 3 * num_heads",
    ),
    "documents": (
        lambda: causal_attention_packed(torch.zeros(1, 4, 6), 1, cu_seqlens=torch.tensor([0, 3])),
        ValueError,
        "cu_seqlens must rise from 0 to T=4; got [0, 3]",
    ),
    "documents in two rows": (
        lambda: causal_attention_packed(torch.zeros(2, 4, 6), 1, cu_seqlens=torch.tensor([0, 4])),
        ValueError,
        "B must be 1 with cu_seqlens; got 2",
    ),
    "cache too short": (
        lambda: decode([1], [3], [3]),
        ValueError,
        "slot 1 needs room for 6 tokens; the cache has 2 slots of 5",
    ),
    "no such slot": (
        lambda: decode([2], [1], [0]),
        ValueError,
        "slot 2 needs room for 1 tokens; the cache has 2 slots",
    ),
    "slot used twice": (lambda: decode([0, 0], [1, 1], [0, 1]), ValueError, "a cache slot can be in one row only"),
    "no new token": (lambda: decode([0], [0], [0]), ValueError, "every row needs at least one new token"),
    "two epilogues": (
        lambda: linear(X, W, activation="relu", residual=X),
        ValueError,
        "an activation or a residual, not both",
    ),
    # generation
    "text without a tokenizer": (
        lambda: MODEL.generate("x"),
        ValueError,
        "prompt 0 is text, but the model has no tokenizer",
    ),
    "empty prompt": (
        lambda: MODEL.generate([[1], []]),
        ValueError,
        "prompt 1 is empty, and the model has no bos_token_id",
    ),
    "prompt too long": (lambda: MODEL.generate([[1] * 7]), ValueError, "prompt 0 has 7 tokens; the context holds 6"),
    "prompt id": (
        lambda: MODEL.generate([[1, 11]]),
        ValueError,
        "prompt 0 holds the token id 11; ids must be in [0, 11)",
    ),
    "prompts as ids": (lambda: MODEL.generate([1, 2]), TypeError, "a prompt must be text or a sequence of token ids"),
    "prompts as floats": (
        lambda: MODEL.generate(torch.zeros(1, 2)),
        ValueError,
        "a tensor of prompts must be (B, T) integers",
    ),
    "ids with a float": (
        lambda: MODEL.generate([[1, 1.7]]),
        TypeError,
        "token ids must be integers; prompt 0 holds 1.7",
    ),
    "ids with a whole float": (
        lambda: MODEL.generate([[1.0]]),
        TypeError,
        "token ids must be integers; prompt 0 holds",
    ),
    "ids as a float array": (lambda: MODEL.generate([np.ones(2)]), TypeError, "token ids must be integers; prompt 0"),
    "ids as a float tensor": (
        lambda: MODEL.generate([[1], torch.ones(2)]),
        TypeError,
        "token ids must be integers; prompt 1 holds tensor(1.)",
    ),
    "ids as a bool tensor": (lambda: MODEL.generate([torch.ones(2) > 0]), TypeError, "holds tensor(True)"),
    "ids as bools": (lambda: MODEL.generate([[True]]), TypeError, "token ids must be integers; prompt 0 holds True"),
    "ids as digits": (lambda: MODEL.generate([["1", "2"]]), TypeError, "must be integers; prompt 0 holds '1'"),
    "ids as bytes": (lambda: MODEL.generate([b"\1\2"]), TypeError, "a sequence of token ids; prompt 0 is bytes"),
    "id of 100 digits": (
        lambda: MODEL.generate([[10**99]]),
        ValueError,
        "holds the token id 1000000000000000000000000000000000000000... (100 characters); ids must be in [0, 11)",
    ),
    "id of 5000 digits": (lambda: MODEL.generate([[10**5000]]), ValueError, "the token id an int of 16610 bits"),
    "no samples": (lambda: MODEL.generate([[1]], num_samples=0), ValueError, "num_samples must be an int >= 1; got 0"),
    "no batch": (
        lambda: MODEL.generate([[1]], batch_size=0),
        ValueError,
        "batch_size must be an int >= 1 or 'auto'; got 0",
    ),
    "fewer sample ids": (lambda: MODEL.generate([[1], [2]], sample_ids=[5]), ValueError, "there is none for prompt 1"),
    "unknown option": (
        lambda: MODEL.generate([[1]], beams=4),
        TypeError,
        "unknown argument beams; there are attention_mask",
    ),
    "stop without a tokenizer": (
        lambda: MODEL.generate([[1]], stop_strings=["x"]),
        ValueError,
        "stop_strings need a tokenizer",
    ),
    # files
    "no such folder": (lambda: GPT2.from_pretrained("./no/such/folder"), FileNotFoundError, "no such file or folder"),
    "no tokenizer file": (lambda: Tokenizer.from_file("./none.json"), FileNotFoundError, "none.json"),
    "tiny vocabulary": (lambda: Tokenizer.train(["x"], 10), ValueError, "vocab_size"),
    "dtype of a checkpoint": (
        lambda: GPT2.from_pretrained("x", dtype=torch.int8),
        ValueError,
        "must be a floating-point",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_sentence(name):
    call, kind, sentence = CASES[name]
    with pytest.raises(kind, match=re.escape(sentence)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700


def test_there_are_enough_of_them():
    assert len(CASES) >= 40


def broken_config(folder: Path) -> str:
    MODEL.save_pretrained(folder)
    (folder / "config.json").write_text("{", encoding="utf-8")
    return "not a JSON file"


def no_weights(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(MODEL.config.to_hf()), encoding="utf-8")
    return "has a config.json but no weights"


def torn_weights(folder: Path) -> str:
    MODEL.save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return "not a readable safetensors file"


def other_sizes(folder: Path) -> str:
    MODEL.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(MODEL.config.replace(vocab_size=12).to_hf()), encoding="utf-8")
    return "transformer.wte.weight is (11, 8) in the file and (12, 8) in the configuration"


@pytest.mark.parametrize("spoil", [broken_config, no_weights, torn_weights, other_sizes])
def test_spoilt_checkpoints(spoil, tmp_path):
    sentence = spoil(tmp_path)
    with pytest.raises((ValueError, OSError), match=re.escape(sentence)) as caught:
        fastgpt2.GPT2.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "x", "--model", "./none/here"], "no such file or folder"),
        (["generate", "x", "--temperature", "-1"], "temperature must be finite and >= 0"),
        (["generate", "--prompts", "none.txt"], "none.txt"),
        (["train", "--out", "x"], "there is no text to train on; give it with --data PATH"),
        (["train", "--data", "no/such/text", "--out", "x"], "no/such/text: no such file or directory"),
        (
            ["train", "--data", "stdlib", "--out", "x", "--steps", "5", "--minutes", "1"],
            "--steps or --minutes, not both",
        ),
        (["convert", "./none/here", "x"], "no such file or folder"),
        (["info", "--model", "./none/here"], "no such file or folder"),
        (["generate", "--num-samples", "x"], "--num-samples: invalid int value: 'x'; see fastgpt2 generate --help"),
        (["generate", "--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["train", "--steps", "5"], "required: --out; see fastgpt2 train --help"),
        (["generate", "x", "--num-samples", str(10**30)], "--num-samples must be at most 10,000,000; got 1000000000"),
        (["generate", "x", "--num-samples", "9" * 100], "... (100 characters)"),
        (["generate", "x", "--num-samples", "9" * 5000], "argument --num-samples: invalid int value"),
        *(
            (["generate", "x", "--device", device], f"device must be one that this machine has; got {device}: use auto")
            for device in ("cuda:99", "xla", "meta", "cpu:3", "gpu", "cuda:x", "hpu", "")
        ),
        (["train", "--data", "stdlib", "--out", "x", "--device", "xla"], "device must be one that this machine has"),
        (
            ["generate", "--prompts", "/dev/zero"],
            "/dev/zero: a file of prompts must end in .txt, .jsonl, .csv, .parquet, .fasta, .fa, or be hf://",
        ),
        (["generate", "--prompts", "zero.txt"], "zero.txt: must be an ordinary file; it is not"),
        (["generate", "--prompts", "-"], "standard input is closed; give the prompt as an argument or --prompts FILE"),
        (["generate", "-"], "standard input is closed; give the prompt as an argument or --prompts FILE"),
        (["generate", "x", "--model", "file.bin"], "file.bin: not a readable file of tensors"),
        (["info", "--model", "file.bin"], "file.bin: not a readable file of tensors"),
        (["train", "--data", "stdlib", "--out", "x", "--layers", str(10**7)], "num_layers must be at most 10000; got"),
        (["train", "--data", "stdlib", "--out", "x", "--hidden-size", str(2**70)], "hidden_size must be at most"),
        (["train", "--data", "stdlib", "--out", "x", "--vocab-size", str(10**10)], "vocab_size must be at least 257"),
        (["write"], "invalid choice: 'write'"),
        ([], "required: {generate,score,select,train,plot,eval,check,warmup,info,convert}; see fastgpt2 --help"),
    ],
)
def test_the_command_line_says_it_in_one_line_and_exits_with_2(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)  # as Python leaves it where it was closed
    monkeypatch.setattr("fastgpt2.cli.generate._MOST_PROMPT_BYTES", 1000)
    Path("zero.txt").symlink_to("/dev/zero")
    Path("file.bin").write_bytes(b"\x80\x02.")
    try:
        status = main(arguments)
    except SystemExit as end:  # how argparse ends
        status = end.code
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("fastgpt2: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"zero.txt", "file.bin"}, "made before the arguments were good"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_devices_that_are_not_there(device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main(["generate", "x", "--device", device]) == 2
    assert capsys.readouterr().err == (
        f"fastgpt2: device must be one that this machine has; got {device}: use auto, cpu\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:132] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_is_not_there_is_one_sentence(error, capsys, monkeypatch):
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr("fastgpt2.cli.info.run", run)
    assert main(["info"]) == 2
    said = "fastgpt2: there is not enough memory for this; use a smaller model, batch or context\n"
    assert capsys.readouterr().err == said


def test_more_memory_than_there_is(tiny_checkpoint, capsys):
    """`main` recognizes the real message of an allocator that runs out of memory."""
    text = tiny_checkpoint / "config.json"
    # More than a process can address, so that no machine's lenience with memory decides.
    for option, value in (("--batch-size", 10**14), ("--context", 2**31 - 1)):
        out = tiny_checkpoint.parent / f"no-memory{option}"
        arguments = ["train", "--data", str(text), "--out", str(out), "--steps", "1", "--vocab-size", "257"]
        sizes = [
            "--layers",
            "1",
            "--hidden-size",
            "65536" if option == "--context" else "16",
            "--context",
            "8",
            "--dtype",
            "fp32",
        ]
        status = main([*arguments, *sizes, option, str(value)])
        error = capsys.readouterr().err.splitlines()[-1]
        assert status == 2
        assert "there is not enough memory" in error


def test_an_interruption_while_modules_load_is_no_traceback(capsys, monkeypatch):
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "fastgpt2: interrupted\n"
