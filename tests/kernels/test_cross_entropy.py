"""The cross-entropy kernel against float64, with random combinations of its options; and as a PyTorch operator."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F

from fastgpt2_kernels import ops
from tests.helpers import assert_within_budget, parts
from tests.kernels.losses import as_the_oracle_sees, plain_cross_entropy, shifted
from tests.kernels.traffic import Traffic

CANARY = -7.5
VOCABULARIES = [1, 2, 5, 17, 100, 255, 257, 1030, 2100, 5000, 9001]
# Triton's interpreter computes NaN and inf in lanes that are masked away.
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning", "ignore:divide by zero:RuntimeWarning"
)


def random_case(rng: random.Random) -> dict:
    V = rng.choice(VOCABULARIES)
    reduction = rng.choice(["mean", "sum", "none"])
    return {
        "shape": (rng.choice([1, 2, 3]), rng.choice([1, 2, 5]), V),
        "dtype": rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
        "padding": rng.choice([0, 0, 1, 8, 13]),
        "offset": rng.choice([0, 0, 1, 8]),
        "scale": rng.choice([1.0, 5.0, 30.0]),
        "target_dtype": rng.choice([torch.int64, torch.int32]),
        "ignored": rng.choice([0.0, 0.3]),
        "ignore_index": rng.choice([-100, 0, V - 1, 7, -(2**40)]),
        "reduction": reduction,
        "label_smoothing": rng.choice([0.0, 0.0, 0.1]),
        "z_loss": rng.choice([0.0, 0.0, 1e-2]),
        "weighted": rng.random() < 0.3,
        "shift": rng.random() < 0.3,
        "mode": rng.choice(["two-pass", "inplace"] + ["fused"] * (reduction != "none")),
    }


def check(case: dict, device: str) -> None:
    B, T, V = case["shape"]
    dtype = case["dtype"]
    # The logits lie in the middle of a larger buffer, with any alignment and row stride, and canaries around every row.
    width = case["offset"] + V + case["padding"]
    buffer = torch.full((B, T, width), CANARY, dtype=dtype)
    at = slice(case["offset"], case["offset"] + V)
    buffer[..., at] = (torch.randn(B, T, V) * case["scale"]).to(dtype)
    buffer = buffer.to(device)
    # Targets are views shifted by one element, so they are not aligned to 16 bytes.
    store = torch.randint(0, V, (B, T + 1)).to(case["target_dtype"])
    ignore_index = case["ignore_index"] if case["target_dtype"] == torch.int64 else max(case["ignore_index"], -100)
    store[torch.rand(B, T + 1) < case["ignored"]] = ignore_index
    targets = store.to(device)[:, 1:]
    class_weight = (torch.rand(V) + 0.1).to(device) if case["weighted"] else None
    options = {key: case[key] for key in ("reduction", "label_smoothing", "z_loss")}

    own = targets
    if case["shift"]:
        own = shifted(targets, ignore_index)
    if case["reduction"] == "mean" and not (own != ignore_index).any():
        return  # the result is NaN, which `test_nothing_to_count` tests

    def run(wide, use_kernel):
        leaf = buffer.clone().requires_grad_()
        logits = (leaf * 1)[..., at]
        if use_kernel:
            loss = ops.cross_entropy(
                logits, targets, ignore_index=ignore_index, class_weight=class_weight, shift=case["shift"],
                fuse_backward=case["mode"] == "fused", inplace_backward=case["mode"] == "inplace",
                backend="triton", **options,
            )  # fmt: skip
        else:
            loss = plain_cross_entropy(
                logits, own, ignore_index=ignore_index, class_weight=class_weight, wide=wide, **options
            )
        dloss = torch.randn(loss.shape, generator=torch.Generator().manual_seed(5)).to(device)
        loss.backward(dloss.to(loss.dtype))
        if use_kernel and case["mode"] == "inplace" and case["padding"] + case["offset"]:
            outside = torch.cat((leaf.grad[..., : at.start], leaf.grad[..., at.stop :]), -1)
            assert not outside.any(), "a gradient outside the logits"
        return loss.detach(), leaf.grad[..., at].detach()

    loss, grad = run(None, True)
    # In half precision the plain expression works like F.cross_entropy: float32 inside, the gradient rounded once.
    plain_loss, plain_grad = run(torch.float32, False)
    exact_loss, exact_grad = run_exact(buffer, at, own, ignore_index, class_weight, options, device)
    assert_within_budget(as_the_oracle_sees(loss), plain_loss, exact_loss, f"loss of {case}")
    # In float64, 1 - p of a nearly certain target may be 0. The kernel never computes 1 - p, so it keeps its bits.
    floor = 4 * torch.finfo(torch.float64).eps
    assert_within_budget(as_the_oracle_sees(grad), plain_grad, exact_grad, f"gradient of {case}", floor=floor)


def run_exact(buffer, at, own, ignore_index, class_weight, options, device):
    leaf = buffer[..., at].double().requires_grad_()
    loss = plain_cross_entropy(
        leaf, own, ignore_index=ignore_index, class_weight=class_weight, wide=torch.float64, **options
    )
    dloss = torch.randn(loss.shape, generator=torch.Generator().manual_seed(5)).to(device)
    loss.backward(dloss.double())
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("part", parts(5))
def test_random_cases(triton_device, seed, part):
    """The 2x rule holds for loss and gradient in 5 x 64 random cases (a fifth where every launch is checked twice)."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    for _ in range(64):
        check(random_case(rng), triton_device)


