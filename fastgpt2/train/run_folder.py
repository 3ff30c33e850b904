"""The folder of a training run: metrics.jsonl, checkpoints/ and the finished model.

A checkpoint is a file step-N.pt, or a folder step-N if the weights are sharded over processes (sharding.py). The best
file has a link best.pt. Without that link, the best checkpoint is the latest folder whose state says so.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2.files import atomic_file, check_archive, link_file, load_torch_file, remove_leftovers, staging_path, sync
from fastgpt2.messages import listed
from fastgpt2.tokenizer import Tokenizer
from fastgpt2.train import sharding
from fastgpt2.train.processes import Processes
from fastgpt2.train.reports import EvalReport, StepReport

# Format 2 added `val_data` and `tokenizer`.
_FORMAT = 2
# The entries of every checkpoint besides its format, the weights and the optimizer's state.
_PROGRESS = (
    "step", "scaler", "loss_sum", "num_losses", "best_loss", "global_rows", "data", "val_data", "tokenizer",
    "model_config", "train_config",
)  # fmt: skip


def checkpoint_paths(out: str | PathLike[str]) -> list[Path]:
    """The checkpoints of a run, files and folders, oldest first."""
    found = (Path(out) / "checkpoints").glob("step-*")
    return sorted((path for path in found if re.fullmatch(r"step-\d+(\.pt)?", path.name)), key=lambda path: path.stem)


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Its entry `model` holds the whole weights.

    Raises:
        ValueError: It is damaged, or not a checkpoint of this version.
    """
    if not Path(path).is_dir():
        return _read_file(path)
    state = read_progress(path)
    names = sharding.tensor_sizes(Path(path))
    tensors = {name: torch.empty(size) for name, size in names.items() if name.startswith("model.")}
    sharding.read_tensors(Path(path), tensors)
    model = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if state["model_config"].get("tie_word_embeddings"):
        model["lm_head.weight"] = model["transformer.wte.weight"]
    return {**state, "model": model}


def read_progress(path: str | PathLike[str], processes: Processes | None = None) -> dict[str, Any]:
    """Read a checkpoint, but without the tensors if it is a folder.

    Each process verifies the checksums of its share of a folder's files.
    """
    if not Path(path).is_dir():
        return _read_file(path)
    return _checked(path, sharding.read_state(Path(path), processes), _PROGRESS)


def _read_file(path: str | PathLike[str]) -> dict[str, Any]:
    check_archive(path)
    state = load_torch_file(path, mmap=False, what="checkpoint", advice="remove it to continue from the one before")
    return _checked(path, state, (*_PROGRESS, "model", "optimizer"))


