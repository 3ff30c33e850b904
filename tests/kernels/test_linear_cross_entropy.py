"""The linear cross-entropy, on the kernel and on PyTorch's operators.

It is tested against float64 with random combinations of its options, for how much it computes and how much memory it
takes, and as a PyTorch operator.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastgpt2_kernels import linear_cross_entropy as linear
from fastgpt2_kernels import ops
from tests.helpers import assert_close, assert_rms_within_budget, assert_within_budget
from tests.kernels.losses import as_the_oracle_sees, plain_cross_entropy, shifted

# Triton's interpreter computes NaN and inf in lanes that are masked away.
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning", "ignore:divide by zero:RuntimeWarning"
)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        request.getfixturevalue("triton_device")
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_case(rng: random.Random, dtype: torch.dtype) -> dict[str, Any]:
    """A random case. Among few elements the largest error is luck, so small cases, for borders, are in float64."""
    tiny = dtype == torch.float64
    V = rng.choice([1, 2, 7, 64] if tiny else [64, 130, 257, 1031])
    reduction = rng.choice(["mean", "mean", "sum", "none"])
    logit_scale = rng.choice([1.0, 1.0, 0.25, 3.0])
    return {
        "B": rng.choice([0, 1, 2] if tiny else [1, 3]),
        "T": rng.choice([0, 1, 2, 5] if tiny else [16, 23]),
        "C": rng.choice([1, 5, 16] if tiny else [16, 33]),
        "V": V,
        "dtype": dtype,
        "reduction": reduction,
        "num_items": rng.choice([None, 3, 7.0]) if reduction == "mean" else None,
        "ignore_index": rng.choice([-100, 0, V - 1, -1, V + 3]),
        "label_smoothing": rng.choice([0.0, 0.0, 0.1, 0.7]),
        "z_loss": rng.choice([0.0, 0.0, 1e-2]),
        "weighted": rng.random() < 0.3,
        "logit_scale": logit_scale,
        "bias": rng.random() < 0.4,
        "frozen": rng.sample(["x", "weight", "bias"], rng.choice([0, 0, 1, 2])),
        # PyTorch computes a product with one row as a matrix-vector product, which sums in another, less exact order.
        "chunk_rows": rng.choice([None, 1, 4, 100] if tiny else [None, 8, 33, 100]),
        # With logits in the hundreds, the error depends on the luck of one row in which two classes are close.
        "scale": rng.choice([0.1, 1.0, 8.0]) / max(1.0, logit_scale),
        "int32": rng.random() < 0.3,
        "offset": rng.choice([0, 1]),  # tensors that begin at element 1 of their storage
        "ignored": rng.choice([0.0, 0.3, 1.0]),
        "shift": rng.random() < 0.3,
        "accumulate": rng.random() < 0.3,
    }


def tensors_of(case: dict[str, Any], seed: int, device: str) -> tuple[dict[str, Tensor], Tensor, Tensor | None, Tensor]:
    """The inputs by name, the targets, the class weights, and the gradient of the loss."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        flat = torch.randn(torch.Size(shape).numel() + case["offset"], generator=generator).to(case["dtype"])
        return flat.to(device)[case["offset"] :].view(shape)

    B, T, C, V = (case[name] for name in "BTCV")
    inputs = {"x": draw(B, T, C) * case["scale"], "weight": draw(V, C)}
    if case["bias"]:
        inputs["bias"] = draw(V)
    inputs = {name: t.detach().requires_grad_(name not in case["frozen"]) for name, t in inputs.items()}
    targets = torch.randint(V, (B, T), generator=generator)
    targets = targets.masked_fill(torch.rand(B, T, generator=generator) < case["ignored"], case["ignore_index"])
    targets = targets.to(device, torch.int32 if case["int32"] else torch.int64)
    class_weight = (torch.rand(V, generator=generator) + 0.1).to(device) if case["weighted"] else None
    grad_output = torch.randn((B, T) if case["reduction"] == "none" else (), generator=generator).to(device)
    return inputs, targets, class_weight, grad_output


