"""Prompts that begin with the same tokens, beside as many samples of one prompt: sharing cannot be faster than that.

A third contender has as many prompts of the same length with nothing in common. That takes minutes on a CPU, so it runs
there only at the smaller scales. All contenders are greedy, and right if a prompt gets the same tokens as alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Call, Case, Contender, Settings
from benchmarks.models import shared
from fastgpt2 import GPT2Config
from fastgpt2.accounting import forward_flops_per_token

TOY = GPT2Config(vocab_size=67, context_length=48, hidden_size=32, num_layers=2, num_heads=2, initializer_range=0.2)
ONE, COMMON, APART = "samples of one prompt", "ours, a common prefix", "prompts with nothing in common"
CHECKED_ROWS = 2


class Inputs(NamedTuple):
    """Prompts (R, T) of each contender."""

    prompts: dict[str, list[list[int]]]
    config: GPT2Config


def cases(settings: Settings) -> Iterator[Case]:
    config = TOY if settings.scale == "toy" else GPT2Config.preset("gpt2", bos_token_id=None, eos_token_id=None)
    R, common, own = settings.pick((64, 200, 4), (16, 200, 4), (3, 20, 2))
    for new in settings.pick((1, 32), (8,), (3,)):
        yield Case(
            name="common prefix",
            shape={"R": R, "T": common + own, "common": common, "new": new},
            dtype="float32",
            contenders=[
                Contender(name, functools.partial(_generate, settings, name, new), is_ours=name == COMMON)
                for name in ((ONE, COMMON, APART) if settings.on_gpu or settings.scale != "full" else (ONE, COMMON))
            ],
            inputs=functools.partial(_inputs, config, R, common, own),
            disagrees=functools.partial(_disagrees, settings, new),
            # The FLOPs of a prefix tree's tokens. The head runs only on a prompt's last token.
            flops=forward_flops_per_token(config, common + own + new) * (common + R * (own + new - 1))
            - 2.0 * config.vocab_size * config.hidden_size * (common + R * (own - 1)),
            tokens=R * new,
            end_to_end=True,
            measures_memory=False,
        )


def _inputs(config: GPT2Config, R: int, common: int, own: int) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    apart = torch.randint(config.vocab_size, (R, common + own), generator=generator)
    alike = apart.clone()
    alike[:, :common] = apart[0, :common]
    return Inputs({ONE: apart[:1].tolist(), COMMON: alike.tolist(), APART: apart.tolist()}, config)


def _generate(settings: Settings, name: str, new: int, inputs: Inputs) -> Call:
    model = shared(settings, inputs.config, torch.float32)
    prompts = inputs.prompts[name]
    R = len(inputs.prompts[COMMON])
    options = {"temperature": 0, "max_new_tokens": new, "num_samples": R // len(prompts), "batch_size": R}
    return lambda: [sample.token_ids for sample in model.generate(prompts, **options)]


def _disagrees(settings: Settings, new: int, inputs: Inputs, contender: Contender, result: Any) -> str | None:
    prompts = inputs.prompts[contender.name]
    model = shared(settings, inputs.config, torch.float32)
    for row in range(0, len(prompts), -(-len(prompts) // CHECKED_ROWS)):
        (alone,) = model.generate([prompts[row]], temperature=0, max_new_tokens=new)
        if result[row] != alone.token_ids:
            return f"row {row} has the tokens {result[row]}; alone it has {alone.token_ids}"
    return None
