"""Mistakes that the type checker must find, and calls that it must accept. mypy reads this file; nothing runs it.

mypy fails if a `type: ignore` is not needed. So each one here asserts that its line has an error of that kind.
"""

from __future__ import annotations

import torch

from fastgpt2 import GPT2, SamplingConfig
from fastgpt2.checkpoint import load_pretrained
from fastgpt2.generate import generate, stream


def accepted(model: GPT2) -> list[int]:
    loaded: GPT2 = load_pretrained("gpt2", vocab_size=50257)
    model = GPT2.from_pretrained("gpt2").train().eval()
    generate(loaded, ["text"], sampling=SamplingConfig(top_k=3), num_samples=2)
    mask = torch.ones(1, 2)
    model.generate(mask.long(), attention_mask=mask, sequence_bias={(1, 2): 0.5}, logits_processor=lambda ids, x: x)
    return model.generate([[1, 2]], max_new_tokens=3, stop_token_ids=(1,), seed=2)[0].token_ids


def refused(model: GPT2) -> None:
    model.generate([[1]], max_new_token=3)  # type: ignore[call-arg]
    model.generate_iter([[1]], batchsize=3)  # type: ignore[call-arg]
    model.stream([[1]], temperature="hot")  # type: ignore[arg-type]
    model.generate([[1]], no_repeat_ngrams=3)  # type: ignore[call-arg]
    model.generate([[1]], suppress_tokens=3)  # type: ignore[arg-type]
    model.generate([[1]], logits_processor=len)  # type: ignore[arg-type]
    generate(model, [[1]], num_sample=3)  # type: ignore[call-arg]
    stream(model, [[1]], top_p="most")  # type: ignore[arg-type]
    GPT2.from_pretrained("gpt2", dtype="bfloat16")  # type: ignore[arg-type]
    model.save_pretrained("folder", type=None)  # type: ignore[call-arg]