def with_grads(loss: Tensor, inputs: dict[str, Tensor], grad_output: Tensor | None = None) -> dict[str, Tensor]:
    wanted = {name: t for name, t in inputs.items() if t.requires_grad}
    grad_output = None if grad_output is None else grad_output.to(loss.dtype)
    grads = torch.autograd.grad(loss, list(wanted.values()), grad_output) if wanted else ()
    return {"loss": loss.detach(), **dict(zip(wanted, grads, strict=True))}


def plain_loss(inputs: dict[str, Tensor], targets: Tensor, class_weight: Tensor | None, case: dict[str, Any]) -> Tensor:
    logits = case["logit_scale"] * F.linear(inputs["x"], inputs["weight"], inputs.get("bias"))
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    targets = shifted(targets, case["ignore_index"]) if case["shift"] else targets
    names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "num_items")
    return plain_cross_entropy(logits, targets, wide=wide, class_weight=class_weight, **{n: case[n] for n in names})


def plain_in_several_orders(
    inputs: dict[str, Tensor], targets: Tensor, class_weight: Tensor | None, case: dict[str, Any], grad_output: Tensor
) -> list[dict[str, Tensor]]:
    """The plain expression's loss and gradients, for three orders of summing over C.

    With only one order, a row of large logits could make the error a matter of luck.
    """
    C = inputs["x"].shape[-1]
    results = []
    for order in (
        torch.arange(C),
        torch.arange(C).flip(0),
        torch.randperm(C, generator=torch.Generator().manual_seed(0)),
    ):
        order, back = order.to(targets.device), order.argsort().to(targets.device)
        leaves = {
            name: (t.detach() if name == "bias" else t.detach()[..., order]).requires_grad_(t.requires_grad)
            for name, t in inputs.items()
        }
        result = with_grads(plain_loss(leaves, targets, class_weight, case), leaves, grad_output)
        results.append({name: t[..., back] if name in ("x", "weight") else t for name, t in result.items()})
    return results


