"""fastgpt2: a Triton-accelerated GPT-2 for PyTorch."""

from __future__ import annotations

from fastgpt2.acceleration import accelerate, unaccelerate
from fastgpt2.cache import KVCache
from fastgpt2.config import GPT2Config, SamplingConfig
from fastgpt2.gpt2 import GPT2
from fastgpt2.loss import calculate_loss, train_step
from fastgpt2.scoring import Score, score
from fastgpt2.selfcheck import check

__version__ = "0.1.0"

__all__ = [
    "GPT2",
    "GPT2Config",
    "KVCache",
    "SamplingConfig",
    "Score",
    "__version__",
    "accelerate",
    "calculate_loss",
    "check",
    "score",
    "train_step",
    "unaccelerate",
]
