"""Runs a case: checks that its contenders agree, then times them in turns. The measurements become `Result`s.

Contenders agree by the rule of the tests: an error against float64 may be at most 2 x (the error of the plain PyTorch
expression in the same dtype + eps x max|exact|). A contender with a larger error is "wrong", and is not timed. The
contenders take turns, so that a slow moment of the machine affects all of them. A ratio is the median of the ratios
within each turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import importlib.metadata
import math
import multiprocessing
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import workers
from benchmarks.workers import Call, LeftOutError, attempt
from fastgpt2.accounting import gpu_seconds, measured_bandwidth, measured_matmul_flops, synchronize, wall_seconds
from fastgpt2.machine import processor
from fastgpt2_kernels.checking.budget import error_budget, largest_error

NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        device: "cpu" or "cuda".
        scale: "full", "quick" (takes minutes) or "toy" (for tests).
        seconds: The time for each case.
        memory: Whether to measure memory on a CPU.
        folder: Where weights are exported for the engines that need them in another format. Without it those engines
            are skipped.
    """

    device: str = "cpu"
    scale: str = "full"
    seconds: float = 20.0
    memory: bool = True
    folder: str = ""

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def pick(self, full: Any, quick: Any, toy: Any) -> Any:
        return {"full": full, "quick": quick, "toy": toy}[self.scale]


@dataclass(frozen=True)
class Contender:
    """One implementation to compare. `build(inputs)` returns the call to time, or raises LeftOutError if it cannot run.

    Attributes:
        is_plain: Whether it is the plain PyTorch expression, whose error decides how large the errors of the other
            contenders of its dtype may be.
    """

    name: str
    build: Callable[[Any], Call]
    is_ours: bool = False
    is_plain: bool = False
    dtype: str | None = None  # where it differs from the case's


@dataclass(frozen=True)
class Case:
    """One thing to compute. `name`, `shape` and `dtype` identify it.

    Attributes:
        inputs: Returns the inputs of `Contender.build`, the same at every call.
        exact: Maps the inputs to the float64 results.
        sample: Selects the results to compare; all by default.
        disagrees: Maps the inputs, a contender and its result to why the result is wrong, or None. It replaces `exact`
            where results cannot be compared as numbers.
        flops: The least FLOPs that must be computed.
        bytes: The least bytes that must be read and written.
        tokens: The tokens that one call produces.
        end_to_end: Whether wall-clock time is measured, which includes the host's work. Otherwise, on a GPU, only the
            device's time is measured, and its cache is flushed first.
        needs_gpu: Whether the case is skipped without a GPU.
        measures_memory: Whether to measure each contender's memory on a CPU, in a process of its own. On a GPU it is
            always measured.
        isolated: Whether each contender is timed in a process of its own on a CPU; see `benchmarks.workers`.
        seconds: The time that this case takes at least, if it is more than that of the settings.
    """

    name: str
    shape: dict[str, int]
    dtype: str
    contenders: Sequence[Contender] = ()
    inputs: Callable[[], Any] = dict
    exact: Callable[[Any], list[Tensor]] | None = None
    sample: Callable[[Any], list[Tensor]] = list
    disagrees: Callable[[Any, Contender, Any], str | None] | None = None
    flops: float = 0.0
    bytes: float | Callable[[str], float] = 0.0  # a function of the contender's dtype, if dtypes differ
    tokens: int = 0
    end_to_end: bool = False
    needs_gpu: bool = False
    measures_memory: bool = True
    isolated: bool = False
    seconds: float = 0.0

    @property
    def title(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.shape.items()), self.dtype])


