"""What a training run says as it goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepReport:
    """Mean training loss (nats a token) since the last report, and the speed over that time."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    mfu: float


@dataclass(frozen=True)
class EvalReport:
    """Validation loss in nats a token, and in bits per byte of text where the tokenizer is known."""

    step: int
    val_loss: float
    bits_per_byte: float | None
    is_best: bool


@dataclass(frozen=True)
class SampleReport:
    """Text that the model has written."""

    step: int
    text: str


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint that is on disk."""

    step: int
    path: Path


Report = StepReport | EvalReport | SampleReport | CheckpointReport
