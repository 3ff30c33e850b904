"""Timing the kernels at the sizes of GPT-2 124M, relative to the limits that were just measured on the device."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.accounting import (
    gpu_seconds,
    matmul_parameters,
    measured_bandwidth,
    measured_matmul_flops,
    wall_seconds,
    weight_bytes,
)
from fastgpt2.cache import KVCache
from fastgpt2.config import GPT2Config, SamplingConfig
from fastgpt2.decode import DecodeSession, NewRow
from fastgpt2.gpt2 import GPT2
from fastgpt2.selfcheck.models import graphs_required
from fastgpt2.selfcheck.operators import compare, why_not
from fastgpt2.selfcheck.report import Finding, Timing, error_finding
from fastgpt2_kernels import ops

Call = Callable[[], Any]


class Shapes(NamedTuple):
    """The sizes to time: batch size and tokens in training, rows and cached tokens in decoding, and the model."""

    batch: int
    tokens: int
    rows: int
    held: int
    model: GPT2Config

    @classmethod
    def of(cls, device: torch.device) -> Shapes:
        if device.type == "cuda":
            return cls(8, 1024, 8, 1000, GPT2Config())
        return cls(1, 256, 8, 250, GPT2Config())

    def compared(self, device: torch.device) -> Shapes:
        """The sizes at which results are compared in float64: the same rows, but fewer of them."""
        return self._replace(batch=1, tokens=min(self.tokens, 1024 if device.type == "cuda" else 32))


class _Calls(NamedTuple):
    """An operator on given tensors. Every call returns its results.

    exact: the peer's expression in float64, or None where the results are random.
    compared: our results where they are compared, if not those of `ours`; likewise `plain`.
    """

    ours: Call
    peer: Call
    exact: Call | None = None
    compared: Call | None = None
    plain: Call | None = None


class _Case(NamedTuple):
    """One operator to time. `make` creates its tensors for a backend; `flops` and `bytes` are the least it needs."""

    operator: str
    size: str
    make: Callable[[str], _Calls]
    peer_name: str
    flops: float
    bytes: float


def measured_limits(device: torch.device) -> dict[str, float]:
    """Measure the bandwidth in bytes per second, and FLOP/s of matrix products in float32 and in the timed dtype."""
    limits = {"bandwidth": measured_bandwidth(device)}
    for dtype in {torch.float32: None, _dtype(device): None}:
        limits[str(dtype).removeprefix("torch.")] = measured_matmul_flops(device, dtype)
    _release_memory(device)
    return limits


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def time_operators(
    device: torch.device, limits: dict[str, float], shapes: Shapes | None = None, seconds: float = 1.0
) -> Iterator[Timing | Finding]:
    """Time every operator on the backend that "auto" selects, for at most about `seconds` each.

    First its results are compared with the peer's in float64. Yields a finding in place of a timing if they are wrong,
    if an error ends it, or if the memory is too small.
    """
    shapes = shapes or Shapes.of(device)
    pairs = zip(_cases(device, shapes), _cases(device, shapes.compared(device)), strict=True)
    for case, small in pairs:
        backends = [name for name in ops.backends_of(case.operator) if why_not(case.operator, name, device) is None]
        # On a CPU Triton kernels are only interpreted, so their time means nothing.
        backends = [name for name in backends if not (name == "triton" and device.type == "cpu")]
        if backends:
            result = _compared_and_timed(case, small, backends[0], device, limits, seconds)
            _release_memory(device)
            yield result


def _compared_and_timed(
    case: _Case, small: _Case, backend: str, device: torch.device, limits: dict[str, float], seconds: float
) -> Timing | Finding:
    dtype = _dtype(device)
    try:
        calls = small.make(backend)
        if (wrong := _what_is_wrong(calls, dtype)) is not None:
            return Finding(case.operator, backend, "failed", None, f"not timed, {small.size}: {wrong}")
        if small.size != case.size:
            del calls  # so that both sizes do not take memory at once
            _release_memory(device)
            calls = case.make(backend)
        ours, theirs = _medians([calls.ours, calls.peer], device, seconds)
    except Exception as error:  # a kernel, a compiler or a driver can raise anything
        return untimed(case.operator, backend, case.size, error)
    name = str(dtype).removeprefix("torch.")
    least = max(case.flops / limits[name], case.bytes / limits["bandwidth"])
    return Timing(
        case.operator, backend, case.size, name, ours,
        case.flops / ours / 1e12 if case.flops else None, case.bytes / ours / 1e9 if case.bytes else None,
        least / ours, case.peer_name, theirs,
    )  # fmt: skip


def untimed(name: str, backend: str, size: str, error: Exception) -> Finding:
    """The finding of a timing that an error ended. Too little memory is a reason to skip it, not a failure."""
    causes = (error, error.__cause__)
    is_memory = any(isinstance(cause, (torch.OutOfMemoryError, MemoryError)) for cause in causes)
    is_memory |= "can't allocate memory" in str(error)  # PyTorch's error on a CPU is a RuntimeError
    place = f"not timed, {size}" if size else "not timed"
    return error_finding(name, backend, place, error, "skipped" if is_memory else "failed")


def _what_is_wrong(calls: _Calls, dtype: torch.dtype) -> str | None:
    """Compare our results with the peer's by the 2x rule. Returns what is wrong, or None."""
    if calls.exact is None:
        return None
    got, plain = (
        [t.detach().clone() for t in call()] for call in (calls.compared or calls.ours, calls.plain or calls.peer)
    )
    return compare(got, [plain], [t.detach() for t in calls.exact()], dtype)[1]


