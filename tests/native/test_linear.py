"""Linear layers with packed weights, and LayerNorm, against the reference in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from fastgpt2_kernels import native, reference
from fastgpt2_kernels.native import decode
from fastgpt2_kernels.types import LayerNormWeights, LinearWeights
from tests.helpers import assert_within_budget

pytestmark = pytest.mark.usefixtures("needs_native")

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
CANARY = 12345.5
NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


def random_linear(
    n: int, k: int, dtype: torch.dtype, generator: torch.Generator, *, bias: bool = True
) -> LinearWeights:
    weight = torch.randn(n, k, generator=generator) * k**-0.5
    b = torch.randn(n, generator=generator) if bias else None
    if dtype == torch.int8:
        scale = weight.abs().amax(1).clamp_min(1e-9) / 127
        return LinearWeights((weight / scale[:, None]).round().to(torch.int8), b, scale)
    return LinearWeights(weight.to(dtype), None if b is None else b.to(dtype))


def quantized(x: Tensor) -> Tensor:
    """x (R, K) rounded like int8 operands, with a scale for every row."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale.clamp_min(torch.finfo(x.dtype).tiny)).round() * scale


def expected(x: Tensor, linear: LinearWeights, dtype: torch.dtype, product: torch.dtype, **options: object) -> Tensor:
    """The reference, computed in `dtype` from operands rounded to `product`. int8 rounds x row by row."""
    norm, activation, residual = (options.get(name) for name in ("layer_norm", "activation", "residual"))
    x = x.to(dtype)
    if norm is not None:
        x = reference.layer_norm(x, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
    x = quantized(x) if product == torch.int8 else x.to(product).to(dtype)
    weight = linear.weight.to(dtype)
    y = torch.nn.functional.linear(x, weight)
    y = y if linear.scale is None else y * linear.scale.to(dtype)
    y = y if linear.bias is None else y + linear.bias.to(dtype)
    name = NAMES.get(str(activation), activation) or "linear"
    y = reference.ACTIVATIONS[name](y)
    return y if residual is None else y + residual.to(dtype)


def on_grid(x: Tensor, product: torch.dtype) -> Tensor:
    """Change x so that float32 and float64 round it to the same `product` values."""
    if product == torch.int8:
        x = (x / x.abs().amax(1, keepdim=True) * 127).round()
        x[:, 0] = 127.0
        return x / 64
    return x.to(product).float()


def check_linear(seed: int, dtype: torch.dtype, rows: int, n: int, k: int, **flags: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = random_linear(n, k, dtype, generator, bias=flags.get("bias", True))
    # A wider tensor with a canary past every row, so that reads beyond the row show.
    wide = torch.full((rows, k + 3), CANARY)
    x = wide[:, :k]
    x.copy_(on_grid(torch.randn(rows, k, generator=generator) * 3, dtype))
    residual = torch.randn(rows, n, generator=generator) if flags.get("residual") else None
    held = torch.full((rows + 2, n + 5), CANARY)
    out = held[1:-1, :n]
    out.fill_(math.nan)
    got = decode.linear(x, decode.pack_linear(linear), residual=residual, out=out)
    assert got is out
    assert (held[[0, -1]] == CANARY).all()
    assert (held[:, n:] == CANARY).all(), "written past the end of a row"
    exact = expected(x, linear, torch.float64, dtype, residual=residual)
    plain = expected(x, linear, torch.float32, dtype, residual=residual)
    assert_within_budget(out, plain, exact, f"linear {dtype} {rows} x {k} -> {n}", dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_odd_shapes(seed, threads, dtype):
    rng = random.Random(seed)
    shapes = [(1, 1, 1), (3, 49, 5), (32, 48, 768), (9, 100, 1025), (65, 17, 130), (130, 97, 64)]
    shapes += [(rng.randint(1, 70), rng.randint(1, 200), rng.randint(1, 1200)) for _ in range(6)]
    for i, (rows, n, k) in enumerate(shapes):
        check_linear(seed + i, dtype, rows, n, k, bias=i % 3 != 1, residual=i % 2 == 1)


@pytest.mark.parametrize("name", native.ACTIVATIONS)
def test_activations(seed, name):
    generator = torch.Generator().manual_seed(seed)
    # With an identity as weight, the activation gets x itself.
    x = torch.cat([torch.randn(40, 61, generator=generator) * scale for scale in (0.01, 1.0, 12.0)])
    x[0, :6] = torch.tensor([0.0, -0.0, 1e-30, 60.0, -60.0, 3.0])
    linear = LinearWeights(torch.eye(61))
    got = decode.linear(x, decode.pack_linear(linear), activation=name)
    plain, exact = (expected(x, linear, t, torch.float32, activation=name) for t in (torch.float32, torch.float64))
    for part in (slice(0, 40), slice(40, 80), slice(80, 120)):
        assert_within_budget(got[part], plain[part], exact[part], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_before_a_linear_layer(seed, threads, dtype):
    generator = torch.Generator().manual_seed(seed)
    for rows, n, k in ((1, 30, 7), (8, 64, 100), (9, 50, 768), (33, 70, 129)):
        linear = random_linear(n, k, dtype, generator)
        weights = LayerNormWeights(*torch.randn(2, k, generator=generator), 1e-5)
        # With a mean far from zero, a single pass would lose the variance.
        x = torch.randn(rows, k, generator=generator) + 50.0
        norm = decode.pack_norm(weights)
        got = decode.linear(x, decode.pack_linear(linear), layer_norm=norm, activation="gelu_tanh")
        options = {"layer_norm": weights, "activation": "gelu_tanh"}
        exact = expected(x, linear, torch.float64, torch.float64, **options)
        plain = expected(x, linear, torch.float32, dtype, **options)
        assert_within_budget(got, plain, exact, "LayerNorm + linear", dtype=dtype)
        # With an identity as weight, the result is the LayerNorm itself.
        got = decode.linear(x, decode.pack_linear(LinearWeights(torch.eye(k))), layer_norm=norm)
        exact, plain = (
            reference.layer_norm(x.to(t), weights.weight.to(t), weights.bias.to(t), 1e-5)
            for t in (torch.float64, torch.float32)
        )
        assert_within_budget(got, plain, exact, "LayerNorm")


def check_rows_do_not_depend_on_neighbours(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = random_linear(101, 1030, dtype, generator)
    norm = decode.pack_norm(LayerNormWeights(*torch.randn(2, 1030, generator=generator), 1e-5))
    packed = decode.pack_linear(linear)
    x = torch.randn(32, 1030, generator=generator)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (1, 3, 8, 17, 32):
                parts = [decode.linear(part, packed, layer_norm=norm, activation="gelu") for part in x.split(rows)]
                outs.append(torch.cat(parts))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_whatever_its_neighbours_and_threads(seed, dtype):
    check_rows_do_not_depend_on_neighbours(dtype, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_alone(seed, dtype, bad):
    generator = torch.Generator().manual_seed(seed)
    packed = decode.pack_linear(random_linear(60, 70, dtype, generator))
    x = torch.randn(12, 70, generator=generator)
    good = decode.linear(x, packed)
    x[5, 3] = bad
    got = decode.linear(x, packed)
    assert not got[5].isfinite().any()
    assert torch.equal(got[[*range(5), *range(6, 12)]], good[[*range(5), *range(6, 12)]])


def test_no_rows():
    packed = decode.pack_linear(LinearWeights(torch.randn(5, 7)))
    assert decode.linear(torch.empty(0, 7), packed).shape == (0, 5)


def test_what_does_not_fit_is_refused_in_one_sentence():
    weight = torch.randn(5, 7)
    packed = decode.pack_linear(LinearWeights(weight))
    norm = decode.pack_norm(LayerNormWeights(torch.ones(8), torch.ones(8), 1e-5))
    x = torch.randn(2, 7)
    for call, message in [
        (lambda: decode.pack_linear(LinearWeights(weight.double())), "float32, bfloat16 or int8"),
        (lambda: decode.pack_linear(LinearWeights(torch.empty(0, 7))), "must be"),
        (lambda: decode.pack_linear(LinearWeights(weight, torch.ones(6))), "bias must be"),
        (lambda: decode.pack_linear(LinearWeights(weight.to(torch.int8))), "scale"),
        (lambda: decode.pack_linear(LinearWeights(weight, None, torch.ones(5))), "scale"),
        (lambda: decode.linear(x[:, :6], packed), "linear: x must be"),
        (lambda: decode.linear(x.double(), packed), "linear: x must be"),
        (lambda: decode.linear(torch.randn(7, 2).t(), packed), "contiguous"),
        (lambda: decode.linear(x, packed, residual=torch.randn(3, 5)), "2 rows"),
        (lambda: decode.linear(x, packed, out=torch.empty(2, 6)), "linear: out"),
        (lambda: decode.linear(x, packed, activation="sine"), "activation"),
        (lambda: decode.linear(x, packed, layer_norm=norm), "width 7"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
