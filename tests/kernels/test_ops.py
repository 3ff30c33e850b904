"""The door: the linear cross-entropy and the attention of the PyTorch backend against float64, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import ops, reference
from tests.helpers import assert_close, assert_rms_within_budget, assert_within_budget

# -- linear cross-entropy ----------------------------------------------------------------------------------------------


def random_case(rng: random.Random, *, tiny: bool) -> dict[str, Any]:
    """The largest error of a few elements is luck: accuracy is judged where there are many (`tiny=False`)."""
    V = rng.choice([1, 2, 7, 64] if tiny else [64, 130, 257])
    return {
        "N": rng.choice([0, 1, 2, 9] if tiny else [16, 33, 70]),
        "C": rng.choice([1, 5, 16] if tiny else [16, 33]),
        "V": V,
        "reduction": rng.choice(["mean", "sum", "none"]),
        "ignore_index": rng.choice([-100, 0, V - 1, -1, V + 3]),
        "label_smoothing": rng.choice([0.0, 0.0, 0.1, 0.7]),
        "bias": rng.random() < 0.4,
        "frozen": rng.sample(["x", "weight", "bias"], rng.choice([0, 0, 1, 2])),
        # A product with one row is a matrix-vector one in PyTorch, summed in another, less exact order.
        "chunk_rows": rng.choice([None, 1, 4, 100] if tiny else [None, 8, 33, 100]),
        "scale": rng.choice([0.1, 1.0, 8.0]),
        "int32": rng.random() < 0.3,
        "shift": rng.random() < 0.3,  # tensors that begin one element into their storage
        "ignored": rng.choice([0.0, 0.3, 1.0]),
    }


def tensors_of(case: dict[str, Any], seed: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs by name, targets, and the gradient of the loss."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        flat = torch.randn(count + case["shift"], generator=generator).to(dtype)
        return flat[case["shift"] :].view(shape)

    N, C, V = case["N"], case["C"], case["V"]
    inputs = {"x": draw(N, C) * case["scale"], "weight": draw(V, C)}
    if case["bias"]:
        inputs["bias"] = draw(V)
    inputs = {name: t.detach().requires_grad_(name not in case["frozen"]) for name, t in inputs.items()}
    targets = torch.randint(V, (N + case["shift"],), generator=generator)[case["shift"] :]
    is_ignored = torch.rand(N, generator=generator) < case["ignored"]
    targets = targets.masked_fill(is_ignored, case["ignore_index"])
    targets = targets.to(torch.int32) if case["int32"] else targets
    grad_output = torch.randn(N if case["reduction"] == "none" else (), generator=generator)
    return inputs, targets, grad_output


def plain_loss(inputs: dict[str, Tensor], targets: Tensor, case: dict[str, Any]) -> Tensor:
    logits = F.linear(inputs["x"], inputs["weight"], inputs.get("bias"))
    return F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(),
        targets.long(),
        ignore_index=case["ignore_index"],
        reduction=case["reduction"],
        label_smoothing=case["label_smoothing"],
    )


def our_loss(inputs: dict[str, Tensor], targets: Tensor, case: dict[str, Any]) -> Tensor:
    return ops.linear_cross_entropy(
        inputs["x"],
        inputs["weight"],
        targets,
        inputs.get("bias"),
        ignore_index=case["ignore_index"],
        reduction=case["reduction"],
        label_smoothing=case["label_smoothing"],
        chunk_rows=case["chunk_rows"],
    )


def with_grads(loss: Tensor, inputs: dict[str, Tensor], grad_output: Tensor) -> dict[str, Tensor]:
    wanted = [t for t in inputs.values() if t.requires_grad]
    grads = torch.autograd.grad(loss, wanted, grad_output.to(loss.dtype)) if wanted else ()
    names = [name for name, t in inputs.items() if t.requires_grad]
    return {"loss": loss.detach(), **dict(zip(names, grads, strict=True))}


def check(case: dict[str, Any], seed: int, dtype: torch.dtype) -> None:
    inputs, targets, grad_output = tensors_of(case, seed, dtype)
    wide = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    got = with_grads(our_loss(inputs, targets, case), inputs, grad_output)
    plain = with_grads(plain_loss(inputs, targets, case), inputs, grad_output)
    exact = with_grads(plain_loss(wide, targets, case), wide, grad_output)
    assert set(got) == set(exact)
    assert got["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, value in exact.items():
        assert torch.equal(got[name].isnan(), value.isnan()), f"{case}: NaN in {name}"
        a, b, c = (t.nan_to_num() for t in (got[name], plain[name], value))
        if dtype == torch.float64:
            assert_close(a, c, f"{case}: {name}")
        elif name == "loss":
            assert_within_budget(a, b, c, f"{case}: {name}", dtype=dtype)
        else:
            assert_rms_within_budget(a, [b], c, f"{case}: gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy_over_random_cases(seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    for i in range(150):
        check(random_case(rng, tiny=dtype == torch.float64), seed + i, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_of_nothing_counted(reduction: str) -> None:
    """As F.cross_entropy: the mean over no row is NaN, the gradients are zero."""
    x, weight = (torch.randn(n, 3, requires_grad=True) for n in (4, 5))
    targets = torch.full((4,), -100)
    loss = ops.linear_cross_entropy(x, weight, targets, reduction=reduction)
    assert torch.equal(loss, F.cross_entropy(x @ weight.T, targets, reduction=reduction)) or loss.isnan()
    assert loss.isnan().all() == (reduction == "mean")
    loss.sum().backward()
    assert not x.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("scale", [50.0, 1e4, 1e18])
def test_confident_rows_and_huge_logits(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = {"x": torch.randn(8, 4, generator=generator) * scale, "weight": torch.randn(9, 4, generator=generator)}
    inputs = {name: t.requires_grad_() for name, t in inputs.items()}
    targets = (inputs["x"] @ inputs["weight"].T).argmax(-1)  # the class that is all but certain
    targets[::2] = 3
    got = with_grads(ops.linear_cross_entropy(inputs["x"], inputs["weight"], targets), inputs, torch.tensor(1.0))
    plain = with_grads(F.cross_entropy(inputs["x"] @ inputs["weight"].T, targets), inputs, torch.tensor(1.0))
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    exact = with_grads(F.cross_entropy(wide["x"] @ wide["weight"].T, targets), wide, torch.tensor(1.0))
    for name, value in exact.items():
        assert_within_budget(got[name], plain[name], value, name)


def test_loss_under_autocast_runs_in_its_dtype(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 16, generator=generator, requires_grad=True)
    weight = torch.randn(30, 16, generator=generator, requires_grad=True)
    targets = torch.randint(30, (40,), generator=generator)
    inputs, one = {"x": x, "weight": weight}, torch.tensor(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_grads(ops.linear_cross_entropy(x, weight, targets), inputs, one)
        plain = with_grads(F.cross_entropy(F.linear(x, weight).float(), targets), inputs, one)
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    exact = with_grads(F.cross_entropy(wide["x"] @ wide["weight"].T, targets), wide, one)
    full = with_grads(ops.linear_cross_entropy(x, weight, targets), inputs, one)
    assert not torch.equal(got["loss"], full["loss"])
    for name, value in exact.items():
        assert got[name].dtype == torch.float32
        assert_within_budget(got[name], plain[name], value, name, dtype=torch.bfloat16)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(seed: int, smoothing: float) -> None:
    """Of the losses of rows: gradcheck runs backward several times, which only they allow."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 3), (7, 3), (7,))
    )
    targets = torch.tensor([0, 6, -100, 3, 3])

    def loss(*tensors: Tensor) -> Tensor:
        options: dict[str, Any] = {"reduction": "none", "label_smoothing": smoothing, "chunk_rows": 2}
        return ops.linear_cross_entropy(tensors[0], tensors[1], targets, tensors[2], **options)

    assert torch.autograd.gradcheck(loss, (x, weight, bias))


