"""Differentiable PyTorch operators, with a short way for eager training.

An operator that is registered with `torch.library` can be compiled, exported, vectorized, traced with fake tensors and
seen by dispatch modes. But calling it costs the host more than our launchers do: PyTorch's dispatcher enters Python
several times in forward and in backward. In eager training on ordinary tensors nothing needs that. There the operator's
functions are called through a plain `torch.autograd.Function`, or directly if no gradient is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Arguments of these types, and no others such as subclasses of Tensor, are computed with directly.
_ORDINARY = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype))


def define_operator(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    save: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Define an operator and return the function that calls it.

    Args:
        name: its name with the namespace, "fastgpt2::name".
        schema: its arguments and results, as in `torch.library.define`.
        run: computes the results. It must return no view of an input.
        fake: returns empty results, as in `torch.library.register_fake`.
        backward: `backward(ctx, *grads)` returns a gradient, or None, for each argument.
        save: `save(ctx, inputs, output)` stores what `backward` needs. None if the operator is itself the backward pass
            of another; `backward` should then raise an error, because it would be a second derivative.

    Returns:
        A function of the operator's arguments, all positional. The operator itself is `torch.ops.fastgpt2.name`.
    """
    torch.library.define(name, schema)
    torch.library.impl(name, "default", run)
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, backward, setup_context=save)
    namespace, short = name.split("::")
    operator = getattr(getattr(torch.ops, namespace), short).default
    function = None if save is None else _autograd_function(short, run, backward, save)

    def call(*inputs: Any) -> Any:
        if not _is_eager(inputs):
            return operator(*inputs)
        if not torch.is_grad_enabled():
            return run(*inputs)
        return operator(*inputs) if function is None else function.apply(*inputs)

    return call


def _autograd_function(
    name: str, run: Callable[..., Any], backward: Callable[..., Any], save: Callable[..., None]
) -> Any:
    """The subclass of torch.autograd.Function with this forward and backward pass, which PyTorch shows by `name`."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = run(*inputs)
        save(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def _is_eager(inputs: tuple[Any, ...]) -> bool:
    """Whether nothing but eager execution and autograd needs to see a call with these inputs."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()  # fake tensors, selective checkpointing, counters of FLOP
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and _ORDINARY.issuperset(map(type, inputs))
    )
