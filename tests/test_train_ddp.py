"""Parallel training: two gloo processes (DDP or FSDP) give the same result as one with twice the accumulation."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt2 import GPT2
from fastgpt2.accounting import training_bytes
from fastgpt2.cli.main import main
from fastgpt2.config import TrainConfig
from fastgpt2.data import TokenData
from fastgpt2.train import Processes, Trainer, checkpoint_paths, read_checkpoint

SERVER = multiprocessing.get_context("forkserver")
CONFIG = {
    "steps": 6, "batch_size": 2, "log_interval": 2, "eval_interval": 3, "checkpoint_interval": 3, "warmup_steps": 2,
    "dtype": "fp32", "lr": 1e-2,
}  # fmt: skip

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.usefixtures("forkserver"),
]


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name, size in (("train", 600), ("val", 100)):
        rng.integers(23, size=size).astype("<u2").tofile(tmp_path / f"{name}.bin")
    return tmp_path


@dataclass(frozen=True)
class Job:
    """A training run that begins or resumes. `stop_at` is the step after which it is asked to stop."""

    out: Path
    resume: bool = False
    stop_at: int = -1
    changes: dict[str, Any] = field(default_factory=dict)

    def do(self, folder: Path, processes: Processes | None = None) -> Trainer:
        torch.set_num_threads(1)
        data = TokenData.open(folder)
        if self.resume:
            trainer = Trainer.resume(self.out, data, processes=processes, **self.changes)
        else:
            config = TrainConfig(**{**CONFIG, **self.changes})
            trainer = Trainer(make_model(), data, config, self.out, processes=processes)
        for report in trainer.run():
            if report.step == self.stop_at:
                trainer.stop()
        return trainer


def worker(rank: int, count: int, port: int, folder: Path, jobs: list[Job]) -> None:
    """Act as a process that torchrun starts: set its environment variables, join the group, and run the jobs."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    os.environ["LOCAL_RANK"] = "0"
    os.fsync = lambda descriptor: None
    processes = Processes.start("cpu")
    try:
        with processes.first_goes_first():
            (folder / f"rank-{rank}").mkdir(exist_ok=True)
            assert (folder / "rank-0").exists()
        strangers = Processes(rank, count + 1, processes.device)
        with pytest.raises(ValueError, match=f"needs all {count} processes; got a Processes of {count + 1}"):
            Job(folder / "none", changes={"parallel": "fsdp"}).do(folder, strangers)
        for job in jobs:
            job.do(folder, processes)
    finally:
        processes.close()