def _checked(path: str | PathLike[str], state: Any, entries: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a checkpoint of format {_FORMAT}; train again with this version")
    if missing := [name for name in entries if name not in state]:
        raise ValueError(f"{path}: lacks {listed(missing)}; remove it to continue from the one before")
    return state


class RunFolder:
    """Writes to the folder of one run."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._checkpoints = self.path / "checkpoints"
        self._link = self._checkpoints / "best.pt"
        self._metrics = self.path / "metrics.jsonl"

    def prepare(self, step: int, tokenizer: Tokenizer | None) -> None:
        """Prepare the folder for a run that continues after `step`, and remove what a killed run left there."""
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._checkpoints)
        remove_leftovers(self.path)
        if not step:
            self._link.unlink(missing_ok=True)
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
        """Write a checkpoint as a file, and remove old checkpoints except for the latest `keep` and the best one."""
        self._sync_metrics()
        path = self._checkpoints / f"step-{step:08d}.pt"
        with atomic_file(path) as file:
            torch.save({"format": _FORMAT, "is_best": is_best, **state}, file)
        self._settle(path, is_best, state["best_loss"], keep)
        return path

    def save_shards(
        self,
        step: int,
        state: dict[str, Any],
        tensors: dict[str, Tensor],
        processes: Processes,
        *,
        is_best: bool,
        keep: int,
    ) -> Path:
        """Like `save_checkpoint`, but write a folder, to which every process adds its part. All processes call this."""
        path = self._checkpoints / f"step-{step:08d}"
        stage = staging_path(path)
        if processes.is_first:
            self._sync_metrics()
            stage.mkdir()
        try:
            processes.wait()
            files = sharding.write_tensors(stage, tensors, processes)
            if not processes.is_first:
                return path
            content = {"format": _FORMAT, "is_best": is_best, "files": files, **state}
            with atomic_file(stage / sharding.STATE) as file:
                file.write(json.dumps(content, indent=1).encode())
        except BaseException:
            if processes.is_first:
                shutil.rmtree(stage, ignore_errors=True)
            raise
        if path.exists():  # from an earlier run in this folder
            _remove_folder(path)
        os.replace(stage, path)
        sync(path.parent)
        self._settle(path, is_best, state["best_loss"], keep)
        return path

    def _sync_metrics(self) -> None:
        with open(self._metrics, "rb") as metrics:
            os.fsync(metrics.fileno())  # the lines up to a checkpoint must not be lost

    def _settle(self, path: Path, is_best: bool, best_loss: float, keep: int) -> None:
        if is_best:
            self.mark_best(path)
        best = self.best(best_loss)
        paths = checkpoint_paths(self.path)
        twins = [
            other for other in paths if other.stem == path.stem and other != path
        ]  # from an earlier run in this folder
        latest = [other for other in paths if other not in twins][-keep:]
        for old in paths:
            if old.is_dir() and old not in (*latest, best):
                _remove_folder(old)
            elif not old.is_dir() and old not in latest:
                old.unlink()

    def mark_best(self, checkpoint: Path) -> None:
        """Make a checkpoint the one that `best` finds. Calling this twice does no harm."""
        if checkpoint.is_dir():  # its own state says so
            self._link.unlink(missing_ok=True)
        else:
            link_file(checkpoint, self._link)

    def best(self, best_loss: float) -> Path | None:
        """The checkpoint with the lowest validation loss; None if there is none."""
        if self._link.exists():
            return self._link
        folders = [path for path in checkpoint_paths(self.path) if path.is_dir()]
        return next((path for path in reversed(folders) if _was_best(path, best_loss)), None)

    def has_best(self, best_loss: float) -> bool:
        """Whether the best checkpoint exists and is undamaged. A damaged one is renamed to NAME.damaged."""
        best = self.best(best_loss)
        if best is None:
            return False
        with contextlib.suppress(ValueError):
            if best.is_dir():
                sharding.read_state(best)
                return True
            check_archive(best)
            if zipfile.is_zipfile(best):
                return True
        os.replace(best, best.with_name(f"{best.name}.damaged"))
        return False


def _remove_folder(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, because a half-removed folder would be a damaged checkpoint."""
    removed = path.with_name(f"{staging_path(path).name}.removed")
    os.replace(path, removed)
    shutil.rmtree(removed)


def _was_best(folder: Path, best_loss: float) -> bool:
    try:
        state = json.loads((folder / sharding.STATE).read_text(encoding="utf-8"))
        return bool(state["is_best"]) and state["best_loss"] == best_loss
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON lacks, by None. A step that fp16 skips has such a gradient norm."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _metrics_until(path: Path, step: int) -> bytes:
    """The complete lines of a metrics file up to a step. The resumed run will write the later ones again."""
    if not path.exists():
        return b""
    lines = itertools.takewhile(lambda line: line[1]["step"] <= step, read_metrics(path))
    return b"".join(line + b"\n" for line, _ in lines)


def read_metrics(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (line, its values) for every complete line of a metrics file; ValueError if no training run wrote it."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            values = json.loads(line)
            if not isinstance(values["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"{path}: line {number} is not a line that a training run wrote; mend the file or move it away to go on"
            ) from None
        yield line, values
