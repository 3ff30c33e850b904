"""The processes of a data-parallel run under torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt2.devices import find_device


@dataclass(frozen=True)
class Processes:
    """This process among those of a data-parallel run, and its device."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def start(cls, device: str = "auto") -> Processes:
        """Join the process group when torchrun started this process (nccl on GPUs, gloo on CPUs); else be alone."""
        count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        chosen = find_device(device)
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(chosen)
        if count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(rank, count, chosen)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The block runs in the first process while the others wait for it, however long; then in those."""
        if self.count == 1:
            yield
            return
        # A group of its own: preparing data may take longer than collectives are allowed to.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        if not self.is_first:
            dist.barrier(group=group)
        yield
        if self.is_first:
            dist.barrier(group=group)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def sum(self, value: Tensor) -> Tensor:
        """`value` added up over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
