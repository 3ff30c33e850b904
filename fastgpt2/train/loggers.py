"""Where a run's reports go beside metrics.jsonl: TensorBoard's files, or Weights & Biases."""

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
    """ImportError where the library that `TrainConfig.log` names is missing."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise ImportError(f'log {name!r} needs {name}; install it with: pip install "fastgpt2[{name}]"')


def open_logger(config: TrainConfig, folder: Path, step: int) -> Logger | None:
    """The logger that `config` asks for, of a run that goes on from `step`."""
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
    """Event files in the run's folder; what a killed run wrote after its last checkpoint is not shown."""

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
    """A run of Weights & Biases that a resumed run continues: its id is kept in the run's folder.

    Where it goes, or whether it stays on this machine, is for its own settings to say (WANDB_PROJECT, WANDB_MODE ...).
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
