"""The host's time in eager training: `python benchmarks/host_overhead.py [--calls 2000]`.

This is CPU time: of operators, forward and backward, in microseconds per call, and of a training step of 12 layers,
with the number of its kernel launches. The host checks arguments, dispatches, records for autograd, allocates memory
and, on a GPU, launches Triton's kernels. Without a GPU no kernel is launched. The tensors are so small that PyTorch's
own operators take little more than their dispatch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the operators take backend="triton" on a CPU only then
sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("", "kernels")]

from fastgpt2 import GPT2, GPT2Config  # noqa: E402
from fastgpt2.loss import calculate_loss  # noqa: E402
from fastgpt2_kernels import ops  # noqa: E402
from fastgpt2_kernels.triton import devices  # noqa: E402

HEADS, C = 3, 48


def count_launches(device: str) -> list[str]:
    """Return a list that grows by a name with each kernel launch. On a CPU the launch itself is left out."""
    launched: list[str] = []
    launch = devices.launch_kernel

    def counted(on: torch.device, kernel: Any, grid: Any, **arguments: Any) -> None:
        launched.append(kernel.__name__)
        if device == "cuda":
            launch(on, kernel, grid, **arguments)

    for name, module in list(sys.modules.items()):
        if name.startswith("fastgpt2_kernels.") and getattr(module, "launch_kernel", None) is launch:
            vars(module)["launch_kernel"] = counted
    return launched


def median_us(call: Callable[[], object], calls: int) -> float:
    rounds = []
    for _ in range(7):
        start = time.process_time()
        for _ in range(max(1, calls // 7)):
            call()
        rounds.append((time.process_time() - start) / max(1, calls // 7) * 1e6)
    return statistics.median(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="calls to time (default: %(default)s)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    launched = count_launches(device)
    print(f"{device}, torch {torch.__version__}{', without launches' if device == 'cpu' else ''}")

    x, residual, qkv = (torch.randn(1, 16, n, device=device, requires_grad=True) for n in (C, C, 3 * C))
    weight, bias = (torch.ones(C, device=device, requires_grad=True) for _ in range(2))
    dout = torch.randn(1, 16, C, device=device)
    operators = {
        "causal_attention_packed": lambda backend: ops.causal_attention_packed(qkv, HEADS, backend=backend),
        "layer_norm": lambda backend: ops.layer_norm(x, weight, bias, 1e-5, residual=residual, backend=backend)[0],
        "bias_activation": lambda backend: ops.bias_activation(x, bias, "gelu_new", backend=backend),
    }
    for name, operator in operators.items():
        for backend in ("triton", "torch"):
            us = median_us(lambda operator=operator, backend=backend: operator(backend).backward(dout), args.calls)
            note = "" if device == "cuda" or backend == "triton" else " (with the computation)"
            print(f"{name:24} {backend:7} {us:7.1f} us{note}")

    config = GPT2Config(vocab_size=256, context_length=64, hidden_size=C, num_layers=12, num_heads=HEADS)
    model = GPT2(config, backend="triton").train().to(device)
    ids = torch.randint(256, (1, 17), device=device)

    def step() -> None:
        calculate_loss(model, ids[:, :-1], ids[:, 1:]).backward()

    step()
    launched.clear()
    step()
    launches = len(launched)
    ms = median_us(step, args.calls // 20) / 1e3
    print(f"training step, 12 layers  {ms:.1f} ms, {launches} kernel launches")


if __name__ == "__main__":
    main()
