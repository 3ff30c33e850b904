"""The parts of `make gpu` that are not commands of their own. Each puts what it finds into a dict, figure by figure.

A part whose results are wrong raises `WrongError`. With `is_toy` the sizes are tiny, and a CPU can run the same code.
On a GPU the models ask for the backend "triton" by name, so that a kernel that fails ends the part. With "auto" PyTorch
would silently take its place, and the part would compare PyTorch with itself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.refill import prefill_and_step, whole_runs
from fastgpt2 import GPT2, GPT2Config, accounting, scheduler, selfcheck
from fastgpt2.cache import KVCache
from fastgpt2.config import SamplingConfig, TrainConfig
from fastgpt2.data import TokenData
from fastgpt2.decode import DecodeSession, NewRow, decode_backend, why_not_decode
from fastgpt2.loss import train_step
from fastgpt2.selfcheck.operators import SEED, dtypes_of
from fastgpt2.selfcheck.report import Finding, Timing
from fastgpt2.train import Trainer
from fastgpt2_kernels import ops, reference
from fastgpt2_kernels.checking.budget import error_budget, largest_error
from fastgpt2_kernels.checking.cases import CASES, Inputs

Found = dict[str, Any]
# How the warnings begin that something else runs in place of a kernel or a CUDA graph.
FALLBACKS = (r"fastgpt2: \w+ runs on PyTorch's operators", r"DecodeSession: a CUDA graph cannot be used")
# What PyTorch says at each operation that waits for the GPU. When it is first told to say so, it also warns that it
# does not yet detect "all synchronizing operations". That warning is not an operation.
WAIT = "called a synchronizing"

# Sizes that the parts use, and that are compiled ahead: B, T, H, D of attention, and the numbers of rows.
ATTENTION_SIZE = (4, 1024, 12, 64)
STEPS_SIZE = (64, 128)  # the tokens of a prompt, and the steps
MEDIUM_ROWS, XL_ROWS, TOY_ROWS = (1, 8, 32), (9,), ((1, 3), (2,))


class WrongError(Exception):
    """A result is not what it must be."""


class Place(NamedTuple):
    """Where a part runs."""

    device: torch.device
    is_toy: bool

    @property
    def interprets(self) -> bool:
        """Whether this is a CPU where Triton's interpreter is turned on."""
        return self.device.type == "cpu" and ops.why_not_triton("decode_step", self.device) is None

    @property
    def backend(self) -> str:
        return "triton" if self.device.type == "cuda" or self.interprets else "auto"

    def pick(self, full: Any, toy: Any) -> Any:
        return toy if self.is_toy else full


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise WrongError(what)


@contextlib.contextmanager
def without_fallbacks() -> Iterator[None]:
    """Raise `WrongError` where a kernel or a CUDA graph has failed and something else would run in its place."""
    with warnings.catch_warnings():
        for message in FALLBACKS:
            warnings.filterwarnings("error", message=message)
        try:
            yield
        except UserWarning as warning:
            raise WrongError(str(warning)) from warning


