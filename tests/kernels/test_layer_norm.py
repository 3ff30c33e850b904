"""The LayerNorm kernels against float64, with random shapes, dtypes and layouts; and as a PyTorch operator."""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import ops, reference
from fastgpt2_kernels.checking.poison import CANARY, Poison
from tests.helpers import assert_within_budget, parts
from tests.kernels.faults import load
from tests.kernels.traffic import Traffic

# Triton's interpreter computes NaN and inf in lanes that are masked away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
HALVES = (torch.bfloat16, torch.float16)
Inputs = dict[str, Tensor]


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values (..., C) in another layout: between canaries, in every second row, or with columns first."""
    C = values.shape[-1]
    if layout == "padded":
        buffer = values.new_full((*values.shape[:-1], C + 13), CANARY)
        buffer[..., 5 : 5 + C] = values
        return buffer[..., 5 : 5 + C]
    if layout == "sliced" and values.dim() > 1:
        buffer = values.new_full((*values.shape[:-2], 2 * values.shape[-2], C), CANARY)
        buffer[..., ::2, :] = values
        return buffer[..., ::2, :]
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    return values


def gradients(f: Any, inputs: Inputs, douts: list[Tensor], needed: list[str]) -> list[Tensor]:
    """f's results, and the gradients of the needed inputs."""
    leaves = {name: t.detach().requires_grad_(name in needed) for name, t in inputs.items()}
    outs = f(**leaves)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    used = [(out, dout.to(out)) for out, dout in zip(outs, douts, strict=True) if out.requires_grad]
    grads = torch.autograd.grad([out for out, _ in used], [leaves[n] for n in needed], [dout for _, dout in used])
    return [t.detach() for t in (*outs, *grads)]


