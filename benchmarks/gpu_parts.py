"""The parts of `make gpu` that are not commands of their own. Each returns what it found as a dict.

A part whose results are wrong raises `WrongError`. With `is_toy` the sizes are tiny, and a CPU can run the same code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2 import GPT2, GPT2Config
from fastgpt2.cache import KVCache
from fastgpt2.config import SamplingConfig
from fastgpt2.decode import DecodeSession, NewRow, decode_backend
from fastgpt2.loss import train_step
from fastgpt2_kernels import ops, reference
from fastgpt2_kernels.checking.budget import error_budget, largest_error


class WrongError(Exception):
    """A result is not what it must be."""


class Place(NamedTuple):
    """Where a part runs."""

    device: torch.device
    is_toy: bool

    @property
    def backend(self) -> str:
        """ "auto", or "triton" on a CPU where Triton's interpreter is turned on."""
        interprets = self.device.type == "cpu" and ops.why_not_triton("decode_step", self.device) is None
        return "triton" if interprets else "auto"

    def pick(self, full: Any, toy: Any) -> Any:
        return toy if self.is_toy else full


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise WrongError(what)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(run: Callable[[], object], device: torch.device, turns: int) -> float:
    """The median time of several turns in seconds, after one that compiles."""
    run()
    found = []
    for _ in range(turns):
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def _model(place: Place, name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> GPT2:
    """A random model with a preset's shape, or a tiny one at toy size."""
    torch.manual_seed(0)
    config = GPT2Config.preset(name, **changes)
    if place.is_toy:
        config = GPT2Config(vocab_size=97, context_length=64, hidden_size=32, num_layers=2, num_heads=2, **changes)
        dtype = torch.float32
    return GPT2(config, backend=place.backend).eval().to(place.device, dtype)


# -- kernels --------------------------------------------------------------------------------------------------------


def attention(place: Place) -> dict[str, Any]:
    """Packed attention in bfloat16, forward and backward: compared with float64, and timed beside PyTorch's SDPA."""
    B, T, H, D = place.pick((4, 1024, 12, 64), (2, 24, 2, 16))
    # Triton's interpreter multiplies bfloat16 wrong.
    dtype = torch.float32 if place.backend == "triton" else torch.bfloat16
    torch.manual_seed(0)
    drawn = torch.randn(B, T, 3 * H * D), torch.randn(B, T, H * D)
    qkv, dout = (t.to(place.device, dtype) for t in drawn)

    def gradient(run: Callable[[Tensor], Tensor], wide: torch.dtype = dtype) -> tuple[Tensor, Tensor]:
        x = qkv.to(wide).requires_grad_()
        out = run(x)
        return out.detach(), torch.autograd.grad(out, x, dout.to(wide))[0]

    def heads(x: Tensor) -> tuple[Tensor, ...]:
        return x.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)

    def plain(x: Tensor) -> Tensor:
        return reference.causal_attention(*heads(x)).transpose(1, 2).flatten(2)

    def sdpa(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*heads(x), is_causal=True).transpose(1, 2).flatten(2)

    def ours(x: Tensor) -> Tensor:
        return ops.causal_attention_packed(x, H, backend=place.backend)

    found: dict[str, Any] = {}
    exact = gradient(plain, torch.float64)
    for name, got, coarse, true in zip(("forward", "backward"), gradient(ours), gradient(plain), exact, strict=True):
        share = largest_error(got, true) / error_budget(largest_error(coarse, true), true, dtype)
        found[f"{name}: share of the error budget"] = share
        _require(share <= 1, f"{name}: the error is {share:.2f} times its budget")
    turns = place.pick(20, 1)
    for name, run in (("ours", ours), ("PyTorch", sdpa)):
        found[f"forward ms, {name}"] = 1e3 * _seconds(functools.partial(run, qkv), place.device, turns)
        both = _seconds(functools.partial(gradient, run), place.device, turns)
        found[f"forward and backward ms, {name}"] = 1e3 * both
    return found


