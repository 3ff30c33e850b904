"""Where a decoding step's time goes on a CPU.

python -m benchmarks.step_profile [--rows 1 8 32] [--weights float32 bfloat16 int8]. GPT-2 124M with random
weights, greedy, 128 new tokens after 64 by `generate`. Milliseconds a step of each phase, in the thread that began it;
"waiting" is for the other threads at the barriers, "host" is Python between the calls.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fastgpt2 import GPT2
from fastgpt2_kernels import ops
from fastgpt2_kernels.native.decode import PHASES

WEIGHTS = ("float32", "bfloat16", "int8")


@contextmanager
def _timed_steps() -> Iterator[tuple[torch.Tensor, list[tuple[float, float, int]]]]:
    """The seconds of the phases of all steps meanwhile, and every call's begin, end and number of steps."""
    times, calls, run = torch.zeros(len(PHASES), dtype=torch.float64), [], ops.NativeStep.run

    def timed(step: ops.NativeStep, slots: torch.Tensor, steps: int = 1) -> int:
        step.times = times
        begin = time.perf_counter()
        done = run(step, slots, steps)
        calls.append((begin, time.perf_counter(), done))
        step.times = None
        return done

    ops.NativeStep.run = timed  # type: ignore[method-assign]
    try:
        yield times, calls
    finally:
        ops.NativeStep.run = run  # type: ignore[method-assign]


def profile(
    model: GPT2, num_rows: int, weights: str, prompt: int = 64, new: int = 128, turns: int = 3
) -> dict[str, float]:
    """Milliseconds a step by phase, and of the host, in the fastest of some turns."""
    prompts = torch.randint(model.config.vocab_size, (num_rows, prompt))
    best: dict[str, float] = {}
    for turn in range(turns + 1):  # the first one packs the weights
        with _timed_steps() as (times, calls):
            model.generate(
                prompts, max_new_tokens=new, temperature=0, stop_token_ids=(), batch_size=num_rows,
                weight_dtype="int8" if weights == "int8" else None,
            )  # fmt: skip
        steps = sum(done for *_, done in calls)
        host = sum(later[0] - earlier[1] for earlier, later in itertools.pairwise(calls))
        by_phase = {**dict(zip(PHASES, times.tolist(), strict=True)), "host": host}
        found = {name: 1e3 * seconds / steps for name, seconds in by_phase.items()}
        if turn > 0 and (not best or sum(found.values()) < sum(best.values())):
            best = found
    return best


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_profile", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    args = parser.parse_args(arguments)
    if (reason := ops.why_not_native("decode_step", torch.device("cpu"))) is not None:
        parser.error(f"there is no native step to profile: {reason}")
    torch.manual_seed(0)
    model = GPT2.from_config("gpt2").eval()
    for weights in args.weights:
        model = model.to(torch.bfloat16 if weights == "bfloat16" else torch.float32)
        for num_rows in args.rows:
            found = profile(model, num_rows, weights)
            total = sum(found.values())
            print(f"{weights}, {num_rows} rows: {total:.2f} ms a step, {1e3 * num_rows / total:.0f} tokens a second")
            for name, ms in found.items():
                print(f"  {name:20} {ms:8.3f} {ms / total:6.1%}")


if __name__ == "__main__":
    main()