def in_processes(target: Any, count: int, *arguments: object, status: int = 0) -> None:
    """Call `target(rank, count, port, *arguments)` in `count` processes of one group. All must exit with `status`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [SERVER.Process(target=target, args=(rank, count, port, *arguments)) for rank in range(count)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    assert [process.exitcode for process in workers] == [status] * count


def make_model(num_layers: int = 2) -> GPT2:
    torch.manual_seed(0)
    return GPT2(vocab_size=23, context_length=8, hidden_size=16, num_layers=num_layers, num_heads=2, dropout_rate=0.0)


def assert_equal_to_rounding(one: Path, two: Path, *, eps: float = 1e-4) -> None:
    """Assert that two runs have the same losses, and change the weights in the same way, up to rounding.

    The change of all weights is compared as one vector. AdamW divides each gradient by its own size, so where a
    gradient is only rounding error, the step is too.
    """
    first = make_model().state_dict()
    last = [GPT2.from_pretrained(out).state_dict() for out in (one, two)]
    ways = [torch.cat([(weights[name] - first[name]).flatten() for name in first]) for weights in last]
    assert (ways[0] - ways[1]).norm() < 10 * eps * ways[0].norm()
    lines = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for out in (one, two)
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for mine, other in zip(*lines, strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            assert mine.get(name, 0) == pytest.approx(other.get(name, 0), rel=eps), (name, mine["step"])


def refuses_damage(checkpoint: Path) -> None:
    """Assert that any damage to the files of a checkpoint folder gives one sentence that says what to do."""
    assert read_checkpoint(checkpoint)["step"] == 3
    shard = min(checkpoint.glob("*.safetensors"))
    state = checkpoint / "state.json"
    whole = {path: path.read_bytes() for path in (shard, state)}
    flipped = bytearray(whole[shard])
    flipped[-5] ^= 1
    without_step = {name: value for name, value in json.loads(whole[state]).items() if name != "step"}
    changes: list[tuple[Path, bytes | None, str]] = [
        (shard, bytes(flipped), f"{shard.name} holds other bytes than were written"),
        (shard, whole[shard][:100], f"{shard.name} holds other bytes than were written"),
        (shard, None, f"{shard.name} is missing, or of another checkpoint"),
        (state, None, "it has no state.json"),
        (state, whole[state][:-9], "state.json: "),
        (state, b"[]", "state.json: "),
        (state, json.dumps(without_step).encode(), "lacks step; remove it to continue from the one before"),
        (state, whole[state].replace(b'"format": 2', b'"format": 1'), "not a checkpoint of format 2"),
    ]
    for path, content, message in changes:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{checkpoint}: ") + ".*" + re.escape(message)) as raised:
            read_checkpoint(checkpoint)
        assert "\n" not in str(raised.value)
        path.write_bytes(whole[path])
    assert read_checkpoint(checkpoint)["step"] == 3


def test_two_processes_are_one_with_twice_the_accumulation(folder: Path) -> None:
    """This holds with whole weights in each process and with sharded ones, and if the number of processes changes."""
    shared = {"parallel": "fsdp", "accumulate": 2}
    Job(folder / "one", changes={"accumulate": 4}).do(folder)
    Job(folder / "begun alone", stop_at=2, changes={"accumulate": 4}).do(folder)
    jobs = [
        Job(folder / "ddp", changes={"accumulate": 2}),
        Job(folder / "begun by two", stop_at=2, changes={"accumulate": 2}),
        Job(folder / "fsdp", changes={**shared, "recompute": True, "sample_interval": 6}),
        Job(folder / "begun by two that share", stop_at=2, changes=shared),
        Job(folder / "begun alone", resume=True, changes=shared),
    ]
    in_processes(worker, 2, folder, jobs)
    for name in ("begun by two", "begun by two that share"):
        path, later = checkpoint_paths(folder / name)
        assert path.stem == "step-00000003"  # between two lines of metrics.jsonl
        shutil.rmtree(later) if later.is_dir() else later.unlink()
        assert path.is_dir() == ("share" in name)
        Job(folder / name, resume=True, changes={"accumulate": 4, "parallel": "ddp"}).do(folder)
    for name in ("ddp", "begun by two", "fsdp", "begun by two that share", "begun alone"):
        assert_equal_to_rounding(folder / "one", folder / name)
        assert GPT2.from_pretrained(folder / name).config.vocab_size == 23
    refuses_damage(checkpoint_paths(folder / "begun by two that share")[0])
    with pytest.raises(ValueError, match=r"must stay 8 rows a step as in step-00000006.pt; got 2"):
        Job(folder / "ddp", resume=True, changes={"accumulate": 1}).do(folder)
    with pytest.raises(ValueError, match=r"parallel 'fsdp' shares the weights among torchrun's processes; start the"):
        Job(folder / "fsdp", resume=True, changes={"accumulate": 4}).do(folder)


# -- sharded weights ----------------------------------------------------------------------------------------------


def disagreeing(rank: int, count: int, port: int, folder: Path, what: str) -> None:
    """Make a trainer in each process. The last process differs from the others in `what`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    processes = Processes.start("cpu")
    is_last = rank == count - 1
    data = TokenData.open(folder / "other" if is_last and what == "data" else folder)
    model = make_model(**({"num_layers": 1} if is_last and what == "model" else {}))
    config = TrainConfig(**{**CONFIG, **({"lr": 0.5} if is_last and what == "lr" else {})})
    try:
        Trainer(model, data, config, folder / "out", processes=processes)
    except ValueError as error:
        (folder / f"said-{rank}").write_text(str(error), encoding="utf-8")
        sys.exit(2)
    finally:
        processes.close()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("lr", "lr must be the same in every process; got 0.01 in process 0 and 0.5 in process 1"),
        ("model", "the model's num_layers must be the same in every process; got 2 in process 0 and 1 in process 1"),
        ("data", "the hash of train.bin must be the same in every process; got "),
    ],
)
def test_processes_that_differ_all_end_with_one_sentence(what: str, message: str, folder: Path) -> None:
    (folder / "other").mkdir()
    np.arange(600, dtype="<u2").tofile(folder / "other" / "train.bin")
    shutil.copy(folder / "val.bin", folder / "other")
    in_processes(disagreeing, 2, folder, what, status=2)
    said = [(folder / f"said-{rank}").read_text(encoding="utf-8") for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith(f"train: {message}")
    assert not (folder / "out").exists()


def command(rank: int, count: int, port: int, folder: Path, last: list[str]) -> None:
    """Run `fastgpt2 train`, with additional options in the last process."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    sys.stderr = open(folder / f"said-{rank}", "w", encoding="utf-8")  # noqa: SIM115 (closed with the process)
    words = ["train", "--data", str(folder), "--out", str(folder / "out"), "--vocab-size", "23", "--device", "cpu"]
    more = [word.format(folder=folder) for word in last] if rank == count - 1 else []
    sys.exit(main([*words, *more]))


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (["--steps", "5"], "steps must be the same in every process; got None in process 0 and 5 in process 1"),
        (["--out", "{folder}/two"], "out must be the same in every process; got "),
    ],
)
def test_commands_that_differ_all_end_with_status_2(last: list[str], message: str, folder: Path) -> None:
    in_processes(command, 2, folder, last, status=2)
    said = [(folder / f"said-{rank}").read_text(encoding="utf-8").splitlines() for rank in range(2)]
    assert said[0] == said[1]
    assert [line.startswith(f"fastgpt2: train: {message}") for line in said[0]] == [True]


class Count(TorchDispatchMode):
    """Counts the bytes that this process holds before each optimizer step, and those that it sends."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[int] = []
        self.sent = 0

    def at_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = [v for p in parameters for v in optimizer.state[p].values() if v.dim()]
        own = [getattr(t, "_local_tensor", t) for t in (*parameters, *(p.grad for p in parameters), *states)]
        self.held.append(sum(t.nbytes for t in own))

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        # Gathering sends the process's own part to every other process. Reducing sends each of them its part.
        part = {"_allgather_base_": 1, "_reduce_scatter_base_": 0}.get(function._schema.name.split("::")[1])
        if part is not None:
            self.sent += args[part].nbytes * (dist.get_world_size() - 1)
        return function(*args, **(kwargs or {}))


def counting_worker(rank: int, count: int, port: int, folder: Path, jobs: list[Job], steps: int) -> None:
    counted = Count()
    register_optimizer_step_pre_hook(counted.at_step)
    with counted:
        worker(rank, count, port, folder, jobs)
    found = {"held": max(counted.held), "sent": counted.sent / steps}
    (folder / f"counted-{jobs[0].out.name}-{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_shares_are_half_and_take_the_same_steps(folder: Path) -> None:
    """In 20 steps, two processes have the losses of DDP. Each holds half, and sends what `training_bytes` says."""
    changes = {"steps": 20, "accumulate": 1, "eval_interval": 0, "checkpoint_interval": 20, "log_interval": 1}
    for parallel in ("ddp", "fsdp"):
        jobs = [Job(folder / parallel, changes={**changes, "parallel": parallel})]
        in_processes(counting_worker, 2, folder, jobs, 20)
    assert_equal_to_rounding(folder / "ddp", folder / "fsdp")
    assert len((folder / "fsdp" / "metrics.jsonl").read_text().splitlines()) == 20
    config = make_model().config
    for rank in range(2):
        ddp, fsdp = (json.loads((folder / f"counted-{name}-{rank}.json").read_text()) for name in ("ddp", "fsdp"))
        assert ddp["held"] == training_bytes(config, 2).held
        # The shares of 23 rows are 12 and 11.
        assert fsdp["held"] == pytest.approx(training_bytes(config, 2, parallel="fsdp").held, rel=0.01)
        assert fsdp["held"] < 0.51 * ddp["held"]
        # The last process pads its 11 rows to 12.
        assert fsdp["sent"] == pytest.approx(training_bytes(config, 2, parallel="fsdp").sent, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"optimizer": "muon"}, {"lora_rank": 2}, {"dtype": "bf16", "recompute": True}],
    ids=str,
)
def test_shares_go_with_every_option(changes: dict[str, Any], folder: Path) -> None:
    """A run that continues from two processes on three, and then on one, ends like a run of one process."""
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    changes = {**changes, "steps": 9, "batch_size": 1, "log_interval": 1, "eval_tokens": 50, "export": "last"}
    Job(folder / "one", changes={**changes, "accumulate": 6}).do(folder)
    shared = {**changes, "parallel": "fsdp"}
    in_processes(worker, 2, folder, [Job(folder / "parts", stop_at=2, changes={**shared, "accumulate": 3})])
    assert [path.name for path in checkpoint_paths(folder / "parts")] == ["step-00000003"]
    in_processes(worker, 3, folder, [Job(folder / "parts", True, 5, {"accumulate": 2})])
    assert [path.name for path in checkpoint_paths(folder / "parts")][-1] == "step-00000006"
    Job(folder / "parts", True, changes={"accumulate": 6, "parallel": "ddp"}).do(folder)
    # Muon multiplies in bfloat16.
    is_half = "dtype" in changes or "optimizer" in changes
    assert_equal_to_rounding(folder / "one", folder / "parts", eps=2**-8 if is_half else 1e-4)


