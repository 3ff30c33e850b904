"""When to fill free slots of a batch: the fixed cost of a prefill, and whole runs with and without waiting.

python -m benchmarks.refill [--rows 8 32] [--new 64] [--dtype float32]. GPT-2 124M with random weights, prompts of 4 to
64 tokens, samples of random lengths. The first figure, the fixed cost of a prefill in decoding steps, goes into
`fastgpt2.scheduler.PREFILL_STEPS`.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from unittest import mock

import torch

from fastgpt2 import GPT2, scheduler
from fastgpt2.cache import KVCache
from fastgpt2.config import SamplingConfig
from fastgpt2.decode import DecodeSession, NewRow, decode_backend, why_not_decode

TOKENS = 16  # the length of the prompts whose prefill is timed


def seconds(run: Callable[[], object], device: torch.device, turns: int = 7) -> float:
    """The median time of several turns in seconds, including the device's work."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    once()
    return statistics.median(once() for _ in range(turns))


def prefill_and_step(model: GPT2, rows: int) -> tuple[float, float]:
    """Seconds of a prefill without the cost of its tokens, and seconds of a step of a full batch."""
    session = DecodeSession(
        model, KVCache(model.config, rows, 256, dtype=model.dtype, device=model.device), SamplingConfig(temperature=0)
    )
    prompts = [[7] * TOKENS] * rows
    one, all_rows = (
        seconds(functools.partial(session.prefill, range(n), prompts[:n]), model.device) for n in (1, rows)
    )
    logits = session.prefill(range(rows), prompts)
    session.begin([NewRow(row, ids, (row, 0), 10_000) for row, ids in enumerate(prompts)], logits)
    step = seconds(lambda: session.step(range(rows)).read(), model.device, turns=31)
    return max(0.0, one - (all_rows - one) / (rows - 1)), step


def whole_runs(model: GPT2, rows: int, new: int, turns: int) -> tuple[float, float, float]:
    """Seconds of a run that fills free slots at once, seconds of a run that waits, and the median ratio of the two."""
    rng = random.Random(rows)
    prompts = [[rng.randrange(model.config.vocab_size) for _ in range(rng.randint(4, 64))] for _ in range(5 * rows)]
    # With this share of stop tokens in the vocabulary a random row ends after about `new` tokens.
    stop = list(range(0, model.config.vocab_size, new))
    options = {"max_new_tokens": 4 * new, "temperature": 1.0, "stop_token_ids": stop, "batch_size": rows}
    tokens: list[list[list[int]]] = []

    def timed(steps: dict[str, float]) -> float:
        with mock.patch.object(scheduler, "PREFILL_STEPS", steps):
            begin = time.perf_counter()
            tokens.append([sample.token_ids for sample in model.generate(prompts, **options)])
            return time.perf_counter() - begin

    at_once = dict.fromkeys(scheduler.PREFILL_STEPS, 0.0)
    timed(at_once)
    pairs = [(timed(at_once), timed(scheduler.PREFILL_STEPS)) for _ in range(turns)]
    if any(found != tokens[0] for found in tokens):
        print("  the runs gave different tokens: a row's rounding depends on how many rows are beside it")
    ratio = statistics.median(without / waited for without, waited in pairs)
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs), ratio


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refill", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32], help="batch sizes (default: 8 32)")
    parser.add_argument("--new", type=int, default=64, help="average number of new tokens (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    parser.add_argument("--model", default="gpt2", help="a preset's name (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="runs of each kind (default: %(default)s)")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPT2.from_config(args.model).eval().to(device, getattr(torch, args.dtype))
    if (reason := why_not_decode(model)) is not None:
        parser.error(f"there is no decoding step to time: {reason}")
    for rows in args.rows:
        prefill, step = prefill_and_step(model, rows)
        print(
            f"{args.model}, {args.dtype}, {rows} rows, {decode_backend(model)}: a prefill costs {1e3 * prefill:.2f} ms "
            f"besides its tokens, a step {1e3 * step:.2f} ms: {prefill / step:.2f} steps"
        )
        at_once, waited, ratio = whole_runs(model, rows, args.new, args.turns)
        print(f"  filling slots at once {at_once:.2f} s, waiting {waited:.2f} s: {ratio:.3f}x as fast", flush=True)


if __name__ == "__main__":
    main()
