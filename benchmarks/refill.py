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
STEPS = 16  # steps that are timed together
CAPACITY = 256  # tokens of the cache: enough for the steps of all turns


def seconds(run: Callable[[], object], device: torch.device, turns: int) -> float:
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


def prefill_and_step(model: GPT2, rows: int, turns: int = 11) -> tuple[float, float]:
    """Seconds of a prefill without the cost of its tokens, and seconds of a step of a full batch.

    As in a run, a prefill ends when the first tokens of its rows are read. The steps of a run overlap on a GPU: the
    host starts a step before it reads the last one. So several are started here, and only the last one is read.
    """
    capacity = min(CAPACITY, model.config.context_length)
    cache = KVCache(model.config, rows, capacity, dtype=model.dtype, device=model.device)
    session = DecodeSession(model, cache, SamplingConfig(temperature=0))
    new = [NewRow(row, [7] * TOKENS, (row, 0), 10_000) for row in range(rows)]

    def prefill(count: int) -> None:
        logits = session.prefill(range(count), [row.prompt_ids for row in new[:count]])
        session.begin(new[:count], logits).read()

    def decode() -> None:
        for _ in range(STEPS):
            results = session.step(range(rows))
        results.read()

    one, all_rows = (seconds(functools.partial(prefill, count), model.device, turns) for count in (1, rows))
    step = seconds(decode, model.device, turns) / STEPS
    return max(0.0, one - (all_rows - one) / (rows - 1)), step


def whole_runs(model: GPT2, rows: int, new: int, turns: int) -> tuple[float, float, float, bool]:
    """Compare runs that fill free slots at once with runs that wait.

    Returns:
        The median seconds of each, the median ratio of the two, and whether both made the same tokens.
    """
    rng = random.Random(rows)
    longest = min(64, model.config.context_length // 2)
    lengths = [rng.randint(4, longest) for _ in range(5 * rows)]
    prompts = [[rng.randrange(model.config.vocab_size) for _ in range(length)] for length in lengths]
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
    at_once_s, waited_s = (statistics.median(taken) for taken in zip(*pairs, strict=True))
    ratio = statistics.median(without / waited for without, waited in pairs)
    return at_once_s, waited_s, ratio, all(found == tokens[0] for found in tokens)


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
        at_once, waited, ratio, is_same = whole_runs(model, rows, args.new, args.turns)
        print(f"  filling slots at once {at_once:.2f} s, waiting {waited:.2f} s: {ratio:.3f}x as fast", flush=True)
        if not is_same:
            print("  the runs gave different tokens: a row's rounding depends on how many rows are beside it")


if __name__ == "__main__":
    main()