def overflow_worker(rank: int, count: int, port: int, folder: Path) -> None:
    """Train in fp16. In the second step, one gradient overflows in one process's share."""

    class Overflows(torch.amp.GradScaler):
        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            if rank == 1 and trainer.step == 1:
                grad = trainer.parameters["transformer.h.0.mlp.c_fc.weight"].grad
                grad._local_tensor[0, 0] = torch.inf  # type: ignore[union-attr]
            super().unscale_(optimizer)

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    processes = Processes.start("cpu")
    config = TrainConfig(**{**CONFIG, "steps": 3, "parallel": "fsdp", "dtype": "fp16", "eval_interval": 0})
    trainer = Trainer(make_model(), TokenData.open(folder), config, folder / "out", processes=processes)
    trainer.scaler = Overflows("cpu", init_scale=16.0)
    for _ in trainer.run():
        pass
    steps = {int(entries["step"]) for entries in trainer.optimizers[0].state.values()}
    assert (steps, trainer.scaler.get_scale()) == ({2}, 8.0), (rank, steps, trainer.scaler.get_scale())
    processes.close()


@pytest.mark.slow
def test_a_step_that_overflows_in_one_share_is_left_out_in_all(folder: Path) -> None:
    in_processes(overflow_worker, 2, folder)
    assert all(value.isfinite().all() for value in GPT2.from_pretrained(folder / "out").parameters())