def check(case: dict[str, Any], seed: int, backend: str, device: str) -> None:
    inputs, targets, class_weight, grad_output = tensors_of(case, seed, device)
    wide = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    num_items = case["num_items"]
    names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "logit_scale", "shift", "chunk_rows")
    loss = ops.linear_cross_entropy(
        inputs["x"], inputs["weight"], targets, inputs.get("bias"), class_weight=class_weight,
        num_items_in_batch=torch.tensor(num_items) if isinstance(num_items, float) else num_items,
        accumulate_into_grad=case["accumulate"], backend=backend, **{name: case[name] for name in names},
    )  # fmt: skip
    got = with_grads(loss, inputs, grad_output)
    plains = plain_in_several_orders(inputs, targets, class_weight, case, grad_output)
    exact = with_grads(plain_loss(wide, targets, class_weight, case), wide, grad_output)
    dtype = case["dtype"]
    assert got["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if exact["loss"].isnan().all():  # a mean over no rows
        assert got.pop("loss").isnan().all()
        assert not any(gradient.any() for gradient in got.values()), f"{case}: a gradient although no row counts"
        return
    for name, c in exact.items():
        a = as_the_oracle_sees(got[name])
        if dtype == torch.float64:
            assert_close(a, c, f"{case}: {name}", 1e-7 if case["weighted"] or num_items else 1e-9)  # float32 divisors
        elif name == "loss":
            assert_within_budget(a, [plain[name] for plain in plains], c, f"{case}: {name}", dtype=dtype)
        else:
            assert_rms_within_budget(a, [plain[name] for plain in plains], c, f"{case}: gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_random_cases(seed: int, dtype: torch.dtype, backend: str, device: str) -> None:
    """Loss and every gradient are within the budget. `test_cross_entropy.py` has the cases of the kernel alone."""
    if dtype == torch.float64 and backend == "triton":
        with pytest.raises(ValueError, match="backend='triton' cannot be used: it computes in float32; got float64"):
            check(random_case(random.Random(seed), dtype), seed, backend, device)
        return
    rng = random.Random(seed)
    for i in range(80 if backend == "torch" else 10):
        check(random_case(rng, dtype), seed + i, backend, device)


def draw(seed: int, device: str, N: int = 37, C: int = 24, V: int = 131, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, C, generator=generator).to(device, dtype).requires_grad_() for n in (N, V))
    return x, weight, torch.randint(V, (N,), generator=generator).to(device)


# -- numbers that are hard to get right --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [50.0, 1e4, 1e18])
def test_confident_rows_and_huge_logits(seed: int, scale: float, backend: str, device: str) -> None:
    x, weight, targets = draw(seed, device, N=8, C=4, V=9)
    x = (x.detach() * scale).requires_grad_()
    targets = (x @ weight.T).argmax(-1)  # the class that is almost certain
    targets[::2] = 3
    inputs = {"x": x, "weight": weight}
    got = with_grads(ops.linear_cross_entropy(x, weight, targets, backend=backend), inputs)
    plain = with_grads(F.cross_entropy(x @ weight.T, targets), inputs)
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    exact = with_grads(F.cross_entropy(wide["x"] @ wide["weight"].T, targets), wide)
    for name, value in exact.items():
        assert_within_budget(got[name], plain[name], value, name)


@pytest.mark.parametrize("probability", [0.999, 1 - 1e-6])
def test_the_gradient_of_a_probability_next_to_one(probability: float, backend: str, device: str) -> None:
    """The gradient is p - 1, which would be lost if p were rounded first."""
    V = 300
    logit = torch.tensor(probability / (1 - probability) * (V - 1), dtype=torch.float64).log().float()
    weight = torch.zeros(V, 1, device=device)
    weight[3] = logit
    targets = torch.full((2,), 3, device=device)

    def gradient(dtype: torch.dtype, loss: Callable[..., Tensor]) -> Tensor:
        x = torch.ones(2, 1, device=device, dtype=dtype, requires_grad=True)
        return with_grads(loss(x, weight.to(dtype)), {"x": x})["x"]

    got = gradient(torch.float32, lambda x, w: ops.linear_cross_entropy(x, w, targets, backend=backend))
    plain, exact = (gradient(d, lambda x, w: F.cross_entropy(x @ w.T, targets)) for d in (torch.float32, torch.float64))
    assert (got < 0).all()
    assert_within_budget(got, plain, exact)


def test_classes_masked_by_minus_infinity(seed: int, backend: str, device: str) -> None:
    """A bias of -inf masks classes of a vocabulary."""
    x, weight, targets = draw(seed, device)
    bias = torch.zeros(131, device=device)
    bias[64:] = -torch.inf
    inputs = {"x": x, "weight": weight}
    got = with_grads(ops.linear_cross_entropy(x, weight, targets % 64, bias, backend=backend), inputs)
    plain = with_grads(F.cross_entropy(F.linear(x, weight, bias), targets % 64), inputs)
    for name, value in plain.items():
        torch.testing.assert_close(got[name], value, msg=name)
    assert not got["weight"][64:].any()


def test_float16_under_a_loss_scale(seed: int, backend: str, device: str) -> None:
    """With many rows and a large vocabulary, p / N would underflow in float16. A loss scale prevents this."""
    x, weight, targets = draw(seed, device, N=256, C=8, V=2100, dtype=torch.float16)
    weight = (weight.detach() * 0.1).requires_grad_()
    inputs = {"x": x, "weight": weight}
    scale = torch.tensor(65536.0, device=device)
    got = with_grads(ops.linear_cross_entropy(x, weight, targets, backend=backend), inputs, scale)
    plain = with_grads(F.cross_entropy((x @ weight.T).float(), targets), inputs, scale)
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    exact = with_grads(F.cross_entropy(wide["x"] @ wide["weight"].T, targets), wide, scale)
    for name, value in exact.items():
        assert_rms_within_budget(got[name], [plain[name]], value, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_bits_are_lost_over_the_chunks(seed: int, dtype: torch.dtype, backend: str, device: str) -> None:
    """The error must be that of a single product of all rows. A half-precision sum of 50 chunks would stop growing."""
    x, weight, targets = draw(seed, device, N=400, C=16, V=64, dtype=dtype)
    x = (x.detach() + 3).requires_grad_()  # so that the terms of a sum have the same sign, as for a frequent token
    targets = targets % 4
    inputs = {"weight": weight}
    got = with_grads(
        ops.linear_cross_entropy(x, weight, targets, chunk_rows=8, reduction="sum", backend=backend), inputs
    )
    plain = with_grads(F.cross_entropy((x @ weight.T).float(), targets, reduction="sum"), inputs)
    wide = {"weight": weight.detach().double().requires_grad_()}
    exact = with_grads(F.cross_entropy(x.double() @ wide["weight"].T, targets, reduction="sum"), wide)
    assert_rms_within_budget(got["weight"], [plain["weight"]], exact["weight"])


# -- what counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("empty", ["nan", "zero"])
def test_nothing_counted(reduction: str, empty: str, backend: str, device: str) -> None:
    """As in F.cross_entropy, the mean over no rows is NaN, unless empty="zero". The gradients are zero."""
    x, weight, targets = draw(0, device, N=4, C=3, V=5)
    loss = ops.linear_cross_entropy(x, weight, targets * 0 - 100, reduction=reduction, empty=empty, backend=backend)
    assert loss.isnan().all() == (reduction == "mean" and empty == "nan")
    assert not loss.nan_to_num().any()
    loss.sum().backward()
    assert not x.grad.any()
    assert not weight.grad.any()


def test_num_items_is_transformers_normalisation(seed: int, backend: str, device: str) -> None:
    """Two unequal batches, each divided by the items of both, give the loss and gradients of one joint batch."""
    x, weight, targets = draw(seed, device)
    targets[::3] = -100
    whole = with_grads(ops.linear_cross_entropy(x, weight, targets, backend=backend), {"x": x, "weight": weight})
    items = (targets != -100).sum()
    loss = sum(
        ops.linear_cross_entropy(x[part], weight, targets[part], num_items_in_batch=items, backend=backend)
        for part in (slice(0, 8), slice(8, None))
    )
    parts = with_grads(loss, {"x": x, "weight": weight})
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, msg=name)


@pytest.mark.parametrize("bad", [131, 2**40, -1])
def test_bad_targets_are_nan_or_raise(seed: int, bad: int, backend: str, device: str) -> None:
    x, weight, targets = draw(seed, device)
    targets[7] = bad
    loss = ops.linear_cross_entropy(x, weight, targets, reduction="none", check_targets=False, backend=backend)
    assert loss.isnan().nonzero().flatten().tolist() == [7]
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert dx.isnan().any(-1).nonzero().flatten().tolist() == [7]
    with pytest.raises(ValueError, match=rf"targets must be in \[0, 131\) or ignore_index=-100; got {bad} in row 7"):
        ops.linear_cross_entropy(x, weight, targets, check_targets=True, backend=backend)
    look = ops.TargetCheck(device)
    ops.linear_cross_entropy(x, weight, targets.clamp(0, 130), check_targets=look, backend=backend)
    look.raise_if_bad()
    ops.linear_cross_entropy(x, weight, targets, check_targets=look, backend=backend)
    with pytest.raises(ValueError, match="neither ignore_index nor in"):
        look.raise_if_bad()


# -- what it computes and holds ----------------------------------------------------------------------------------------


def test_the_chunk_rule() -> None:
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert linear.chunk_rows(8192, 50257, device) <= 8192 // 16
        assert linear.chunk_rows(10**6, 262144, device) <= 2048
        assert linear.chunk_rows(3, 50257, device) == 3
        assert linear.chunk_rows(0, 50257, device) == 1
    assert linear.chunk_rows(32768, 50257, torch.device("cuda")) == 2048


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_a_large_weight_on_a_cpu(seed: int, scale: float) -> None:
    """oneDNN computes the logits of a weight of this size. They keep the 2x rule, with an odd vocabulary."""
    torch.manual_seed(seed)
    N, C, V = 40, 512, 2051
    assert linear._use_onednn(torch.zeros(N, C), torch.zeros(V, C), None)
    x, weight, bias = torch.randn(N, C), torch.randn(V, C) / 16, torch.randn(V)
    targets = torch.randint(V, (N,))

    def results(of, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        loss = of(*inputs)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, weight, bias) * scale, targets)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x, weight, targets, bias, logit_scale=scale, backend="torch")

    found = (results(ours, torch.float32), results(plain, torch.float32), results(plain, torch.float64))
    for name, got, rounded, exact in zip(("loss", "x", "weight", "bias"), *found, strict=True):
        assert_rms_within_budget(got, [rounded], exact, name)


