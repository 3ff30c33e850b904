"""The operators: attention and linear layers of the PyTorch backend against float64, and invalid arguments."""

from __future__ import annotations

import importlib
import inspect
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import ops, reference
from fastgpt2_kernels.backends import implementation
from tests.helpers import assert_close, assert_rms_within_budget, assert_within_budget

# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upcast", [False, True])
def test_causal_attention_over_random_shapes(seed: int, dtype: torch.dtype, upcast: bool) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(25):
        B, H, D = rng.choice([0, 1, 2]), rng.choice([1, 3]), rng.choice([1, 5, 16])
        T = rng.choice([0, 1, 2, 7, 33])
        H = H if T * D >= 64 else 16 * H  # with fewer numbers the largest error would be a matter of luck
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


def test_causal_attention_options(seed: int) -> None:
    """Lengths, documents, seeded dropout and log-sum-exp are right on the PyTorch backend, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    B, H, T, D = 3, 2, 17, 4
    qkv = torch.randn(B, T, 3 * H * D, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([0, T, 5])
    rows = torch.arange(T) < lengths[:, None]
    padded = rows[:, None, None, :] & rows[:, None, :, None]
    cu_seqlens = torch.tensor([0, 4, 4, 11, B * T])
    documents = reference.document_mask(cu_seqlens, B * T)
    dropout_seed = torch.randint(2**62, (2,), generator=generator)
    flat = qkv.reshape(1, B * T, -1)
    cases: list[tuple[Tensor, Tensor, dict[str, Any]]] = [
        (qkv.masked_fill(~rows[..., None], float("nan")), padded, {"lengths": lengths}),
        (flat, documents, {"cu_seqlens": cu_seqlens}),
        (flat, documents, {"cu_seqlens": ops.plan_documents(cu_seqlens, B * T)}),
    ]
    for given, mask, options in cases:
        for dropout_p in (0.0, 0.4):
            leaf, exact_leaf = given.clone().requires_grad_(), given.nan_to_num().requires_grad_()
            out, lse = ops.causal_attention_packed(
                leaf, H, dropout_p=dropout_p, dropout_seed=dropout_seed, return_lse=True, **options
            )
            q, k, v = exact_leaf.view(*given.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4)
            keep = reference.dropout_keep(dropout_seed, *q.shape[:3], q.shape[2], dropout_p)
            exact = reference.causal_attention(q, k, v, mask=mask, keep=keep, dropout_p=dropout_p)
            assert_close(out, exact.transpose(1, 2).flatten(2))
            torch.testing.assert_close(lse.double(), reference.attention_lse(q, k, mask=mask).detach())
            (grad,) = torch.autograd.grad(out.square().sum(), leaf)
            (exact_grad,) = torch.autograd.grad(exact.square().sum(), exact_leaf)
            assert_close(grad, exact_grad)


def test_dropout_keep_is_philox() -> None:
    """It gives Random123's test vectors for philox4x32-7, with counter and key of all ones or all zeros."""
    expected = {
        0: (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
        -1: (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    }
    for ones, words in expected.items():
        c = [torch.full((1,), ones & 0xFFFFFFFF)] * 4
        assert tuple(int(word) for word in reference.philox(*c, ones & 0xFFFFFFFF, ones & 0xFFFFFFFF)) == words


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
def test_linear(seed: int, dtype: torch.dtype, activation: str) -> None:
    """A bias, every activation and a residual are within the budget."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((32, 40), (32,)))
    x, residual = (torch.randn(9, n, generator=generator).to(dtype) for n in (40, 32))
    options: dict[str, Any] = {"residual": residual} if activation == "residual" else {"activation": activation}
    exact, plain = (F.linear(*(t.to(to) for t in (x, weight, bias))) for to in (torch.float64, dtype))
    if activation == "residual":
        exact, plain = exact + residual.double(), plain + residual
    else:
        exact, plain = (ops.ACTIVATIONS[activation](t) for t in (exact, plain))
    assert_rms_within_budget(ops.linear(x, weight, bias, **options), [plain], exact, activation)


# -- what is refused ---------------------------------------------------------------------------------------------------

Q, X, W = torch.ones(1, 2, 3, 4), torch.ones(3, 4), torch.ones(5, 4)
IDS = torch.zeros(3, dtype=torch.int64)
REFUSED: dict[str, tuple[Any, str]] = {
    "q of 3 dimensions": (lambda: ops.causal_attention(Q[0], Q, Q), r"q must be \(B, H, T, D\)"),
    "k and v differ": (lambda: ops.causal_attention(Q, Q, Q[:, :, :2]), r"v \(1, 2, 2, 4\)"),
    "fewer keys than queries": (lambda: ops.causal_attention(Q, Q[:, :, :2], Q[:, :, :2]), "got 2 keys and 3 queries"),
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
    "two devices": (lambda: ops.causal_attention(Q, Q.to("meta"), Q), "one device; got q on cpu, k on meta"),
    "a scale of 0": (lambda: ops.causal_attention(Q, Q, Q, scale=0.0), "scale must be finite and > 0; got 0.0"),
    "lengths of another batch": (
        lambda: ops.causal_attention(Q, Q, Q, lengths=torch.tensor([1, 2])),
        r"lengths must be int32 or int64 of shape \(1,\); got torch.int64 \(2,\)",
    ),
    "a negative length": (
        lambda: ops.causal_attention(Q, Q, Q, lengths=torch.tensor([-1])),
        r"lengths must be in \[0, T=3\]; got \[-1\]",
    ),
    "a length too long": (
        lambda: ops.causal_attention(Q, Q, Q, lengths=torch.tensor([4])),
        r"lengths must be in \[0, T=3\]; got \[4\]",
    ),
    "lengths after a cache": (
        lambda: ops.causal_attention(Q[:, :, :1], Q, Q, lengths=torch.tensor([1])),
        "as many keys as queries; got 3 keys and 1 queries",
    ),
    "lengths and documents": (
        lambda: ops.causal_attention_packed(
            torch.ones(1, 3, 12), 1, lengths=torch.tensor([3]), cu_seqlens=torch.tensor([0, 3])
        ),
        "give lengths or cu_seqlens, not both",
    ),
    "documents planned for another row": (
        lambda: ops.causal_attention_packed(
            torch.ones(1, 3, 12), 1, cu_seqlens=ops.plan_documents(torch.tensor([0, 2]), 2)
        ),
        "planned for 2 tokens; got 3",
    ),
    "a dropout seed of one number": (
        lambda: ops.causal_attention(Q, Q, Q, dropout_p=0.1, dropout_seed=torch.tensor([1])),
        r"dropout_seed must be int64 of shape \(2,\) on cpu; got torch.int64 \(1,\)",
    ),
    "a slot in two rows": (lambda: ops.plan_rows([1, 1], [1, 1], [0, 0]), r"one row only; got slots \[1, 1\]"),
    "a row of no tokens": (lambda: ops.plan_rows([1], [0], [0]), "at least one new token"),
    "a full cache": (
        lambda: ops.cached_attention(torch.ones(1, 24), Q, Q, ops.plan_rows([0], [1], [3])),
        "slot 0 needs room for 4 tokens; the cache has 1 slots of 3",
    ),
    "an activation": (lambda: ops.activation(X, "gleu"), "name must be one of .*; got 'gleu'"),
    "activation and residual": (lambda: ops.linear(X, W, activation="relu", residual=X), "not both"),
    "a backend": (
        lambda: ops.layer_norm(X, X[0], X[0], 1e-5, backend="cuda"),
        "'auto', 'triton', 'native', 'torch'; got 'cuda'",
    ),
    "an operator": (lambda: ops.why_not_triton("softmax", "cpu"), "operator must be one of .*; got 'softmax'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_every_operator_is_in_the_table_of_backends() -> None:
    """The table holds the operators that take a backend, and the decoding step."""
    functions = {name: getattr(ops, name) for name in ops.__all__ if callable(getattr(ops, name))}
    public = {
        name
        for name, function in functions.items()
        if not isinstance(function, type) and "backend" in inspect.signature(function).parameters
    }
    assert public - {"check_backend"} | {"decode_step"} == set(ops.OPERATORS)


@pytest.mark.parametrize("operator", ops.OPERATORS)
def test_the_functions_of_a_row_of_the_table_take_the_same_arguments(operator: str) -> None:
    """A decoding step may take more arguments, which have defaults."""
    found = ops.backends_of(operator)
    assert found.keys() <= set(ops.BACKENDS) - {"auto"}
    if "triton" in found:
        pytest.importorskip("triton")
    signatures = []
    for backend, where in found.items():
        module, name = where.split(":")
        function = implementation(operator, backend)
        assert function is getattr(importlib.import_module(module), name)
        parameters = inspect.signature(function).parameters.values()
        signatures.append([p.name for p in parameters if p.default is p.empty or operator != "decode_step"])
    assert signatures.count(signatures[0]) == len(signatures), signatures


def test_a_first_call_may_be_within_torch_compile(triton_device: str) -> None:
    """The call loads the kernel's module. It runs in a new process."""
    code = f"""import torch; from fastgpt2_kernels import ops
x = torch.randn(1, 4, 96, device={triton_device!r})
f = torch.compile(lambda x: ops.causal_attention_packed(x, 2, backend="triton"), fullgraph=True, backend="aot_eager")
print(torch.equal(f(x), ops.causal_attention_packed(x, 2, backend="triton")))"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "kernels")}
    # NumPy multiplies in the new process. With this variable it might use instructions that this processor lacks.
    environment.pop("OPENBLAS_CORETYPE", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "True\n", done.stderr


def test_an_explicit_triton_says_why_it_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"linear: backend='triton' cannot be used: linear has no Triton kernel"):
        ops.linear(X, X, backend="triton")
