"""Layer norm and bias with activation, forward, and forward and backward together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Call, Case, Contender, Settings
from benchmarks.peers import compiled, hidden_sizes, need, need_gpu, need_triton
from fastgpt2_kernels import ops, reference

EPS = 1e-5


class Inputs(NamedTuple):
    """x (N, C), weight and bias (C,), and the result's gradient."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor


Layer = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, weight, bias


def cases(settings: Settings) -> Iterator[Case]:
    widths = [width for width, _ in hidden_sizes().values()]
    N = settings.pick(8192 if settings.on_gpu else 4096, 512, 8)
    for C in settings.pick((widths[0], widths[-1]), (widths[0],), (32,)):
        for dtype in ("bfloat16", "float32") if settings.scale != "toy" else ("float32",):
            for backward in (False, True):
                yield _case(settings, "layer_norm", LAYER_NORMS, N, C, dtype, backward)
                yield _case(settings, "bias_activation", ACTIVATIONS, N, 4 * C, dtype, backward)


def _case(
    settings: Settings, name: str, layers: dict[str, Callable[[Settings], Layer]], N: int, C: int, dtype: str,
    backward: bool,
) -> Case:  # fmt: skip
    element = getattr(torch, dtype).itemsize
    return Case(
        name=f"{name} {'backward' if backward else 'forward'}",
        shape={"N": N, "C": C},
        dtype=dtype,
        contenders=[
            Contender(label, functools.partial(_build, settings, make, backward), "ours" in label, label == "eager")
            for label, make in layers.items()
        ],
        inputs=functools.partial(_inputs, settings, N, C, dtype),
        exact=functools.partial(_exact, layers["eager"](settings), backward),
        bytes=N * C * element * (5 if backward else 2),  # x, y, and dy, x, dx
        measures_memory=False,
    )  # fmt: skip


def _inputs(settings: Settings, N: int, C: int, dtype: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    x, weight, bias, dy = draw(N, C), 1 + 0.1 * draw(C), 0.1 * draw(C), draw(N, C)
    x, weight, bias, dy = (t.to(settings.device, getattr(torch, dtype)) for t in (x, weight, bias, dy))
    return Inputs(x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), dy)


def _results(layer: Layer, inputs: Inputs, backward: bool) -> list[Tensor]:
    y = layer(inputs.x, inputs.weight, inputs.bias)
    if not backward:
        return [y]
    grads = torch.autograd.grad(y, inputs[:3], inputs.dy, allow_unused=True)
    return [y, *(grad for grad in grads if grad is not None)]


def _exact(layer: Layer, backward: bool, inputs: Inputs) -> list[Tensor]:
    wide = Inputs(*(t.detach().double().requires_grad_(t.requires_grad) for t in inputs))
    return _results(layer, wide, backward)


def _build(settings: Settings, make: Callable[[Settings], Layer], backward: bool, inputs: Inputs) -> Call:
    layer = make(settings)
    if backward:
        return lambda: _results(layer, inputs, True)
    return torch.no_grad()(lambda: _results(layer, inputs, False))


# -- contenders ---------------------------------------------------------------------------------------------------


def _eager_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.layer_norm(x, weight, bias, EPS)


def _eager_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.bias_activation(x, bias, "gelu_new")


def _our_norm(backend: str, settings: Settings) -> Layer:
    if backend == "triton":
        need_triton(settings, "layer_norm")
    return lambda x, weight, bias: ops.layer_norm(x, weight, bias, EPS, backend=backend)


def _our_gelu(backend: str, settings: Settings) -> Layer:
    if backend == "triton":
        need_triton(settings, "bias_activation")
    return lambda x, weight, bias: ops.bias_activation(x, bias, "gelu_new", backend=backend)


def _liger_norm(settings: Settings) -> Layer:
    need_gpu(settings)
    function = need("liger_kernel.ops.layer_norm", "liger-kernel").LigerLayerNormFunction
    return lambda x, weight, bias: function.apply(x, weight, bias, EPS)


LAYER_NORMS: dict[str, Callable[[Settings], Layer]] = {
    "eager": lambda settings: _eager_norm,
    "ours triton": functools.partial(_our_norm, "triton"),
    "ours torch": functools.partial(_our_norm, "torch"),
    "compiled": lambda settings: compiled(_eager_norm, settings),
    "Liger": _liger_norm,
}
ACTIVATIONS: dict[str, Callable[[Settings], Layer]] = {
    "eager": lambda settings: _eager_gelu,
    "ours triton": functools.partial(_our_gelu, "triton"),
    "ours torch": functools.partial(_our_gelu, "torch"),
    "F.gelu": lambda settings: lambda x, weight, bias: F.gelu(x + bias, approximate="tanh"),
    "compiled": lambda settings: compiled(_eager_gelu, settings),
}