def test_few_numbers_of_rows_are_compiled_for_a_large_weight(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are padded to few counts, because oneDNN keeps half a megabyte for each. The loss does not change."""
    monkeypatch.setattr(linear, "ONEDNN_NUMBERS", 0)
    torch.manual_seed(seed)
    weight = torch.randn(13, 8)
    found: list[int] = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.mkldnn._linear_pointwise.default:
                found.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    for rows in random.Random(seed).sample(range(1, 513), 150):
        x, targets = torch.randn(rows, 8), torch.randint(13, (rows,))
        plain, exact = (
            F.cross_entropy(x.to(dtype) @ weight.t().to(dtype), targets) for dtype in (x.dtype, torch.float64)
        )
        with Counter():
            loss = ops.linear_cross_entropy(x, weight, targets, backend="torch")
        assert rows <= found[-1] <= 1.125 * rows
        assert_within_budget(loss, plain, exact)
    assert len(found) == 150
    assert len(set(found)) <= 56


@pytest.mark.parametrize(
    ("needed", "products"), [("", 1), ("x", 2), ("weight", 2), ("bias", 1), ("x weight", 3), ("x weight bias", 3)]
)
def test_no_work_for_what_needs_no_gradient(seed: int, needed: str, products: int) -> None:
    """Only the needed matrix products are computed."""
    x, weight, targets = draw(seed, "cpu", N=64, C=8, V=50)
    x, weight, bias = x.detach(), weight.detach(), torch.zeros(50)
    options = linear.LossOptions(-100, 0.0, 0.0, 1.0, 16, torch.float32, False)
    names = needed.split()
    grads = linear._new_gradients(x, weight, [name in names for name in ("x", "weight", "bias")], torch.float32)
    # PyTorch's counter does not know oneDNN's product. The shapes are those of x (n, k) and weight (v, k).
    onednn = {torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * x[0] * x[1] * weight[0]}
    with FlopCounterMode(display=False, custom_mapping=onednn) as counter:
        linear.loss_chunks(x, weight, bias, targets, None, torch.ones(64), grads if needed else None, options)
    assert counter.get_total_flops() == products * 2 * 64 * 8 * 50


def test_frozen_inputs_need_nothing(seed: int, backend: str, device: str) -> None:
    x, weight, targets = draw(seed, device)
    for frozen, other in ((x, weight), (weight, x)):
        frozen.requires_grad_(False)
        with_grads(ops.linear_cross_entropy(x, weight, targets, backend=backend), {"other": other})
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert not ops.linear_cross_entropy(x, weight, targets, backend=backend).requires_grad


def test_no_host_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values pass through forward and backward, so nothing there waits for a value."""
    x = torch.randn(40, 8, device="meta")
    weight = torch.randn(50, 8, device="meta")
    targets = torch.zeros(40, dtype=torch.int64, device="meta")
    row_grad, class_weight = torch.ones(40, device="meta"), torch.ones(50, device="meta")
    ops.TargetCheck("meta").look(targets, 50, -100, False)
    logits = torch.randn(2, 20, 50, device="meta", requires_grad=True)
    for options in (
        {"shift": True, "z_loss": 0.1, "return_stats": True},
        {"class_weight": class_weight, "empty": "zero"},
    ):
        loss = ops.cross_entropy(logits, targets.view(2, 20), backend="torch", **options)
        (loss[0] if isinstance(loss, tuple) else loss).backward()
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know this device
    backends = [False]
    if pytest.importorskip("triton"):
        from fastgpt2_kernels.triton import cross_entropy as kernel

        class Launched(dict):
            def __missing__(self, grid: object) -> Callable[..., None]:
                return lambda **arguments: None

        for name in ("_cross_entropy_kernel", "_scale_rows_kernel"):
            monkeypatch.setattr(kernel, name, Launched())
        backends.append(True)
    for use_triton in backends:
        options = linear.LossOptions(-100, 0.1, 1e-3, 2.0, 16, torch.float32, use_triton)
        grads = linear._new_gradients(x, weight, (True, True, True), torch.float32)
        linear.loss_chunks(x, weight, weight[:, 0], targets, class_weight, row_grad, grads, options)
        linear.scale_(grads.weight, torch.ones((), device="meta"), use_triton)


def test_inputs_are_left_alone(seed: int, backend: str, device: str) -> None:
    x, weight, targets = draw(seed, device)
    copies = [t.detach().clone() for t in (x, weight, targets)]
    loss = ops.linear_cross_entropy(x, weight, targets, backend=backend)
    loss.backward()
    assert all(torch.equal(t, copy) for t, copy in zip((x, weight, targets), copies, strict=True))


# -- autograd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1, "logit_scale": 0.7}], ids=str)
def test_gradcheck(seed: int, options: dict[str, float]) -> None:
    """The reduction is "none", because gradcheck runs backward several times, which no other reduction allows."""
    x, weight, _ = draw(seed, "cpu", N=5, C=3, V=7, dtype=torch.float64)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, -100, 3, 3])

    def loss(*tensors: Tensor) -> Tensor:
        return ops.linear_cross_entropy(
            tensors[0], tensors[1], targets, tensors[2], reduction="none", chunk_rows=2, **options
        )

    assert torch.autograd.gradcheck(loss, (x, weight, bias))