@dataclass
class Result:
    """One line of a result file. Times are seconds per call. Ratios are speedups: above 1 this contender is faster.

    Attributes:
        status: "ok", or "absent: ", "failed: ", "wrong: " or "skipped: " and the reason, or "needs a GPU".
        peer: The fastest contender of the same dtype that is not ours.
        ratio_peer: The speedup over `peer`.
        base: The first contender of the case.
        ratio_base: The speedup over `base`.
        share: The least time that the measured bandwidth and matrix products allow, as a share of `median`.
        intensity: FLOPs per byte.
        peak_bytes: The memory that one call needs, besides its inputs and results.
        resident_bytes: The memory of a process that does nothing else.
        launches: The kernels that a call runs on the GPU.
        cold_seconds: The time to build the contender and make the first call.
    """

    module: str
    case: str
    shape: dict[str, int]
    dtype: str
    contender: str
    status: str
    is_ours: bool = False
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    turns: int = 0
    peer: str | None = None
    ratio_peer: float | None = None
    base: str | None = None
    ratio_base: float | None = None
    ratio_base_p20: float | None = None
    ratio_base_p80: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    share: float | None = None
    intensity: float | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    launches: int | None = None
    cold_seconds: float | None = None
    machine: dict[str, Any] = field(default_factory=dict)


def load(module: str, settings: Settings) -> list[Case]:
    return list(importlib.import_module(f"benchmarks.{module}").cases(settings))


# -- agreement ----------------------------------------------------------------------------------------------------


