"""Cross-entropy of logits, and of hidden states without storing their logits: loss and gradients, V = 50257."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Call, Case, Contender, LeftOutError, Settings
from benchmarks.peers import compiled, hidden_sizes, need, need_gpu, need_time, need_triton
from benchmarks.tune import Tunable
from fastgpt2_kernels import ops
from fastgpt2_kernels.triton import launch

COMPARED_ROWS = 256  # how many rows of an (N, V) gradient are compared, the first and the last among them
ORACLE_ROWS = 1024


class Inputs(NamedTuple):
    """Either x (N, V) are logits and weight is None, or x is (N, C) and weight is (V, C)."""

    x: Tensor
    weight: Tensor | None
    targets: Tensor


Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def cases(settings: Settings) -> Iterator[Case]:
    if settings.on_gpu:
        rows = settings.pick((1024, 4096, 8192, 16384, 65536), (4096, 8192), (8,))
    else:
        rows = settings.pick((1024, 4096, 65536), (256, 65536), (8,))
    C, V = (hidden_sizes()["gpt2"][0], 50257) if settings.scale != "toy" else (16, 67)
    for linear in (False, True):
        for N in rows:
            for dtype in ("bfloat16", "float32") if settings.scale != "toy" else ("float32",):
                yield _case(settings, N, C, V, dtype, linear)


def tunables(settings: Settings) -> Iterator[Tunable]:
    """The launch row for GPT-2's vocabulary."""
    capability = torch.cuda.get_device_capability() if settings.on_gpu and torch.version.hip is None else None
    V, N, dtype = settings.pick((50257, 8192, "bfloat16"), (50257, 4096, "bfloat16"), (67, 8, "float32"))
    registers = (None, 64, 80, 96, 128) if capability is not None else (None,)
    sizes = [(8192, 2048), (4096, 2048), (16384, 4096), (4096, 1024)] if settings.scale != "toy" else [(64, 32)]
    yield Tunable(
        key=f"cross_entropy_row({V}, {capability}, element_size={getattr(torch, dtype).itemsize})",
        present=launch.cross_entropy_row(V, capability, element_size=getattr(torch, dtype).itemsize),
        candidates=[
            launch.CrossEntropyRow(block_v, mid_v, warps, most)
            for block_v, mid_v in sizes
            for warps in (4, 8, 16)
            for most in registers
        ],
        using=lambda row: mock.patch.object(launch, "cross_entropy_row", return_value=row),
        case=_case(settings, N, 0, V, dtype, linear=False),
    )


def _case(settings: Settings, N: int, C: int, V: int, dtype: str, linear: bool) -> Case:
    element = getattr(torch, dtype).itemsize
    read_and_written = 2 * (N + V) * C if linear else 2 * N * V
    return Case(
        name="linear_cross_entropy" if linear else "cross_entropy",
        shape={"N": N, "V": V, **({"C": C} if linear else {})},
        dtype=dtype,
        contenders=[
            Contender(name, functools.partial(_build, settings, make), name.startswith("ours"), name == "eager")
            for name, make in (LINEAR if linear else PLAIN).items()
        ],
        inputs=functools.partial(_inputs, settings, N, C if linear else V, V if linear else 0, dtype),
        exact=_exact,
        sample=_sample,
        flops=6.0 * N * C * V if linear else 0.0,
        bytes=read_and_written * element,
        needs_gpu=N > 4096,
    )