def precision(place: Place) -> dict[str, Any]:
    """Generation in float32 with each setting of PyTorch's two switches for the precision of products."""
    model = _model(place, "gpt2", torch.float32)
    found = {}
    for name, switch in (
        ("highest", lambda: torch.set_float32_matmul_precision("highest")),
        ("high", lambda: torch.set_float32_matmul_precision("high")),
        ("tf32", lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")),
        ("ieee", lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")),
    ):
        switch()
        samples = model.generate([[1, 2, 3]], max_new_tokens=8, temperature=0, stop_token_ids=())
        found[name] = samples[0].token_ids
    _require(found["highest"] == found["ieee"], "the settings highest and ieee must give the same tokens")
    return found


# -- decoding -------------------------------------------------------------------------------------------------------


def _begun(model: GPT2, rows: int, prompt: int, capacity: int, **options: Any) -> DecodeSession:
    cache = KVCache(model.config, rows, capacity, dtype=model.dtype, device=model.device)
    session = DecodeSession(model, cache, SamplingConfig(temperature=0), **options)
    rng = random.Random(0)
    prompts = [[rng.randrange(model.config.vocab_size) for _ in range(prompt)] for _ in range(rows)]
    logits = session.prefill(range(rows), prompts)
    session.begin([NewRow(row, ids, (row, 0), 10**6) for row, ids in enumerate(prompts)], logits)
    return session


def _steps(model: GPT2, rows: int, prompt: int, steps: int, **options: Any) -> tuple[list[list[int]], float]:
    """The tokens of greedy steps, and milliseconds per step. The first step is not timed."""
    session = _begun(model, rows, prompt, min(model.config.context_length, prompt + steps + 2), **options)
    results = [session.step(range(rows))]
    results[0].read()
    begin = time.perf_counter()
    for _ in range(steps):
        results.append(session.step(range(rows)))
    tokens = [r.read()[0][:rows] for r in results]
    return tokens, 1e3 * (time.perf_counter() - begin) / steps


def _decoding(place: Place, name: str, all_rows: Sequence[int]) -> dict[str, Any]:
    model = _model(place, name)
    prompt, steps = place.pick((64, 128), (5, 6))
    found: dict[str, Any] = {"backend": decode_backend(model)}
    ways: dict[str, dict[str, Any]] = {"launches": {"use_graphs": False}, "graph": {"use_pdl": False}}
    if place.device.type == "cuda" and torch.cuda.get_device_capability(place.device)[0] >= 9:
        ways["graph, PDL"] = {"use_pdl": True}
    for rows in all_rows:
        first = None
        for way, options in ways.items():
            tokens, ms = _steps(model, rows, prompt, steps, **options)
            found[f"{rows} rows, {way}: ms per step"] = ms
            found[f"{rows} rows, {way}: tokens per second"] = 1e3 * rows / ms
            first = tokens if first is None else first
            _require(tokens == first, f"{rows} rows: {way} gives other tokens than single launches")
    return found


def medium(place: Place) -> dict[str, Any]:
    """The gpt2-medium shape with 1, 8 and 32 rows: a CUDA graph against single launches, with and without PDL."""
    return _decoding(place, "gpt2-medium", (1, 8, 32) if not place.is_toy else (1, 3))


def xl(place: Place) -> dict[str, Any]:
    """The gpt2-xl shape with 9 rows: its products need the most shared memory."""
    return _decoding(place, "gpt2-xl", (9,) if not place.is_toy else (2,))


def inference_mode(place: Place) -> dict[str, Any]:
    """`generate` under `torch.inference_mode()`, then outside, then inside."""
    model = _model(place, "gpt2")
    found = []
    for is_inside in (True, False, True):
        with torch.inference_mode() if is_inside else contextlib.nullcontext():
            samples = model.generate([[1, 2, 3], [4]], max_new_tokens=12, temperature=0, stop_token_ids=())
        found.append([sample.token_ids for sample in samples])
    _require(found[0] == found[1] == found[2], "inside inference_mode the tokens are others than outside")
    return {"tokens": found[0]}


def second_gpu(place: Place) -> dict[str, Any]:
    """Generation and a training step on cuda:1 while cuda:0 is current."""
    if place.device.type == "cuda" and torch.cuda.device_count() < 2:
        return {"skipped": "there is only one GPU"}
    found = []
    other = torch.device("cuda:1") if place.device.type == "cuda" else place.device
    for device in (place.device, other):
        model = _model(place._replace(device=device), "gpt2")
        samples = model.generate([[1, 2, 3]], max_new_tokens=12, temperature=0, stop_token_ids=())
        train_step(model.train(), torch.ones(2, 9, dtype=torch.int64, device=device))
        found.append(samples[0].token_ids)
        if device.type == "cuda":
            _require(torch.cuda.current_device() == place.device.index, "the current device was changed")
    _require(found[0] == found[1], "the second GPU gives other tokens")
    return {"tokens": found[0]}


def repeated(place: Place) -> dict[str, Any]:
    """10,000 steps of 32 rows, twice. Tokens and log-probabilities must be bit-identical."""
    model = _model(place, "gpt2")
    rows, steps = place.pick((32, 10_000), (3, 40))
    new = model.config.context_length - 8
    prompts = [[index % 90 + 1] for index in range(rows * -(-steps // new))]
    found, seconds = [], []
    for _ in range(2):
        digest, begin = hashlib.sha256(), time.perf_counter()
        options = {"max_new_tokens": new, "temperature": 0.8, "top_k": 50, "stop_token_ids": (), "batch_size": rows}
        for sample in model.generate(prompts, **options):
            digest.update(repr((sample.token_ids, sample.logprobs)).encode())
        found.append(digest.hexdigest())
        seconds.append(time.perf_counter() - begin)
    _require(found[0] == found[1], "the second run is not bit-identical to the first")
    return {"seconds": seconds, "tokens per second": len(prompts) * new / min(seconds), "sha256": found[0]}


def refill(place: Place) -> dict[str, Any]:
    """200 prompts: the throughput of samples that end at random, beside that of samples of one length."""
    model = _model(place, "gpt2")
    count, mean, rows = place.pick((200, 64, 32), (12, 6, 3))
    rng = random.Random(0)
    prompts = [[rng.randrange(90) for _ in range(rng.randint(2, 32 if not place.is_toy else 6))] for _ in range(count)]
    found = {}
    stops: dict[str, tuple[int, Sequence[int]]] = {
        "random ends": (6 * mean, list(range(0, model.config.vocab_size, mean))),
        "one length": (mean, ()),
    }
    for name, (most, stop) in stops.items():
        options = {"max_new_tokens": most, "temperature": 1.0, "stop_token_ids": stop, "batch_size": rows}
        model.generate(prompts[:rows], **options)
        begin = time.perf_counter()
        samples = model.generate(prompts, **options)
        seconds = time.perf_counter() - begin
        _require(len(samples) == count, f"{len(samples)} of {count} samples came back")
        found[f"{name}: tokens per second"] = sum(len(s.token_ids) for s in samples) / seconds
    return found


# -- training -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _counted_synchronisations(device: torch.device) -> Iterator[list[str]]:
    said: list[str] = []
    if device.type != "cuda":
        yield said
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield said
        finally:
            torch.cuda.set_sync_debug_mode("default")
            said += [str(w.message) for w in caught if "synchroniz" in str(w.message)]


def training(place: Place) -> dict[str, Any]:
    """20 training steps in bfloat16 (eager and compiled) and in float16, and how often the host waits for the GPU."""
    steps, B, T = place.pick((20, 8, 1024), (3, 2, 16))
    found: dict[str, Any] = {}
    for dtype, is_compiled in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)):
        if place.is_toy and is_compiled:
            continue  # compiling takes minutes on a CPU
        model = _model(place, "gpt2", torch.float32).train()
        run: Any = torch.compile(model) if is_compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        scaler = torch.amp.GradScaler(place.device.type, enabled=dtype == torch.float16)
        tokens = torch.randint(model.config.vocab_size, (B, T + 1), device=place.device)
        losses = []

        def step(
            run: Any = run, model: GPT2 = model, optimizer: Any = optimizer, scaler: Any = scaler,
            tokens: Tensor = tokens, dtype: torch.dtype = dtype,
        ) -> Tensor:  # fmt: skip
            with torch.autocast(place.device.type, dtype):
                loss = run(tokens[:, :-1], targets=tokens[:, 1:])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        losses.append(step())
        _wait(place.device)
        begin = time.perf_counter()
        with _counted_synchronisations(place.device) as waits:
            losses += [step() for _ in range(steps)]
        _wait(place.device)
        seconds = time.perf_counter() - begin
        name = f"{str(dtype).removeprefix('torch.')}{', compiled' if is_compiled else ''}"
        numbers = [float(loss) for loss in losses]
        _require(numbers[-1] < numbers[0], f"{name}: the loss went from {numbers[0]:.3f} to {numbers[-1]:.3f}")
        found[f"{name}: tokens per second"] = steps * B * T / seconds
        found[f"{name}: waits in {steps} steps"] = len(waits)
        found[f"{name}: loss"] = [numbers[0], numbers[-1]]
    return found


# The parts that settle the greatest doubts come first. The number is the most seconds that a part may take.
PARTS: dict[str, tuple[int, Callable[[Place], dict[str, Any]]]] = {
    "attention": (60, attention),
    "medium": (90, medium),
    "xl": (60, xl),
    "precision": (45, precision),
    "inference_mode": (30, inference_mode),
    "second_gpu": (30, second_gpu),
    "repeated": (90, repeated),
    "training": (150, training),
    "refill": (60, refill),
}


def summary(name: str) -> str:
    return (PARTS[name][1].__doc__ or "").splitlines()[0]