def _config(place: Place, name: str, **changes: Any) -> GPT2Config:
    if place.is_toy:
        sizes = {"vocab_size": 97, "context_length": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
        return GPT2Config(**{**sizes, **changes})
    return GPT2Config.preset(name, **changes)


def _model(place: Place, name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> GPT2:
    """A random model with a preset's shape, or a tiny one at toy size. It is made on the device, which is faster."""
    torch.manual_seed(0)
    with place.device:
        model = GPT2(_config(place, name, **changes), backend=place.backend).eval()
    return model.to(torch.float32 if place.is_toy else dtype)


def _decoding_model(place: Place, name: str, dtype: torch.dtype = torch.bfloat16) -> GPT2:
    """A model that must be decoded by a `DecodeSession`: `generate` would do without one and not say so."""
    model = _model(place, name, dtype)
    reason = why_not_decode(model)
    _require(reason is None or place.device.type == "cpu", f"there is no decoding step: {reason}")
    return model


# -- kernels --------------------------------------------------------------------------------------------------------


def attention(place: Place, found: Found) -> None:
    """Packed attention in bfloat16, forward and backward: compared with float64, and timed beside PyTorch's SDPA."""
    B, T, H, D = place.pick(ATTENTION_SIZE, (2, 24, 2, 16))
    # Triton's interpreter multiplies bfloat16 wrong.
    dtype = torch.float32 if place.interprets else torch.bfloat16
    torch.manual_seed(0)
    drawn = torch.randn(B, T, 3 * H * D), torch.randn(B, T, H * D)
    qkv, dout = (t.to(place.device, dtype) for t in drawn)

    def gradient(run: Callable[[Tensor], Tensor], wide: torch.dtype = dtype) -> tuple[Tensor, Tensor]:
        x = qkv.detach().to(wide).requires_grad_()  # `to` alone may return qkv itself, which must need no gradient
        out = run(x)
        return out.detach(), torch.autograd.grad(out, x, dout.to(wide))[0]

    def forward(run: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return run(qkv)

    def heads(x: Tensor) -> tuple[Tensor, ...]:
        return x.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)

    def plain(x: Tensor) -> Tensor:
        return reference.causal_attention(*heads(x)).transpose(1, 2).flatten(2)

    def sdpa(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*heads(x), is_causal=True).transpose(1, 2).flatten(2)

    def ours(x: Tensor) -> Tensor:
        return ops.causal_attention_packed(x, H, backend=place.backend)

    exact = gradient(plain, torch.float64)
    for name, got, coarse, true in zip(("forward", "backward"), gradient(ours), gradient(plain), exact, strict=True):
        share = largest_error(got, true) / error_budget(largest_error(coarse, true), true, dtype)
        found[f"{name}: share of the error budget"] = share
        _require(share <= 1, f"{name}: the error is {share:.2f} times its budget")
    for name, measured in (("forward", forward), ("forward and backward", gradient)):
        calls = {who: functools.partial(measured, run) for who, run in (("ours", ours), ("PyTorch", sdpa))}
        for who, seconds in _seconds(calls, place.device, place.pick(9, 1)).items():
            found[f"{name} ms, {who}"] = 1e3 * seconds


def _seconds(calls: dict[str, Callable[[], object]], device: torch.device, turns: int) -> dict[str, float]:
    """The median seconds of each call. The calls take turns. On a GPU this is the GPU's own time, without the host's.

    The host takes longer to launch a kernel than a short kernel runs, so the wall clock would show the host.
    """
    clock = accounting.gpu_seconds if device.type == "cuda" else accounting.wall_seconds
    for call in calls.values():
        call()  # compiles
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            times[name].append(clock(call, device, 5))
    return {name: statistics.median(taken) for name, taken in times.items()}


def precision(place: Place, found: Found) -> None:
    """Generation in float32 with each setting of PyTorch's two switches for the precision of products."""
    model = _decoding_model(place, "gpt2", torch.float32)
    # The older switch also sets the newer one. Where the two contradict each other, PyTorch's own products may refuse
    # to run, so before "ieee" the older one is set back.
    for name, older, newer in (
        ("highest", "highest", None), ("high", "high", None), ("tf32", None, "tf32"), ("ieee", "highest", "ieee"),
    ):  # fmt: skip
        if older is not None:
            torch.set_float32_matmul_precision(older)
        if newer is not None:
            torch.backends.cuda.matmul.fp32_precision = newer
        samples = model.generate([[1, 2, 3]], max_new_tokens=8, temperature=0, stop_token_ids=())
        found[name] = samples[0].token_ids
    _require(found["highest"] == found["ieee"], "the settings highest and ieee must give the same tokens")
    _require(found["high"] == found["tf32"], "the settings high and tf32 must give the same tokens")


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
    results[-1].read()
    ms = 1e3 * (time.perf_counter() - begin) / steps
    if model.device.type == "cuda" and options.get("use_graphs", True):
        _require_graphs(session)
    return [r.read()[0][:rows] for r in results], ms


def _require_graphs(session: DecodeSession) -> None:
    """A session whose capture failed launches its kernels one by one, and would be compared with itself."""
    _require(session.use_graphs and bool(session._graphs), "no CUDA graph was captured")


def _decoding(place: Place, found: Found, name: str, all_rows: Sequence[int]) -> None:
    model = _decoding_model(place, name)
    prompt, steps = place.pick(STEPS_SIZE, (5, 6))
    found["backend"] = decode_backend(model)
    ways: dict[str, dict[str, Any]] = {"launches": {"use_graphs": False}, "graph": {"use_pdl": False}}
    if _has_pdl(place.device):
        ways["graph, PDL"] = {"use_pdl": True}
    for rows in all_rows:
        first = None
        for way, options in ways.items():
            tokens, ms = _steps(model, rows, prompt, steps, **options)
            found[f"{rows} rows, {way}: ms per step"] = ms
            found[f"{rows} rows, {way}: tokens per second"] = 1e3 * rows / ms
            first = tokens if first is None else first
            _require(tokens == first, f"{rows} rows: {way} gives other tokens than single launches")


def _has_pdl(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9


def medium(place: Place, found: Found) -> None:
    """The gpt2-medium shape with 1, 8 and 32 rows: a CUDA graph against single launches, with and without PDL."""
    _decoding(place, found, "gpt2-medium", place.pick(MEDIUM_ROWS, TOY_ROWS[0]))


def xl(place: Place, found: Found) -> None:
    """The gpt2-xl shape with 9 rows: its products need the most shared memory."""
    _decoding(place, found, "gpt2-xl", place.pick(XL_ROWS, TOY_ROWS[1]))


def inference_mode(place: Place, found: Found) -> None:
    """`generate` under `torch.inference_mode()`, then outside, then inside."""
    model = _decoding_model(place, "gpt2")
    tokens = []
    for is_inside in (True, False, True):
        with torch.inference_mode() if is_inside else contextlib.nullcontext():
            samples = model.generate([[1, 2, 3], [4]], max_new_tokens=12, temperature=0, stop_token_ids=())
        tokens.append([sample.token_ids for sample in samples])
    found["tokens"] = tokens[0]
    _require(tokens[0] == tokens[1] == tokens[2], "inside inference_mode the tokens are others than outside")


def second_gpu(place: Place, found: Found) -> None:
    """Generation and a training step on cuda:1 while cuda:0 is current."""
    if place.device.type == "cuda" and torch.cuda.device_count() < 2:
        found["skipped"] = "there is only one GPU"
        return
    other = torch.device("cuda:1") if place.device.type == "cuda" else place.device
    tokens = []
    for device in (place.device, other):
        model = _decoding_model(place._replace(device=device), "gpt2")
        samples = model.generate([[1, 2, 3]], max_new_tokens=12, temperature=0, stop_token_ids=())
        train_step(model.train(), torch.ones(2, 9, dtype=torch.int64, device=device))
        tokens.append(samples[0].token_ids)
        if device.type == "cuda":
            _require(torch.cuda.current_device() == place.device.index, "the current device was changed")
    found["tokens"] = tokens
    # GPUs of different kinds draw other random weights, and round differently.
    if place.device.type != "cuda" or _same_kind(place.device, other):
        _require(tokens[0] == tokens[1], "the second GPU gives other tokens")


def _same_kind(one: torch.device, other: torch.device) -> bool:
    return torch.cuda.get_device_name(one) == torch.cuda.get_device_name(other)


def repeated(place: Place, found: Found) -> None:
    """10,000 steps of 32 rows, twice. Tokens and log-probabilities must be bit-identical."""
    model = _decoding_model(place, "gpt2")
    rows, steps = place.pick((32, 10_000), (3, 40))
    new = model.config.context_length - 8
    prompts = [[index % 90 + 1] for index in range(rows * -(-steps // new))]
    digests = []
    for turn in ("first", "second"):
        digest, begin = hashlib.sha256(), time.perf_counter()
        options = {"max_new_tokens": new, "temperature": 0.8, "top_k": 50, "stop_token_ids": (), "batch_size": rows}
        for sample in model.generate(prompts, **options):
            digest.update(repr((sample.token_ids, sample.logprobs)).encode())
        digests.append(digest.hexdigest())
        found[f"{turn} run: tokens per second"] = len(prompts) * new / (time.perf_counter() - begin)
    found["sha256"] = digests
    _require(digests[0] == digests[1], "the second run is not bit-identical to the first")


def refill(place: Place, found: Found) -> None:
    """The fixed cost of a prefill, which decides how long free slots wait, and what waiting gains in whole runs."""
    model = _decoding_model(place, "gpt2")
    if why_not_decode(model) is not None:
        found["skipped"] = "there is no decoding step here"
        return
    found["steps that the scheduler assumes"] = scheduler.PREFILL_STEPS[decode_backend(model)]
    all_rows, new, turns = place.pick(((8, 32), 64, 3), ((3,), 4, 1))
    for rows in all_rows:
        prefill, step = prefill_and_step(model, rows, place.pick(11, 1))
        found[f"{rows} rows: fixed ms of a prefill"] = 1e3 * prefill
        found[f"{rows} rows: ms of a step"] = 1e3 * step
        found[f"{rows} rows: fixed cost of a prefill, in steps"] = prefill / step
    for rows in all_rows:
        at_once, waited, ratio, is_same = whole_runs(model, rows, new, turns)
        found[f"{rows} rows: tokens of both runs are equal"] = is_same
        found[f"{rows} rows: seconds without waiting, with waiting"] = [at_once, waited]
        found[f"{rows} rows: speedup of waiting"] = ratio


# -- training -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _counted_synchronisations(device: torch.device) -> Iterator[list[str]]:
    """Collect PyTorch's warnings that the host waits for the GPU. Other warnings are given again afterwards."""
    said: list[str] = []
    if device.type != "cuda":
        yield said
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=WAIT)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield said
        finally:
            torch.cuda.set_sync_debug_mode("default")
            said += [str(w.message) for w in caught if str(w.message).startswith(WAIT)]
    for other in caught:
        if not str(other.message).startswith(WAIT):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)


def training(place: Place, found: Found) -> None:
    """20 steps of the trainer in bfloat16 and float16, with and without `--compile`; how often the host waits."""
    steps, B, lr = place.pick((20, 8, 3e-4), (3, 2, 1e-2))
    T = place.pick(1024, 16)
    compiles: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if place.is_toy:  # the compiler takes minutes on a CPU
        compiles = mock.patch.object(torch, "compile", lambda function: function)
    with tempfile.TemporaryDirectory() as folder, compiles:
        # A model that has learned that most tokens never occur has a far lower loss, which 20 steps are enough to see.
        np.random.default_rng(0).integers(0, 9, size=64 * T, dtype="uint16").tofile(Path(folder, "train.bin"))
        for is_compiled in (False, True):
            for dtype in ("bf16", "fp16"):
                name = f"{dtype}{', compiled' if is_compiled else ''}"
                config = TrainConfig(batch_size=B, warmup_steps=0, lr=lr, dtype=dtype, compile=is_compiled)
                _train(place, found, name, config, Path(folder), steps)


def _train(place: Place, found: Found, name: str, config: TrainConfig, folder: Path, steps: int) -> None:
    """Train as `fastgpt2 train` does, but without its reports, evaluations and checkpoints."""
    model = _model(place, "gpt2", torch.float32, context_length=place.pick(1024, 16))
    trainer = Trainer(model, TokenData.open(folder), config, folder / "run")

    def step() -> None:
        trainer._train_step(module)
        trainer.step += 1

    with trainer._modes():
        module = trainer._wrapped()
        begin = time.perf_counter()
        step()
        first = trainer._mean_loss()  # waits for the device
        found[f"{name}: seconds of the first step"] = time.perf_counter() - begin
        step()  # still compiles, and picks kernels
        trainer._mean_loss()
        begin = time.perf_counter()
        with _counted_synchronisations(place.device) as waits:
            for _ in range(steps):
                step()
        later = trainer._mean_loss()
        seconds = time.perf_counter() - begin
    found[f"{name}: tokens per second"] = steps * config.batch_size * trainer.context / seconds
    found[f"{name}: waits in {steps} steps"] = len(waits)
    if waits:
        found[f"{name}: a wait"] = waits[0]
    found[f"{name}: loss of the first step, of the timed steps"] = [first, later]
    _require(later < first, f"{name}: the loss went from {first:.3f} to {later:.3f}")


# -- the self-check -------------------------------------------------------------------------------------------------


def check(place: Place, found: Found) -> None:
    """`fastgpt2 check`: every operator, decoding and whole models against float64, and the speed of the kernels."""
    found["ok"], found["failed"] = 0, []

    def note(item: Finding | Timing) -> None:
        if isinstance(item, Timing):
            found[f"{item.name} on {item.backend}, {item.size}: ms"] = 1e3 * item.seconds
        elif item.status == "failed":
            found["failed"] = [*found["failed"], f"{item.name} on {item.backend}: {item.detail}"]
        elif item.status == "ok":
            found["ok"] += 1

    report = selfcheck.check(str(place.device), speed=not place.is_toy, progress=note)
    found["report"] = report.to_dict()
    _require(report.ok, f"{len(found['failed'])} checks failed")


# -- compiling ahead ------------------------------------------------------------------------------------------------


def compile_ahead(place: Place, found: Found) -> None:
    """Compile the kernels of the next parts, on all cores. The parts would compile one kernel after the other."""
    if place.interprets:
        found["skipped"] = "Triton's interpreter compiles nothing"
        return
    target = ops.this_target() if place.device.type == "cuda" else "sm_90"
    has_pdl = _has_pdl(place.device) if place.device.type == "cuda" else True
    failed = []
    for name, run in _launches(place, has_pdl).items():
        begin = time.perf_counter()
        try:
            variants = ops.find_variants(target, run)
            seconds = time.perf_counter() - begin
            if not place.is_toy:
                ops.compile_variants(variants)
        except Exception as error:  # the kernels of the other parts are still worth compiling
            failed.append(name)
            found[f"{name}: error"] = f"{type(error).__name__}: {error}"[:2000]
            continue
        found[f"{name}: kernels, seconds to find, to compile"] = [
            len(variants), seconds, time.perf_counter() - begin - seconds,
        ]  # fmt: skip
    _require(not failed, f"kernels do not compile: {', '.join(failed)}")


def _launches(place: Place, has_pdl: bool) -> dict[str, Callable[[], None]]:
    """What launches the kernels of each part, on CPU tensors. One layer is enough, because all use the same kernels."""

    def model(name: str, dtype: torch.dtype) -> GPT2:
        whole = GPT2(_config(place, name).replace(num_layers=1), backend="triton").eval()
        return whole.to(torch.float32 if place.is_toy else dtype)

    def attend() -> None:
        B, T, H, D = place.pick(ATTENTION_SIZE, (2, 24, 2, 16))
        qkv = torch.zeros(B, T, 3 * H * D, dtype=place.pick(torch.bfloat16, torch.float32))
        with torch.no_grad():
            ops.causal_attention_packed(qkv, H, backend="triton")
        ops.causal_attention_packed(qkv.requires_grad_(), H, backend="triton").sum().backward()

    def decode(
        name: str, all_rows: Sequence[int], prompt: int = 3, dtype: torch.dtype = torch.bfloat16, **sampling: Any
    ) -> None:
        whole = model(name, dtype)
        for rows in all_rows:
            _launch_step(whole, rows, prompt, has_pdl, SamplingConfig(**{"temperature": 0.0, **sampling}))

    def each_precision() -> None:
        was = torch.get_float32_matmul_precision()
        try:
            for name in ("highest", "high"):
                torch.set_float32_matmul_precision(name)
                decode("gpt2", (1,), dtype=torch.float32)
        finally:
            torch.set_float32_matmul_precision(was)

    def generate() -> None:
        decode("gpt2", (1, 2))
        decode("gpt2", (32,), prompt=1, temperature=0.8, top_k=50)
        decode("gpt2", (8, 32), prompt=16)
        decode("gpt2", (8, 32), prompt=16, temperature=1.0)

    def train() -> None:
        # This vocabulary is large enough for the kernels' largest blocks, and odd like GPT-2's, so it has the same
        # kernels. With GPT-2's own vocabulary a CPU would take a minute for the products in float16.
        config = _config(place, "gpt2").replace(num_layers=1, vocab_size=place.pick(8209, 97))
        whole = GPT2(config, backend="triton").train()
        tokens = torch.ones(2, 17, dtype=torch.int64)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                loss = whole(tokens[:, :-1], targets=tokens[:, 1:])
            loss.backward()

    def check_operators() -> None:
        for case in place.pick(CASES, CASES[:3]):
            if "triton" in ops.backends_of(case.operator):
                for dtype in case.dtypes or dtypes_of("triton", torch.device("cuda")):
                    case.run(Inputs(SEED, torch.device("cpu"), dtype), "triton")

    prompt = place.pick(STEPS_SIZE[0], 5)
    return {
        "attention": attend,
        "medium": lambda: decode("gpt2-medium", place.pick(MEDIUM_ROWS, TOY_ROWS[0]), prompt),
        "xl": lambda: decode("gpt2-xl", place.pick(XL_ROWS, TOY_ROWS[1]), prompt),
        "training": train,
        "precision": each_precision,
        "generate": generate,
        "check": check_operators,
    }


@torch.no_grad()
def _launch_step(model: GPT2, rows: int, prompt: int, has_pdl: bool, sampling: SamplingConfig) -> None:
    """Launch what a prefill and the steps launch, single ones and those of a graph."""
    cache = KVCache(model.config, rows, prompt + 8, dtype=model.dtype)
    session = DecodeSession(model, cache, sampling, use_pdl=False)
    # A prefill of two prompts launches the kernels of a prefill of more.
    few = min(rows, 2)
    session.prefill(range(few), [[1] * prompt] * few)
    logits = torch.zeros(rows, model.config.vocab_size)
    session.begin([NewRow(row, [1] * prompt, (row, 0), 8) for row in range(rows)], logits)
    for session.use_table, session.use_pdl in ((False, False), (True, False), *([(True, True)] if has_pdl else [])):
        session.step(range(rows))


class OwnPart(NamedTuple):
    """The most seconds that a part may take, and its function."""

    seconds: int
    run: Callable[[Place, Found], None]


# The parts that settle the greatest doubts come first.
PARTS: dict[str, OwnPart] = {
    "compile": OwnPart(100, compile_ahead),
    "attention": OwnPart(40, attention),
    "medium": OwnPart(60, medium),
    "xl": OwnPart(60, xl),
    "check": OwnPart(120, check),
    "training": OwnPart(160, training),
    "precision": OwnPart(30, precision),
    "inference_mode": OwnPart(30, inference_mode),
    "refill": OwnPart(90, refill),
    "repeated": OwnPart(90, repeated),
    "second_gpu": OwnPart(60, second_gpu),
}


def summary(name: str) -> str:
    return (PARTS[name].run.__doc__ or "").splitlines()[0]
