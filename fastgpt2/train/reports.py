"""The reports that a training run yields."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepReport:
    """The mean training loss (nats per token) since the last report, and the speed over that time."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    mfu: float


@dataclass(frozen=True)
class EvalReport:
    """The validation loss in nats per token, and in bits per byte of text if the tokenizer is known."""

    step: int
    val_loss: float
    bits_per_byte: float | None
    is_best: bool


@dataclass(frozen=True)
class SampleReport:
    """Text that the model generated."""

    step: int
    text: str


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint that has been written."""

    step: int
    path: Path


Report = StepReport | EvalReport | SampleReport | CheckpointReport
