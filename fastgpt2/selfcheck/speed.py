"""Timing the kernels at the sizes of GPT-2 124M, relative to the limits that were just measured on the device."""

from __future__ import annotations

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
    measured_bandwidth,
    measured_matmul_flops,
    wall_seconds,
    weight_bytes,
)
from fastgpt2.cache import KVCache
from fastgpt2.config import GPT2Config, SamplingConfig
from fastgpt2.decode import DecodeSession, NewRow, decode_backend, why_not_decode
from fastgpt2.gpt2 import GPT2
from fastgpt2.selfcheck.operators import why_not
from fastgpt2.selfcheck.report import Timing
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


class _Case(NamedTuple):
    """One operator to time. `ours` maps a backend to our call; `flops` and `bytes` are the least that are needed."""

    operator: str
    size: str
    ours: Callable[[str], Call]
    peer_name: str
    peer: Call
    flops: float
    bytes: float


def measured_limits(device: torch.device) -> dict[str, float]:
    """Measure the bandwidth in bytes per second, and FLOP/s of matrix products in float32 and in the timed dtype."""
    limits = {"bandwidth": measured_bandwidth(device)}
    for dtype in {torch.float32: None, _dtype(device): None}:
        limits[str(dtype).removeprefix("torch.")] = measured_matmul_flops(device, dtype)
    return limits


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def time_operators(
    device: torch.device, limits: dict[str, float], shapes: Shapes | None = None, seconds: float = 1.0
) -> Iterator[Timing]:
    """Time every operator on the backend that "auto" selects, for at most about `seconds` each."""
    shapes = shapes or Shapes.of(device)
    dtype = str(_dtype(device)).removeprefix("torch.")
    for make in (*_OPERATORS, _decode_step):
        for case in make(device, shapes):
            backends = [name for name in ops.backends_of(case.operator) if why_not(case.operator, name, device) is None]
            # On a CPU Triton kernels are only interpreted, so their time means nothing.
            backends = [name for name in backends if not (name == "triton" and device.type == "cpu")]
            if not backends:
                continue
            ours, theirs = _medians([case.ours(backends[0]), case.peer], device, seconds)
            least = max(case.flops / limits[dtype], case.bytes / limits["bandwidth"])
            yield Timing(
                case.operator, backends[0], case.size, dtype, ours,
                case.flops / ours / 1e12 if case.flops else None, case.bytes / ours / 1e9 if case.bytes else None,
                least / ours, case.peer_name, theirs,
            )  # fmt: skip


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


def _draw(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).mul_(scale).to(_dtype(device))


def _forward_and_backward(function: Callable[..., Any], *leaves: Tensor) -> Call:
    leaves = tuple(t.requires_grad_() for t in leaves)
    dout = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, dout)


def _without_gradients(function: Callable[..., Any]) -> Call:
    return torch.no_grad()(function)