def test_a_second_backward_raises(seed: int, backend: str, device: str) -> None:
    x, weight, targets = draw(seed, device)
    loss = ops.linear_cross_entropy(x, weight, targets, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward can run only once for each loss"):
        loss.backward()


def test_the_first_gradient_is_not_copied(seed: int, device: str) -> None:
    """The (V, C) gradient of the forward pass becomes `weight.grad` itself."""
    x, weight, targets = draw(seed, device)
    loss = ops.linear_cross_entropy(x, weight, targets)
    pointer = loss.grad_fn.grads[1].data_ptr()
    (loss / 3).backward()
    assert weight.grad.data_ptr() == pointer


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_accumulating_into_grad(seed: int, reduction: str, backend: str, device: str) -> None:
    """The gradient is added in place to the existing tensor. With tied weights, so is the embedding's gradient."""
    x, weight, targets = draw(seed, device)
    ids = targets.clone()

    def step(**options: bool) -> None:
        hidden = F.embedding(ids, weight) + x
        ops.linear_cross_entropy(
            hidden, weight, targets, reduction=reduction, backend=backend, **options
        ).sum().backward()

    for _ in range(3):
        step()
    expected = x.grad, weight.grad
    x.grad = weight.grad = None
    step(accumulate_into_grad=True)
    there = weight.grad
    for _ in range(2):
        step(accumulate_into_grad=True)
    assert weight.grad is there
    torch.testing.assert_close((x.grad, weight.grad), expected)


def test_accumulating_makes_no_second_gradient(seed: int, backend: str, device: str) -> None:
    x, weight, targets = draw(seed, device)
    weight.grad = torch.ones_like(weight)
    x.requires_grad_(False)
    loss = ops.linear_cross_entropy(x, weight, targets, accumulate_into_grad=True, backend=backend)
    assert torch.autograd.grad(loss, weight, allow_unused=True) == (None,)
    torch.testing.assert_close(
        weight.grad.sum(), torch.tensor(1.0, device=device) * weight.numel()
    )  # each row of dZ sums to 0


def test_accumulating_into_half_precision_is_a_plain_gradient(seed: int, backend: str, device: str) -> None:
    """A bfloat16 `.grad` is not exact enough for a sum over chunks, so the gradient is returned as usual."""
    x, weight, targets = draw(seed, device, dtype=torch.bfloat16)
    ops.linear_cross_entropy(x, weight, targets, chunk_rows=8, backend=backend).backward()
    once = weight.grad.clone()
    ops.linear_cross_entropy(x, weight, targets, chunk_rows=8, accumulate_into_grad=True, backend=backend).backward()
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_gradient_checkpointing(
    seed: int, use_reentrant: bool, reduction: str, backend: str, device: str
) -> None:
    x, weight, targets = draw(seed, device)

    def loss(hidden: Tensor) -> Tensor:
        return ops.linear_cross_entropy(hidden * 2, weight, targets, reduction=reduction, backend=backend).sum()

    plain = torch.autograd.grad(loss(x), (x, weight))
    x.grad = weight.grad = None
    checkpoint(loss, x, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close((x.grad, weight.grad), plain)


def test_under_autocast(seed: int, backend: str, device: str) -> None:
    """All products, also those of backward, run in the autocast dtype. The gradients have the dtypes of the inputs."""
    x, weight, targets = draw(seed, device)
    inputs = {"x": x, "weight": weight}
    full = with_grads(ops.linear_cross_entropy(x, weight, targets, backend=backend), inputs)
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    exact = with_grads(F.cross_entropy(wide["x"] @ wide["weight"].T, targets), wide)
    for reduction in ("mean", "none"):
        with torch.autocast(device, torch.bfloat16):
            loss = ops.linear_cross_entropy(x, weight, targets, reduction=reduction, backend=backend)
            got = with_grads(loss.mean(), inputs)
            plain = with_grads(F.cross_entropy(F.linear(x, weight).float(), targets), inputs)
        got["loss"] = loss.detach().mean()
        assert not torch.equal(got["loss"], full["loss"])
        for name, value in exact.items():
            assert got[name].dtype == torch.float32
            assert_within_budget(got[name], plain[name], value, name, dtype=torch.bfloat16)


# -- as a PyTorch operator ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(seed: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x, weight, targets = draw(seed, device, N=5, C=4, V=9, dtype=dtype)
    bias = torch.randn(9, device=device, dtype=dtype, requires_grad=True)
    options = (-100, 0.1, 1e-3, 2.0, 2, dtype, backend == "triton")
    rows = (x, weight, bias, targets, torch.rand(9, device=device), *options)
    torch.library.opcheck(linear.linear_cross_entropy_rows_op, rows)
    divisor = torch.tensor(3.0, device=device)
    for needs in ((True, True, True), (False, True, False)):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((x, weight, bias), needs, strict=True)]
        torch.library.opcheck(linear.linear_cross_entropy_op, (*leaves, targets, divisor, None, *options, *needs))
        arguments = (torch.rand(5, device=device), *(t.detach() for t in leaves), targets, None, *options, *needs)
        torch.library.opcheck(linear.linear_cross_entropy_rows_backward_op, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole(seed: int, reduction: str, backend: str, device: str) -> None:
    """torch.compile(fullgraph=True) captures it without a graph break, with the same result as eager mode."""
    x, weight, targets = draw(seed, device, N=12)
    inputs = {"x": x, "weight": weight}

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_cross_entropy(
            x.view(2, 6, -1) * 2, weight, targets.view(2, 6), shift=True, reduction=reduction, chunk_rows=5,
            z_loss=1e-3, backend=backend,
        ).sum()  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = with_grads(loss(x, weight), inputs), with_grads(compiled(x, weight), inputs)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight), expected["loss"])


