"""Memory and time of the chunked linear cross-entropy against logits held whole, forward and backward, on the CPU.

    python benchmarks/linear_cross_entropy.py [--rows 2048 --width 256 --vocabulary 50257] [--dtype float32]

Each contender's peak extra memory is the growth of its own process's resident memory; the times alternate in one
process, after a check that the contenders agree. Prints medians, their spread, and the two ratios.
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


def whole(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def chunked(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x, weight, targets)


CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"whole": whole, "chunked": chunked}


def inputs(args: argparse.Namespace, rows: int | None = None) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows, dtype = rows or args.rows, getattr(torch, args.dtype)
    x = torch.randn(rows, args.width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(args.vocabulary, args.width, generator=generator) * 0.1).to(dtype).requires_grad_()
    return x, weight, torch.randint(args.vocabulary, (rows,), generator=generator)


def step(name: str, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    x.grad = weight.grad = None
    loss = CONTENDERS[name](x, weight, targets)
    loss.backward()
    return loss.detach()


def peak_mb(args: argparse.Namespace, name: str) -> float:
    """Growth of this process's resident memory over one step, the gradients that it returns not counted."""
    import psutil

    tensors = inputs(args)
    step(name, *inputs(args, rows=2))  # what PyTorch itself sets up
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


def times_ms(args: argparse.Namespace) -> dict[str, list[float]]:
    tensors = inputs(args)
    results = {}
    for name in CONTENDERS:
        loss = step(name, *tensors)
        results[name] = (loss, *(t.grad.double() for t in tensors[:2]))
    for a, b in zip(*results.values(), strict=True):
        if (a - b).abs().max() > 1e-2 * b.abs().max():
            raise SystemExit("the contenders disagree")
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(args.repeats):
        for name, taken in times.items():
            start = time.perf_counter()
            step(name, *tensors)
            taken.append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(json.dumps(peak_mb(args, args.peak_of)))
        return
    print(
        f"rows {args.rows}, width {args.width}, vocabulary {args.vocabulary}, {args.dtype}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    memory = {}
    for name in CONTENDERS:
        command = [sys.executable, *sys.argv, "--peak-of", name]
        memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    times = times_ms(args)
    for name, taken in times.items():
        median, low, high = statistics.median(taken), min(taken), max(taken)
        print(f"{name:8} {memory[name]:8.0f} MB extra at the peak   {median:8.0f} ms ({low:.0f} .. {high:.0f})")
    time_ratio = statistics.median(b / a for a, b in zip(times["whole"], times["chunked"], strict=True))
    print(f"chunked / whole: memory 1/{memory['whole'] / memory['chunked']:.1f}, time {time_ratio:.2f}")


if __name__ == "__main__":
    main()
