"""The short way of calling an operator in eager training, and who must see the operator itself instead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt2_kernels import ops


def draw_inputs(device: str) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each operator as a function of differentiable tensors, and those tensors."""
    x, residual, qkv = (torch.randn(2, 5, n, device=device) for n in (24, 24, 72))
    q, k, v = (torch.randn(1, 2, 5, 16, device=device) for _ in range(3))
    weight, bias = (torch.randn(24, device=device) for _ in range(2))

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y, s = ops.layer_norm(x, weight, bias, 1e-5, residual=residual, backend="triton")
        return y * s

    activation = functools.partial(ops.bias_activation, name="gelu_new", backend="triton")
    packed = functools.partial(ops.causal_attention_packed, num_heads=3, backend="triton")
    return {
        "layer_norm": (layer_norm, [x, weight, bias, residual]),
        "bias_activation": (activation, [x, bias]),
        "attention_packed": (packed, [qkv]),
        "attention": (functools.partial(ops.causal_attention, backend="triton"), [q, k, v]),
    }


OPERATORS = ("layer_norm", "bias_activation", "attention_packed", "attention")


class Seen(TorchDispatchMode):
    """Notes the name of every operator that the dispatcher calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Logged(Tensor):
    """A subclass of Tensor that notes the operators it is given to."""

    names: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.names.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


@contextmanager
def registered(name: str) -> Iterator[list[str]]:
    """While it is open, the names of calls of operators that are registered with PyTorch are noted."""
    with Seen() as seen:
        yield seen.names
    assert any(found.startswith("fastgpt2::") for found in seen.names), name


@pytest.fixture
def of(triton_device: str, seed: int) -> Callable[[str], tuple[Callable[..., Tensor], list[Tensor]]]:
    torch.manual_seed(seed)
    drawn = draw_inputs(triton_device)
    return lambda name: (drawn[name][0], [t.clone().requires_grad_() for t in drawn[name][1]])


def differentiate(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), inputs)]


@pytest.mark.parametrize("name", OPERATORS)
def test_both_ways_give_the_same_bits(of, name):
    function, inputs = of(name)
    short = differentiate(function, inputs)
    with registered(name) as names:
        long = differentiate(function, inputs)
    assert {f"fastgpt2::{name}", f"fastgpt2::{name}_backward"} <= {found.removesuffix(".default") for found in names}
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_eager_training_takes_the_short_way(of, name, monkeypatch):
    """PyTorch's dispatcher calls neither the operator nor its backward pass, with and without gradients."""
    from torch._ops import OpOverload

    function, inputs = of(name)
    called = []
    call = OpOverload.__call__
    monkeypatch.setattr(OpOverload, "__call__", lambda self, *a, **k: called.append(self.name()) or call(self, *a, **k))
    differentiate(function, inputs)
    with torch.no_grad():
        assert function(*inputs).grad_fn is None
    assert not [found for found in called if found.startswith("fastgpt2::")]
    with Seen():
        function(*inputs)
    assert called, "nothing was watched"


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_vmap_calls_the_operator_for_each_item(of, name):
    function, inputs = of(name)
    items = [torch.stack([t.detach(), -2 * t.detach()]) for t in inputs]
    found = torch.vmap(function)(*items)
    expected = torch.stack([function(*(t[i] for t in items)) for i in range(2)])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_subclasses_of_tensor_see_the_operator(of, name):
    function, inputs = of(name)
    Logged.names = []
    with torch.no_grad():
        function(*(t.as_subclass(Logged) for t in inputs))
    assert any(name in found for found in Logged.names), Logged.names


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_tensors_launch_nothing(of, name):
    from torch._subclasses import FakeTensorMode

    function, inputs = of(name)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in inputs]
        out = function(*fake)
        found = torch.autograd.grad(out.sum(), fake)
    assert out.shape == function(*inputs).shape
    assert [t.shape for t in found] == [t.shape for t in inputs]


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives_are_refused_by_name(of, name):
    function, inputs = of(name)
    found = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; use backend='torch'"):
        torch.autograd.grad(sum(t.sum() for t in found), inputs)


@pytest.mark.parametrize("name", OPERATORS)
def test_frozen_inputs_get_no_gradient(of, name):
    function, inputs = of(name)
    inputs = [t.detach() for t in inputs]
    assert not function(*inputs).requires_grad
    inputs[-1].requires_grad_()
    out = function(*inputs)
    out.sum().backward()
    assert inputs[-1].grad is not None
    assert all(t.grad is None for t in inputs[:-1])


@pytest.mark.parametrize("name", OPERATORS)
def test_selective_checkpointing_sees_the_operator(of, name):
    """A policy that saves this operator's results finds it, so the operator is not computed again."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    function, inputs = of(name)
    asked = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        asked.append((op.name(), ctx.is_recompute))
        is_ours = op.name().startswith("fastgpt2::")
        return CheckpointPolicy.MUST_SAVE if is_ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)
    found = [out.detach(), *torch.autograd.grad(out.sin().sum(), inputs)]
    assert (f"fastgpt2::{name}", False) in asked
    assert all(torch.equal(a, b) for a, b in zip(found, differentiate(function, inputs), strict=True))
