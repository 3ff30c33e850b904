"""Bias and activation in one kernel against float64, with random shapes and layouts; and as a PyTorch operator."""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2_kernels import ops, reference
from fastgpt2_kernels.checking.poison import Poison
from tests.helpers import assert_within_budget, parts, random_ids, random_model
from tests.kernels.faults import load
from tests.kernels.test_layer_norm import HALVES, Inputs, gradients, lay_out
from tests.kernels.traffic import Traffic

# Triton's interpreter computes NaN and inf in lanes that are masked away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NAMES = sorted(ops.TRITON_ACTIVATIONS)


def plain(x: Tensor, bias: Tensor | None, *, name: str) -> Tensor:
    """Compute in float32, and round once. This is stricter than PyTorch's own operators, which also round x + bias."""
    wide = torch.promote_types(torch.float32, x.dtype)
    z = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    return reference.ACTIVATIONS[name](z).to(x.dtype)


def hold(f: Any, inputs: Inputs, dy: Tensor, needed: list[str], name: str, what: str) -> None:
    bias = inputs.get("bias")
    runs = []
    for g, dtype in ((f, None), (functools.partial(plain, name=name), None), (exactly(name), torch.float64)):
        given = {key: t.to(dtype or t.dtype) for key, t in inputs.items()}
        run = g if bias is not None else functools.partial(g, bias=None)
        runs.append(gradients(run, given, [dy.to(dtype or dy.dtype)], needed))
    terms = {"y": 0.0, "x": 0.0, "bias": dy.double().abs().sum(tuple(range(dy.dim() - 1))).max().item()}
    for key, a, b, c in zip(("y", *needed), *runs, strict=True):
        assert a.dtype == b.dtype
        assert_within_budget(a, b, c, f"{key} of {what}", terms=terms[key])


def exactly(name: str) -> Any:
    return functools.partial(plain, name=name)  # it computes in float64 for float64 inputs


