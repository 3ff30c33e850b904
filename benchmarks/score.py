"""Scoring sequences of mixed lengths: ours, packed without padding, beside a plain loop of padded batches.

The lengths have the spread of real collections (log-normal: most are short, a few are long) and a random order. The
plain loop takes batches in the order of the file, as people usually write it; another loop sorts by length first.
The contenders must agree on the log-probability of every token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Call, Case, Contender, Settings
from benchmarks.models import shared, shared_twin
from fastgpt2 import GPT2Config, score
from fastgpt2.accounting import forward_flops_per_token

TOY = GPT2Config(vocab_size=67, context_length=48, hidden_size=32, num_layers=2, num_heads=2, initializer_range=0.2)
BATCH_ROWS = 8


class Inputs(NamedTuple):
    sequences: list[list[int]]
    config: GPT2Config


def cases(settings: Settings) -> Iterator[Case]:
    config = TOY if settings.scale == "toy" else GPT2Config.preset("gpt2")
    count = settings.pick(256 if settings.on_gpu else 24, 16, 5)
    median, longest = settings.pick((96, 1024) if settings.on_gpu else (64, 512), (48, 256), (8, 48))
    lengths = _lengths(count, median, longest)
    for dtype in ("float32",) if settings.scale == "toy" else ("float32", "bfloat16"):
        yield Case(
            name="score mixed",
            shape={"R": count, "T": longest, "tokens": sum(lengths)},
            dtype=dtype,
            contenders=[
                Contender("transformers, padded", functools.partial(_padded, settings, dtype, False), is_plain=True),
                Contender("transformers, sorted and padded", functools.partial(_padded, settings, dtype, True)),
                Contender("ours", functools.partial(_ours, settings, dtype), is_ours=True),
            ],
            inputs=functools.partial(_inputs, config, lengths),
            exact=functools.partial(_exact, settings),
            flops=sum(forward_flops_per_token(config, n) * n for n in lengths),
            tokens=sum(lengths),
            end_to_end=True,
            measures_memory=settings.scale == "full",
        )


def _lengths(count: int, median: int, longest: int) -> list[int]:
    """Quantiles of a log-normal distribution, in random order."""
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    lengths = (median * (0.9 * torch.special.ndtri(quantiles)).exp()).round().clamp(8, longest)
    return lengths[torch.randperm(count, generator=torch.Generator().manual_seed(3))].int().tolist()


def _inputs(config: GPT2Config, lengths: list[int]) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    return Inputs([torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in lengths], config)


@torch.no_grad()
def _exact(settings: Settings, inputs: Inputs) -> list[Tensor]:
    return _one_at_a_time(settings, "float64", inputs)()


# -- contenders ---------------------------------------------------------------------------------------------------


def _ours(settings: Settings, dtype: str, inputs: Inputs) -> Call:
    model = shared(settings, inputs.config, getattr(torch, dtype))
    return lambda: [torch.tensor([p for one in score(model, inputs.sequences) for p in one.logprobs])]


def _padded(settings: Settings, dtype: str, is_sorted: bool, inputs: Inputs) -> Call:
    """A plain loop: padded batches, a mask, and the log-softmax of the logits."""
    model = shared_twin(settings, inputs.config, getattr(torch, dtype))
    order = list(range(len(inputs.sequences)))
    if is_sorted:
        order.sort(key=lambda i: len(inputs.sequences[i]))

    @torch.no_grad()
    def call() -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), BATCH_ROWS):
            indices = order[start : start + BATCH_ROWS]
            rows = [torch.tensor(inputs.sequences[i]) for i in indices]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(settings.device)
            lengths = torch.tensor([len(row) for row in rows], device=ids.device)
            mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            logits = model(ids, attention_mask=mask.long()).logits
            logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            for i, row, length in zip(indices, logprobs, lengths.tolist(), strict=True):
                found[i] = row[: length - 1]
        return [torch.cat([found[i] for i in range(len(order))])]

    return call


def _one_at_a_time(settings: Settings, dtype: str, inputs: Inputs) -> Call:
    model = shared_twin(settings, inputs.config, getattr(torch, dtype))

    @torch.no_grad()
    def call() -> list[Tensor]:
        parts = []
        for sequence in inputs.sequences:
            ids = torch.tensor([sequence], device=settings.device)
            logits = model(ids).logits[0, :-1]
            wide = torch.promote_types(logits.dtype, torch.float32)
            parts.append(logits.to(wide).log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0])
        return [torch.cat(parts)]

    return call
