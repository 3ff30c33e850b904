"""What a contender needs to take part: a package, a GPU, Triton or time. Without it LeftOutError is raised."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import NEEDS_GPU, LeftOutError, Settings
from fastgpt2_kernels import ops


def need(module: str, package: str | None = None) -> Any:
    """Import a module. LeftOutError names the package to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.split(".")[0]
        known = f"pip install {package}" if (error.name or "").split(".")[0] == module.split(".")[0] else str(error)
        raise LeftOutError(f"absent: {package} is not installed ({known})") from None


def need_gpu(settings: Settings) -> None:
    if not settings.on_gpu:
        raise LeftOutError(NEEDS_GPU)


def need_triton(settings: Settings, operator: str) -> None:
    """On a CPU Triton kernels take part only in Triton's interpreter: results are checked, but times mean nothing."""
    if not settings.on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise LeftOutError(NEEDS_GPU)
    reason = ops.why_not_triton(operator, settings.device)
    if reason is not None:
        raise LeftOutError(f"absent: {reason}")


def need_time(settings: Settings, why: str) -> None:
    if not settings.on_gpu and settings.scale == "quick":
        raise LeftOutError(f"skipped: {why}; leave out --quick")


def compiled(function: Callable[..., Any], settings: Settings, fullgraph: bool = True) -> Callable[..., Any]:
    """`torch.compile`. On a CPU it takes a minute, so a quick run leaves it out."""
    if not settings.on_gpu and settings.scale != "full":
        raise LeftOutError("skipped: torch.compile takes a minute on a CPU; leave out --quick")
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    functorch.donated_buffer = False  # the same graph runs backward many times
    dynamo.recompile_limit = 256  # each case needs a graph, and a module has more cases than the default of 8
    return torch.compile(function, fullgraph=fullgraph, dynamic=False)


@functools.cache
def hidden_sizes() -> dict[str, tuple[int, int]]:
    """GPT-2's sizes: width and heads."""
    from fastgpt2 import GPT2Config

    names = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    return {name: (c.hidden_size, c.num_heads) for name in names for c in [GPT2Config.preset(name)]}