def error_of(result: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    if len(result) != len(exact):
        raise ValueError(f"{len(result)} results where there are {len(exact)} to compare")
    return [largest_error(got, want) for got, want in zip(result, exact, strict=True)]


def out_of_budget(errors: Sequence[float], plain: Sequence[float], exact: Sequence[Tensor], dtype: str) -> str | None:
    """Why the errors exceed their budget, or None.

    The plain expression's error counts for at most sqrt(eps) x max|exact|, so that a wrong expression allows no errors.
    """
    kind = getattr(torch, dtype)
    for i, (error, plain_error, want) in enumerate(zip(errors, plain, exact, strict=True)):
        most = math.sqrt(torch.finfo(kind).eps) * want.abs().max().item()
        budget = error_budget(min(plain_error, most), want, kind)
        if not error <= budget:
            return f"result {i} is off by {error:.3g}, the budget is {budget:.3g}"
    return None


# -- one case -----------------------------------------------------------------------------------------------------


@dataclass
class _Ready:
    contender: Contender
    call: Call
    cold: float
    times: list[float] = field(default_factory=list)
    failure: str | None = None


def run_case(module: str, case: Case, settings: Settings) -> list[Result]:
    """Check and time a case. Returns the results of all contenders, in their order."""
    device = torch.device(settings.device)
    results = {id(c): _blank(module, case, c, device) for c in case.contenders}
    if case.needs_gpu and not settings.on_gpu:
        return [Result(module, case.name, case.shape, case.dtype, "all", NEEDS_GPU, machine=machine(device))]
    inputs, failure = attempt(case.inputs)
    exact = None
    if failure is None and case.exact is not None:
        exact, failure = attempt(functools.partial(case.exact, inputs))
    if failure is not None:  # for example, the inputs do not fit in the GPU's memory
        return [Result(module, case.name, case.shape, case.dtype, "all", failure, machine=machine(device))]
    ready = []
    for contender, outcome in _agreed(case, inputs, exact, device):
        if isinstance(outcome, str):
            results[id(contender)].status = outcome
        else:
            ready.append(outcome)
    _take_turns(ready, case, settings, device)
    for one in [one for one in ready if one.failure]:
        results[id(one.contender)].status = one.failure
        ready.remove(one)
    for one in ready:
        result = results[id(one.contender)]
        _summarise(result, one, ready, case, device)
        if settings.on_gpu:
            result.launches = count_launches(one.call)
            result.peak_bytes = _gpu_peak(one.call)
    del inputs, exact, ready
    gc.collect()
    if settings.on_gpu:
        torch.cuda.empty_cache()
    if settings.memory and case.measures_memory and not settings.on_gpu:
        for index, result in enumerate(results.values()):
            if result.status == "ok":
                peaks = peak_in_child(module, settings, case.title, index)
                result.peak_bytes, result.resident_bytes = peaks or (None, None)
    return list(results.values())


def _blank(module: str, case: Case, contender: Contender, device: torch.device) -> Result:
    dtype = contender.dtype or case.dtype
    return Result(
        module, case.name, case.shape, dtype, contender.name, "ok", is_ours=contender.is_ours, machine=machine(device)
    )


def _agreed(
    case: Case, inputs: Any, exact: list[Tensor] | None, device: torch.device
) -> Iterator[tuple[Contender, str | _Ready]]:
    """Prepare every contender for timing, or yield the status that its row shows instead."""
    plain: dict[str, list[float]] = {}
    for contender in sorted(case.contenders, key=lambda c: not c.is_plain):
        outcome, failure = attempt(functools.partial(_agree, case, contender, inputs, exact, plain, device))
        if case.isolated and not isinstance(outcome, _Ready):
            workers.dismiss((contender.name, contender.dtype))
        yield contender, failure or outcome


def _agree(
    case: Case, contender: Contender, inputs: Any, exact: list[Tensor] | None, plain: dict[str, list[float]],
    device: torch.device,
) -> str | _Ready:  # fmt: skip
    """Prepare a contender for timing, or say why it is wrong. A plain expression adds its errors to `plain`."""
    dtype = contender.dtype or case.dtype
    build = contender.build
    if case.isolated and device.type == "cpu":
        build = workers.isolated((contender.name, contender.dtype), build)
    start = time.perf_counter()
    call = build(inputs)
    result = call()
    synchronize(device)
    cold = time.perf_counter() - start
    if case.disagrees is not None:
        why = case.disagrees(inputs, contender, result)
    else:
        errors = error_of(case.sample(result), exact or [])
        if contender.is_plain:
            plain[dtype] = errors
        why = out_of_budget(errors, plain.get(dtype, [0.0] * len(errors)), exact or [], dtype)
    return f"wrong: {why}" if why else _Ready(contender, call, cold)


def agree(case: Case, contender: Contender, device: torch.device) -> Call:
    """The call of a contender whose result is right. LeftOutError if it cannot run, ValueError if it is wrong."""
    if case.needs_gpu and device.type != "cuda":
        raise LeftOutError(NEEDS_GPU)
    needed = [c for c in case.contenders if c.is_plain and c is not contender]
    inputs = case.inputs()
    exact = None if case.exact is None else case.exact(inputs)
    chosen = dataclasses.replace(case, contenders=[*needed, contender])
    for one, outcome in _agreed(chosen, inputs, exact, device):
        if one is contender:
            if isinstance(outcome, _Ready):
                return outcome.call
            is_fault = outcome.startswith("wrong") or (contender.is_ours and outcome.startswith("failed"))
            raise (ValueError if is_fault else LeftOutError)(outcome)
    raise ValueError(f"{case.title} has no {contender.name}")


def _take_turns(ready: list[_Ready], case: Case, settings: Settings, device: torch.device) -> None:
    min_turns, max_turns = settings.pick((3, 200), (3, 7), (2, 2))
    clock = clock_for(case, device)

    def timed(one: _Ready, repeats: int) -> float:
        seconds = None
        if one.failure is None:
            seconds, one.failure = attempt(functools.partial(clock, one.call, device, repeats))
        return math.inf if seconds is None else seconds

    # A call of less than a millisecond is repeated within its turn, because clock and loop cost a microsecond.
    repeats = [1 if case.end_to_end else math.ceil(1e-3 / min(max(timed(one, 1), 1e-7), 1e-3)) for one in ready]
    stop = time.perf_counter() + max(settings.seconds, case.seconds)
    for turn in range(max_turns):
        if not ready or (turn >= min_turns and time.perf_counter() > stop):
            return
        for one, number in zip(ready, repeats, strict=True):
            one.times.append(timed(one, number))


def clock_for(case: Case, device: torch.device) -> Callable[[Call, torch.device, int], float]:
    return wall_seconds if case.end_to_end or device.type != "cuda" else gpu_seconds


def _summarise(result: Result, one: _Ready, ready: list[_Ready], case: Case, device: torch.device) -> None:
    result.turns, result.cold_seconds = len(one.times), one.cold
    result.median, result.p20, result.p80 = quantiles(one.times)
    base = next((r for r in ready if r.contender is case.contenders[0]), None)
    if base is not None:
        result.base = base.contender.name
        ratios = quantiles([b / t for b, t in zip(base.times, one.times, strict=True)])
        result.ratio_base, result.ratio_base_p20, result.ratio_base_p80 = ratios
    dtype = one.contender.dtype or case.dtype
    peers = [r for r in ready if not r.contender.is_ours and (r.contender.dtype or case.dtype) == dtype]
    if best := min((r for r in peers if r is not one), key=lambda r: statistics.median(r.times), default=None):
        result.peer = best.contender.name
        result.ratio_peer = statistics.median(b / t for b, t in zip(best.times, one.times, strict=True))
    limit = limits(device, dtype)
    moved = case.bytes(dtype) if callable(case.bytes) else case.bytes
    if case.flops:
        result.tflops = case.flops / result.median / 1e12
    if moved:
        result.gbps = moved / result.median / 1e9
        result.intensity = case.flops / moved
    if case.flops or moved:
        result.share = max(case.flops / limit["flops"], moved / limit["bandwidth"]) / result.median
    if case.tokens:
        result.tokens_per_second = case.tokens / result.median


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    at = [ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8)]
    return statistics.median(ordered), at[0], at[1]