def _release_memory(device: torch.device) -> None:
    """Give PyTorch's free blocks back, so that the next sizes find room. A GPU that no longer works cannot do it."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def _medians(calls: Sequence[Call], device: torch.device, seconds: float) -> list[float]:
    """The median time of each call. The calls take turns, so that a slow moment affects all of them."""
    clock = gpu_seconds if device.type == "cuda" else wall_seconds
    for call in calls:
        call()  # compiles
    repeats = [max(1, math.ceil(1e-3 / max(clock(call, device, 1), 1e-7))) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    stop = time.perf_counter() + seconds
    while len(times[0]) < 3 or (time.perf_counter() < stop and len(times[0]) < 50):
        for call, number, of in zip(calls, repeats, times, strict=True):
            of.append(clock(call, device, number))
    return [statistics.median(of) for of in times]


# -- what is timed --------------------------------------------------------------------------------------------------


def _cases(device: torch.device, shapes: Shapes) -> Iterator[_Case]:
    """The cases, none of which has tensors yet."""
    for cases in (_attention, _layers, _losses, _decoding, _decode_step):
        yield from cases(device, shapes)


_FORWARD, _BACKWARD, _BOTH = "forward", "backward", "with backward"


def _draw(device: torch.device, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).mul_(scale).to(_dtype(device))


def _compare_and_time(
    draw: Callable[[], Sequence[Tensor]],
    ours: Callable[..., Any],
    peer: Callable[..., Any],
    part: str = _FORWARD,
) -> Callable[[str], _Calls]:
    """The calls of two functions of the same tensors; `ours` takes the backend too."""

    def make(backend: str) -> _Calls:
        def exact() -> Sequence[Tensor]:
            return _call(peer, [t.detach().double() for t in tensors], part)()

        tensors = draw()
        return _Calls(_call(functools.partial(ours, backend=backend), tensors, part), _call(peer, tensors, part), exact)

    return make


def _call(function: Callable[..., Any], tensors: Sequence[Tensor], part: str) -> Call:
    if part == _FORWARD:
        return torch.no_grad()(lambda: _as_list(function(*tensors)))
    leaves = [t.detach().requires_grad_() for t in tensors]
    outs = _as_list(function(*leaves))
    douts = [_draw(out.device, *out.shape, seed=1).to(out.dtype) for out in outs]
    if part == _BACKWARD:
        return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)
    return lambda: torch.autograd.grad(_as_list(function(*leaves)), leaves, douts)


def _as_list(results: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [results] if isinstance(results, Tensor) else results


def _attention(device: torch.device, shapes: Shapes) -> Iterator[_Case]:
    B, T, H, C = shapes.batch, shapes.tokens, shapes.model.num_heads, shapes.model.hidden_size
    D = C // H

    def sdpa(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def sdpa_of_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    flops, moved = 2.0 * B * T * T * C, float(B * T * C * _dtype(device).itemsize)
    parts = ((_FORWARD, flops, 4 * moved), (_BACKWARD, 2.5 * flops, 8 * moved), (_BOTH, 3.5 * flops, 12 * moved))
    for part, work, traffic in parts:
        yield _Case(
            "causal_attention_packed", f"B={B} T={T} H={H} D={D} {part}",
            _compare_and_time(
                lambda: [_draw(device, B, T, 3 * C)], functools.partial(ops.causal_attention_packed, num_heads=H),
                sdpa, part,
            ),
            "SDPA", work, traffic,
        )  # fmt: skip
    for part, work, traffic in (parts[0], parts[2]):
        yield _Case(
            "causal_attention", f"B={B} T={T} H={H} D={D} {part}",
            _compare_and_time(
                lambda: [_draw(device, B, H, T, D, seed=seed) for seed in range(3)], ops.causal_attention,
                sdpa_of_heads, part,
            ),
            "SDPA", work, traffic,
        )  # fmt: skip


def _layers(device: torch.device, shapes: Shapes) -> Iterator[_Case]:
    N, C, inner = shapes.batch * shapes.tokens, shapes.model.hidden_size, shapes.model.inner_dim
    element = _dtype(device).itemsize

    def norm(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str) -> Any:
        return ops.layer_norm(x, weight, bias, 1e-5, backend=backend)

    def norm_of_sum(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *, backend: str) -> Any:
        return ops.layer_norm(x, weight, bias, 1e-5, residual=residual, backend=backend)

    def peer_of_sum(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        s = x + residual
        return F.layer_norm(s, (C,), weight, bias, 1e-5), s

    def draw(with_residual: bool) -> list[Tensor]:
        tensors = [_draw(device, N, C), _draw(device, C, seed=1), _draw(device, C, seed=2)]
        return [*tensors, _draw(device, N, C, seed=3)] if with_residual else tensors

    for part, passes in ((_BACKWARD, 3.0), (_BOTH, 5.0)):
        yield _Case(
            "layer_norm", f"N={N} C={C} {part}",
            _compare_and_time(
                lambda: draw(False), norm, lambda x, w, b: F.layer_norm(x, (C,), w, b, 1e-5), part
            ),
            "F.layer_norm", 0.0, passes * N * C * element,
        )  # fmt: skip
    yield _Case(
        "layer_norm", f"N={N} C={C} residual {_BOTH}",
        _compare_and_time(lambda: draw(True), norm_of_sum, peer_of_sum, _BOTH),
        "F.layer_norm", 0.0, 9.0 * N * C * element,
    )  # fmt: skip
    for part, passes in ((_BACKWARD, 3.0), (_BOTH, 5.0)):
        yield _Case(
            "bias_activation", f"N={N} C={inner} {part}",
            _compare_and_time(
                lambda: [_draw(device, N, inner), _draw(device, inner, seed=1)],
                functools.partial(ops.bias_activation, name="gelu_new"),
                lambda x, b: F.gelu(x + b, approximate="tanh"), part,
            ),
            "F.gelu", 0.0, passes * N * inner * element,
        )  # fmt: skip


def _losses(device: torch.device, shapes: Shapes) -> Iterator[_Case]:
    N, C, V = shapes.batch * shapes.tokens, shapes.model.hidden_size, shapes.model.vocab_size
    element = _dtype(device).itemsize

    @functools.cache
    def targets() -> Tensor:
        return torch.randint(V, (N,), generator=torch.Generator().manual_seed(0)).to(device)

    yield _Case(
        "cross_entropy", f"N={N} V={V} {_BOTH}",
        _compare_and_time(
            lambda: [_draw(device, N, V)],
            lambda logits, backend: ops.cross_entropy(logits, targets(), backend=backend),
            lambda logits: F.cross_entropy(logits, targets()), _BOTH,
        ),
        "F.cross_entropy", 0.0, 2.0 * N * V * element,
    )  # fmt: skip
    yield _Case(
        "linear_cross_entropy", f"N={N} C={C} V={V} {_BOTH}",
        _compare_and_time(
            lambda: [_draw(device, N, C), _draw(device, V, C, scale=0.02)],
            lambda x, weight, backend: ops.linear_cross_entropy(x, weight, targets(), backend=backend),
            lambda x, weight: F.cross_entropy(x @ weight.T, targets()), _BOTH,
        ),
        "F.cross_entropy", 6.0 * N * C * V, 2.0 * (N + V) * C * element,
    )  # fmt: skip


def _decoding(device: torch.device, shapes: Shapes) -> Iterator[_Case]:
    R, S, C, V = shapes.rows, shapes.held, shapes.model.hidden_size, shapes.model.vocab_size
    H, inner = shapes.model.num_heads, shapes.model.inner_dim
    element = _dtype(device).itemsize

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def draw() -> list[Tensor]:
        return [_draw(device, R, C), _draw(device, inner, C, seed=1), _draw(device, inner, seed=2)]

    yield _Case(
        "linear_decode", f"R={R} K={C} N={inner}",
        _compare_and_time(draw, functools.partial(ops.linear_decode, activation="gelu_new"), linear),
        "F.linear, F.gelu", 2.0 * R * C * inner, (C * inner + R * (C + inner)) * element,
    )  # fmt: skip

    def in_8_bits(backend: str) -> _Calls:
        x, weight, bias = draw()
        quantized, scale = ops.quantize_rows(weight)
        wide = quantized.double() * scale.double()[:, None]
        tensors = [x, wide.to(x.dtype), bias]
        ours = functools.partial(
            ops.linear_decode, x, quantized, bias, activation="gelu_new", weight_scale=scale, backend=backend
        )
        return _Calls(
            _call(ours, [], _FORWARD), _call(linear, tensors, _FORWARD),
            _call(linear, [x.double(), wide, bias.double()], _FORWARD),
        )  # fmt: skip

    yield _Case(
        "linear_decode", f"R={R} K={C} N={inner} 8-bit weights", in_8_bits, "F.linear, F.gelu",
        2.0 * R * C * inner, C * inner + (R * (C + inner)) * element,
    )  # fmt: skip

    @functools.cache
    def lengths() -> Tensor:
        return torch.full((R,), S, dtype=torch.int32, device=device)

    def sdpa(qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = qkv.view(R, 3, H, C // H).unbind(1)
        keys[:, :, S], values[:, :, S] = k, v
        return F.scaled_dot_product_attention(q[:, :, None], keys, values).view(R, C)

    yield _Case(
        "decode_attention", f"R={R} S={S} H={H} D={C // H}",
        _compare_and_time(
            lambda: [
                _draw(device, R, 3 * C), *(_draw(device, R, H, S + 1, C // H, seed=seed) for seed in (1, 2))
            ],
            lambda qkv, keys, values, backend: ops.decode_attention(qkv, keys, values, lengths(), backend=backend),
            sdpa,
        ),
        "SDPA", 4.0 * R * (S + 1) * C, 2.0 * R * (S + 1) * C * element,
    )  # fmt: skip

    def sampling(backend: str) -> _Calls:
        logits, positions = _draw(device, R, V).float(), lengths()
        keys = ops.row_keys(0, range(R), [0] * R).to(device)
        ours = functools.partial(ops.sample, logits, top_k=50, keys=keys, positions=positions, backend=backend)
        return _Calls(_call(ours, [], _FORWARD), _call(_sample_by_hand, [logits], _FORWARD))

    yield _Case("sample", f"R={R} V={V} top_k=50", sampling, "topk, multinomial", 0.0, 4.0 * R * V)


def _sample_by_hand(logits: Tensor) -> Tensor:
    best = logits.topk(50)
    return best.indices.gather(1, best.values.softmax(-1).multinomial(1))


def _decode_step(device: torch.device, shapes: Shapes) -> Iterator[_Case]:
    """A decode step of the whole model, against the same model on PyTorch's operators."""
    R, dtype = shapes.rows, _dtype(device)
    prompts = [[1 + row] * 16 for row in range(R)]

    @torch.no_grad()
    def make(backend: str) -> _Calls:
        with torch.device(device):
            model = GPT2(shapes.model, backend=backend).to(dtype).eval()
            plain = GPT2(shapes.model, backend="torch").eval()
        plain.load_state_dict(model.state_dict(), assign=True)
        plain = plain.to(device)
        cache = KVCache(model.config, R, dtype=dtype, device=device)
        session = DecodeSession(model, cache, SamplingConfig(temperature=0))
        logits = session.prefill(range(R), prompts)
        # The limit is so high that no row ends; a row that has ended would no longer be computed.
        session.begin([NewRow(row, ids, (row, 0), 10**6) for row, ids in enumerate(prompts)], logits)
        state = session.slots
        lengths, produced, first = state.lengths.clone(), state.produced.clone(), state.tokens[:R, None].long().clone()

        def step(_: GPT2 = model) -> Any:  # a session does not keep its model alive, so this function does
            state.lengths.copy_(lengths)
            state.produced.copy_(produced)
            return session.step(range(R))

        def step_logits() -> Sequence[Tensor]:
            with graphs_required(session):  # this first step captures the graph that is timed later
                step().read()
            return [session.step_logits(R)]

        def forward(of: GPT2) -> Sequence[Tensor]:
            ids = torch.cat([torch.tensor(prompts, device=device), first], 1)
            return [of(ids)[:, -1]]

        def exact() -> Sequence[Tensor]:
            return forward(copy.deepcopy(plain).double())

        plain_cache = KVCache(model.config, R, dtype=dtype, device=device)
        ids = torch.ones(R, dtype=torch.int64, device=device)
        plan = ops.plan_rows(range(R), [1] * R, [len(prompts[0])] * R, device)

        def eager() -> Tensor:
            return plain.logits(plain.extend(ids, plan, plain_cache)).argmax(-1)

        plain_cache.keys.zero_()
        plain_cache.values.zero_()
        calls = (step_logits, lambda: forward(plain), exact)
        compared, right, wide = (torch.no_grad()(call) for call in calls)
        return _Calls(step, torch.no_grad()(eager), wide, compared, right)

    backend, moved = "native" if device.type == "cpu" else "triton", float(weight_bytes(shapes.model, dtype))
    millions = matmul_parameters(shapes.model) / 1e6
    yield _Case(
        "decode_step", f"GPT-2 {millions:.0f}M R={R}, {backend}", make, "the model on PyTorch",
        R * 2.0 * moved / dtype.itemsize, moved,
    )  # fmt: skip
