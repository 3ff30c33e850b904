"""Layer norm (also of x + residual) and bias with activation, forward, and forward and backward together.

The error budget of layer norm comes from F.layer_norm, as in the tests. On a CPU it sums the gradients of weight and
bias less accurately than `eager` does, so the budget is larger there.
"""

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
    """x (N, C), weight and bias (C,), residual (N, C) or None, and the gradients of one result or two, (N, C) each."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    douts: list[Tensor]


Layer = Callable[..., Tensor | tuple[Tensor, Tensor]]  # x, weight, bias, and the residual where there is one


def cases(settings: Settings) -> Iterator[Case]:
    widths = [width for width, _ in hidden_sizes().values()]
    N = settings.pick(8192 if settings.on_gpu else 4096, 512, 8)
    for C in settings.pick((widths[0], widths[-1]), (widths[0],), (32,)):
        for dtype in ("bfloat16", "float32") if settings.scale != "toy" else ("float32",):
            for backward in (False, True):
                yield _case(settings, "layer_norm", LAYER_NORMS, N, C, dtype, backward)
                yield _case(settings, "layer_norm of a sum", SUM_NORMS, N, C, dtype, backward)
                yield _case(settings, "bias_activation", ACTIVATIONS, N, 4 * C, dtype, backward)


def _case(
    settings: Settings, name: str, layers: dict[str, Callable[[Settings], Layer]], N: int, C: int, dtype: str,
    backward: bool,
) -> Case:  # fmt: skip
    element, has_residual = getattr(torch, dtype).itemsize, layers is SUM_NORMS
    plain = "F.layer_norm" if "F.layer_norm" in layers else "eager"
    # Forward x and y, backward dy, x and dx. With a residual: forward x, residual, y and the sum s, backward dy, ds, s
    # and one gradient for both.
    passes = (8 if backward else 4) if has_residual else (5 if backward else 2)
    return Case(
        name=f"{name} {'backward' if backward else 'forward'}",
        shape={"N": N, "C": C},
        dtype=dtype,
        contenders=[
            Contender(label, functools.partial(_build, settings, make, backward), "ours" in label, label == plain)
            for label, make in layers.items()
        ],
        inputs=functools.partial(_inputs, settings, N, C, dtype, has_residual),
        exact=functools.partial(_exact, layers["eager"](settings), backward),
        bytes=N * C * element * passes,
        measures_memory=False,
    )  # fmt: skip


def _inputs(settings: Settings, N: int, C: int, dtype: str, has_residual: bool) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (shift + scale * torch.randn(*shape, generator=generator)).to(settings.device, getattr(torch, dtype))

    x, weight, bias = leaf(N, C), leaf(C, scale=0.1, shift=1.0), leaf(C, scale=0.1)
    residual = leaf(N, C).requires_grad_() if has_residual else None
    douts = [leaf(N, C) for _ in range(1 + has_residual)]
    return Inputs(x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), residual, douts)


def _results(layer: Layer, inputs: Inputs, backward: bool) -> list[Tensor]:
    leaves = [t for t in inputs[:4] if t is not None]
    outs = layer(*leaves)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    if not backward:
        return outs
    grads = torch.autograd.grad(outs, leaves, inputs.douts, allow_unused=True)
    return [*outs, *(grad for grad in grads if grad is not None)]


def _exact(layer: Layer, backward: bool, inputs: Inputs) -> list[Tensor]:
    leaves = (None if t is None else t.detach().double().requires_grad_() for t in inputs[:4])
    return _results(layer, Inputs(*leaves, [dout.double() for dout in inputs.douts]), backward)


def _build(settings: Settings, make: Callable[[Settings], Layer], backward: bool, inputs: Inputs) -> Call:
    layer = make(settings)
    if backward:
        return lambda: _results(layer, inputs, True)
    return torch.no_grad()(lambda: _results(layer, inputs, False))


# -- contenders ---------------------------------------------------------------------------------------------------


def _eager_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.layer_norm(x, weight, bias, EPS)


def _eager_sum_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return reference.add_layer_norm(x, residual, weight, bias, EPS)


def _torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def _torch_sum_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    s = x + residual
    return _torch_norm(s, weight, bias), s


def _eager_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.bias_activation(x, bias, "gelu_new")


def _our_norm(backend: str, settings: Settings) -> Layer:
    if backend == "triton":
        need_triton(settings, "layer_norm")
    return lambda x, weight, bias, residual=None: ops.layer_norm(
        x, weight, bias, EPS, residual=residual, backend=backend
    )


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
    "F.layer_norm": lambda settings: _torch_norm,
    "torch.compile": lambda settings: compiled(_eager_norm, settings),
    "liger": _liger_norm,
}
SUM_NORMS: dict[str, Callable[[Settings], Layer]] = {
    "eager": lambda settings: _eager_sum_norm,
    "ours triton": functools.partial(_our_norm, "triton"),
    "ours torch": functools.partial(_our_norm, "torch"),
    "F.layer_norm": lambda settings: _torch_sum_norm,
    "torch.compile": lambda settings: compiled(_eager_sum_norm, settings),
}
ACTIVATIONS: dict[str, Callable[[Settings], Layer]] = {
    "eager": lambda settings: _eager_gelu,
    "ours triton": functools.partial(_our_gelu, "triton"),
    "ours torch": functools.partial(_our_gelu, "torch"),
    "F.gelu": lambda settings: lambda x, weight, bias: F.gelu(x + bias, approximate="tanh"),
    "torch.compile": lambda settings: compiled(_eager_gelu, settings),
}
