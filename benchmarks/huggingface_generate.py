"""The same `generate` calls on transformers' GPT-2 class and on ours, for ragged prompts padded on the left.

A contender is right if float64 could choose each of its tokens, within the rounding of the contender's dtype (see
generate.py): the best one, the best one that repeats no n-gram, or when sampling one of the 50 most likely.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import engines
from benchmarks.generate import CHECKED_ROWS, EPS, TOY, exact_logits, rounding_of
from benchmarks.harness import Call, Case, Contender, Settings
from benchmarks.models import shared_twin
from benchmarks.peers import need
from fastgpt2 import GPT2Config
from fastgpt2.accounting import forward_flops_per_token

TOP_K = 50
NGRAM = 3


class Inputs(NamedTuple):
    prompts: list[list[int]]
    new_tokens: int
    config: GPT2Config
    options: dict[str, Any]


def cases(settings: Settings) -> Iterator[Case]:
    config = TOY if settings.scale == "toy" else GPT2Config.preset("gpt2", bos_token_id=None, eos_token_id=None)
    new = settings.pick(64, 16, 6)
    rows = settings.pick(8, 4, 3)
    longest = settings.pick(128, 64, 8)
    lengths = [longest // 4 + r * (longest - longest // 4) // (rows - 1) for r in range(rows)]
    for name, options in (
        ("greedy", {"do_sample": False}),
        ("top-k", {"do_sample": True, "top_k": TOP_K}),
        ("no n-gram twice", {"do_sample": False, "no_repeat_ngram_size": NGRAM}),
    ):
        yield _case(settings, config, name, options, lengths, new)


def _case(
    settings: Settings, config: GPT2Config, name: str, options: dict[str, Any], lengths: list[int], new: int
) -> Case:
    R = len(lengths)
    return Case(
        name=f"generate by transformers, {name}",
        shape={"R": R, "T": max(lengths), "new": new},
        dtype="float32",
        contenders=[
            Contender(label, functools.partial(_generate, settings, ours, dtype), ours, dtype=dtype)
            for label, ours in (("transformers", False), ("ours", True))
            for dtype in (("float32",) if settings.scale == "toy" else ("float32", "bfloat16"))
        ],
        inputs=functools.partial(_inputs, config, options, lengths, new),
        disagrees=functools.partial(_disagrees, settings),
        flops=forward_flops_per_token(config, max(lengths) + new) * (sum(lengths) + R * (new - 1)),
        tokens=R * new,
        end_to_end=True,
        measures_memory=False,
        isolated=settings.scale != "toy",
    )  # fmt: skip


def _inputs(config: GPT2Config, options: dict[str, Any], lengths: list[int], new: int) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return Inputs(prompts, new, config, options)


def _generate(settings: Settings, ours: bool, dtype: str, inputs: Inputs) -> Call:
    model = (
        _ours(settings, inputs.config, dtype) if ours else shared_twin(settings, inputs.config, getattr(torch, dtype))
    )
    ids, mask = (t.to(settings.device) for t in engines.left_padded(inputs.prompts))
    new = inputs.new_tokens

    def call() -> list[list[int]]:
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, pad_token_id=0, **inputs.options)
        return out[:, ids.shape[1] :].tolist()

    return call


@functools.cache
def _ours(settings: Settings, config: GPT2Config, dtype: str) -> Any:
    need("transformers")
    from fastgpt2.transformers import GPT2LMHeadModel

    twin = shared_twin(settings, config, torch.float32)
    model = GPT2LMHeadModel(twin.config).to(settings.device)
    model.load_state_dict(twin.state_dict())
    return model.to(getattr(torch, dtype)).eval()


def _disagrees(settings: Settings, inputs: Inputs, contender: Contender, result: list[list[int]]) -> str | None:
    counts = [len(ids) for ids in result]
    if counts != [inputs.new_tokens] * len(inputs.prompts):
        return f"expected {inputs.new_tokens} new tokens for each of {len(inputs.prompts)} rows; got {counts}"
    dtype = contender.dtype or "float32"
    for row in sorted({0, len(result) - 1})[:CHECKED_ROWS]:
        prompt, ids = inputs.prompts[row], result[row]
        held = [*prompt, *ids]
        exact = exact_logits(settings, inputs.config, tuple(held[:-1]))[len(prompt) - 1 :]
        budget = 2 * 2 * (rounding_of(settings, inputs.config, tuple(prompt), dtype) + EPS[dtype] * exact.abs().max())
        chosen = exact.gather(-1, torch.tensor(ids, device=exact.device)[:, None])[:, 0]
        regret = _bounds(exact, held, len(prompt), inputs.options) - chosen
        if regret.max() > budget:
            at = int(regret.argmax())
            return f"row {row}, token {at}: its logit is {regret[at]:.3g} too low, the budget is {budget:.3g}"
    return None


def _bounds(exact: Tensor, held: list[int], prompt_tokens: int, options: dict[str, Any]) -> Tensor:
    """The lowest logit that each new token may have, before rounding."""
    if options["do_sample"]:
        return exact.topk(TOP_K).values[:, -1]
    exact = exact.clone()
    if "no_repeat_ngram_size" in options:
        for step in range(len(exact)):
            before = held[: prompt_tokens + step]
            last = before[len(before) - NGRAM + 1 :]
            repeats = [i for i in range(len(before) - NGRAM + 1) if before[i : i + NGRAM - 1] == last]
            exact[step, [before[i + NGRAM - 1] for i in repeats]] = -torch.inf
            if held[prompt_tokens + step] in {before[i + NGRAM - 1] for i in repeats}:
                return torch.full_like(exact[:, 0], torch.inf)
    return exact.amax(-1)
