"""Sharding a model over processes (FSDP2), and its checkpoints, which any number of processes can read.

Every process holds an equal part of each weight, of its gradient and of its optimizer's state. A block's weights are
gathered when it runs, and freed after it.

A checkpoint is a folder. It holds one safetensors file per process, written by PyTorch's distributed checkpointing
(DCP), and state.json with everything else and the files' checksums. DCP's own format is not used, because reading it
runs pickled code.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgpt2.gpt2 import GPT2
from fastgpt2.messages import first_line

if TYPE_CHECKING:
    from fastgpt2.train.processes import Processes

STATE = "state.json"


# -- the model ----------------------------------------------------------------------------------------------------


def shard(model: GPT2, device: torch.device, count: int) -> None:
    """Shard every weight over `count` processes, on `device`. One block at a time, so that no GPU holds all weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (count,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def release(model: GPT2) -> None:
    """Free the weights that a forward pass has gathered. Only a backward pass would free them otherwise."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; any other is returned as it is. All processes call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """Gather the weights onto the CPU of the first process; the others get nothing. All processes call this."""
    weights = {}
    for name, value in model.state_dict().items():
        gathered = whole(value)
        if processes.is_first:
            weights[name] = gathered.cpu()
    return weights


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard a whole tensor in the way `like` is sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


# -- its checkpoints ----------------------------------------------------------------------------------------------


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, list[int]]:
    """Write tensors into an existing folder, each process its own parts. All processes call this.

    Returns:
        The size and checksum of every file. The files are on disk by then.
    """
    import torch.distributed.checkpoint as dcp

    # Scalars, such as the optimizer's count of steps, may lie on several devices, and safetensors takes no views.
    values = {name: value.detach().contiguous() for name, value in tensors.items()}
    _run(dcp.save, values, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    mine: dict[str, list[int]] = {}
    for path in _files(folder)[processes.rank :: processes.count]:
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
        mine[path.name] = _checksum(path)
    if processes.count == 1:
        return mine
    parts: list[dict[str, list[int]]] = [{} for _ in range(processes.count)]
    dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}


def read_state(folder: Path, processes: Processes | None = None) -> dict[str, Any]:
    """Verify the checksums of a checkpoint's files, and read everything but its tensors.

    Each of several processes verifies its share of the files.

    Raises:
        ValueError: The folder is not a complete checkpoint.
    """
    damaged = f"{folder}: is damaged ({{}}); remove it to continue from the one before"
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        files = {str(name): [int(size), int(code)] for name, (size, code) in state["files"].items()}
    except FileNotFoundError:
        raise ValueError(damaged.format(f"it has no {STATE}")) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(damaged.format(f"{STATE}: {first_line(error)}")) from error
    if there := {path.name for path in _files(folder)} ^ files.keys():
        raise ValueError(damaged.format(f"{min(there)} is missing, or of another checkpoint"))
    rank, count = (processes.rank, processes.count) if processes else (0, 1)
    for name in sorted(files)[rank::count]:
        if _checksum(folder / name) != files[name]:
            raise ValueError(damaged.format(f"{name} holds other bytes than were written"))
    return state


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, whole or sharded, with those of the same names in a checkpoint."""
    import torch.distributed.checkpoint as dcp

    # Every process reads its own parts and need not coordinate with the others.
    _run(dcp.load, dict(tensors), no_dist=True, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))


def tensor_sizes(folder: Path) -> dict[str, torch.Size]:
    """The names of a checkpoint's tensors, and their sizes when they are gathered."""
    import torch.distributed.checkpoint as dcp

    found = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: getattr(tensor, "size", torch.Size()) for name, tensor in found.items()}


def _run(function: Any, *arguments: Any, **options: Any) -> None:
    """Call a function of DCP, and raise its failure as a usual error: DCP's own is not an Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP warns if a process reads without the others
            function(*arguments, **options)
    except CheckpointException as error:
        cause = next((cause for cause, _ in error.failures.values()), error)
        if isinstance(cause, OSError):
            raise cause from None
        raise ValueError(first_line(cause)) from error


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _checksum(path: Path) -> list[int]:
    """A file's size, and the CRC-32 of its bytes."""
    size = code = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size, code = size + len(block), zlib.crc32(block, code)
    return [size, code]
