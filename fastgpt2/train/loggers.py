"""Loggers that send a run's reports to TensorBoard or Weights & Biases, in addition to metrics.jsonl."""

from __future__ import annotations

import importlib.util
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from fastgpt2.config import TrainConfig
from fastgpt2.files import atomic_file
from fastgpt2.train.reports import EvalReport, SampleReport, StepReport


class Logger(Protocol):
    def log(self, report: StepReport | EvalReport | SampleReport) -> None: ...

    def close(self) -> None: ...


def check_logger(name: str | None) -> None:
    """Raise ImportError if the library that `TrainConfig.log` names is not installed."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise ImportError(f'log {name!r} needs {name}; install it with: pip install "fastgpt2[{name}]"')


def open_logger(config: TrainConfig, folder: Path, step: int) -> Logger | None:
    """Open the logger that `config` names for a run that continues after `step`; None if it names none."""
    if config.log is None:
        return None
    return _TensorBoard(folder, step) if config.log == "tensorboard" else _Wandb(config, folder)


def _values(report: StepReport | EvalReport) -> dict[str, float]:
    """The numbers of a report, by name."""
    part = "train" if isinstance(report, StepReport) else "validation"
    named = {
        name.removeprefix("val_"): value for name, value in asdict(report).items() if name not in ("step", "is_best")
    }
    return {f"{part}/{name}": value for name, value in named.items() if value is not None}


class _TensorBoard:
    """Writes event files to the run's folder. Events that a killed run wrote after its last checkpoint are hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, report: StepReport | EvalReport | SampleReport) -> None:
        if isinstance(report, SampleReport):
            self._writer.add_text("sample", report.text, report.step)
            return
        for name, value in _values(report).items():
            self._writer.add_scalar(name, value, report.step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases. Its id is kept in the run's folder, so that a resumed run continues it.

    Its own settings (WANDB_PROJECT, WANDB_MODE ...) say where the run goes, or that it stays on this machine.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        import wandb

        path = folder / "wandb-id"
        if not path.exists():
            with atomic_file(path) as file:
                file.write(secrets.token_hex(8).encode())
        run_id = path.read_text(encoding="ascii").strip()
        self._run: Any = wandb.init(id=run_id, resume="allow", name=folder.name, dir=str(folder), config=asdict(config))

    def log(self, report: StepReport | EvalReport | SampleReport) -> None:
        values: dict[str, Any] = {"sample": report.text} if isinstance(report, SampleReport) else _values(report)
        self._run.log(values, step=report.step)

    def close(self) -> None:
        self._run.finish()
