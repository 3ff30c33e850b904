"""Where a decoding step's time goes on a CPU.

python -m benchmarks.step_profile [--rows 1 8 32] [--weights float32 bfloat16 int8]. GPT-2 124M with random
weights generates 128 tokens greedily after a prompt of 64. The table shows the milliseconds per step of each phase,
in the thread that began it. "waiting" is the time that this thread waits for others at barriers. "host" is Python
between the calls.

Next to it is the least time that a phase can take on this machine. This is the longer of two times: its bytes (weights,
cached keys and values) at the bandwidth of reading memory, and its products at the rate of a linear layer whose weights
stay in the cache. Both rates are measured first. With --prefill N the table is for the first token after a prompt of N.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from fastgpt2 import GPT2, GPT2Config
from fastgpt2.accounting import measured_bandwidth
from fastgpt2_kernels import ops
from fastgpt2_kernels.native.decode import PHASES, linear, pack_linear
from fastgpt2_kernels.types import LinearWeights

WEIGHTS = ("float32", "bfloat16", "int8")
PROMPT, NEW = 64, 128  # tokens, as in the benchmark of generation


@dataclass
class _Times:
    """The times of the native step."""

    phases: torch.Tensor  # seconds of each of PHASES
    calls: list[tuple[float, float, int]]  # begin, end and number of steps


@contextmanager
def _timed(method: str) -> Iterator[_Times]:
    """Record the times of all calls of `run` or `prefill` of the native step in this block."""
    times, original = _Times(torch.zeros(len(PHASES), dtype=torch.float64), []), getattr(ops.NativeStep, method)

    def timed(step: ops.NativeStep, *args: Any, **options: Any) -> Any:
        step.times = times.phases
        begin = time.perf_counter()
        try:
            done = original(step, *args, **options)
        finally:
            step.times = None
        times.calls.append((begin, time.perf_counter(), done if isinstance(done, int) else 1))
        return done

    with mock.patch.object(ops.NativeStep, method, timed):
        yield times


def _fastest(turns: int, turn: Callable[[], tuple[torch.Tensor, float]]) -> dict[str, float]:
    """Milliseconds of each phase and of the host in the fastest turn. The first turn packs weights and is ignored."""
    found = []
    for _ in range(turns + 1):
        phases, host = turn()
        found.append(
            {name: 1e3 * seconds for name, seconds in zip((*PHASES, "host"), (*phases.tolist(), host), strict=True)}
        )
    return min(found[1:], key=lambda times: sum(times.values()))


def profile(
    model: GPT2, num_rows: int, weights: str, prompt: int = PROMPT, new: int = NEW, turns: int = 3
) -> dict[str, float]:
    """Milliseconds per step of each phase and of the host, in the fastest of several turns."""
    prompts = torch.randint(model.config.vocab_size, (num_rows, prompt))

    def turn() -> tuple[torch.Tensor, float]:
        with _timed("run") as times:
            model.generate(
                prompts, max_new_tokens=new, temperature=0, stop_token_ids=(), batch_size=num_rows,
                weight_dtype="int8" if weights == "int8" else None,
            )  # fmt: skip
        steps = sum(done for *_, done in times.calls)
        host = sum(later[0] - earlier[1] for earlier, later in itertools.pairwise(times.calls))
        return times.phases / steps, host / steps

    return _fastest(turns, turn)


def profile_prefill(model: GPT2, prompt: int, weights: str, turns: int = 6) -> dict[str, float]:
    """Milliseconds to the first token of a prompt, by phase and for the host, in the fastest of several turns."""
    prompts = torch.randint(model.config.vocab_size, (1, prompt))

    def turn() -> tuple[torch.Tensor, float]:
        begin = time.perf_counter()
        with _timed("prefill") as times:
            model.generate(prompts, max_new_tokens=1, temperature=0, weight_dtype="int8" if weights == "int8" else None)
        return times.phases, time.perf_counter() - begin - float(times.phases.sum())

    return _fastest(turns, turn)


WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def product_rate(weights: str, repeats: int = 30) -> float:
    """FLOP/s of 512 rows through a linear layer whose weights stay in the processor's cache."""
    n, k, rows = 1536, 768, 512
    weight = torch.randn(n, k).mul_(40)
    if weights == "int8":
        layer = pack_linear(LinearWeights(weight.to(torch.int8), None, torch.ones(n)))
    else:
        layer = pack_linear(LinearWeights(weight.to(getattr(torch, weights))))
    x, best = torch.randn(rows, k), float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        linear(x, layer)
        best = min(best, time.perf_counter() - begin)
    return 2 * n * k * rows / best