def test_a_second_backward_raises() -> None:
    x, weight = (torch.randn(n, 3, requires_grad=True) for n in (4, 5))
    loss = ops.linear_cross_entropy(x, weight, torch.zeros(4, dtype=torch.int64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        loss.backward()


def test_inputs_are_left_alone_and_no_grad_mode_works() -> None:
    x, weight = (torch.randn(n, 3, requires_grad=True) for n in (4, 5))
    copies = [t.detach().clone() for t in (x, weight)]
    targets = torch.tensor([0, 1, -100, 4])
    loss = ops.linear_cross_entropy(x, weight, targets)
    loss.backward()
    with torch.no_grad():
        again = ops.linear_cross_entropy(x, weight, targets)
    assert not again.requires_grad
    assert torch.equal(loss, again)
    assert all(torch.equal(t, copy) for t, copy in zip((x, weight), copies, strict=True))


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upcast", [False, True])
def test_causal_attention_over_random_shapes(seed: int, dtype: torch.dtype, upcast: bool) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(25):
        B, H, D = rng.choice([0, 1, 2]), rng.choice([1, 3]), rng.choice([1, 5, 16])
        T = rng.choice([0, 1, 2, 7, 33])
        S = T + rng.choice([0, 0, 1, 10])
        scale = rng.choice([None, 1.0, 0.3])
        q, k, v = (torch.randn(B, H, n, D, generator=generator).to(dtype) for n in (T, S, S))
        got = ops.causal_attention(q, k, v, scale=scale, upcast=upcast)
        plain = reference.causal_attention(q, k, v, scale=scale, upcast=upcast)
        exact = reference.causal_attention(q.double(), k.double(), v.double(), scale=scale)
        assert got.dtype == dtype
        what = f"B {B} H {H} T {T} S {S} D {D} scale {scale}"
        if dtype == torch.float64:
            assert_close(got, exact, what)
        else:
            assert_within_budget(got, plain, exact, what, dtype=dtype)


def test_the_oracle_is_pytorchs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, 9, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    assert_close(reference.causal_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))
    x, weight, bias = torch.randn(3, 9, 4, generator=generator, dtype=torch.float64)
    exact = F.layer_norm(x, (4,), weight[0], bias[0], 1e-3)
    assert_close(reference.layer_norm(x, weight[0], bias[0], 1e-3), exact)
    targets = torch.tensor([0, 3, -100, 1, 2, 0, 1, 3, 2])
    for reduction in ("mean", "sum", "none"):
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
        got = reference.linear_cross_entropy(x, weight, targets, **options)
        assert_close(got, F.cross_entropy(F.linear(x, weight), targets, **options))


# -- linear ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [*ops.ACTIVATIONS, "residual"])
def test_packed_linear(seed: int, dtype: torch.dtype, activation: str) -> None:
    # A width of whole SIMD vectors: PyTorch computes what is left over with other functions.
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((32, 40), (32,)))
    packed = ops.pack_linear(weight)
    if packed is None:
        pytest.skip(f"this machine has no packed layout for {dtype}")
    x = torch.randn(9, 40, generator=generator).to(dtype)
    residual = torch.randn(9, 32, generator=generator).to(dtype) if activation == "residual" else None
    options: dict[str, Any] = {"residual": residual} if residual is not None else {"activation": activation}

    def run(rows: slice, **more: Any) -> Tensor:
        part = {"residual": residual[rows]} if residual is not None else options
        return ops.linear(x[rows], weight, bias, **part, **more)

    exact = F.linear(x.double(), weight.double(), bias.double())
    exact = exact + residual.double() if residual is not None else ops.ACTIVATIONS[activation](exact)
    every = slice(None)
    assert_within_budget(run(every, packed=packed), run(every), exact, activation)
    rows = torch.cat([run(slice(i, i + 1), packed=packed) for i in range(9)])
    assert torch.equal(rows, run(every, packed=packed)), "a row depends on the rows beside it"


