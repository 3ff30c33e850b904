"""The `Trainer`: AdamW with GPT-2's parameter groups, or Muon; data-parallel under torchrun; resumable bit for bit.

A step depends only on the weights, the optimizer's state and (seed, step). Those two determine its rows (data.py) and
its random numbers, because the generators are seeded at every step. So a checkpoint needs no generator state. A run may
be killed at any moment: continued from its last checkpoint, it gives what an uninterrupted run gives.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgpt2 import accounting
from fastgpt2.config import GPT2Config, TrainConfig
from fastgpt2.data import TokenData
from fastgpt2.gpt2 import GPT2
from fastgpt2.loss import calculate_loss
from fastgpt2.messages import first_line
from fastgpt2.tokenizer import Tokenizer
from fastgpt2.train import sharding
from fastgpt2.train.loggers import Logger, check_logger, open_logger
from fastgpt2.train.lora import add_adapters, check_lora, merge_adapters
from fastgpt2.train.optimization import DTYPES, check_optimizer, learning_rate, make_optimizers, resolve_dtype
from fastgpt2.train.processes import Processes, check_parallel
from fastgpt2.train.reports import CheckpointReport, EvalReport, Report, SampleReport, StepReport
from fastgpt2.train.run_folder import RunFolder, checkpoint_paths, read_checkpoint, read_progress
from fastgpt2_kernels import ops

# With `minutes`, these steps are timed to set the number of steps. Those before them are warm-up. If steps are slow,
# fewer are timed: those that fit in this share of the time.
_CALIBRATION = range(5, 25)
_CALIBRATION_SHARE = 0.25
# The settings that a resumed run may change. They affect no results, or only those of the steps to come.
_MAY_CHANGE = {
    "steps", "batch_size", "accumulate", "compile", "deterministic", "log_interval", "eval_interval", "eval_tokens",
    "sample_interval", "sample_prompt", "checkpoint_interval", "keep_checkpoints", "export", "parallel", "recompute",
    "early_stopping", "log",
}  # fmt: skip
# The entries of a checkpoint file that hold the state of `Trainer.optimizers`.
_OPTIMIZERS = ("optimizer", "muon")


class _LossModule(nn.Module):
    """Computes the loss in its forward pass, so that DistributedDataParallel can wrap it."""

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        return calculate_loss(self.model, input_ids, targets)


class Trainer:
    """Trains a model, and writes metrics, checkpoints and the finished model to a folder.

    The weights are float32 and are changed in place. torch's generators are seeded at every step. With
    `config.lora_rank` the model gets adapters. With `config.parallel` "fsdp" its weights are sharded over the
    processes, and it can no longer be used outside the trainer.

    Args:
        model: The model.
        data: The tokens to train on, and those to validate on.
        config: How to train.
        out: The run's folder.
        tokenizer: The tokenizer that is saved with the model; None if there is none.
        processes: The processes of the run; None is this process alone.

    Raises:
        ValueError: The model, the data and the configuration do not fit each other, or this machine.
        ImportError: The configuration needs a library that is not installed.
    """

    def __init__(
        self,
        model: GPT2,
        data: TokenData,
        config: TrainConfig,
        out: str | PathLike[str],
        *,
        tokenizer: Tokenizer | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes(0, 1, model.device)
        self.device = self.processes.device
        self.config = config.replace(dtype=resolve_dtype(config.dtype, self.device))
        self.out = Path(out)
        self._folder = RunFolder(out)
        self.data = data
        self.tokenizer = tokenizer
        self.context = model.config.context_length
        self._fingerprint = data.train.fingerprint()
        self._val_fingerprint = data.val.fingerprint() if data.val is not None else None
        # This comes first, because an error that only one process finds would leave the others waiting for it.
        self.processes.check_same(self._settings(model.config))
        data.train.windows_per_epoch(self.context)  # raises when the text is too short
        if data.meta is not None and data.meta.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"Trainer: the data's vocabulary must fit in the model's; got {data.meta.vocab_size} tokens of data "
                f"and vocab_size {model.config.vocab_size}"
            )
        if config.early_stopping and (data.val is None or len(data.val) < 2):
            raise ValueError("Trainer: early_stopping needs a validation set; give a val_fraction > 0 or leave it out")
        if config.optimizer == "muon" and self.config.dtype == "fp16":
            raise ValueError(
                "Trainer: optimizer 'muon' needs dtype bf16 or fp32; got fp16, which skips steps that overflow"
            )
        if model.dtype != torch.float32:
            raise ValueError(
                f"Trainer: the model's weights must be float32 (config.dtype is autocast's); got {model.dtype}"
            )
        check_config(config)
        if config.parallel == "fsdp" and self.processes.count != dist.get_world_size():
            raise ValueError(
                f"Trainer: parallel 'fsdp' needs all {dist.get_world_size()} processes; got a Processes of "
                f"{self.processes.count}: pass Processes.start()"
            )
        if config.lora_rank:
            add_adapters(model, config.lora_rank, config.lora_alpha, config.seed)
        self.is_sharded = config.parallel == "fsdp"
        if self.is_sharded:
            sharding.shard(model, self.device, self.processes.count)
        self.model = model.to(self.device).train()
        self.model.tokenizer = tokenizer
        self.model.recompute(config.recompute)
        self.parameters = dict(model.named_parameters())
        self.autocast_dtype = DTYPES[self.config.dtype]
        self.optimizers = make_optimizers(model, config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.dtype == "fp16")
        self.step = 0
        self.best_loss = math.inf
        self.stale_evaluations = 0  # consecutive evaluations without a new lowest loss
        self.loss_sum = torch.zeros((), device=self.device)
        self.num_losses = 0
        self.max_norm = torch.zeros((), device=self.device)
        self.stop_requested = False
        self.is_calibrated = config.minutes is None
        self._logger: Logger | None = None
        self._val_bytes: int | None = None

    def _settings(self, model_config: GPT2Config) -> dict[str, object]:
        """The settings that must be the same in every process."""
        return {
            **asdict(self.config),
            **{f"the model's {name}": value for name, value in asdict(model_config).items()},
            "the hash of train.bin": self._fingerprint,
            "the hash of val.bin": self._val_fingerprint,
            "the tokenizer's hash": None if self.tokenizer is None else self.tokenizer.digest(),
        }

    # -- a run ----------------------------------------------------------------------------------------------------

    @property
    def global_rows(self) -> int:
        return self.config.batch_size * self.config.accumulate * self.processes.count

    def stop(self) -> None:
        """Ask `run` to finish its current step, write a checkpoint and end. This is safe in a signal handler."""
        self.stop_requested = True

    @property
    def is_finished(self) -> bool:
        return (self.is_calibrated and self.step >= self.config.steps) or self.is_stopped_early

    @property
    def is_stopped_early(self) -> bool:
        return 0 < self.config.early_stopping <= self.stale_evaluations

    def run(self) -> Iterator[Report]:
        """Train, and yield reports, until all steps are done or `stop()` is called.

        The finished model is written when all steps are done, or when training has stopped early.

        Raises:
            ValueError: The loss is no longer finite. The checkpoints written before stay.
        """
        if self.processes.is_first:
            self._folder.prepare(self.step, self.tokenizer)
        with self._modes(), self._logging():
            yield from self._steps()
        if self.is_finished:
            self._export()

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        """Turn on `deterministic` and `compile` for the duration of the run."""
        was_deterministic = torch.are_deterministic_algorithms_enabled()
        if self.config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
            torch.use_deterministic_algorithms(True)
        if self.config.compile:
            # Only the transformer: the loss is one chunked operator, with nothing around it to fuse.
            # The instance's dictionary holds the compiled method. Deleting it there restores the class's own.
            vars(self.model)["hidden_states"] = torch.compile(self.model.hidden_states)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_deterministic)
            if self.config.compile:
                del vars(self.model)["hidden_states"]

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """Open the logger for the duration of the run. A run that has nothing left to do opens none."""
        if self.processes.is_first and not self.is_finished:
            self._logger = open_logger(self.config, self.out, self.step)
        try:
            yield
        finally:
            if self._logger is not None:
                self._logger.close()
            self._logger = None

    def _steps(self) -> Iterator[Report]:
        loss_module = self._wrapped()
        peak = accounting.peak_flops(self.device, self.autocast_dtype) * self.processes.count
        frozen = self.config.lora_rank > 0
        mfu_per_speed = accounting.training_flops_per_token(self.model.config, self.context, frozen=frozen) / peak
        clock, clock_step = time.perf_counter(), self.step
        began, begun_at = clock, clock_step
        timed_from, timed_since = max(self.step, _CALIBRATION.start), clock
        stopping = False
        while not self.is_finished and not stopping:
            if self.step == timed_from:
                timed_since = time.perf_counter()
            lr, grad_norm = self._train_step(loss_module)
            self.step += 1
            if not self.is_calibrated and self._has_timed_enough(time.perf_counter() - began):
                timed = (timed_since, timed_from) if self.step > timed_from else (began, begun_at)
                self._calibrate((time.perf_counter() - timed[0]) / (self.step - timed[1]))
            logging = self._is_due(self.config.log_interval)
            stopping = self._agree_to_stop()
            if logging:
                loss = self._mean_loss()
                speed = (self.step - clock_step) * self.global_rows * self.context / (time.perf_counter() - clock)
                step_report = StepReport(self.step, loss, lr, float(grad_norm), speed, speed * mfu_per_speed)
                self._log(step_report)
                yield step_report
                clock, clock_step = time.perf_counter(), self.step
            pause = time.perf_counter()
            is_best = False
            if self._is_due(self.config.eval_interval) and (eval_report := self._evaluate()):
                is_best = eval_report.is_best
                self._log(eval_report)
                yield eval_report
            if self._is_due(self.config.sample_interval):
                model = self._whole_model()
                if model is not None:
                    sample_report = SampleReport(self.step, self._sample(model))
                    if self._logger is not None:
                        self._logger.log(sample_report)
                    yield sample_report
            if stopping or is_best or self._is_due(self.config.checkpoint_interval):
                path = self._save(self._finite_loss_sum(), is_best)
                if path is not None:
                    yield CheckpointReport(self.step, path)
            clock += time.perf_counter() - pause  # the speed counts training steps only

    def _is_due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps (0: never) and after the last step is due now."""
        return bool(interval) and (self.step % interval == 0 or self.is_finished)

    def _agree_to_stop(self) -> bool:
        if self.processes.count == 1:
            return self.stop_requested
        # Processes do not agree at every step, because that takes a round of messages.
        return self._is_due(self.config.log_interval) and self.processes.any(self.stop_requested)

    def _train_step(self, loss_module: nn.Module) -> tuple[float, Tensor]:
        """Run one optimizer step; returns its learning rate and the gradient's norm before clipping."""
        config, processes = self.config, self.processes
        lr = learning_rate(self.step, config)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        torch.manual_seed(_mix(config.seed, self.step, processes.rank))
        first = self.step * self.global_rows
        for micro in range(config.accumulate):
            # Micro-batch m of process r is slice m * count + r of the step's rows, whatever the layout.
            start = first + (micro * processes.count + processes.rank) * config.batch_size
            inputs, targets = self.data.train.rows(start, config.batch_size, self.context, config.seed)
            is_last = micro == config.accumulate - 1
            with contextlib.ExitStack() as stack:
                if isinstance(loss_module, DistributedDataParallel) and not is_last:
                    stack.enter_context(loss_module.no_sync())
                with self._autocast():
                    loss = loss_module(self._to_device(inputs), self._to_device(targets)) / config.accumulate
                self.scaler.scale(loss).backward()
            self.loss_sum += loss.detach()
        self.num_losses += 1
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        limit = config.max_grad_norm or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        if self.is_sharded:
            grad_norm = sharding.whole(grad_norm)
        if not self.scaler.is_enabled():  # the scaler skips steps that overflow; nothing else does
            self.max_norm = torch.maximum(self.max_norm, grad_norm)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return lr, grad_norm

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype != torch.float32)

    def _to_device(self, ids: Tensor) -> Tensor:
        return ops.to_device(ids, self.device)

    def _wrapped(self) -> nn.Module:
        module: nn.Module = _LossModule(self.model)
        if self.processes.count > 1 and not self.is_sharded:
            ids = [self.device.index] if self.device.type == "cuda" else None
            module = DistributedDataParallel(module, device_ids=ids)
        return module

    def _has_timed_enough(self, elapsed_s: float) -> bool:
        """Whether the number of steps can be set now. The answer is the same in every process.

        This waits for the device after each of these first steps, so their times include the device's work.
        """
        share = 60 * (self.config.minutes or 0.0) * _CALIBRATION_SHARE
        return self.processes.any(elapsed_s >= share and self.step > 1) or self.step >= _CALIBRATION.stop

    def _calibrate(self, step_s: float) -> None:
        """Set `steps` from `minutes` and the seconds per step, equally in every process."""
        minutes = self.config.minutes or 0.0
        mean_s = self.processes.sum(torch.tensor(step_s, device=self.device)).item() / self.processes.count
        self.config = self.config.replace(steps=max(self.step + 1, round(60 * minutes / mean_s)))
        self.is_calibrated = True

    def _mean_loss(self) -> float:
        """The mean loss since the last call, over all processes."""
        mean = self._finite_loss_sum() / (self.num_losses * self.processes.count)
        self.loss_sum.zero_()
        self.num_losses = 0
        return mean

    def _finite_loss_sum(self) -> float:
        """The sum of losses since the last report, over all processes.

        Raises:
            ValueError: It is not finite, or a gradient that has entered the weights was not.
        """
        loss_sum, max_norm = self.processes.sum(torch.stack((self.loss_sum, self.max_norm))).tolist()
        if not math.isfinite(loss_sum + max_norm):
            what, value = ("gradient's norm", max_norm) if math.isfinite(loss_sum) else ("loss", loss_sum)
            paths = checkpoint_paths(self.out)
            last = f"{paths[-1].name} is the last good checkpoint" if paths else "there is no checkpoint before it"
            raise ValueError(f"training: the {what} became {value} by step {self.step}; {last}: use a lower lr")
        return loss_sum

    # -- evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> tuple[float, int]:
        """Compute the validation loss.

        Returns:
            The loss in nats per token, and the number of tokens that it is the mean of (0 without a validation set).
        """
        if self.data.val is None:
            return math.nan, 0
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        batches = self.data.val.evaluation_batches(
            self.context, self.config.batch_size, self.config.eval_tokens or None
        )
        while turn := list(itertools.islice(batches, self.processes.count)):
            is_mine = self.processes.rank < len(turn)
            if not is_mine and not self.is_sharded:
                break
            # With sharded weights all processes compute together, even those without a batch of their own.
            inputs, targets = turn[self.processes.rank if is_mine else 0]
            with self._autocast():
                loss = calculate_loss(self.model, self._to_device(inputs), self._to_device(targets), reduction="sum")
            if is_mine:
                total += torch.stack((loss.double(), torch.full_like(loss, targets.numel(), dtype=torch.float64)))
        if self.is_sharded:
            sharding.release(self.model)
        self.model.train()
        loss_sum, num_tokens = self.processes.sum(total).tolist()
        return (loss_sum / num_tokens if num_tokens else math.nan), int(num_tokens)

    def _evaluate(self) -> EvalReport | None:
        loss, num_tokens = self.evaluate()
        if not num_tokens:
            return None
        is_best = loss < self.best_loss
        self.best_loss = min(loss, self.best_loss)
        self.stale_evaluations = 0 if is_best else self.stale_evaluations + 1
        num_bytes = self._evaluated_bytes(num_tokens)
        bits_per_byte = loss * num_tokens / num_bytes / math.log(2) if num_bytes else None
        return EvalReport(self.step, loss, bits_per_byte, is_best)

    def _evaluated_bytes(self, num_tokens: int) -> int:
        """The number of UTF-8 bytes in the text of the evaluated targets; 0 without a tokenizer."""
        if self.tokenizer is None or self.data.val is None:
            return 0
        if self._val_bytes is None:
            eos, count = self.tokenizer.eos_token_id, 0
            targets = self.data.val.tokens[1 : num_tokens + 1]
            for start in range(0, len(targets), 1 << 16):
                ids = [i for i in targets[start : start + (1 << 16)].tolist() if i != eos]
                count += len(self.tokenizer.decode(ids).encode("utf-8"))
            self._val_bytes = count
        return self._val_bytes

    def _whole_model(self) -> GPT2 | None:
        """The unsharded model in the first process, None in the others. All processes call this."""
        if not self.is_sharded:
            return self.model if self.processes.is_first else None
        weights = sharding.whole_weights(self.model, self.processes)
        return self._plain_model(weights) if self.processes.is_first else None

    def _plain_model(self, weights: dict[str, Tensor]) -> GPT2:
        """Build a separate model with these weights, and with adapters if the run trains some."""
        model = GPT2(self.model.config, backend=self.model.backend)
        if self.config.lora_rank:
            add_adapters(model, self.config.lora_rank, self.config.lora_alpha, self.config.seed)
        model.load_state_dict(weights)
        model.tokenizer = self.tokenizer
        return model.to(self.device)

    def _sample(self, model: GPT2) -> str:
        model.eval()
        room = self.context // 2
        if self.tokenizer is None:
            start = [model.config.eos_token_ids[0] if model.config.eos_token_ids else 0]
            sample = model.generate([start], max_new_tokens=room, seed=self.config.seed)[0]
            text = " ".join(map(str, sample.token_ids))
        else:
            prompt = self.tokenizer.encode(self.config.sample_prompt)[-room:] or [self.tokenizer.eos_token_id or 0]
            sample = model.generate([prompt], max_new_tokens=room, seed=self.config.seed, top_p=0.95)[0]
            text = self.tokenizer.decode([*prompt, *sample.token_ids])
        model.train()
        return text

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _log(self, report: StepReport | EvalReport) -> None:
        if self.processes.is_first:
            self._folder.log(report)
            if self._logger is not None:
                self._logger.log(report)

    def _save(self, loss_sum: float, is_best: bool) -> Path | None:
        """Write a checkpoint; returns its path in the first process, None in the others. All processes call this."""
        state = {
            "step": self.step,
            "scaler": self.scaler.state_dict(),
            "loss_sum": loss_sum,
            "processes": self.processes.count,
            "num_losses": self.num_losses,
            "best_loss": self.best_loss,
            "stale_evaluations": self.stale_evaluations,
            "calibrated": self.is_calibrated,
            "global_rows": self.global_rows,
            "data": self._fingerprint,
            "val_data": self._val_fingerprint,
            "tokenizer": self.tokenizer.digest() if self.tokenizer is not None else None,
            "model_config": asdict(self.model.config),
            "train_config": asdict(self.config),
        }
        keep = self.config.keep_checkpoints
        if self.is_sharded:
            tensors = self._model_tensors() | self._optimizer_tensors()
            path = self._folder.save_shards(self.step, state, tensors, self.processes, is_best=is_best, keep=keep)
            return path if self.processes.is_first else None
        if not self.processes.is_first:
            return None
        state["model"] = self.model.state_dict()
        for name, optimizer in zip(_OPTIMIZERS, self.optimizers, strict=False):
            state[name] = optimizer.state_dict()
        return self._folder.save_checkpoint(self.step, state, is_best=is_best, keep=keep)

    def _model_tensors(self) -> dict[str, Tensor]:
        """The weights and buffers, named as in a checkpoint folder. A tied head is left out."""
        weights = self.model.state_dict()
        if self.model.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        return {f"model.{name}": value for name, value in weights.items()}

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        states = {p: entries for optimizer in self.optimizers for p, entries in optimizer.state.items()}
        return {
            f"optimizer.{name}.{key}": value
            for name, p in self.parameters.items()
            for key, value in states.get(p, {}).items()
        }

    @classmethod
    def resume(
        cls,
        out: str | PathLike[str],
        data: TokenData,
        *,
        processes: Processes | None = None,
        backend: str = "auto",
        **changes: Any,
    ) -> Trainer:
        """Continue a run from its last checkpoint.

        Args:
            out: The run's folder.
            data: The data that the run began with.
            processes: The processes of the run; by default those that torchrun started.
            backend: The model's backend.
            changes: Fields of TrainConfig to change.

        Raises:
            ValueError: A change would make it a different run (of the seed, the learning rate ...), the data or the
                tokenizer is not the run's, or the checkpoint is damaged.
            FileNotFoundError: There is no checkpoint.
        """
        paths = checkpoint_paths(out)
        if not paths:
            raise FileNotFoundError(f"{Path(out) / 'checkpoints'}: no checkpoint to resume from")
        processes = processes or Processes.start()
        state = read_progress(paths[-1], processes)
        with _damage_in(paths[-1]):
            was = TrainConfig(**state["train_config"])
        if "dtype" in changes:
            changes["dtype"] = resolve_dtype(changes["dtype"], processes.device)
        for name, value in changes.items():
            before = getattr(was, name)
            if name not in _MAY_CHANGE and value != before:
                raise ValueError(f"resume: {name} must stay {before!r} as in {paths[-1].name}; got {value!r}")
        if "steps" in changes:
            changes["minutes"] = None
        with _damage_in(paths[-1]):
            model = GPT2(GPT2Config(**state["model_config"]), backend=backend)
        tokenizer = Tokenizer.from_folder(out)
        trainer = cls(model, data, was.replace(**changes), out, tokenizer=tokenizer, processes=processes)
        if trainer.global_rows != state["global_rows"]:
            raise ValueError(
                f"resume: batch_size x accumulate x processes must stay {state['global_rows']} rows a step as in "
                f"{paths[-1].name}; got {trainer.global_rows}"
            )
        if trainer._fingerprint != state["data"]:
            raise ValueError(f"resume: data must be what the run began with; {data.train.path} holds other tokens")
        if trainer._val_fingerprint != state["val_data"]:
            val = data.train.path.with_name("val.bin")
            what = "is missing" if data.val is None else "holds other tokens, or was not there"
            raise ValueError(f"resume: data must be what the run began with; {val} {what}")
        if state["tokenizer"] is not None and (tokenizer is None or tokenizer.digest() != state["tokenizer"]):
            what = "is missing" if tokenizer is None else "is another"
            raise ValueError(
                f"resume: the tokenizer must be what the run began with; {Path(out) / 'tokenizer.json'} {what}: put it "
                "back (where the run trained it, data/ holds it too)"
            )
        with _damage_in(paths[-1]):
            trainer._restore(paths[-1], state)
        if state.get("is_best"):
            if processes.is_first:
                trainer._folder.mark_best(
                    paths[-1]
                )  # the run may have been killed between writing the checkpoint and this
        elif math.isfinite(trainer.best_loss) and not processes.from_first(
            lambda: trainer._folder.has_best(trainer.best_loss)
        ):
            trainer.best_loss = math.inf
            if processes.is_first:
                warnings.warn(
                    f"{Path(out) / 'checkpoints'}: the best checkpoint is missing or damaged; the finished model will "
                    "be the best of the evaluations from here on, or the last weights where there is none",
                    stacklevel=2,
                )
        return trainer

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        if path.is_dir():
            sharding.read_tensors(path, self._model_tensors())
            self._restore_optimizers(path)
        else:
            own = self.model.state_dict()
            weights = {name: self._placed(value, own.get(name)) for name, value in state["model"].items()}
            self.model.load_state_dict(weights)
            for name, optimizer in zip(_OPTIMIZERS, self.optimizers, strict=False):
                saved = state[name]
                in_order = [p for group in optimizer.param_groups for p in group["params"]]
                for index, entries in saved["state"].items():
                    saved["state"][index] = {k: self._placed(v, in_order[index]) for k, v in entries.items()}
                optimizer.load_state_dict(saved)
        # With fp16 the scaler skips steps that overflow. It may have skipped all, and then there is no state yet.
        for optimizer in () if self.scaler.is_enabled() else self.optimizers:
            if len(optimizer.state) != sum(len(group["params"]) for group in optimizer.param_groups):
                raise ValueError("the optimizer's state does not belong to the model's parameters")
        self.scaler.load_state_dict(state["scaler"])
        self.step = operator.index(state["step"])
        self.best_loss = float(state["best_loss"])
        self.stale_evaluations = int(state.get("stale_evaluations", 0))  # older checkpoints have none
        # Older checkpoints do not say so. Their runs were always calibrated at the same step.
        known = bool(state.get("calibrated", self.step >= _CALIBRATION.stop))
        self.is_calibrated = self.config.minutes is None or known
        self.num_losses = operator.index(state["num_losses"])
        if self.processes.is_first:
            # A sum over the processes. Their number may have changed; older checkpoints do not say what it was.
            count = self.processes.count
            self.loss_sum.fill_(state["loss_sum"] * (count / state.get("processes", count)))

    def _placed(self, value: Any, like: Tensor | None) -> Any:
        return sharding.placed_like(value, like) if self.is_sharded and like is not None else value

    def _restore_optimizers(self, folder: Path) -> None:
        """Fill the optimizers' state with everything that a checkpoint folder holds for each parameter."""
        sizes = sharding.tensor_sizes(folder)
        owners = {p: optimizer for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]}
        for name, p in self.parameters.items():
            start = f"optimizer.{name}."
            for key in (found.removeprefix(start) for found in sizes if found.startswith(start)):
                is_whole = sizes[start + key] == p.shape
                owners[p].state[p][key] = torch.zeros_like(p) if is_whole else torch.zeros((), device=p.device)
        sharding.read_tensors(folder, self._optimizer_tensors())

    def _export(self) -> None:
        """Write the finished model into the run's folder, in the layout of `GPT2.save_pretrained`.

        Adapters are merged into the weights, so that everything that loads a GPT-2 can load it.
        """
        takes_best = self.config.export == "best"
        best = self.processes.from_first(lambda: self._folder.best(self.best_loss) if takes_best else None)
        if best is not None:
            weights = read_checkpoint(best)["model"] if self.processes.is_first else {}
        elif self.is_sharded:
            weights = sharding.whole_weights(self.model, self.processes)
        else:
            weights = self.model.state_dict()
        if not self.processes.is_first:
            return
        if self.is_sharded or self.config.lora_rank:
            model = self._plain_model(weights)
            if self.config.lora_rank:
                merge_adapters(model)
        else:
            model = self.model
            model.load_state_dict(weights)
        model.eval().save_pretrained(self.out)


def check_config(config: TrainConfig) -> None:
    """Check that this process can train as `config` says.

    Raises:
        ValueError: Weights should be sharded, but torchrun did not start this process.
        ImportError: A library is missing, or PyTorch is too old.
    """
    check_parallel(config)
    check_optimizer(config.optimizer)
    check_logger(config.log)
    if config.lora_rank:
        check_lora()


@contextlib.contextmanager
def _damage_in(checkpoint: Path) -> Iterator[None]:
    """Turn any error that a damaged checkpoint causes into a ValueError that names the checkpoint."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint}: not a whole checkpoint ({first_line(error)}); remove it to continue from the one before"
        ) from error


def _mix(seed: int, step: int, rank: int) -> int:
    """A generator's seed for one step of one process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
