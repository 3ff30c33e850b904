"""What other projects' implementations need to take part."""

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
    """The module, or LeftOutError with the package to install."""
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
    """On a CPU it takes part only under Triton's interpreter, where kernels are checked but times mean nothing."""
    if not settings.on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise LeftOutError(NEEDS_GPU)
    reason = ops.why_not_triton(operator, settings.device)
    if reason is not None:
        raise LeftOutError(f"absent: {reason}")


def need_time(settings: Settings, why: str) -> None:
    if not settings.on_gpu and settings.scale == "quick":
        raise LeftOutError(f"skipped: {why}; leave out --quick")


def compiled(function: Callable[..., Any], settings: Settings, fullgraph: bool = True) -> Callable[..., Any]:
    """`torch.compile`, which on a CPU takes a minute that a quick run has not."""
    if not settings.on_gpu and settings.scale != "full":
        raise LeftOutError("skipped: torch.compile takes a minute on a CPU; leave out --quick")
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    functorch.donated_buffer = False  # a backward is timed again and again on one graph
    dynamo.recompile_limit = 256  # one graph for every case, of which a module has more than 8
    return torch.compile(function, fullgraph=fullgraph, dynamic=False)


@functools.cache
def hidden_sizes() -> dict[str, tuple[int, int]]:
    """GPT-2's sizes: width and heads."""
    from fastgpt2 import GPT2Config

    names = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    return {name: (c.hidden_size, c.num_heads) for name in names for c in [GPT2Config.preset(name)]}