def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, eps: float) -> Any:
    """F.layer_norm. If the dtypes differ, it is computed in float32, and rounded once."""
    s = x if residual is None else x + residual
    wide = functools.reduce(torch.promote_types, (torch.float32, s.dtype, weight.dtype))
    y = F.layer_norm(s.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(s.dtype)
    return y if residual is None else (y, s)


def exactly(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, eps: float) -> Any:
    if residual is None:
        return reference.layer_norm(x, weight, bias, eps)
    return reference.add_layer_norm(x, residual, weight, bias, eps)


def hold(f: Any, inputs: Inputs, douts: list[Tensor], needed: list[str], eps: float, what: str) -> None:
    """f's results and gradients are within the budget. With a residual, they are judged at the sum as f rounded it."""
    got = gradients(f, inputs, douts, needed)
    terms = sizes_of_terms(inputs, douts, eps)
    names = [*(["y", "s"] if "residual" in inputs else ["y"]), *needed]
    at = dict(inputs)
    if "residual" in inputs:
        s, exact_s = inputs["x"] + inputs["residual"], inputs["x"].double() + inputs["residual"].double()
        assert got[1].dtype == s.dtype
        assert_within_budget(got[1], s, exact_s, f"s of {what}")
        at |= {"x": got[1], "residual": torch.zeros_like(got[1])}
    expected = gradients(functools.partial(plain, eps=eps), at, douts, needed)
    doubles = {name: t.double() for name, t in at.items()}
    exact = gradients(functools.partial(exactly, eps=eps), doubles, [d.double() for d in douts], needed)
    for name, a, b, c in zip(names, got, expected, exact, strict=True):
        assert a.dtype == inputs.get(name, b).dtype, name
        assert_within_budget(a, b, c, f"{name} of {what}", terms=terms[name], dtype=a.dtype)


def sizes_of_terms(inputs: Inputs, douts: list[Tensor], eps: float) -> dict[str, float]:
    """The size of the terms that each result sums. Most of them can cancel."""
    x, weight, bias = (inputs[name].double() for name in ("x", "weight", "bias"))
    s = x + inputs["residual"].double() if "residual" in inputs else x
    dy = douts[0].double()
    d = s - s.mean(-1, keepdim=True)
    rstd = (d.square().mean(-1, keepdim=True) + eps).rsqrt()
    h = d * rstd
    rows = tuple(range(dy.dim() - 1))
    ds = (weight * dy * rstd).abs().amax() + (douts[1].double().abs().amax() if "residual" in inputs else 0.0)
    return {
        "y": ((h * weight).abs() + bias.abs()).amax().item(),
        "s": s.abs().amax().item(),
        "x": ds.item(),
        "residual": ds.item(),
        "weight": (dy * h).abs().sum(rows).amax().item(),
        "bias": dy.abs().sum(rows).amax().item(),
    }


def compare(inputs: Inputs, douts: list[Tensor], needed: list[str], eps: float, what: str) -> None:
    hold(functools.partial(ops.layer_norm, eps=eps, backend="triton"), inputs, douts, needed, eps, what)


def random_case(rng: random.Random, device: str) -> tuple[Inputs, list[Tensor], list[str], float, str]:
    widths = rng.choices([[1, 2, 3, 8, 17, 31, 64, 100], [129, 255, 256, 257], [600, 776, 1030]], [78, 18, 4])[0]
    C = rng.choice(widths)
    lead = rng.choice([(), (1,), (3,), (2, 2), (1, 5), (2, 1, 2)] if rng.random() < 0.9 else [(14,), (2, 7)])
    dtype = rng.choice([torch.float32, torch.float32, *HALVES])
    layout, dout_layout = (rng.choice(["plain", "padded", "sliced", "transposed"]) for _ in range(2))
    mean, spread = rng.choice([0.0, 1.0, -20.0]), rng.choice([1.0, 0.01, 30.0])
    eps = rng.choice([1e-5, 1e-5, 1e-12, 0.1])
    inputs = {
        "x": lay_out((torch.randn(*lead, C) * spread + mean).to(dtype), layout),
        "weight": torch.randn(C).to(rng.choice([dtype, torch.float32, *HALVES])),
        "bias": torch.randn(C).to(rng.choice([dtype, torch.float32, *HALVES])),
    }
    douts = [lay_out(torch.randn(*lead, C).to(dtype), dout_layout)]
    if rng.random() < 0.5:
        inputs["residual"] = lay_out((torch.randn(*lead, C) * spread).to(rng.choice([dtype, torch.float32])), layout)
        douts.append(lay_out(torch.randn(*lead, C).to(dtype), rng.choice(["plain", "transposed", "padded"])))
    needed = [name for name in inputs if rng.random() < 0.75] or ["x"]
    what = f"C {C} lead {lead} {dtype} {layout} {dout_layout} mean {mean} spread {spread} eps {eps} needed {needed}"
    return {k: t.to(device) for k, t in inputs.items()}, [d.to(device) for d in douts], needed, eps, what


@pytest.mark.parametrize("part", parts(4))
def test_random_cases(triton_device: str, seed: int, part: int, poison: Poison) -> None:
    """The 2x rule holds for results and gradients in 4 x 50 random cases. Outputs are poisoned, between canaries."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    for _ in range(50):
        compare(*random_case(rng, triton_device))
        assert poison.is_intact()


def draw(C: int, *lead: int, device: str, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Inputs:
    shapes = {"x": (*lead, C), "weight": (C,), "bias": (C,), "residual": (*lead, C)}
    inputs = {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}
    inputs["x"] = (torch.randn(*lead, C, device=device) + mean).to(dtype)
    return inputs


@pytest.mark.parametrize("C", [768, 1500])
def test_a_mean_far_larger_than_the_spread(triton_device: str, seed: int, C: int) -> None:
    """The kernel sums squares of differences, in a second pass. Differences of squares would leave no correct digit."""
    torch.manual_seed(seed)
    inputs = draw(C, 24, device=triton_device, mean=1e4)
    del inputs["residual"]
    compare(inputs, [torch.randn(24, C, device=triton_device)], list(inputs), 1e-5, f"mean 1e4, C {C}")
    got = ops.layer_norm(**inputs, eps=1e-5, backend="triton")
    exact = reference.layer_norm(*(t.double() for t in inputs.values()), 1e-5)
    torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=2e-6)  # the mean's rounding error is subtracted


@pytest.mark.parametrize(("C", "residual"), [(16384, True), (16391, False), (20000, True), (8200, False)])
def test_long_rows(triton_device: str, seed: int, C: int, residual: bool, poison: Poison) -> None:
    """Rows may be as long as registers allow, or longer. The limit is 8192 in backward, and 16384 in forward."""
    torch.manual_seed(seed)
    inputs = draw(C, 3, device=triton_device, mean=5.0)
    if not residual:
        del inputs["residual"]
    douts = [torch.randn(3, C, device=triton_device) for _ in range(1 + residual)]
    compare(inputs, douts, list(inputs), 1e-5, f"C {C}")
    assert poison.is_intact()


@pytest.mark.parametrize("C", [1, 5, 300, 17000])
def test_constant_rows(triton_device: str, C: int) -> None:
    """With a variance of 0 the result is exactly the bias, and dx is only what eps leaves of it."""
    inputs = draw(C, 2, device=triton_device)
    x = torch.tensor([[3.0], [-1e4]], device=triton_device).expand(2, C).requires_grad_()
    y = ops.layer_norm(x, inputs["weight"], inputs["bias"], 1e-5, backend="triton")
    assert torch.equal(y, inputs["bias"].expand(2, C))
    dy = torch.randn(2, C, device=triton_device)
    (got,) = torch.autograd.grad(y, x, dy)
    g = (dy * inputs["weight"]).double()
    torch.testing.assert_close(got.double(), (g - g.mean(-1, keepdim=True)) / 1e-5**0.5, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("C", [300, 17000])
def test_what_is_not_finite_stays_in_its_row(triton_device: str, seed: int, C: int) -> None:
    torch.manual_seed(seed)
    inputs = draw(C, 5, device=triton_device)
    clean = {name: t.clone() for name, t in inputs.items()}
    inputs["x"][1, 7], inputs["x"][3, 0] = math.nan, math.inf
    douts = [torch.randn(5, C, device=triton_device) for _ in range(2)]
    f = functools.partial(ops.layer_norm, eps=1e-5, backend="triton")
    rows = [0, 2, 4]
    got, expected = (gradients(f, given, douts, ["x"]) for given in (inputs, clean))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a[rows], b[rows])
    assert got[0][[1, 3]].isnan().all()


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9)])
def test_no_rows(triton_device: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=triton_device, requires_grad=True)
    weight, bias = (torch.randn(9, device=triton_device, requires_grad=True) for _ in range(2))
    y, s = ops.layer_norm(x, weight, bias, 1e-5, residual=x, backend="triton")
    assert y.shape == s.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    for t in (weight, bias):
        assert t.grad is not None
        assert not t.grad.any()


def test_gradients_of_one_result_alone(triton_device: str, seed: int) -> None:
    """Gradients are right if only the sum or only its LayerNorm is used, also if x and residual are one tensor."""
    torch.manual_seed(seed)
    inputs = draw(40, 6, device=triton_device)
    dout = torch.randn(6, 40, device=triton_device)
    for used in (0, 1):
        for same in (False, True):
            results = []
            for backend in ("triton", "torch"):
                x = inputs["x"].clone().requires_grad_()
                weight = inputs["weight"].clone().requires_grad_()
                residual = x if same else inputs["residual"]
                outs = ops.layer_norm(x, weight, inputs["bias"], 1e-5, residual=residual, backend=backend)
                results.append(torch.autograd.grad(outs[used], (x, weight), dout, allow_unused=True))
            assert (results[0][1] is None) == (used == 1)
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b) if a is not None else None


def test_frozen_parts_cost_nothing(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched for frozen inputs: no backward at all, or no sums, or no dx."""
    from fastgpt2_kernels.triton.layers import layer_norm as kernel

    asked: list[tuple[bool, ...]] = []
    backward, sums = kernel.layer_norm_backward, kernel.sum_partials

    def spy(*args: Any, **needs: Any) -> Any:
        asked.append(tuple(needs[name] for name in ("needs_ds", "needs_dweight", "needs_dbias")))
        return backward(*args, **needs)

    summed: list[int] = []
    monkeypatch.setattr(kernel, "layer_norm_backward", spy)
    monkeypatch.setattr(kernel, "sum_partials", lambda p, out: (summed.append(p.shape[1]), sums(p, out)))
    inputs = draw(20, 3, device=triton_device)
    del inputs["residual"]
    f = functools.partial(ops.layer_norm, eps=1e-5, backend="triton")
    assert not f(**inputs).requires_grad
    for needed in (["x"], ["weight"], ["bias"], ["weight", "bias"], ["x", "bias"]):
        gradients(f, inputs, [torch.randn(3, 20, device=triton_device)], needed)
        assert asked.pop() == tuple(name in needed for name in ("x", "weight", "bias"))
        assert summed == ([len(set(needed) - {"x"})] if needed != ["x"] else [])
        summed.clear()


def test_runs_are_bitwise_equal(triton_device: str, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = draw(600, 14, device=triton_device)
    douts = [torch.randn(14, 600, device=triton_device) for _ in range(2)]
    f = functools.partial(ops.layer_norm, eps=1e-5, backend="triton")
    runs = [gradients(f, inputs, douts, list(inputs)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_row_is_the_same_among_any_number_of_rows(triton_device: str, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = draw(130, 40, device=triton_device)
    f = functools.partial(ops.layer_norm, weight=inputs["weight"], bias=inputs["bias"], eps=1e-5, backend="triton")
    whole = f(inputs["x"])
    for rows in (1, 2, 31):
        assert torch.equal(f(inputs["x"][-rows:]), whole[-rows:])


def test_the_callers_tensors_are_left_alone(triton_device: str, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = draw(40, 6, device=triton_device)
    before = {name: t.clone() for name, t in inputs.items()}
    douts = [torch.randn(6, 40, device=triton_device) for _ in range(2)]
    kept = [d.clone() for d in douts]
    gradients(functools.partial(ops.layer_norm, eps=1e-5, backend="triton"), inputs, douts, list(inputs))
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    assert all(torch.equal(a, b) for a, b in zip(douts, kept, strict=True))


def test_opcheck(triton_device: str) -> None:
    from fastgpt2_kernels.triton.layers import layer_norm as kernel

    inputs = draw(24, 2, 3, device=triton_device)
    x, weight, bias, residual = (t.requires_grad_() for t in inputs.values())
    for r in (None, residual):
        torch.library.opcheck(torch.ops.fastgpt2.layer_norm.default, (x, weight, bias, r, 1e-5))
    _, s, *stats = (t.detach() for t in kernel.layer_norm_op(x, weight, bias, residual, 1e-5))
    dy = torch.randn_like(s)
    for after, needs in ((None, (True, False, True)), (dy * 2, (True, True, True))):
        arguments = (dy, after, s, weight.detach(), *stats, torch.bfloat16, *needs)
        torch.library.opcheck(torch.ops.fastgpt2.layer_norm_backward.default, arguments)


def test_second_derivatives_are_refused(triton_device: str) -> None:
    inputs = draw(24, 2, 3, device=triton_device)
    x, weight, bias, residual = (t.requires_grad_() for t in inputs.values())
    y, _ = ops.layer_norm(x, weight, bias, 1e-5, residual=residual, backend="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"layer_norm: .* no second derivatives; use backend='torch'"):
        grad.sum().backward()


def test_compiles_whole(triton_device: str, seed: int) -> None:
    """torch.compile(fullgraph=True) captures it without a graph break, with the same result as eager mode."""
    torch.manual_seed(seed)
    inputs = draw(24, 2, 3, device=triton_device)
    douts = [torch.randn(2, 3, 24, device=triton_device) for _ in range(2)]

    def f(**given: Tensor) -> tuple[Tensor, Tensor]:
        y, s = ops.layer_norm(**given, eps=1e-5, backend="triton")
        return ops.layer_norm(y, given["weight"], given["bias"], 1e-5, backend="triton"), s

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(gradients(g, inputs, douts, list(inputs)) for g in (f, compiled)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_reference_has_these_gradients() -> None:
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(reference.add_layer_norm, (x, residual, weight, bias, 1e-5))


def test_interpreted_offsets_past_31_bits(triton_device: str, seed: int) -> None:
    """Rows may be 2**31 elements apart. The memory between them is never touched."""
    torch.manual_seed(seed)
    store = torch.empty(2**31 + 400, dtype=torch.bfloat16, device=triton_device)
    x = store.as_strided((1, 2, 300), (0, 2**31 + 8, 1))
    x.copy_(torch.randn(1, 2, 300))
    weight, bias = torch.randn(2, 300, device=triton_device)
    inputs = {"x": x, "weight": weight, "bias": bias}
    compare(inputs, [torch.randn(1, 2, 300, device=triton_device)], ["x"], 1e-5, "far rows")


def test_interpreted_traffic(monkeypatch: pytest.MonkeyPatch, interpreter: str, seed: int) -> None:
    """x, residual and dy are read once; y, s and dx are written once; weight and bias are read once per program."""
    from fastgpt2_kernels.triton.layers import layer_norm as kernel

    torch.manual_seed(seed)
    inputs = draw(700, 1, 40, device="cpu", dtype=torch.bfloat16)
    out = kernel._empty_outputs(inputs["x"], inputs["residual"])
    monkeypatch.setattr(kernel, "_empty_outputs", lambda *_: out)
    with monkeypatch.context() as patch:
        traffic = Traffic(patch, **inputs, **out._asdict())
        kernel.layer_norm_forward(*inputs.values(), 1e-5)
        assert all((traffic.reads[name] == 1).all() for name in ("x", "residual"))
        assert (traffic.reads["weight"] <= 24).all()  # once per program, for 40 rows
        assert all((traffic.writes[name] == 1).all() for name in out._fields)
        assert not any(traffic.reads[name].any() for name in out._fields)
    grads = kernel._empty_gradients(out.s, inputs["weight"], torch.float32, True, True, True)
    monkeypatch.setattr(kernel, "_empty_gradients", lambda *_: grads)
    dy, after = (torch.randn(1, 40, 700, dtype=torch.bfloat16) for _ in range(2))
    needs = {"bias_dtype": torch.float32, "needs_ds": True, "needs_dweight": True, "needs_dbias": True}
    with monkeypatch.context() as patch:
        traffic = Traffic(patch, dy=dy, after=after, s=out.s, mean=out.mean, **grads._asdict())
        kernel.layer_norm_backward(dy, after, out.s, inputs["weight"], *out[2:], **needs)
        assert all((traffic.reads[name] == 1).all() for name in ("dy", "after", "s", "mean"))
        assert all((traffic.writes[name] == 1).all() for name in grads._fields)


# -- what is refused ---------------------------------------------------------------------------------------------------

X, W = torch.ones(3, 4), torch.ones(4)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"x": torch.tensor(1.0)}, r"x must be \(..., C\), weight and bias \(C,\); got \(\), \(4,\) and \(4,\)"),
    "no columns": ({"x": torch.ones(3, 0), "weight": W[:0], "bias": W[:0]}, r"got \(3, 0\), \(0,\) and \(0,\)"),
    "width": ({"weight": torch.ones(5)}, r"got \(3, 4\), \(5,\) and \(4,\)"),
    "weight of two dimensions": ({"weight": X}, r"got \(3, 4\), \(3, 4\) and \(4,\)"),
    "dtype": ({"x": X.int()}, r"x must be floating-point; got torch.int32 \(3, 4\)"),
    "device": ({"bias": W.to("meta")}, "one device; got x on cpu, weight on cpu, bias on meta"),
    "residual": ({"residual": X[:2]}, r"residual must have the shape of x \(3, 4\); got \(2, 4\)"),
    "eps": ({"eps": -1e-5}, "eps must be finite and >= 0; got -1e-05"),
    "eps not a number": ({"eps": math.nan}, "eps must be finite and >= 0; got nan"),
    "backend": ({"backend": "cuda"}, "'auto', 'triton', 'native', 'torch'; got 'cuda'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    wrong, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as raised:
        ops.layer_norm(**{"x": X, "weight": W, "bias": W, "eps": 1e-5, **wrong})
    assert "\n" not in str(raised.value)


def test_refused_float64(triton_device: str) -> None:
    x = torch.ones(3, 4, dtype=torch.float64, device=triton_device)
    with pytest.raises(ValueError, match="layer_norm: backend='triton' cannot be used: it computes in float32"):
        ops.layer_norm(x, x[0], x[0], 1e-5, backend="triton")
    assert ops.layer_norm(x, x[0], x[0], 1e-5).dtype == torch.float64


# -- mistakes made on purpose ------------------------------------------------------------------------------------------

SOURCE = Path(__file__).parents[2] / "kernels/fastgpt2_kernels/triton/layers/layer_norm.py"
MUTATIONS = {
    "masked lanes count for the mean's rest": (
        "        d = tl.where(mask, s - mean, 0.0)\n        left",
        "        d = s - mean\n        left",
    ),
    "one column past the row": ("mask = offs < C\n    weight", "mask = offs <= C\n    weight"),
    "eps outside the root": ("tl.sum(d * d, 0) / C + eps)", "tl.sum(d * d, 0) / C) + eps"),
    "unbiased variance": ("tl.sum(d * d, 0) / C", "tl.sum(d * d, 0) / (C - 1)"),
    "the mean keeps its rounding": ("left = tl.sum(d, 0) / C\n", "left = tl.sum(d, 0) * 0\n"),
    "the norm of the unrounded sum": ("s = rounded.to(tl.float32)", "s = s"),
    "x in place of the sum": ("ctx.save_for_backward(x if residual is None else s,", "ctx.save_for_backward(x,"),
    "mean(g) is left out": ("(g - tl.sum(g, 0) / C)", "g"),
    "mean(g h) is left out": ("- h * (tl.sum(g * h, 0) / C))", "- h * 0)"),
    "the gradient past the norm is left out": ("ds += tl.load(after_row", "ds += 0 * tl.load(after_row"),
    "dweight of the last row only": ("dweight += dy_n * h\n", "dweight = dy_n * h\n"),
    "dbias of the last row only": ("            dbias += dy_n\n    partial", "            dbias = dy_n\n    partial"),
    "dbias in dweight's place": ("partial + META.NEEDS_DW * C + offs, dbias", "partial + offs, dbias"),
    "rows of another batch": ("(n // T) * x.stride_b", "(n // T) * x.stride_t"),
    "long rows: a block's columns again": ("ds_row + offs", "ds_row + offs % BLOCK_C"),
    "long rows: the square of the mean": ("left = tl.sum(sums, 0) / C", "left = mean + tl.sum(sums, 0) / C"),
    "long rows: one block's sum of g h": ("sums_gh += g * h", "sums_gh = g * h"),
    "long rows: dweight without rstd": ("(d * tl.load(stats.rstd_ptr + n))", "d"),
}  # fmt: skip


HELD, LONG = ((130, torch.float32), (520, torch.bfloat16)), ((20000, torch.float32),)


def check(kernel: ModuleType, device: str, poison: Poison, cases: tuple[tuple[int, torch.dtype], ...]) -> None:
    """A few cases that reach every branch, through the operator and autograd."""
    torch.manual_seed(3)
    for C, dtype in cases:
        B, T = (1, 3) if C == 20000 else (2, 7)
        inputs = draw(C, B, T, device=device, dtype=dtype, mean=3e3 if C == 130 else 50.0)
        inputs["x"][0, 1] *= 0.01
        inputs = {name: lay_out(t, "padded") for name, t in inputs.items()}  # room for mistakes
        inputs |= {name: inputs[name].clone() for name in ("weight", "bias")}
        douts = [torch.randn(B, T, C, device=device).to(dtype) for _ in range(2)]

        def mine(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return kernel.layer_norm_op(x, weight, bias, residual, 1e-3)[:2]

        hold(mine, inputs, douts, list(inputs), 1e-3, f"C {C}")
        got = gradients(mine, inputs, douts, list(inputs))
        s = got[1].double()
        doubles = {**{name: t.double() for name, t in inputs.items()}, "x": s, "residual": s * 0}
        exact = gradients(functools.partial(exactly, eps=1e-3), doubles, [d.double() for d in douts], ["x"])
        for a, b in zip((got[0], got[2]), (exact[0], exact[2]), strict=True):  # every row of y and dx
            assert ((a.double() - b).abs().amax(-1) < 0.02 * b.abs().amax(-1)).all()
        if C == 130:
            torch.testing.assert_close(got[0].double(), exact[0], rtol=2e-5, atol=2e-5)
        assert poison.is_intact()


def test_interpreted_as_it_is(tmp_path: Path, interpreter: str, poison: Poison) -> None:
    check(load(SOURCE, tmp_path), interpreter, poison, HELD + LONG)


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_interpreted_mistake_is_caught(
    mistake: str, tmp_path: Path, interpreter: str, poison: Poison
) -> None:  # fmt: skip
    old, new = MUTATIONS[mistake]
    kernel = load(SOURCE, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check(kernel, interpreter, poison, LONG if mistake.startswith("long rows") else HELD)
