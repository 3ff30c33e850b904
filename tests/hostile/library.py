"""Calls that the library's functions must refuse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fastgpt2 import GPT2, GPT2Config, KVCache, SamplingConfig, calculate_loss, score, train_step
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

# By name: a call, the class of its error, and a part of the error's text.
Cases = dict[str, tuple[Callable[[], object], type[Exception], str]]

MODEL = GPT2(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2, context_length=6).eval()
IDS = torch.zeros(2, 3, dtype=torch.int64)
X = torch.zeros(4, 8)
W = torch.zeros(11, 8)
T = torch.zeros(4, dtype=torch.int64)
Q = torch.zeros(1, 2, 3, 4)
SPOILT = GPT2(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2, context_length=6).eval()
SPOILT.transformer.wte.weight.data.fill_(float("nan"))


def hf(**changes: object) -> GPT2Config:
    return GPT2Config.from_hf({"model_type": "gpt2", **changes})


def decode(slots: list[int], counts: list[int], lengths: list[int]) -> torch.Tensor:
    cache = torch.zeros(2, 2, 5, 4)
    return cached_attention(torch.zeros(sum(counts), 24), cache, cache.clone(), plan_rows(slots, counts, lengths))


CONFIGURATION: Cases = {
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
}

MODELS: Cases = {
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
}

LOSS: Cases = {
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
}

OPERATORS: Cases = {
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
}

GENERATION: Cases = {
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
    "logits are all NaN": (
        lambda: SPOILT.generate([[1]], max_new_tokens=2),
        RuntimeError,
        "logits for prompt 0 after 0 tokens are NaN, infinite or all banned; check the weights",
    ),
    "logits are all -inf": (
        lambda: MODEL.generate([[1]], max_new_tokens=2, logits_processor=lambda ids, logits: logits - torch.inf),
        RuntimeError,
        "logits for prompt 0 after 0 tokens are NaN, infinite or all banned; check the weights",
    ),
    "scores of NaN logits": (lambda: score(SPOILT, [[1, 2]]), RuntimeError, "sequence 0 are NaN or infinite"),
    "stop without a tokenizer": (
        lambda: MODEL.generate([[1]], stop_strings=["x"]),
        ValueError,
        "stop_strings need a tokenizer",
    ),
}

FILES: Cases = {
    "no such folder": (lambda: GPT2.from_pretrained("./no/such/folder"), FileNotFoundError, "no such file or folder"),
    "no tokenizer file": (lambda: Tokenizer.from_file("./none.json"), FileNotFoundError, "none.json"),
    "tiny vocabulary": (lambda: Tokenizer.train(["x"], 10), ValueError, "vocab_size"),
    "dtype of a checkpoint": (
        lambda: GPT2.from_pretrained("x", dtype=torch.int8),
        ValueError,
        "must be a floating-point",
    ),
}
