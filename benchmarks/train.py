"""A whole training step (forward, backward, AdamW): ours beside transformers, both eager and compiled.

Dropout is off, so that the contenders can agree on their loss and gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Call, Case, Contender, Settings
from benchmarks.models import fresh, transformers_twin
from benchmarks.peers import compiled
from fastgpt2 import GPT2, GPT2Config, train_step
from fastgpt2.accounting import training_flops_per_token

Make = Callable[[Settings, GPT2Config], tuple[torch.nn.Module, Callable[[Tensor], Tensor]]]


class Inputs(NamedTuple):
    tokens: Tensor
    config: GPT2Config


def cases(settings: Settings) -> Iterator[Case]:
    if settings.scale == "toy":
        sizes = [(GPT2Config(vocab_size=67, context_length=16, hidden_size=32, num_layers=2, num_heads=2), 2, 8)]
    elif settings.on_gpu:
        names = settings.pick(("gpt2", "gpt2-medium", "gpt2-large"), ("gpt2",), ())
        sizes = [(GPT2Config.preset(name), 8, 1024) for name in names]
    else:
        sizes = [(GPT2Config.preset("gpt2"), *settings.pick((4, 512), (1, 128), ()))]
    for config, B, T in sizes:
        config = config.replace(residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0)
        for dtype in ("float32", "bfloat16"):
            yield _case(settings, config, B, T, dtype)


def _case(settings: Settings, config: GPT2Config, B: int, T: int, dtype: str) -> Case:
    def contender(name: str, make: Make, kind: str = dtype) -> Contender:
        build = functools.partial(_build, settings, make, kind)
        return Contender(name, build, name.startswith("ours"), name == "transformers", kind)

    # The first contender is the base of the ratios: eager float32, even for the cases in half precision.
    base = [contender("transformers", _transformers, "float32")] if dtype != "float32" else []
    return Case(
        name="training step",
        shape={"L": config.num_layers, "C": config.hidden_size, "B": B, "T": T},
        dtype=dtype,
        contenders=[*base, *(contender(name, make) for name, make in CONTENDERS.items())],
        inputs=functools.partial(step_inputs, settings, config, B, T),
        exact=functools.partial(exact_step, settings),
        flops=training_flops_per_token(config, T) * B * T,
        tokens=B * T,
        end_to_end=True,
        seconds=settings.pick(120.0, 0.0, 0.0),
    )


def step_inputs(settings: Settings, config: GPT2Config, B: int, T: int) -> Inputs:
    tokens = torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(1))
    return Inputs(tokens.to(settings.device), config)


def _build(settings: Settings, make: Make, dtype: str, inputs: Inputs) -> Call:
    model, backward = make(settings, inputs.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def call() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(settings.device, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = backward(inputs.tokens)
        optimizer.step()
        return [loss, *some_gradients(model)]

    return call


def some_gradients(model: torch.nn.Module) -> list[Tensor]:
    """The gradients of a middle linear layer, in the layout (in, out), of the last layer norm and of an embedding."""
    named = dict(model.named_parameters())
    layers = 1 + max(int(name.split(".")[2]) for name in named if ".h." in name)
    names = (f"transformer.h.{layers // 2}.mlp.c_proj.weight", "transformer.ln_f.weight", "transformer.wpe.weight")
    linear, *rest = (named[name].grad for name in names)
    return [linear.T if isinstance(model, GPT2) else linear, *rest]


def exact_step(settings: Settings, inputs: Inputs) -> list[Tensor]:
    """The result of transformers in float64, one sequence at a time."""
    model = transformers_twin(fresh(settings, inputs.config)).double().train()
    loss = 0.0
    for row in inputs.tokens:
        part = model(row[None], labels=row[None]).loss / len(inputs.tokens)
        part.backward()
        loss += part.item()
    return [torch.tensor(loss, dtype=torch.float64, device=settings.device), *some_gradients(model)]


def _ours(settings: Settings, config: GPT2Config) -> tuple[GPT2, Callable[[Tensor], Tensor]]:
    model = fresh(settings, config).train()
    return model, lambda tokens: train_step(model, tokens)


def _ours_compiled(settings: Settings, config: GPT2Config) -> tuple[GPT2, Callable[[Tensor], Tensor]]:
    model = fresh(settings, config).train()
    model.hidden_states = compiled(model.hidden_states, settings)
    return model, lambda tokens: train_step(model, tokens)


def _transformers(settings: Settings, config: GPT2Config, compile: bool = False) -> Any:
    model = transformers_twin(fresh(settings, config)).train()
    # Its forward pass logs, which breaks the graph.
    forward = compiled(model, settings, fullgraph=False) if compile else model

    def backward(tokens: Tensor) -> Tensor:
        loss = forward(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return model, backward


CONTENDERS: dict[str, Make] = {
    "transformers": _transformers,
    "ours": _ours,
    "ours compiled": _ours_compiled,
    "transformers compiled": functools.partial(_transformers, compile=True),
}