def _attention(device: torch.device, shapes: Shapes) -> Iterator[_Case]:
    B, T, H, C = shapes.batch, shapes.tokens, shapes.model.num_heads, shapes.model.hidden_size
    qkv = _draw(device, B, T, 3 * C)

    def sdpa(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def ours(backend: str) -> Callable[[Tensor], Tensor]:
        return functools.partial(ops.causal_attention_packed, num_heads=H, backend=backend)

    flops, element, size = 2.0 * B * T * T * C, qkv.element_size(), f"B={B} T={T} H={H} D={C // H}"
    name, forward, both = "causal_attention_packed", f"{size} forward", f"{size} with backward"
    yield _Case(
        name, forward, lambda b: _without_gradients(lambda: ours(b)(qkv)),
        "SDPA", _without_gradients(lambda: sdpa(qkv)), flops, 4.0 * B * T * C * element,
    )  # fmt: skip
    yield _Case(
        name, both, lambda b: _forward_and_backward(ours(b), qkv), "SDPA", _forward_and_backward(sdpa, qkv),
        3.5 * flops, 12.0 * B * T * C * element,
    )  # fmt: skip


def _layers(device: torch.device, shapes: Shapes) -> Iterator[_Case]:
    N, C, inner = shapes.batch * shapes.tokens, shapes.model.hidden_size, shapes.model.inner_dim
    x, weight, bias = _draw(device, N, C), _draw(device, C), _draw(device, C)
    wide, wide_bias = _draw(device, N, inner), _draw(device, inner)
    element = x.element_size()
    yield _Case(
        "layer_norm", f"N={N} C={C} with backward",
        lambda b: _forward_and_backward(functools.partial(ops.layer_norm, eps=1e-5, backend=b), x, weight, bias),
        "F.layer_norm", _forward_and_backward(lambda x, w, b: F.layer_norm(x, (C,), w, b, 1e-5), x, weight, bias),
        0.0, 5.0 * N * C * element,
    )  # fmt: skip
    yield _Case(
        "bias_activation", f"N={N} C={inner} with backward",
        lambda b: _forward_and_backward(
            functools.partial(ops.bias_activation, name="gelu_new", backend=b), wide, wide_bias
        ),
        "F.gelu", _forward_and_backward(lambda x, b: F.gelu(x + b, approximate="tanh"), wide, wide_bias),
        0.0, 5.0 * N * inner * element,
    )  # fmt: skip


def _losses(device: torch.device, shapes: Shapes) -> Iterator[_Case]:
    N, C, V = shapes.batch * shapes.tokens, shapes.model.hidden_size, shapes.model.vocab_size
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(V, (N,), generator=generator).to(device)
    x, weight = _draw(device, N, C), _draw(device, V, C, scale=0.02)
    logits = _draw(device, N, V)
    element = x.element_size()
    yield _Case(
        "cross_entropy", f"N={N} V={V} with backward",
        lambda b: _forward_and_backward(functools.partial(ops.cross_entropy, targets=targets, backend=b), logits),
        "F.cross_entropy", _forward_and_backward(lambda logits: F.cross_entropy(logits, targets), logits),
        0.0, 2.0 * N * V * element,
    )  # fmt: skip
    yield _Case(
        "linear_cross_entropy", f"N={N} C={C} V={V} with backward",
        lambda b: _forward_and_backward(
            functools.partial(ops.linear_cross_entropy, targets=targets, backend=b), x, weight
        ),
        "F.cross_entropy", _forward_and_backward(lambda x, w: F.cross_entropy(x @ w.T, targets), x, weight),
        6.0 * N * C * V, 2.0 * (N + V) * C * element,
    )  # fmt: skip


def _decoding(device: torch.device, shapes: Shapes) -> Iterator[_Case]:
    R, S, C, V = shapes.rows, shapes.held, shapes.model.hidden_size, shapes.model.vocab_size
    H, inner = shapes.model.num_heads, shapes.model.inner_dim
    x, weight, bias = _draw(device, R, C), _draw(device, inner, C), _draw(device, inner)
    element = x.element_size()
    yield _Case(
        "linear_decode", f"R={R} K={C} N={inner}",
        lambda b: _without_gradients(lambda: ops.linear_decode(x, weight, bias, activation="gelu_new", backend=b)),
        "F.linear, F.gelu",
        _without_gradients(lambda: F.gelu(F.linear(x, weight, bias), approximate="tanh")),
        2.0 * R * C * inner, (C * inner + R * (C + inner)) * element,
    )  # fmt: skip
    qkv, keys, values = _draw(device, R, 3 * C), _draw(device, R, H, S + 1, C // H), _draw(device, R, H, S + 1, C // H)
    lengths = torch.full((R,), S, dtype=torch.int32, device=device)

    def sdpa() -> Tensor:
        q, k, v = qkv.view(R, 3, H, C // H).unbind(1)
        keys[:, :, S], values[:, :, S] = k, v
        return F.scaled_dot_product_attention(q[:, :, None], keys, values)

    yield _Case(
        "decode_attention", f"R={R} S={S} H={H} D={C // H}",
        lambda b: _without_gradients(lambda: ops.decode_attention(qkv, keys, values, lengths, backend=b)),
        "SDPA", _without_gradients(sdpa), 4.0 * R * (S + 1) * C, 2.0 * R * (S + 1) * C * element,
    )  # fmt: skip
    logits, positions = _draw(device, R, V).float(), lengths
    keys_R2 = ops.row_keys(0, range(R), [0] * R).to(device)
    yield _Case(
        "sample", f"R={R} V={V} top_k=50",
        lambda b: _without_gradients(
            lambda: ops.sample(logits, top_k=50, keys=keys_R2, positions=positions, backend=b)
        ),
        "topk, multinomial", _without_gradients(lambda: _sample_by_hand(logits)), 0.0, 4.0 * R * V,
    )  # fmt: skip


def _sample_by_hand(logits: Tensor) -> Tensor:
    best = logits.topk(50)
    return best.indices.gather(1, best.values.softmax(-1).multinomial(1))


def _decode_step(device: torch.device, shapes: Shapes) -> Iterator[_Case]:
    """A decode step of the whole model, against the same model on PyTorch's operators."""
    R, dtype = shapes.rows, _dtype(device)
    with torch.device(device):
        model = GPT2(shapes.model).to(dtype).eval()
    if why_not_decode(model) is not None:
        return
    prompts = [[1 + row] * 16 for row in range(R)]

    def ours(_: str) -> Call:
        cache = KVCache(model.config, R, dtype=dtype, device=device)
        session = DecodeSession(model, cache, SamplingConfig(temperature=0))
        logits = session.prefill(range(R), prompts)
        # The limit is so high that no row ends; a row that has ended would no longer be computed.
        session.begin([NewRow(row, ids, (row, 0), 10**6) for row, ids in enumerate(prompts)], logits)
        state = session.slots
        lengths, produced = state.lengths.clone(), state.produced.clone()

        def step() -> Any:
            state.lengths.copy_(lengths)
            state.produced.copy_(produced)
            return session.step(range(R))

        return step

    plain = GPT2(shapes.model, backend="torch").eval()
    plain.load_state_dict(model.state_dict(), assign=True)
    plain = plain.to(device)
    cache = KVCache(model.config, R, dtype=dtype, device=device)
    past = len(prompts[0])
    ids = torch.ones(R, dtype=torch.int64, device=device)
    plan = ops.plan_rows(range(R), [1] * R, [past] * R, device)

    def eager() -> Tensor:
        return plain.logits(plain.extend(ids, plan, cache)).argmax(-1)

    cache.keys.zero_()
    cache.values.zero_()
    moved = float(weight_bytes(shapes.model, dtype))
    yield _Case(
        "decode_step", f"GPT-2 {model.num_parameters() / 1e6:.0f}M R={R}, {decode_backend(model)}", ours,
        "the model on PyTorch", _without_gradients(eager), R * 2.0 * moved / dtype.itemsize, moved,
    )  # fmt: skip


_OPERATORS = (_attention, _layers, _losses, _decoding)
