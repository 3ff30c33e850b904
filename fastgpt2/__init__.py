"""fastgpt2: a Triton-accelerated GPT-2 for PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastgpt2.cache import KVCache
from fastgpt2.config import GPT2Config, SamplingConfig
from fastgpt2.loss import calculate_loss, train_step
from fastgpt2.model import GPT2

if TYPE_CHECKING:
    from fastgpt2.integrations.transformers import accelerate

__version__ = "0.1.0"

__all__ = [
    "GPT2",
    "GPT2Config",
    "KVCache",
    "SamplingConfig",
    "__version__",
    "accelerate",
    "calculate_loss",
    "train_step",
]


def __getattr__(name: str) -> Any:
    # What needs checkpoints or another library is imported when it is first named.
    if name == "accelerate":
        from fastgpt2.integrations.transformers import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
