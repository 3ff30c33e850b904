"""Memory and time of the linear cross-entropy beside the other ways to compute it on a CPU, forward and backward.

    python benchmarks/linear_cross_entropy.py [--rows 4096 --width 768 --vocabulary 50257] [--dtype float32 bfloat16]

The contenders: `unfused`, `F.cross_entropy(x @ weight.T)`; `torch`, PyTorch's own chunked `F.linear_cross_entropy`
(where the installed version has one); `liger`, Liger-Kernel's chunking written with PyTorch's operators; `ours`.

Each contender's peak extra memory is the growth of its own process's resident memory over one step, the gradients it
returns not counted; the times alternate in one process, after every contender's loss and gradients have been held
against float32's. Prints medians, their spread, and the ratios to `unfused`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("", "kernels")]

from fastgpt2_kernels import ops  # noqa: E402

Inputs = tuple[Tensor, Tensor, Tensor]


def unfused(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.T, targets)


def torchs(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, targets, options=options)


class LigerChunks(torch.autograd.Function):
    """Liger-Kernel's `fused_linear_cross_entropy`: its rule for chunks, its order of operations, its dtypes."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        (N, C), V = x.shape, weight.shape[0]
        chunks = -(-V // C)
        rows = 1 << (-(-N // chunks) - 1).bit_length()
        dx, dw = torch.zeros_like(x), torch.zeros_like(weight)
        loss = torch.zeros((), dtype=torch.float32)
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            logits = x[part] @ weight.T
            chunk_targets = targets[part]
            log_probs = logits.float().log_softmax(-1)
            loss -= log_probs.gather(-1, chunk_targets[:, None]).sum() / N
            grad = log_probs.exp_()
            grad.scatter_add_(-1, chunk_targets[:, None], torch.full_like(grad[:, :1], -1.0))
            grad = grad.div_(N).to(x.dtype)
            dx[part] = grad @ weight
            dw += torch.mm(grad.T, x[part])
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        dx, dw = ctx.saved_tensors
        return (dx, dw, None) if grad_output == 1 else (dx * grad_output, dw * grad_output, None)


def liger(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return LigerChunks.apply(x, weight, targets)


def ours(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x, weight, targets)


CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "unfused": unfused,
    **({"torch": torchs} if hasattr(F, "linear_cross_entropy") else {}),
    "liger": liger,
    "ours": ours,
}


def inputs(args: argparse.Namespace, dtype: str, rows: int | None = None) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows, kind = rows or args.rows, getattr(torch, dtype)
    x = torch.randn(rows, args.width, generator=generator).to(kind).requires_grad_()
    weight = (torch.randn(args.vocabulary, args.width, generator=generator) * 0.1).to(kind).requires_grad_()
    return x, weight, torch.randint(args.vocabulary, (rows,), generator=generator)


def step(name: str, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    x.grad = weight.grad = None
    loss = CONTENDERS[name](x, weight, targets)
    loss.backward()
    return loss.detach()


def peak_mb(args: argparse.Namespace, name: str, dtype: str) -> float:
    """Growth of this process's resident memory over one step, the gradients that it returns not counted."""
    import psutil

    tensors = inputs(args, dtype)
    step(name, *inputs(args, dtype, rows=2))  # what PyTorch itself sets up
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step(name, *tensors)
    done.set()
    watcher.join()
    returned = sum(t.numel() * t.element_size() for t in tensors[:2])
    return (peak - before - returned) / 1e6


def times_ms(args: argparse.Namespace, dtype: str) -> dict[str, list[float]]:
    tensors = inputs(args, dtype)
    wide = [tensors[0].detach().float().requires_grad_(), tensors[1].detach().float().requires_grad_(), tensors[2]]
    exact = [step("unfused", *wide), *(t.grad for t in wide[:2])]
    for name in CONTENDERS:
        result = [step(name, *tensors), *(t.grad for t in tensors[:2])]
        errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(result, exact, strict=True)]
        print(f"{name:8} relative error: loss {errors[0]:.1e}, dx {errors[1]:.1e}, dweight {errors[2]:.1e}", flush=True)
        if max(errors) > 0.1:
            raise SystemExit(f"{name} computes something else")
    del exact, wide, result
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(args.repeats):
        for name, taken in times.items():
            start = time.perf_counter()
            step(name, *tensors)
            taken.append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-only", action="store_true", help="do not time")
    parser.add_argument("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(json.dumps(peak_mb(args, args.peak_of, args.dtype[0])))
        return
    for dtype in args.dtype:
        print(
            f"rows {args.rows}, width {args.width}, vocabulary {args.vocabulary}, {dtype}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        )
        shape = [f"--{name}={getattr(args, name)}" for name in ("rows", "width", "vocabulary")]
        memory = {}
        for name in CONTENDERS:
            command = [sys.executable, sys.argv[0], *shape, "--dtype", dtype, "--peak-of", name]
            memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        times = {name: [0.0] for name in CONTENDERS} if args.memory_only else times_ms(args, dtype)
        for name, taken in times.items():
            line = f"{name:8} {memory[name]:7.0f} MB extra, 1/{memory['unfused'] / memory[name]:.1f} of unfused"
            if not args.memory_only:
                ratio = statistics.median(b / a for a, b in zip(times["unfused"], taken, strict=True))
                median, low, high = statistics.median(taken), min(taken), max(taken)
                line += f"   {median:7.0f} ms ({low:.0f} .. {high:.0f}), {ratio:.2f} of unfused"
            print(line, flush=True)


if __name__ == "__main__":
    main()