@pytest.mark.parametrize("probability", [0.5, 0.7, 0.99, 0.999, 1 - 1e-6, 1 - 1e-10])
@pytest.mark.parametrize("mode", [{}, {"fuse_backward": True}, {"inplace_backward": True}])
def test_confident_rows(triton_device, probability, mode):
    """The loss is log(1 + rest), where rest is the odds of all other classes, and its gradient is p - 1.

    Rounding 1 + rest and p to float32 would leave one correct digit or none. The kernel keeps four.
    """
    V = 300
    logits = torch.zeros(1, 4, V, dtype=torch.float64)
    logits[..., 3] = math.log(probability / (1 - probability) * (V - 1))
    logits = logits.float()
    targets = torch.full((1, 4), 3, device=triton_device)

    def run(x, f):
        leaf = x.to(triton_device).requires_grad_()
        loss = f(leaf * 1)
        loss.backward()
        return loss.detach().double(), leaf.grad[0, :, 3].double()

    got = run(logits, lambda x: ops.cross_entropy(x, targets, backend="triton", **mode))
    others = (V - 1) * (-logits[0, :, 3].double()).exp().to(triton_device)
    exact = others.log1p().mean(), -others / (1 + others) / 4
    torch.testing.assert_close(got, exact, rtol=5e-5, atol=0)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits(triton_device, scale, seed):
    torch.manual_seed(seed)
    logits = (torch.randn(5, 3000) * scale).to(triton_device)
    targets = logits.argmax(-1)
    targets[0] = 0
    got = ops.cross_entropy(logits, targets, reduction="none", backend="triton")
    assert_within_budget(
        got,
        F.cross_entropy(logits, targets, reduction="none"),
        F.cross_entropy(logits.double(), targets, reduction="none"),
    )


def test_rows_of_minus_infinity(triton_device):
    logits = torch.full((4, 4100), -math.inf)
    logits[1, 4099] = 1.0  # all blocks except the last are -inf
    logits[2, 0] = 2.0
    logits[3] = torch.randn(4100)
    targets = torch.tensor([0, 4099, 7, 5])
    leaf = logits.to(triton_device).requires_grad_()
    loss = ops.cross_entropy(leaf, targets.to(triton_device), reduction="none", backend="triton")
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(loss.cpu(), expected, equal_nan=True)
    (grad,) = torch.autograd.grad(loss[1:].sum(), leaf)
    assert grad[1:].isfinite().all()
    torch.testing.assert_close(grad[1].cpu(), torch.zeros(4100))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nothing_to_count(triton_device, backend):
    logits = torch.randn(3, 50, device=triton_device, requires_grad=True)
    targets = torch.full((3,), -100, device=triton_device)
    assert ops.cross_entropy(logits, targets, backend=backend).isnan()
    loss = ops.cross_entropy(logits, targets, empty="zero", backend=backend)
    assert loss == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_ignored_rows_may_hold_anything(triton_device, backend, value):
    logits = torch.randn(3, 500, device=triton_device)
    logits[1] = value
    leaf = logits.requires_grad_()
    targets = torch.tensor([3, -100, 499], device=triton_device)
    loss = ops.cross_entropy(leaf, targets, backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad[[0, 2]].isfinite().all()
    if backend == "triton":
        assert not leaf.grad[1].any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("bad", [50, 2**31 + 3, -1, -(2**40)])
def test_bad_targets_are_nan_or_raise(triton_device, backend, bad):
    logits = torch.randn(3, 50, device=triton_device, requires_grad=True)
    targets = torch.tensor([3, bad, 4], device=triton_device)
    loss = ops.cross_entropy(logits, targets, reduction="none", check_targets=False, backend=backend)
    assert loss.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad.isnan().all(-1).tolist() == [False, True, False]
    assert grad[[0, 2]].isfinite().all()
    with pytest.raises(ValueError, match=rf"targets must be in \[0, 50\) or ignore_index=-100; got {bad} in row 1"):
        ops.cross_entropy(logits, targets, check_targets=True, backend=backend)
    check = ops.TargetCheck(triton_device)
    ops.cross_entropy(logits, targets.clamp(0, 49), check_targets=check, backend=backend)
    check.raise_if_bad()
    ops.cross_entropy(logits, targets, check_targets=check, backend=backend)
    with pytest.raises(ValueError, match="neither ignore_index nor in"):
        check.raise_if_bad()
    check.raise_if_bad()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_stats(triton_device, backend, seed):
    torch.manual_seed(seed)
    logits = torch.randn(2, 6, 700, device=triton_device) * 3
    targets = torch.randint(0, 700, (2, 6), device=triton_device)
    targets[0, :3] = logits[0, :3].argmax(-1)
    targets[1, 4] = -100
    loss, stats = ops.cross_entropy(logits, targets, label_smoothing=0.1, return_stats=True, backend=backend)
    log_probs = logits.double().log_softmax(-1)
    counted = targets != -100
    at = targets.clamp_min(0)[..., None]
    expected = {
        "lse": logits.double().logsumexp(-1),
        "logprob": log_probs.gather(-1, at)[..., 0],
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name).double(), value.where(counted, 0.0), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.correct, (logits.argmax(-1) == targets) & counted)
    torch.testing.assert_close(loss, F.cross_entropy(logits.view(-1, 700), targets.view(-1), label_smoothing=0.1))