def limits(
    config: GPT2Config, num_rows: int, keys: float, weights: str, bandwidth: float, rates: Mapping[str, float],
    prompt: int = 0,
) -> dict[str, float]:  # fmt: skip
    """The least milliseconds of each phase that reads much memory or multiplies much.

    Args:
        config: The model's configuration.
        num_rows: Rows of a step, or of a prefill.
        keys: The number of keys that a new token attends to, on average.
        weights: "float32", "bfloat16" or "int8".
        bandwidth: The bytes per second at which memory is read.
        rates: FLOP/s by the weights' dtype; see `product_rate`. Attention always multiplies in float32.
        prompt: New tokens of each row in a prefill; 0 for a step, which has one.
    """
    C, L, V, inner = config.hidden_size, config.num_layers, config.vocab_size, config.inner_dim
    tokens = num_rows * max(prompt, 1)
    numbers = {"qkv": 3 * C * C * L, "other linear layers": (C * C + 2 * C * inner) * L, "head": C * V}
    least = {}
    for name, count in numbers.items():
        flops = 2 * count * (num_rows if name == "head" else tokens)
        least[name] = 1e3 * max(count * WEIGHT_BYTES[weights] / bandwidth, flops / rates[weights])
    cache_bytes = 4 if weights == "float32" else 2
    least["attention"] = 1e3 * max(
        num_rows * (prompt or keys) * 2 * C * L * cache_bytes / bandwidth, 4 * tokens * keys * C * L / rates["float32"]
    )
    return least


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="batch sizes (default: 1 8 32)")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS, help="their dtypes (default: all)")
    parser.add_argument(
        "--prefill", type=int, default=0, metavar="N", help="instead profile the first token after a prompt of N tokens"
    )
    args = parser.parse_args(arguments)
    if (reason := ops.why_not_native("decode_step", torch.device("cpu"))) is not None:
        parser.error(f"there is no native step to profile: {reason}")
    torch.manual_seed(0)
    model = GPT2.from_config("gpt2").eval()
    rates = {weights: product_rate(weights) for weights in WEIGHTS}
    for weights in args.weights:
        print(f"{weights}: linear layers whose weights are in the cache run at {rates[weights] / 1e9:.0f} GFLOP/s")
        model = model.to(torch.bfloat16 if weights == "bfloat16" else torch.float32)
        for num_rows in [1] if args.prefill else args.rows:
            bandwidth = measured_bandwidth("cpu", repeats=10)
            if args.prefill:
                found = profile_prefill(model, args.prefill, weights)
                keys = (args.prefill + 1) / 2
            else:
                found = profile(model, num_rows, weights)
                keys = PROMPT + NEW / 2
            bandwidth = max(bandwidth, measured_bandwidth("cpu", repeats=10))  # other processes may have used it
            least = limits(model.config, num_rows, keys, weights, bandwidth, rates, args.prefill)
            total = sum(found.values())
            what = f"the first token of {args.prefill}" if args.prefill else f"a step of {num_rows} rows"
            bound = sum(least.values())
            print(f"{weights}: {what} takes {total:.2f} ms; the machine allows {bound:.2f} ({bound / total:.0%})")
            print(f"  memory is read at {bandwidth / 1e9:.1f} GB/s")
            for name, ms in found.items():
                allowed = f"{least[name]:8.3f}" if name in least else ""
                print(f"  {name:20} {ms:8.3f} {ms / total:6.1%} {allowed}")


if __name__ == "__main__":
    main()
