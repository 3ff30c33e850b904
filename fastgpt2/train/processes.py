"""The processes of a data-parallel run under torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt2.config import TrainConfig
from fastgpt2.devices import find_device
from fastgpt2.messages import shown

T = TypeVar("T")


def check_parallel(config: TrainConfig) -> None:
    """Raise ValueError if the weights should be sharded, but no process group has been started."""
    if config.parallel == "fsdp" and not dist.is_initialized():
        raise ValueError(
            "train: parallel 'fsdp' shares the weights among torchrun's processes; start the command with torchrun, or "
            "give --parallel ddp"
        )


@dataclass(frozen=True)
class Processes:
    """The processes of a data-parallel run: how many there are, which one this is, and its device."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def start(cls, device: str = "auto") -> Processes:
        """Join the process group if torchrun started this process (nccl on GPUs, gloo on CPUs); otherwise be alone."""
        count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        chosen = find_device(device)
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(chosen)
        if (count > 1 or dist.is_torchelastic_launched()) and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(rank, count, chosen)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Run the block in the first process, then in the others, which wait for it however long it takes."""
        if self.count == 1:
            yield
            return
        # A group of its own, because preparing data may take longer than the timeout of other collectives.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        if not self.is_first:
            dist.barrier(group=group)
        yield
        if self.is_first:
            dist.barrier(group=group)

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        if self.count > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def sum(self, value: Tensor) -> Tensor:
        """Add `value` up over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def from_first(self, call: Callable[[], T]) -> T:
        """Run `call` in the first process only, and return its result in all of them."""
        value = [call() if self.is_first else None]
        if self.count > 1:
            dist.broadcast_object_list(value, src=0)
        return cast(T, value[0])

    def check_same(self, settings: Mapping[str, object]) -> None:
        """ValueError in all processes, naming the first setting that is not the same in every one of them."""
        if self.count == 1 or not dist.is_initialized():
            return
        of_all: list[dict[str, object]] = [{}] * dist.get_world_size()
        dist.all_gather_object(of_all, dict(settings))
        first = of_all[0]
        for rank, other in enumerate(of_all):
            for name in sorted({*first, *other}):
                if first.get(name) != other.get(name):
                    raise ValueError(
                        f"train: {name} must be the same in every process; got {shown(first.get(name))} in process 0 "
                        f"and {shown(other.get(name))} in process {rank}"
                    )

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
