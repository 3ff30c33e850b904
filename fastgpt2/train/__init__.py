"""Training: the `Trainer`, its reports, and the checkpoints of a run."""

from fastgpt2.train.optimization import learning_rate, parameter_groups, resolve_dtype
from fastgpt2.train.plot import plot_runs
from fastgpt2.train.processes import Processes
from fastgpt2.train.reports import CheckpointReport, EvalReport, Report, SampleReport, StepReport
from fastgpt2.train.run_folder import checkpoint_paths, read_checkpoint
from fastgpt2.train.trainer import Trainer, check_config

__all__ = [
    "CheckpointReport",
    "EvalReport",
    "Processes",
    "Report",
    "SampleReport",
    "StepReport",
    "Trainer",
    "check_config",
    "checkpoint_paths",
    "learning_rate",
    "parameter_groups",
    "plot_runs",
    "read_checkpoint",
    "resolve_dtype",
]