@pytest.mark.parametrize("mode", [{"fuse_backward": True}, {"inplace_backward": True}])
def test_a_second_backward_raises(triton_device, mode):
    leaf = torch.randn(3, 40, device=triton_device, requires_grad=True)
    loss = ops.cross_entropy(leaf * 1, torch.tensor([1, 2, 3], device=triton_device), backend="triton", **mode)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_callers_tensors_are_left_alone(triton_device, seed):
    torch.manual_seed(seed)
    logits = torch.randn(3, 1200, device=triton_device)
    targets = torch.randint(0, 1200, (3,), device=triton_device)
    before = logits.clone(), targets.clone()
    leaf = logits.requires_grad_()
    for mode in ({}, {"fuse_backward": True}):
        ops.cross_entropy(leaf, targets, backend="triton", **mode).backward()
    assert torch.equal(before[0], logits.detach())
    assert torch.equal(before[1], targets)


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (0, 3, 9)])
def test_no_rows(triton_device, shape):
    logits = torch.randn(shape, device=triton_device, requires_grad=True)
    targets = torch.zeros(shape[:-1], dtype=torch.int64, device=triton_device)
    loss = ops.cross_entropy(logits, targets, reduction="sum", backend="triton")
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == shape


def test_runs_are_bitwise_equal(triton_device, seed):
    torch.manual_seed(seed)
    logits = torch.randn(4, 3001, device=triton_device, requires_grad=True)
    targets = torch.randint(0, 3001, (4,), device=triton_device)
    runs = []
    for _ in range(2):
        loss = ops.cross_entropy(logits, targets, backend="triton")
        runs.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck(triton_device):
    from fastgpt2_kernels.triton import cross_entropy as kernel

    logits = torch.randn(2, 3, 40, device=triton_device, requires_grad=True)
    targets = torch.randint(0, 40, (2, 3), device=triton_device)
    dloss = torch.rand(2, 3, device=triton_device)
    options = (-100, 0.1, 1e-3, False)
    torch.library.opcheck(kernel.cross_entropy_op, (logits, targets, None, *options, True, False))
    torch.library.opcheck(kernel.cross_entropy_fused_op, (logits.detach(), targets, dloss, None, *options, True))
    rows = kernel.cross_entropy_op(logits, targets, None, *options, False, False)
    arguments = (dloss, logits.detach(), targets, *(r.detach() for r in rows[1:4]), None, *options)
    torch.library.opcheck(kernel.cross_entropy_backward_op, arguments)
    torch.library.opcheck(kernel.cross_entropy_backward_inplace_op, arguments)
    torch.library.opcheck(kernel.scale_rows_op, (logits.detach().clone(), torch.tensor(0.5, device=triton_device)))