def test_runs_are_bitwise_equal(seed: int, backend: str, device: str) -> None:
    x, weight, targets = draw(seed, device)
    inputs = {"x": x, "weight": weight}
    runs = [with_grads(ops.linear_cross_entropy(x, weight, targets, backend=backend), inputs) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


# -- what is refused ---------------------------------------------------------------------------------------------------

X, W, IDS = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "x of 1 dimension": ((X[0], W, IDS), {}, r"x must be \(N, C\) or \(B, T, C\) and weight \(V, C\); got \(4,\)"),
    "x and weight differ": ((X, W[:, :3], IDS), {}, r"got \(3, 4\) and \(5, 3\)"),
    "no vocabulary": ((X, W[:0], IDS), {}, r"got \(3, 4\) and \(0, 4\)"),
    "integers as x": ((X.long(), W.long(), IDS), {}, "must be floating-point; got torch.int64"),
    "two dtypes": ((X, W.double(), IDS), {}, "one dtype; got x torch.float32, weight torch.float64"),
    "two devices": ((X, W.to("meta"), IDS), {}, "one device; got x on cpu, weight on meta"),
    "targets elsewhere": ((X, W, IDS.to("meta")), {}, "one device; got x on cpu, targets on meta"),
    "targets of another shape": ((X, W, IDS[:2]), {}, r"targets must have shape \(3,\) as x; got \(2,\)"),
    "targets as floats": ((X, W, IDS.float()), {}, "targets must be int64 or int32; got torch.float32"),
    "a target past the vocabulary": ((X, W, IDS + 5), {}, "got 5 in row 0"),
    "a negative target": ((X, W, IDS - 1), {}, "got -1 in row 0"),
    "a bias of another size": ((X, W, IDS, W[:4, 0]), {}, r"bias must be \(5,\); got \(4,\)"),
    "class weights of another size": (
        (X, W, IDS),
        {"class_weight": X[0]},
        r"class_weight must be floating-point \(5,\)",
    ),
    "a reduction": ((X, W, IDS), {"reduction": "avg"}, "reduction must be one of mean, sum, none; got 'avg'"),
    "label smoothing of 1": ((X, W, IDS), {"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\); got 1.0"),
    "negative z-loss": ((X, W, IDS), {"z_loss": -1.0}, "z_loss must be finite and >= 0; got -1.0"),
    "an infinite scale": ((X, W, IDS), {"logit_scale": float("inf")}, "logit_scale must be finite; got inf"),
    "empty": ((X, W, IDS), {"empty": "one"}, "empty must be 'nan' or 'zero'; got 'one'"),
    "shift without rows": ((X, W, IDS), {"shift": True}, r"shift=True needs x of shape \(B, T, C\)"),
    "no items": ((X, W, IDS), {"num_items_in_batch": 0}, "num_items_in_batch must be >= 1, or a tensor .*; got 0"),
    "items of a sum": ((X, W, IDS), {"num_items_in_batch": 2, "reduction": "sum"}, "needs reduction .mean.; got .sum."),
    "many items": ((X, W, IDS), {"num_items_in_batch": X[0]}, r"a tensor of one element; got torch.float32 \(4,\)"),
    "chunks of no rows": ((X, W, IDS), {"chunk_rows": 0}, "chunk_rows must be >= 1; got 0"),
    "no leaf to accumulate in": (
        (X, (W * 1).requires_grad_() * 1, IDS),
        {"accumulate_into_grad": True},
        "accumulate_into_grad needs a leaf tensor as weight",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    arguments, options, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as raised:
        ops.linear_cross_entropy(*arguments, **options)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("linear_cross_entropy: ")