def random_case(rng: random.Random, device: str) -> tuple[Inputs, Tensor, list[str], str, str]:
    widths, more = rng.choices([[1, 3, 8, 40, 100], [255, 256, 257], [300, 520]], [70, 22, 8])[0], rng.random() < 0.1
    C = rng.choice(widths)
    lead = rng.choice([(33,), (5, 7)] if more or C < 8 else [(), (1,), (7,), (2, 5), (3, 2, 2)])
    if C * math.prod(lead) < 64:
        lead = (64 // C,)  # with fewer numbers the largest error would be a matter of luck
    name = rng.choice([*NAMES, "gelu_new", "gelu"])
    dtype = rng.choice([torch.float32, torch.float32, *HALVES])
    layout, dout_layout = (rng.choice(["plain", "padded", "sliced", "transposed"]) for _ in range(2))
    spread = rng.choice([0.1, 1.0, 5.0])
    inputs = {"x": lay_out((torch.randn(*lead, C) * spread).to(dtype), layout)}
    if rng.random() < 0.85:
        inputs["bias"] = torch.randn(C).to(rng.choice([dtype, torch.float32, *HALVES]))
    needed = [key for key in inputs if rng.random() < 0.75] or ["x"]
    dy = lay_out(torch.randn(*lead, C).to(dtype), dout_layout)
    what = f"{name} C {C} lead {lead} {dtype} {layout} {dout_layout} spread {spread} needed {needed}"
    return {key: t.to(device) for key, t in inputs.items()}, dy.to(device), needed, name, what


@pytest.mark.parametrize("part", parts(4))
def test_random_cases(triton_device: str, seed: int, part: int, poison: Poison) -> None:
    """The 2x rule holds for results and gradients in 4 x 50 random cases. Outputs are poisoned, between canaries."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    for _ in range(50):
        inputs, dy, needed, name, what = random_case(rng, triton_device)
        f = functools.partial(ops.bias_activation, name=name, backend="triton")
        hold(f, inputs, dy, needed, name, what)
        assert poison.is_intact()


@pytest.mark.parametrize("name", NAMES)
def test_every_activation_over_its_range(triton_device: str, name: str) -> None:
    """Results and slopes are within the budget at a thousand numbers from -12 to 12, at the kinks and at 0.

    The tails are right to 4 digits wherever the formula in PyTorch is right to 5.
    """
    x = torch.cat((torch.linspace(-12, 12, 1001), torch.tensor([0.0, -0.0, 1e-6, 1e-20, -1e-3, 40.0, -40.0])))
    x = x[None].to(triton_device)
    f = functools.partial(ops.bias_activation, bias=None, name=name, backend="triton")
    dy = torch.ones_like(x)
    got = gradients(lambda x: f(x), {"x": x}, [dy], ["x"])
    expected = gradients(lambda x: plain(x, None, name=name), {"x": x}, [dy], ["x"])
    exact = gradients(lambda x: plain(x, None, name=name), {"x": x.double()}, [dy.double()], ["x"])
    for a, b, c in zip(got, expected, exact, strict=True):
        assert_within_budget(a, b, c, name)
        relative, theirs = ((t.double() - c).abs() / c.abs().clamp_min(1e-30) for t in (a, b))
        digits = (theirs < 1e-5) & (c.abs() > 1e-30)
        assert (relative[digits] < 1e-4).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_and_not_finite(triton_device: str, name: str, dtype: torch.dtype) -> None:
    """Numbers whose square or cube overflows give float64's results. NaN and -inf give PyTorch's, and inf the limit."""
    x = torch.tensor([[math.nan, -math.inf, math.inf, 1e20, -1e20, 3e38, -3e38, 1e5, -1e5]]).to(dtype)
    expected = reference.ACTIVATIONS[name](x.double()).to(dtype)
    if "gelu" in name:
        expected[0, 2] = 10.0 if name == "gelu_10" else math.inf
    got = ops.bias_activation(x.to(triton_device), None, name, backend="triton").cpu()
    torch.testing.assert_close(got, expected, equal_nan=True)
    leaf = x[:, 3:].float().to(triton_device).requires_grad_()
    (slope,) = torch.autograd.grad(ops.bias_activation(leaf, None, name, backend="triton").sum(), leaf)
    exact_leaf = leaf.detach().cpu().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.ACTIVATIONS[name](exact_leaf).sum(), exact_leaf)
    torch.testing.assert_close(slope.cpu(), exact.float(), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (3, 0)])
def test_no_rows(triton_device: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=triton_device, requires_grad=True)
    bias = torch.randn(shape[-1], device=triton_device, requires_grad=True)
    y = ops.bias_activation(x, bias, "gelu_new", backend="triton")
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert x.grad.shape == shape
    assert not bias.grad.any()


def test_runs_are_bitwise_equal(triton_device: str, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = {"x": torch.randn(40, 300, device=triton_device), "bias": torch.randn(300, device=triton_device)}
    dy = torch.randn(40, 300, device=triton_device)
    f = functools.partial(ops.bias_activation, name="gelu", backend="triton")
    runs = [gradients(f, inputs, [dy], ["x", "bias"]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(f(inputs["x"][-3:], inputs["bias"]), runs[0][0][-3:])  # a row does not depend on its neighbours


def test_frozen_parts_cost_nothing(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgpt2_kernels.triton.layers import activation as kernel

    asked: list[tuple[bool, bool]] = []
    backward = kernel.bias_activation_backward

    def spy(*args: Any, needs_dx: bool, needs_dbias: bool) -> Any:
        asked.append((needs_dx, needs_dbias))
        return backward(*args, needs_dx=needs_dx, needs_dbias=needs_dbias)

    monkeypatch.setattr(kernel, "bias_activation_backward", spy)
    inputs = {"x": torch.randn(3, 20, device=triton_device), "bias": torch.randn(20, device=triton_device)}
    f = functools.partial(ops.bias_activation, name="gelu_new", backend="triton")
    assert not f(**inputs).requires_grad
    for needed in (["x"], ["bias"], ["x", "bias"]):
        gradients(f, inputs, [torch.randn(3, 20, device=triton_device)], needed)
        assert asked.pop() == ("x" in needed, "bias" in needed)
    assert not asked


def test_opcheck(triton_device: str) -> None:
    import fastgpt2_kernels.triton.layers.activation  # noqa: F401

    x = torch.randn(5, 24, device=triton_device, requires_grad=True)
    bias = torch.randn(24, device=triton_device, requires_grad=True)
    for b in (bias, None):
        torch.library.opcheck(torch.ops.fastgpt2.bias_activation.default, (x, b, "gelu_tanh"))
    dy = torch.randn(5, 24, device=triton_device)
    for needs in ((True, True), (False, True)):
        arguments = (dy, x.detach(), bias.detach(), "gelu_tanh", *needs)
        torch.library.opcheck(torch.ops.fastgpt2.bias_activation_backward.default, arguments)


def test_second_derivatives_are_refused(triton_device: str) -> None:
    x = torch.randn(5, 24, device=triton_device, requires_grad=True)
    y = ops.bias_activation(x, torch.randn(24, device=triton_device), "gelu_new", backend="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"bias_activation: .* no second derivatives; use backend='torch'"):
        grad.sum().backward()


def test_compiles_whole(triton_device: str, seed: int) -> None:
    """torch.compile(fullgraph=True) captures it, and `linear`, without a graph break. The result is eager mode's."""
    torch.manual_seed(seed)
    inputs = {
        "x": torch.randn(2, 3, 24, device=triton_device),
        "weight": torch.randn(40, 24, device=triton_device),
        "bias": torch.randn(40, device=triton_device),
    }
    dy = torch.randn(2, 3, 40, device=triton_device)
    f = functools.partial(ops.linear, activation="gelu_new", backend="triton")
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(gradients(g, inputs, [dy], list(inputs)) for g in (f, compiled)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", sorted(ops.ACTIVATIONS))
def test_the_reference_has_these_gradients(name: str) -> None:
    x, bias = torch.linspace(-4, 4, 12, dtype=torch.float64).view(3, 4), torch.rand(4, dtype=torch.float64)
    f = functools.partial(reference.bias_activation, name=name)
    assert torch.autograd.gradcheck(f, (x.requires_grad_(), bias.requires_grad_()))


def test_interpreted_offsets_past_31_bits(triton_device: str, seed: int) -> None:
    """Rows may be 2**31 elements apart. The memory between them is never touched."""
    torch.manual_seed(seed)
    store = torch.empty(2**31 + 400, dtype=torch.bfloat16, device=triton_device)
    x = store.as_strided((2, 300), (2**31 + 8, 1))
    x.copy_(torch.randn(2, 300))
    f = functools.partial(ops.bias_activation, name="gelu", backend="triton")
    hold(f, {"x": x, "bias": torch.randn(300)}, torch.randn(2, 300).bfloat16(), ["x", "bias"], "gelu", "far rows")


def test_interpreted_traffic(monkeypatch: pytest.MonkeyPatch, interpreter: str, seed: int) -> None:
    """x and dy are read once, y and dx are written once, and the bias is read once per tile."""
    from fastgpt2_kernels.triton.layers import activation as kernel

    torch.manual_seed(seed)
    x, dy = (torch.randn(37, 300, dtype=torch.bfloat16) for _ in range(2))
    bias = torch.randn(300)
    made = [torch.empty(37, 300, dtype=torch.bfloat16)]
    with monkeypatch.context() as patch:
        new_empty = torch.Tensor.new_empty
        patch.setattr(torch.Tensor, "new_empty", lambda t, s, **o: made[0] if s == (37, 300) else new_empty(t, s, **o))
        traffic = Traffic(patch, x=x, bias=bias, y=made[0])
        assert kernel.bias_activation_forward(x, bias, "gelu") is made[0]
        assert (traffic.reads["x"] == 1).all()
        assert (traffic.reads["bias"] == 3).all()  # tiles of 16 rows
        assert (traffic.writes["y"] == 1).all()
        assert not traffic.reads["y"].any()
    grads = kernel._empty_gradients(x, bias, True, True)
    monkeypatch.setattr(kernel, "_empty_gradients", lambda *_: grads)
    with monkeypatch.context() as patch:
        traffic = Traffic(patch, x=x, dy=dy, dx=grads[0], dbias=grads[1])
        kernel.bias_activation_backward(dy, x, bias, "gelu", needs_dx=True, needs_dbias=True)
        assert all((traffic.reads[name] == 1).all() for name in ("x", "dy"))
        assert all((traffic.writes[name] == 1).all() for name in ("dx", "dbias"))


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu_new", "sqrtsoftplus"])
def test_the_model_obeys_its_backend(
    triton_device: str, seed: int, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both backends give the same logits and gradients. The kernels run only on the backend that asks for them."""
    from fastgpt2_kernels.triton.layers import activation as bias_activation
    from fastgpt2_kernels.triton.layers import layer_norm

    calls: list[str] = []
    for module, name in ((layer_norm, "layer_norm_forward"), (bias_activation, "bias_activation_forward")):
        f = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=f, name=name: (calls.append(name), f(*a))[1])
    model = random_model(seed, activation_function=activation, num_layers=1).to(triton_device)
    ids = random_ids(seed, 1, 7).to(triton_device)
    results = []
    for backend in ("torch", "triton"):
        model.backend = backend
        model.zero_grad()
        logits = model(ids)
        logits.square().mean().backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
        counts = tuple(calls.count(name) for name in ("layer_norm_forward", "bias_activation_forward"))
        assert counts == ((0, 0) if backend == "torch" else (3, 1 if activation in ops.TRITON_ACTIVATIONS else 0))
    (a, grads_a), (b, grads_b) = results
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for name, grad in grads_a.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(grads_b[name], grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


# -- what is refused ---------------------------------------------------------------------------------------------------

X, B = torch.ones(3, 4), torch.ones(4)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"name": "gleu"}, "bias_activation: name must be one of .*; got 'gleu'"),
    "rank": ({"x": torch.tensor(1.0)}, r"x must be \(..., C\) and bias \(C,\); got \(\) and \(4,\)"),
    "width": ({"bias": torch.ones(5)}, r"got \(3, 4\) and \(5,\)"),
    "dtype": ({"x": X.int()}, r"x must be floating-point; got torch.int32 \(3, 4\)"),
    "bias dtype": ({"bias": B.long()}, r"bias must be floating-point; got torch.int64 \(4,\)"),
    "device": ({"bias": B.to("meta")}, "one device; got x on cpu, bias on meta"),
    "backend": ({"backend": "cuda"}, "'auto', 'triton', 'native', 'torch'; got 'cuda'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    wrong, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as raised:
        ops.bias_activation(**{"x": X, "bias": B, "name": "gelu", **wrong})
    assert "\n" not in str(raised.value)


def test_refused_by_an_explicit_triton(triton_device: str) -> None:
    x = X.to(triton_device)
    with pytest.raises(ValueError, match="backend='triton' cannot be used: sqrtsoftplus has no Triton kernel"):
        ops.bias_activation(x, None, "sqrtsoftplus", backend="triton")
    torch.testing.assert_close(
        ops.bias_activation(x, x[0], "sqrtsoftplus"), reference.bias_activation(x, x[0], "sqrtsoftplus")
    )
    with pytest.raises(ValueError, match="backend='triton' cannot be used: it computes in float32; got float64"):
        ops.bias_activation(x.double(), None, "gelu", backend="triton")


# -- mistakes made on purpose ------------------------------------------------------------------------------------------

SOURCE = Path(__file__).parents[2] / "kernels/fastgpt2_kernels/triton/layers/activation.py"
MUTATIONS = {
    "the cubic term's slope": ("3.0 * CUBIC", "2.0 * CUBIC"),
    "half of u": ("tl.constexpr(1.5957691216057308)", "tl.constexpr(0.7978845608)"),
    "overflow for large negative numbers": ("e = tl.exp2(tl.abs(w) * -LOG2_E)", "e = tl.exp2(w * -LOG2_E)"),
    "base e for base 2": ("LOG2_E = tl.constexpr(1.4426950408889634)", "LOG2_E = tl.constexpr(1.0)"),
    "erf of z": ("tl.erf(z * SQRT_HALF)", "tl.erf(z)"),
    "the density without its half": ("(-0.5 * LOG2_E)", "(-1.0 * LOG2_E)"),
    "no bias": ("        z += tl.load(bias_ptr", "        z += 0 * tl.load(bias_ptr"),
    "one row too many": ("mask = (n < N)[:, None]", "mask = (n <= N)[:, None]"),
    "one column too many": ("mask_c = offs_c < C\n    mask = ", "mask_c = offs_c <= C\n    mask = "),
    "dbias of the last tile only": ("dbias += tl.where(mask, dx, 0.0)", "dbias = tl.where(mask, dx, 0.0)"),
    "masked rows count for dbias": ("tl.where(mask, dx, 0.0)", "_slope(z, NAME)"),
    "tiles of other programs": ("tl.num_programs(1) * BLOCK_N", "BLOCK_N"),
    "dy is left out": ("dx = dy_tile * _slope(z, NAME)", "dx = _slope(z, NAME)"),
    "relu's slope everywhere": ("slope = tl.where(z <= 0, 0.0, 1.0)", "slope = tl.where(z <= 0, 1.0, 1.0)"),
    "tanh near 0": ("tl.abs(z) < 0.25", "tl.abs(z) < 2.5"),
}  # fmt: skip


def check(kernel: ModuleType, device: str, poison: Poison) -> None:
    """A few cases that reach every mutated branch, through the operator and autograd."""
    torch.manual_seed(3)
    for name in ("gelu_new", "gelu", "relu", "tanh"):
        x, dy = (lay_out(torch.randn(42, 300) * 4, "padded").to(device)[:38] for _ in range(2))
        x[0, :4] = torch.tensor([-200.0, 200.0, -60.0, 0.0])
        bias = torch.randn(300).to(device)

        def mine(x: Tensor, bias: Tensor, name: str = name) -> Tensor:
            return kernel.bias_activation_op(x, bias, ops.TRITON_ACTIVATIONS[name])

        hold(mine, {"x": x, "bias": bias}, dy, ["x", "bias"], name, name)
        assert mine(x, bias).isfinite().all()
        assert poison.is_intact()


def test_interpreted_as_it_is(tmp_path: Path, interpreter: str, poison: Poison) -> None:
    check(load(SOURCE, tmp_path), interpreter, poison)


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_interpreted_mistake_is_caught(mistake: str, tmp_path: Path, interpreter: str, poison: Poison) -> None:
    old, new = MUTATIONS[mistake]
    kernel = load(SOURCE, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check(kernel, interpreter, poison)
