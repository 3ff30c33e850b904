"""Ahead-of-time compilation of the kernels that a model needs, into Triton's cache. It works without a GPU, too."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastgpt2.cache import KVCache
from fastgpt2.config import GPT2Config, SamplingConfig
from fastgpt2.decode import DecodeSession, NewRow
from fastgpt2.gpt2 import GPT2
from fastgpt2.loss import calculate_loss
from fastgpt2_kernels import ops

# Steps are captured for powers of two, and row counts of one class share compiled kernels. These are one of each class.
ROWS = (1, 2, 8, 16, 32)
SAMPLINGS = (SamplingConfig(temperature=0), SamplingConfig(temperature=0.8, top_k=50, top_p=0.95))


def warm_up(
    config: GPT2Config,
    target: str | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    rows: Sequence[int] = ROWS,
    trains: bool = False,
    jobs: int | None = None,
) -> list[str]:
    """Compile the kernels that generation with a model of this shape needs, and with `trains` those of training.

    Args:
        config: The model's configuration; its weights do not matter.
        target: The GPU to compile for, such as "sm_90" or "gfx942"; None is the current GPU.
        dtype: The dtype of the weights. A training step is compiled for float32 weights too.
        rows: The numbers of rows that will be decoded together.
        trains: Whether to compile a training step too.
        jobs: How many kernels to compile at a time; None is one per processor.

    Returns:
        The kernels' names, once for each variant.

    Raises:
        ValueError: The target is unknown.
        RuntimeError: No target is given, and there is no GPU.
    """
    variants = find_variants(config, target, dtype=dtype, rows=rows, trains=trains)
    ops.compile_variants(variants, jobs)
    return [variant.kernel for variant in variants]


def find_variants(
    config: GPT2Config, target: str | None, *, dtype: torch.dtype, rows: Sequence[int], trains: bool
) -> list:
    """The kernel variants that `warm_up` compiles."""
    name = ops.this_target() if target is None else target
    # All layers use the same kernels, so one layer is enough.
    model = GPT2(config.replace(num_layers=1), backend="triton").to(dtype).eval()
    with_pdl = name.startswith("sm_") and name[3:].isdigit() and int(name[3:]) >= 90

    def run() -> None:
        for sampling in SAMPLINGS:
            for count in rows:
                _generate(model, sampling, count, with_pdl)
        if trains:
            for kind in dict.fromkeys((dtype, torch.float32)):
                _train(model.to(kind).train())

    return ops.find_variants(name, run)


@torch.no_grad()
def _generate(model: GPT2, sampling: SamplingConfig, rows: int, with_pdl: bool) -> None:
    cache = KVCache(model.config, rows, 64, dtype=model.dtype)
    session = DecodeSession(model, cache, sampling, stop_ids=(0,), use_pdl=False)
    session.use_table = True  # as in a CUDA graph
    prompts = [[1, 2, 3]] * rows
    logits = session.prefill(range(rows), prompts)
    session.begin([NewRow(row, ids, (row, 0), 8) for row, ids in enumerate(prompts)], logits)
    session.step(range(rows))
    if with_pdl:
        session.use_pdl = True
        session.step(range(rows))


def _train(model: GPT2) -> None:
    tokens = torch.ones(2, 17, dtype=torch.int64)
    calculate_loss(model, tokens[:, :-1], tokens[:, 1:]).backward()