def test_fingerprint_sees_every_change(seed: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)
        before = ops.fingerprint(weight)
        assert ops.fingerprint(weight) == before
        for i, j in ((0, 0), (2, 3), (4, 6)):
            old = weight[i, j].item()
            weight.data[i, j] = old + 1
            assert ops.fingerprint(weight) != before
            weight.data[i, j] = old
        assert ops.fingerprint(weight) == before


# -- what is refused ---------------------------------------------------------------------------------------------------

Q, X, W = torch.ones(1, 2, 3, 4), torch.ones(3, 4), torch.ones(5, 4)
IDS = torch.zeros(3, dtype=torch.int64)
REFUSED: dict[str, tuple[Any, str]] = {
    "q of 3 dimensions": (lambda: ops.causal_attention(Q[0], Q, Q), r"q must be \(B, H, T, D\)"),
    "k and v differ": (lambda: ops.causal_attention(Q, Q, Q[:, :, :2]), r"v \(1, 2, 2, 4\)"),
    "fewer keys than queries": (lambda: ops.causal_attention(Q, Q[:, :, :2], Q[:, :, :2]), "got 2 < 3"),
    "two dtypes": (lambda: ops.causal_attention(Q, Q.double(), Q.double()), "one dtype; got q torch.float32, k"),
    "dropout of 1": (lambda: ops.causal_attention(Q, Q, Q, dropout_p=1.0), r"dropout_p must be in \[0, 1\); got 1"),
    "width no multiple": (lambda: ops.causal_attention_packed(X[None], 3), r"got \(1, 3, 4\) with num_heads=3"),
    "documents of two rows": (
        lambda: ops.causal_attention_packed(torch.ones(2, 3, 12), 1, cu_seqlens=IDS[:2]),
        "B must be 1 with cu_seqlens; got 2",
    ),
    "documents that end early": (
        lambda: ops.causal_attention_packed(torch.ones(1, 3, 12), 1, cu_seqlens=torch.tensor([0, 2])),
        r"must rise from 0 to T=3; got \[0, 2\]",
    ),
    "documents as floats": (
        lambda: ops.causal_attention_packed(torch.ones(1, 3, 12), 1, cu_seqlens=torch.tensor([0.0, 3.0])),
        "int32 or int64",
    ),
    "a slot in two rows": (lambda: ops.plan_rows([1, 1], [1, 1], [0, 0]), r"one row only; got slots \[1, 1\]"),
    "a row of no tokens": (lambda: ops.plan_rows([1], [0], [0]), "at least one new token"),
    "a full cache": (
        lambda: ops.cached_attention(torch.ones(1, 24), Q, Q, ops.plan_rows([0], [1], [3])),
        "slot 0 needs room for 4 tokens; the cache has 1 slots of 3",
    ),
    "an activation": (lambda: ops.activation(X, "gleu"), "name must be one of .*; got 'gleu'"),
    "activation and residual": (lambda: ops.linear(X, W, activation="relu", residual=X), "not both"),
    "x and weight differ": (lambda: ops.linear_cross_entropy(X, W[:, :3], IDS), r"got \(3, 4\) and \(5, 3\)"),
    "targets of another shape": (lambda: ops.linear_cross_entropy(X, W, IDS[:2]), r"must have shape \(3,\)"),
    "targets as floats": (lambda: ops.linear_cross_entropy(X, W, IDS.float()), "must be int64 or int32"),
    "a target past the vocabulary": (lambda: ops.linear_cross_entropy(X, W, IDS + 5), "got 5 in row 0"),
    "a negative target": (lambda: ops.linear_cross_entropy(X, W, IDS - 1), "got -1 in row 0"),
    "a bias of another size": (lambda: ops.linear_cross_entropy(X, W, IDS, W[:4, 0]), r"bias must be \(5,\)"),
    "a reduction": (lambda: ops.linear_cross_entropy(X, W, IDS, reduction="avg"), "got 'avg'"),
    "label smoothing of 1": (lambda: ops.linear_cross_entropy(X, W, IDS, label_smoothing=1.0), "label_smoothing"),
    "chunks of no rows": (lambda: ops.linear_cross_entropy(X, W, IDS, chunk_rows=0), "chunk_rows must be >= 1"),
    "a backend": (lambda: ops.layer_norm(X, X[0], X[0], 1e-5, backend="cuda"), "'auto', 'triton', 'torch'; got 'cuda'"),
    "an operator": (lambda: ops.why_not_triton("softmax", "cpu"), "operator must be one of .*; got 'softmax'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_an_explicit_triton_says_why_it_cannot_be() -> None:
    reason = ops.why_not_triton("layer_norm", "cpu")
    if reason is None:
        pytest.skip("layer_norm has a Triton kernel for this device")
    with pytest.raises(ValueError, match=r"layer_norm: backend='triton' cannot be used: "):
        ops.layer_norm(X, X[0], X[0], 1e-5, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width_in", "width_out"), [(768, 2304), (3072, 768), (1600, 4800)])
def test_a_packed_row_is_the_same_to_the_bit_among_any_number_of_rows(dtype, width_in, width_out, seed):
    """At GPT-2's own widths: oneDNN splits long sums of a single row, which is why single rows are filled up."""
    torch.manual_seed(seed)
    weight = torch.randn(width_out, width_in).to(dtype)
    if not ops.can_pack(weight):
        pytest.skip(f"this CPU has no layout for {dtype}")
    packed = ops.pack_linear(weight)
    x, residual = torch.randn(64, width_in).to(dtype), torch.randn(64, width_out).to(dtype)
    whole = ops.linear(x, weight, packed=packed)
    added = ops.linear(x, weight, packed=packed, residual=residual)
    for rows in (1, 2, 3, 5, 6, 7, 8, 17, 33):
        assert torch.equal(ops.linear(x[:rows], weight, packed=packed), whole[:rows])
        assert torch.equal(ops.linear(x[:rows], weight, packed=packed, residual=residual[:rows]), added[:rows])