# -- what a machine can do ----------------------------------------------------------------------------------------


@functools.cache
def limits(device: torch.device, dtype: str) -> dict[str, float]:
    """Bytes per second of a copy or a sum, and FLOP/s of a matrix product, measured at the first call.

    With integers only the bytes set a limit, because PyTorch has no fast integer product to measure.
    """
    kind = getattr(torch, dtype)
    if not kind.is_floating_point:
        return {"bandwidth": _bandwidth(device), "flops": math.inf}
    return {"bandwidth": _bandwidth(device), "flops": measured_matmul_flops(device, kind, repeats=20)}


@functools.cache
def _bandwidth(device: torch.device) -> float:
    return measured_bandwidth(device, repeats=10)


def known_limits(device: torch.device) -> dict[str, Any]:
    return {dtype: limits(device, dtype) for dtype in ("float32", "bfloat16")}


@functools.cache
def machine(device: torch.device) -> dict[str, Any]:
    names = ("torch", "triton", "transformers")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "limits": known_limits(device),
        "versions": {"python": platform.python_version(), **{n: v for n in names if (v := version(n))}},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- launches and memory ------------------------------------------------------------------------------------------


def count_launches(call: Call) -> int | None:
    """The number of kernels that one call runs on the GPU, including copies, fills and the kernels of CUDA graphs.

    None if PyTorch's profiler cannot see them, because it was built or runs without its tracer.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
    except (RuntimeError, AssertionError):
        return None
    return sum(event.count for event in profiler.key_averages() if event.device_type == DeviceType.CUDA)


def _gpu_peak(call: Call) -> int:
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - _bytes_of(result)


def _bytes_of(result: Any) -> int:
    if isinstance(result, Tensor):
        return result.numel() * result.element_size()
    return sum(map(_bytes_of, result)) if isinstance(result, (list, tuple)) else 0


def peak_in_child(module: str, settings: Settings, title: str, contender: int) -> tuple[int, int] | None:
    """Measure a contender's memory on a CPU, in a separate process.

    Returns (growth of resident memory during one call, without its results, all resident memory), or None if psutil is
    not installed or the process dies.
    """
    if version("psutil") is None:
        return None
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = workers.context().Process(target=_child, args=(sender, module, settings, title, contender))
    child.start()
    sender.close()
    try:
        peaks = receiver.recv()
    except EOFError:
        peaks = None
    child.join()
    return peaks


def _child(sender: Any, module: str, settings: Settings, title: str, contender: int) -> None:
    case = next(case for case in load(module, settings) if case.title == title)
    chosen = case.contenders[contender]
    # A toy case runs first, so that the libraries have made their own allocations.
    toys = load(module, dataclasses.replace(settings, scale="toy"))
    toy = next((toy for toy in toys if toy.name == case.name), toys[0])
    with contextlib.suppress(LeftOutError):  # torch.compile has no toy case
        next((c for c in toy.contenders if c.name == chosen.name), toy.contenders[0]).build(toy.inputs())()
    sender.send(resident_peak(chosen.build(case.inputs())))


def resident_peak(call: Call) -> tuple[int, int]:
    import psutil

    gc.collect()
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = call()
    done.set()
    watcher.join()
    peak = max(peak, process.memory_info().rss)
    return max(0, peak - before - _bytes_of(result)), peak