def test_compiles_whole(triton_device, seed):
    """torch.compile(fullgraph=True) captures it without a graph break, with the same result as eager mode."""
    torch.manual_seed(seed)
    logits = torch.randn(2, 3, 40, device=triton_device, requires_grad=True)
    targets = torch.randint(0, 40, (2, 3), device=triton_device)

    def loss(x, **mode):
        return ops.cross_entropy(x * 2, targets, shift=True, z_loss=1e-3, backend="triton", **mode)

    for mode in ({}, {"fuse_backward": True}):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        results = [
            (value, *torch.autograd.grad(value, logits)) for value in (loss(logits, **mode), compiled(logits, **mode))
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("V", [7, 300, 2500])
def test_gradient_into_another_layout(triton_device, seed, V):
    """The launcher accepts a gradient with other strides, and writes nothing outside its rows."""
    from fastgpt2_kernels.triton import cross_entropy as kernel

    torch.manual_seed(seed)
    logits = torch.randn(2, 3, V + 5, device=triton_device)[..., :V]
    targets = torch.randint(0, V, (2, 3), device=triton_device)
    store = torch.full((3, 2, V + 9), CANARY, device=triton_device)
    grad = store.transpose(0, 1)[..., 4 : 4 + V]
    dloss = torch.rand(2, 3, device=triton_device)
    kernel.cross_entropy_rows(logits, targets, ignore_index=-100, dloss=dloss, grad=grad)
    expected = (logits.softmax(-1) - F.one_hot(targets, V)) * dloss[..., None]
    torch.testing.assert_close(grad, expected)
    assert (store[..., :4] == CANARY).all()
    assert (store[..., 4 + V :] == CANARY).all()


@pytest.mark.parametrize("mode", [{}, {"fuse_backward": True}])
def test_interpreted_offsets_past_31_bits(triton_device, seed, mode):
    """Rows may be 2**31 elements apart. The memory between them is never touched."""
    torch.manual_seed(seed)
    rows = torch.randn(2, 300, dtype=torch.bfloat16, device=triton_device)
    store = torch.empty(2**31 + 400, dtype=torch.bfloat16, device=triton_device)
    logits = store.as_strided((1, 2, 300), (0, 2**31 + 8, 1))
    logits.copy_(rows[None])
    targets = torch.tensor([[3, 299]], device=triton_device)
    leaf = logits.requires_grad_()
    loss = ops.cross_entropy(leaf, targets, backend="triton", **mode)
    (grad,) = torch.autograd.grad(loss, leaf)
    plain = rows.float().requires_grad_()
    expected = F.cross_entropy(plain, targets[0])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad[0].float(), torch.autograd.grad(expected, plain)[0], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("V", [50257, 262144])
def test_large_vocabularies(triton_device, seed, V):
    torch.manual_seed(seed)
    logits = (torch.randn(2, V + 3, device=triton_device) * 3)[:, 3:].requires_grad_()
    targets = torch.tensor([0, V - 1], device=triton_device)
    runs = [
        f(logits)
        for f in (lambda x: ops.cross_entropy(x, targets, backend="triton"), lambda x: F.cross_entropy(x, targets))
    ]
    (got, got_grad), (plain, plain_grad) = ((loss, torch.autograd.grad(loss, logits)[0]) for loss in runs)
    wide = logits.detach().double().requires_grad_()
    exact = F.cross_entropy(wide, targets)
    assert_within_budget(got, plain, exact)
    assert_within_budget(got_grad, plain_grad, torch.autograd.grad(exact, wide)[0])


def test_interpreted_traffic(monkeypatch, interpreter, seed):
    """Logits are read once and gradients are written once. In the fused form, the gradient's pass reads each row again.

    That pass begins at the end of the row, which is then still in the L2 cache. With 3 programs on each of the 132
    multiprocessors of an H100, and V = 50257 in bf16, the rows take 40 MB of its 50 MB.
    """
    from fastgpt2_kernels.triton import cross_entropy as kernel

    torch.manual_seed(seed)
    logits = torch.randn(1, 3, 3001, dtype=torch.bfloat16)
    grad = torch.empty_like(logits)
    targets = torch.tensor([[3, -100, 2999]])
    dloss = torch.ones(1, 3)
    counted = torch.tensor([1, 0, 1])[:, None]
    target_reads = F.one_hot(targets.clamp_min(0), 3001) * counted
    with monkeypatch.context() as patch:
        traffic = Traffic(patch, logits=logits, grad=grad)
        rows = kernel.cross_entropy_rows(logits, targets, ignore_index=-100)
        assert torch.equal(traffic.reads["logits"][0], (counted + target_reads)[0])  # ignored rows are not read
        assert not traffic.writes["logits"].any()
    with monkeypatch.context() as patch:
        traffic = Traffic(patch, logits=logits, grad=grad)
        kernel.cross_entropy_rows_backward(dloss, logits, targets, *rows[1:4], grad, ignore_index=-100)
        assert torch.equal(traffic.reads["logits"][0], counted.expand(3, 3001))
        assert (traffic.writes["grad"] == 1).all()
        assert not traffic.reads["grad"].any()
    with monkeypatch.context() as patch:
        traffic = Traffic(patch, logits=logits, grad=grad)
        kernel.cross_entropy_rows(logits, targets, ignore_index=-100, dloss=dloss, grad=grad)
        assert torch.equal(traffic.reads["logits"][0], (2 * counted + target_reads)[0])
        assert (traffic.writes["grad"] == 1).all()