def _inputs(settings: Settings, N: int, width: int, V: int, dtype: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def leaf(rows: int, scale: float) -> Tensor:
        values = torch.randn(rows, width, generator=generator) * scale
        return values.to(settings.device, getattr(torch, dtype)).requires_grad_()

    targets = torch.randint(V or width, (N,), generator=generator).to(settings.device)
    return Inputs(leaf(N, 1.0), leaf(V, 0.1) if V else None, targets)


def _sample(result: Any) -> list[Tensor]:
    """The loss, rows of the gradient of x, and the gradient of weight."""
    loss, dx, *dweight = result
    return [loss, _some_rows(dx), *dweight]


def _some_rows(x: Tensor) -> Tensor:
    return x[torch.linspace(0, len(x) - 1, min(len(x), COMPARED_ROWS), device=x.device).long()]


def _exact(inputs: Inputs) -> list[Tensor]:
    """What `_sample` returns, computed in float64 a few rows at a time."""
    x, weight, targets = inputs
    N, wide_weight = len(x), None if weight is None else weight.detach().double()
    loss, dweight, rows = 0.0, None if wide_weight is None else torch.zeros_like(wide_weight), []
    for start in range(0, N, ORACLE_ROWS):
        part = x.detach()[start : start + ORACLE_ROWS].double()
        logits = (part if wide_weight is None else part @ wide_weight.T).requires_grad_()
        value = F.cross_entropy(logits, targets[start : start + ORACLE_ROWS], reduction="sum") / N
        (grad,) = torch.autograd.grad(value, logits)
        loss += value.item()
        if wide_weight is not None and dweight is not None:
            dweight.addmm_(grad.T, part)
            grad = grad @ wide_weight
        wanted = torch.linspace(0, N - 1, min(N, COMPARED_ROWS), device=x.device).long() - start
        rows.append(grad[wanted[(wanted >= 0) & (wanted < len(grad))]])
    total = torch.tensor(loss, dtype=torch.float64, device=x.device)
    return [total, torch.cat(rows), *([] if dweight is None else [dweight])]


def _build(settings: Settings, make: Callable[[Settings], Loss], inputs: Inputs) -> Call:
    loss_of = make(settings)
    leaves = [t for t in inputs[:2] if t is not None]

    def call() -> list[Tensor]:
        loss = loss_of(*inputs)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    return call


def _ours(backend: str) -> Callable[[Settings], Loss]:
    def make(settings: Settings) -> Loss:
        if backend == "triton":
            need_triton(settings, "cross_entropy")

        def loss(x: Tensor, weight: Tensor | None, targets: Tensor) -> Tensor:
            if weight is None:
                return ops.cross_entropy(x, targets, fuse_backward=True, backend=backend)
            return ops.linear_cross_entropy(x, weight, targets, backend=backend)

        return loss

    return make


def _eager(x: Tensor, weight: Tensor | None, targets: Tensor) -> Tensor:
    return F.cross_entropy(x if weight is None else x @ weight.T, targets)


def _torch_linear(settings: Settings) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise LeftOutError("absent: this PyTorch has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, targets: F.linear_cross_entropy(x, weight, targets, options=options)


def _liger(settings: Settings) -> Loss:
    need_gpu(settings)
    need("liger_kernel", "liger-kernel")
    functions = need("liger_kernel.transformers.functional", "liger-kernel")

    def loss(x: Tensor, weight: Tensor | None, targets: Tensor) -> Tensor:
        if weight is None:
            # Liger overwrites the logits with the gradient. A user who needs the logits must copy them, so it is timed.
            return functions.liger_cross_entropy(x.clone(), targets)
        return functions.liger_fused_linear_cross_entropy(x, weight, targets)

    return loss


def _cut(settings: Settings) -> Loss:
    need_gpu(settings)
    return need("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy


def _liger_chunks(settings: Settings) -> Loss:
    need_time(settings, "its chunks of a few rows take minutes on a CPU")
    return LigerChunks.apply


class LigerChunks(torch.autograd.Function):
    """Liger's `fused_linear_cross_entropy` in PyTorch's operators, with its chunk size, order and dtypes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        (N, C), V = x.shape, weight.shape[0]
        chunks = -(-V // C)
        rows = 1 << (-(-N // chunks) - 1).bit_length()
        dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            chunk_targets = targets[part]
            log_probs = (x[part] @ weight.T).float().log_softmax(-1)
            loss -= log_probs.gather(-1, chunk_targets[:, None]).sum() / N
            grad = log_probs.exp_()
            grad.scatter_add_(-1, chunk_targets[:, None], torch.full_like(grad[:, :1], -1.0))
            grad = grad.div_(N).to(x.dtype)
            dx[part] = grad @ weight
            dweight += torch.mm(grad.T, x[part])
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return (dx, dweight, None) if grad_output == 1 else (dx * grad_output, dweight * grad_output, None)


PLAIN: dict[str, Callable[[Settings], Loss]] = {
    "eager": lambda settings: _eager,
    "ours triton": _ours("triton"),
    "ours torch": _ours("torch"),
    "torch.compile": lambda settings: compiled(_eager, settings),
    "liger": _liger,
}
LINEAR: dict[str, Callable[[Settings], Loss]] = {
    **PLAIN,
    "torch chunked": _torch_linear,
    "liger's chunks": _liger_chunks,
    "cut-cross-entropy": _cut,
}
