"""Ahead-of-time compilation of the kernels that a model needs, into Triton's cache. It works without a GPU, too.

Nothing here lists kernels. Generation and a training step run as users run them, on a CPU and with small inputs, and
what they launch is noted.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastgpt2.cache import KVCache
from fastgpt2.config import GPT2Config, SamplingConfig
from fastgpt2.decode import DecodeSession, drop_sessions
from fastgpt2.generate import generate
from fastgpt2.gpt2 import GPT2
from fastgpt2.loss import calculate_loss
from fastgpt2.prefixes import MIN_COMPUTED, MIN_SHARED
from fastgpt2_kernels import ops

# Steps are captured for powers of two, and row counts of one class share compiled kernels. These are one of each class.
ROWS = (1, 2, 8, 16, 32)
# A filter is part of the sampling kernel only if it is on, so each subset of the filters is a kernel of its own.
_FILTERS = {"top_k": 50, "top_p": 0.95, "min_p": 0.05}
_PENALTY = 1.2
# The first of two tokens is chosen after the prompt, the second one in a step.
_GREEDY = SamplingConfig(max_new_tokens=2, temperature=0, stop_token_ids=())
# The tokens that a prompt has after a shared prefix: up to 8 go through other kernels than more do.
_ADDED = (MIN_COMPUTED, 9)


def warm_up(
    config: GPT2Config,
    target: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    rows: Sequence[int] = ROWS,
    weight_dtype: torch.dtype | None = None,
    train_dtype: torch.dtype | None = None,
    jobs: int | None = None,
) -> list[str]:
    """Compile the kernels that generation with a model of this shape needs, and those of training if asked for.

    Args:
        config: The model's configuration; its weights do not matter.
        target: The GPU to compile for, such as "sm_90" or "gfx942"; None is the current GPU.
        dtype: The dtype of the weights in generation.
        rows: The numbers of rows that will be decoded together.
        weight_dtype: torch.int8 if generation will store the linear layers' weights in 8 bits.
        train_dtype: The autocast dtype of training, whose weights are float32; torch.float32 is training without
            autocast. None compiles no kernels of training.
        jobs: How many kernels to compile at a time; None is one per processor.

    Returns:
        The kernels' names, once for each variant.

    Raises:
        ValueError: The target is unknown, or the kernels do not take the dtype.
        RuntimeError: No target is given, and there is no GPU.
    """
    variants = find_variants(config, target, dtype=dtype, rows=rows, weight_dtype=weight_dtype, train_dtype=train_dtype)
    ops.compile_variants(variants, jobs)
    return [variant.kernel for variant in variants]


def find_variants(
    config: GPT2Config,
    target: str | None,
    *,
    dtype: torch.dtype,
    rows: Sequence[int] = ROWS,
    weight_dtype: torch.dtype | None = None,
    train_dtype: torch.dtype | None = None,
) -> list[Any]:
    """The kernel variants that `warm_up` compiles."""
    name = ops.this_target() if target is None else target

    def run() -> None:
        # All layers use the same kernels, so one layer is enough.
        model = GPT2(config.replace(num_layers=1), backend="triton")
        if train_dtype is not None:
            _train(model, train_dtype)
        _generate(model.to(dtype).eval(), rows, weight_dtype)

    return launched_on(name, run)


def launched_on(target: str, run: Callable[[], object]) -> list[Any]:
    """The kernel variants that `run` would compile on a GPU. It runs models with backend="triton" on the CPU.

    Args:
        target: The GPU, such as "sm_90" or "gfx942".
        run: What runs. Kernels are not executed, so it must not look at their results.

    Raises:
        ValueError: The target is unknown.
    """

    def whole_run() -> None:
        with _decides_as(target):
            run()

    return ops.find_variants(target, whole_run)


def may_have_pdl(target: str) -> bool:
    """Whether decoding tries programmatic dependent launch on this GPU."""
    return target.startswith("sm_") and int(target[3:]) >= 90


@contextmanager
def _decides_as(target: str) -> Iterator[None]:
    """Let models on the CPU decide as they would on the target where the two differ.

    A step launches what a GPU captures in a graph, with the table that finds the cache. Where the target may have
    programmatic dependent launch, a session tries both ways and keeps the faster one, so either may be needed. What is
    copied to a GPU begins at an aligned address, even if it was a view.
    """
    with_pdl = (False, True) if may_have_pdl(target) else (False,)

    def run(session: DecodeSession, rows: Tensor) -> None:
        for use_pdl in with_pdl:
            session._kernels.run(rows, use_table=True, use_pdl=use_pdl)

    to_device = ops.to_device
    with (
        mock.patch.object(DecodeSession, "_run", run),
        mock.patch.object(ops, "to_device", lambda *args: to_device(*args).clone()),
        mock.patch.object(KVCache, "best_dtype", staticmethod(lambda dtype, device: dtype)),
    ):
        yield


# -- what runs ------------------------------------------------------------------------------------------------------


def _generate(model: GPT2, rows: Sequence[int], weight_dtype: torch.dtype | None) -> None:
    """Generate with every number of rows, and with all settings that compile differently."""
    config = model.config

    def run(prompts: list[list[int]], sampling: SamplingConfig) -> None:
        generate(model, prompts, batch_size=len(prompts), weight_dtype=weight_dtype, sampling=sampling)

    prompt = [0] * max(1, min(4, config.context_length - 1))  # leaves room for a step
    for count in rows:
        run([prompt] * count, _GREEDY)
    for sampling in _samplings():
        run([prompt], sampling)
    for num_stops in {0, 1, len(set(config.eos_token_ids))}:
        # No kernel is executed, so every token that is chosen is 0. If 0 ended a sample, no step would run.
        run([prompt], dataclasses.replace(_GREEDY, stop_token_ids=tuple(range(1, num_stops + 1))))
    for prompts in _sharing_prompts(config):
        run(prompts, _GREEDY)
    drop_sessions(model)


def _samplings() -> Iterator[SamplingConfig]:
    """Settings for every variant of the sampling kernel that a decoding step has."""
    subsets = [names for size in range(len(_FILTERS) + 1) for names in itertools.combinations(_FILTERS, size)]
    for penalty in (1.0, _PENALTY):
        greedy = dataclasses.replace(_GREEDY, repetition_penalty=penalty)
        yield greedy
        for names in subsets:
            filters: dict[str, Any] = {name: _FILTERS[name] for name in names}
            yield dataclasses.replace(greedy, temperature=0.8, **filters)


def _sharing_prompts(config: GPT2Config) -> Iterator[list[list[int]]]:
    """Pairs of prompts that share a prefix, as far as the context has room for them."""
    prefix = [0] * MIN_SHARED
    for count in _ADDED:
        if len(prefix) + count <= config.context_length:
            yield [prefix, prefix + [0] * count]


def _train(model: GPT2, dtype: torch.dtype) -> None:
    """Run a step of training, and of validation, as `fastgpt2 train` does."""
    tokens = torch.zeros(2, min(16, model.config.context_length) + 1, dtype=torch.int64)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with autocast:
        loss = calculate_loss(model.train(), tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    model.zero_grad(set_to_none=True)
    with autocast, torch.no_grad():
        calculate_loss(model.eval(), tokens[:, :-1], tokens[:, 1:], reduction="sum")
