"""The folder of a training run: metrics.jsonl, checkpoints/step-*.pt with a link best.pt, and the finished model."""

from __future__ import annotations

import contextlib
import json
import math
import os
import zipfile
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fastgpt2.files import atomic_file, check_archive, link_file, remove_leftovers
from fastgpt2.messages import listed
from fastgpt2.tokenizer import Tokenizer
from fastgpt2.train.reports import EvalReport, StepReport

# 2: `val_data` and `tokenizer`.
_FORMAT = 2
# What every checkpoint holds beside its format.
_ENTRIES = (
    "step", "model", "optimizer", "scaler", "loss_sum", "num_losses", "best_loss", "global_rows", "data", "val_data",
    "tokenizer", "model_config", "train_config",
)  # fmt: skip


def checkpoint_paths(out: str | PathLike[str]) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((Path(out) / "checkpoints").glob("step-*.pt"))


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU. ValueError when the file is not a checkpoint of this package."""
    check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what an unpickler stumbles over, and so what it raises, is up to the file's bytes
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file itself cannot be opened; without a name it is a place that the bytes name
        raise ValueError(f"{path}: not a readable checkpoint; remove it to continue from the one before") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a checkpoint of format {_FORMAT}; train again with this version")
    if missing := [name for name in _ENTRIES if name not in state]:
        raise ValueError(f"{path}: lacks {listed(missing)}; remove it to continue from the one before")
    return state


class RunFolder:
    """Writes to the folder of one run."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.best = self.path / "checkpoints" / "best.pt"
        self._metrics = self.path / "metrics.jsonl"

    def prepare(self, step: int, tokenizer: Tokenizer | None) -> None:
        """Make the folder ready for a run that goes on from `step`, whatever a killed run has left there."""
        self.best.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.best.parent)
        remove_leftovers(self.path)
        if not step:
            self.best.unlink(missing_ok=True)
        if tokenizer is not None:
            tokenizer.save(self.path)
        kept = _metrics_until(self._metrics, step) if step else b""
        with atomic_file(self._metrics) as file:
            file.write(kept)

    def log(self, report: StepReport | EvalReport) -> None:
        """Append a line to metrics.jsonl."""
        with open(self._metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(asdict(report)), allow_nan=False) + "\n")

    def save_checkpoint(self, step: int, state: dict[str, Any], *, is_best: bool, keep: int) -> Path:
        """Write a checkpoint, and remove old ones: the latest `keep` stay, and the best one."""
        with open(self._metrics, "rb") as metrics:
            os.fsync(metrics.fileno())  # the lines up to a checkpoint outlive it
        path = self.best.with_name(f"step-{step:08d}.pt")
        with atomic_file(path) as file:
            torch.save({"format": _FORMAT, "is_best": is_best, **state}, file)
        if is_best:
            self.link_best(path)
        for old in checkpoint_paths(self.path)[:-keep]:
            old.unlink()
        return path

    def has_best(self) -> bool:
        """Whether best.pt is there, and whole; a damaged one is set aside as best.pt.damaged."""
        if not self.best.exists():
            return False
        with contextlib.suppress(ValueError):
            check_archive(self.best)
            if zipfile.is_zipfile(self.best):
                return True
        os.replace(self.best, self.best.with_name("best.pt.damaged"))
        return False

    def link_best(self, checkpoint: Path) -> None:
        """Make best.pt the same file as a checkpoint."""
        link_file(checkpoint, self.best)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: null stands for them (the gradient's norm of a step that fp16 skipped)."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _metrics_until(path: Path, step: int) -> bytes:
    """The whole lines of a metrics file up to a step: what a resumed run repeats, or half wrote, is dropped."""
    if not path.exists():
        return b""
    kept = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            at = json.loads(line)["step"]
            if not isinstance(at, int):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"{path}: line {number} is not a line that a training run wrote; mend the file or move it away to go on"
            ) from None
        if at > step:
            break
        kept.append(line + b"\n")
    return b"".join(kept)
