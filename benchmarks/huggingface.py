"""A training step of transformers' Trainer, with transformers' GPT-2 and with the same model after `accelerate`.

This is Trainer's own step (`training_step`, then AdamW) without its logging. Without dropout, loss and gradients must
agree. With transformers' default dropout of 0.1 each contender drops other numbers, and only the loss is compared.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Call, Case, Contender, Settings
from benchmarks.models import fresh, transformers_twin
from benchmarks.peers import need
from benchmarks.train import Inputs, exact_step, some_gradients, step_inputs
from fastgpt2 import GPT2Config, accelerate
from fastgpt2.accounting import training_flops_per_token

# Contender -> the attention implementation of transformers' model; `accelerate` changes ours in place.
CONTENDERS = {"transformers eager": "eager", "transformers": "sdpa", "ours": "sdpa"}


def cases(settings: Settings) -> Iterator[Case]:
    if settings.scale == "toy":
        sizes = [(GPT2Config(vocab_size=67, context_length=16, hidden_size=32, num_layers=2, num_heads=2), 2, 8)]
    elif settings.on_gpu:
        sizes = [(GPT2Config.preset("gpt2"), 8, 1024)]
    else:
        sizes = [(GPT2Config.preset("gpt2"), *settings.pick((4, 512), (1, 128), ()))]
    for config, B, T in sizes:
        for dropout in (0.0, 0.1):
            yield _case(settings, config, B, T, dropout)


def _case(settings: Settings, config: GPT2Config, B: int, T: int, dropout: float) -> Case:
    config = config.replace(residual_dropout=dropout, embedding_dropout=dropout, attention_dropout=dropout)
    without = config.replace(residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0)
    return Case(
        name="Trainer's step" + (", dropout" if dropout else ""),
        shape={"L": config.num_layers, "C": config.hidden_size, "B": B, "T": T},
        dtype="float32",
        contenders=[
            Contender(name, functools.partial(_build, settings, name), name == "ours", name == "transformers eager")
            for name in CONTENDERS
        ],
        inputs=functools.partial(step_inputs, settings, config, B, T),
        exact=None if dropout else functools.partial(exact_step, settings),
        disagrees=functools.partial(_is_another_loss, settings, without) if dropout else None,
        flops=training_flops_per_token(config, T) * B * T,
        tokens=B * T,
        end_to_end=True,
    )


def _build(settings: Settings, name: str, inputs: Inputs) -> Call:
    transformers = need("transformers")
    need("accelerate")  # Trainer needs it
    model = transformers_twin(fresh(settings, inputs.config)).train()
    model.set_attn_implementation(CONTENDERS[name])
    if name == "ours":
        accelerate(model)
    arguments = transformers.TrainingArguments(
        tempfile.gettempdir(), report_to=[], save_strategy="no", use_cpu=not settings.on_gpu, max_grad_norm=0.0
    )
    trainer = transformers.Trainer(model, arguments)
    trainer.current_gradient_accumulation_steps = 1  # as Trainer's loop does
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = {"input_ids": inputs.tokens, "labels": inputs.tokens}

    def call() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        loss = trainer.training_step(model, batch)
        optimizer.step()
        return [loss, *some_gradients(model)]

    return call


def _is_another_loss(
    settings: Settings, config: GPT2Config, inputs: Inputs, contender: Contender, result: Any
) -> str | None:
    """Why a loss with dropout is wrong, or None.

    With random weights the first loss is close to the loss without dropout. A wrong head or shift is far off.
    """
    expected = _loss_without_dropout(settings, config, inputs)
    off = abs(float(result[0]) / expected - 1)
    return None if off < 0.05 else f"the loss is {off:.1%} away from the loss without dropout"


@functools.lru_cache(maxsize=1)
def _loss_without_dropout(settings: Settings, config: GPT2Config, inputs: Inputs) -> float:
    with torch.no_grad():
        model = transformers_twin(fresh(settings, config))
        return float(model(inputs.tokens, labels=inputs.tokens).loss)
