"""The host's time for an eager attention call, in microseconds: `python benchmarks/host_overhead.py [--calls 2000]`.

The host checks the arguments, dispatches, records for autograd, allocates memory and launches Triton's kernels. Without
a GPU the launches are replaced by empty functions, and the output says so.
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

from fastgpt2_kernels import ops  # noqa: E402
from fastgpt2_kernels.triton import attention  # noqa: E402


class _NoLaunch:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **keywords: None


def median_us(call: Callable[[], object], calls: int) -> float:
    rounds = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(calls // 7):
            call()
        rounds.append((time.perf_counter() - start) / (calls // 7) * 1e6)
    return statistics.median(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="calls to time (default: %(default)s)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        for name in ("_attention_fwd_kernel", "_attention_bwd_dq_kernel", "_attention_bwd_dkdv_kernel"):
            setattr(attention, name, _NoLaunch())
        torch.set_num_threads(1)
    print(f"{device}, torch {torch.__version__}{', without launches' if device == 'cpu' else ''}")
    dtype = torch.bfloat16
    qkv = torch.randn(1, 16, 3 * 768, dtype=dtype, device=device)
    leaf = qkv.clone().requires_grad_()
    dout = torch.randn(1, 16, 768, dtype=dtype, device=device)

    def forward(backend: str) -> torch.Tensor:
        return ops.causal_attention_packed(qkv, 12, backend=backend)

    def both(backend: str) -> None:
        ops.causal_attention_packed(leaf, 12, backend=backend).backward(dout)

    for backend in ("triton", "torch"):
        with torch.no_grad():
            no_grad = median_us(lambda backend=backend: forward(backend), args.calls)
        trained = median_us(lambda backend=backend: both(backend), args.calls)
        note = "" if device == "cuda" or backend == "triton" else " (with the computation)"
        print(f"{backend:7} forward {no_grad:6.1f} us, forward and backward {trained:6.1f} us per call{note}")


if __name__ == "__main__":
    main()
