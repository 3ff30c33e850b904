"""Linear layers for a few rows against float64, with random combinations of all options; and as an operator."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fastgpt2_kernels import ops, reference
from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.decode import linear
from tests.helpers import assert_rms_within_budget, parts
from tests.kernels import linear_maps
from tests.kernels.linear_maps import DTYPES, INTERPRETED
from tests.kernels.traffic import Traffic

# Triton's interpreter computes NaN and inf in lanes that are masked away.
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning", "ignore:divide by zero:RuntimeWarning"
)
BASE = {
    "prologue": "none", "R": 3, "N": 50, "K": 300, "heads": 4, "head_size": 40, "split_s": 4, "splits": 3,
    "slots": True, "counts": True, "product": torch.float16, "int8": False, "mean": 0.0, "spread": 1.0,
    "x_dtype": torch.float32, "bias": torch.float32, "residual": None, "out": torch.float32, "activation": "linear",
    "tiles": None,
}  # fmt: skip


@pytest.fixture
def kernel(triton_device):
    from fastgpt2_kernels.triton.decode import linear

    return linear


@pytest.mark.parametrize("part", parts(4))
def test_random_cases(triton_device, kernel, monkeypatch, seed, part):
    """The 2x rule holds in 4 x 52 random cases."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    for _ in range(52):
        case = linear_maps.random_case(rng)
        linear_maps.use_tiles(monkeypatch, case["tiles"])
        linear_maps.check(kernel, case, triton_device)


@pytest.mark.parametrize("product", DTYPES, ids=str)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("prologue", ["none", "layer_norm", "combine"])
def test_a_few_cases(triton_device, kernel, seed, prologue, int8, product):
    """The 2x rule holds in one case of every kind. They are so few that every memory access can be checked."""
    torch.manual_seed(seed)
    changes = {"prologue": prologue, "int8": int8, "product": product, "x_dtype": product}
    changes |= {"residual": "out", "activation": "gelu_new"}
    linear_maps.check(kernel, {**BASE, **changes}, triton_device)


@pytest.mark.parametrize("prologue", ["none", "layer_norm", "combine"])
@pytest.mark.parametrize("product", [torch.float32, torch.float16], ids=str)
def test_a_row_alone_is_the_same_row_in_any_batch(triton_device, kernel, monkeypatch, seed, prologue, product):
    """A row is bitwise the same, although batches of other sizes are launched with other tiles.

    In the interpreter, NumPy computes the products, and the order of a sum depends on the tiles. So there, products are
    summed over K one by one.
    """
    if triton_device == "cpu" and INTERPRETED:
        sum_one_by_one(monkeypatch)
    torch.manual_seed(seed)
    N, K = 24, 1408 if prologue == "combine" else 1400
    case = {**BASE, "prologue": prologue, "R": 64, "heads": 11, "head_size": 128, "counts": False, "splits": 2}
    layer_norm = None
    weight = (torch.randn(N, K) / K**0.5).to(triton_device, product)
    bias, residual = torch.randn(N, device=triton_device), torch.randn(64, N, device=triton_device)
    if prologue == "layer_norm":
        layer_norm = ops.LayerNormWeights(*torch.randn(2, K).to(triton_device, product), 1e-5)
    x = (torch.randn(64, K) + 3).to(triton_device)
    parts, rows, split_s = linear_maps.random_parts(case, triton_device)

    def run(first: int, last: int) -> torch.Tensor:
        given = x[first:last]
        if prologue == "combine":
            some = linear_maps.Rows(rows.lengths, rows.slots[first:last], None)
            given = kernel.Attended(linear_maps.Parts(*(p[first:last] for p in parts)), some, split_s)
        out = torch.full((last - first, N), math.nan, device=triton_device)
        kernel.linear_decode_out(
            given, weight, out, bias=bias, layer_norm=layer_norm, activation="gelu_tanh", residual=residual[first:last]
        )
        return out

    sizes = (1, 3, 17, 64)
    tiles = {launch.linear_decode_row(R, N, K, product.itemsize, prologue, "sm_80") for R in sizes}
    assert len(tiles) > 1 or product == torch.float32
    alone = torch.cat([run(r, r + 1) for r in range(5, 10)])
    for size in (*sizes[1:], 64):
        first = min(6, 64 - size)
        got = run(first, first + size)
        low, high = max(first, 5), min(first + size, 10)
        assert torch.equal(got[low - first : high - first], alone[low - 5 : high - 5]), size
        if size == 64:  # also with the tiles that more outputs would have
            shipped = launch.linear_decode_row(64, 10**6, K, product.itemsize, prologue, "sm_80")
            monkeypatch.setattr(launch, "linear_decode_row", lambda *_, row=shipped: row)


def sum_one_by_one(monkeypatch) -> None:
    import numpy as np
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data.copy()
        for k in range(a.data.shape[-1]):
            total += a.data[..., :, k, None].astype(np.float32) * b.data[..., None, k, :].astype(np.float32)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def test_a_row_that_does_not_fit_is_nan_alone(triton_device, kernel, seed):
    """Attention has written NaN to the first split of such a row. Splits past its end are not read."""
    torch.manual_seed(seed)
    case = {**BASE, "prologue": "combine", "slots": False, "counts": False}
    parts, rows, split_s = linear_maps.random_parts(case, triton_device)
    rows.lengths[1] = 10_000
    for part in parts:
        part[1] = math.nan
    weight, out = torch.randn(50, 160, device=triton_device), torch.empty(3, 50, device=triton_device)
    kernel.linear_decode_out(kernel.Attended(parts, rows, split_s), weight, out)
    assert out.isnan().all(-1).tolist() == [False, True, False]
    assert not out[[0, 2]].isnan().any()


def test_runs_are_bitwise_equal(triton_device, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(5, 700, device=triton_device), torch.randn(50, 700, device=triton_device)
    first, second = (ops.linear_decode(x, weight, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nothing_to_do(triton_device, backend):
    weight = torch.randn(9, 30, device=triton_device)
    assert ops.linear_decode(weight[:0], weight, backend=backend).shape == (0, 9)
    assert ops.linear_decode(weight, weight[:0], backend=backend).shape == (9, 0)
    assert torch.equal(
        ops.linear_decode(weight[:, :0], weight[:, :0], weight[:, 0].contiguous(), backend=backend),
        weight[:, 0].expand(9, 9),
    )


def test_interpreted_traffic(monkeypatch, kernel, interpreter, seed):
    """The weight is read once per block of rows, x once per block of outputs, and the output is written once.

    LayerNorm reads what does not fit into its first step three times.
    """
    torch.manual_seed(seed)
    x, weight, out = torch.randn(20, 700), torch.randn(50, 700), torch.zeros(20, 50)
    norm = ops.LayerNormWeights(torch.ones(700), torch.zeros(700), 1e-5)
    # A share of 96 inputs, in three steps of 32 or in one.
    for tiles, layer_norm, expected in [
        ((16, 32, 32), None, {"x": 2, "weight": 2}),
        ((8, 16, 128), norm, {"x": 4, "weight": 3}),
        ((16, 32, 32), norm, {"x": None, "weight": 2}),
    ]:
        linear_maps.use_tiles(monkeypatch, tiles)
        with monkeypatch.context() as patch:
            traffic = Traffic(patch, x=x, weight=weight, out=out)
            kernel.linear_decode_out(x, weight, out, layer_norm=layer_norm, residual=out)
        assert (traffic.reads["weight"] == expected["weight"]).all()
        first_step = torch.arange(700) % 96 < 32
        x_reads = torch.where(first_step, 2, 6) if expected["x"] is None else torch.tensor(expected["x"])
        assert torch.equal(traffic.reads["x"], x_reads.expand(20, 700))
        assert (traffic.writes["out"] == 1).all()
        assert (traffic.reads["out"] == 1).all()
        assert not traffic.writes["weight"].any()


# -- the operator -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("product", DTYPES, ids=str)
@pytest.mark.parametrize("int8", [False, True])
def test_operator(triton_device, seed, backend, product, int8):
    torch.manual_seed(seed)
    x = torch.randn(5, 96, device=triton_device) * 2 + 1
    weight, scale = torch.randn(33, 96, device=triton_device).to(product), None
    if int8:
        weight, scale = ops.quantize_rows(weight)
    bias, residual = torch.randn(33).to(triton_device, product), torch.randn(5, 33, device=triton_device)
    norm = ops.LayerNormWeights(*torch.randn(2, 96).to(triton_device, product), 1e-5)
    options = {"weight_scale": scale, "layer_norm": norm, "activation": "gelu_new"}
    got = ops.linear_decode(x, weight, bias, residual=residual, backend=backend, **options)
    without = ops.linear_decode(x, weight, bias, backend=backend, **options)
    half = ops.linear_decode(x, weight, bias, residual=residual, out_dtype=torch.float16, backend=backend, **options)
    assert (got.dtype, without.dtype, half.dtype) == (torch.float32, product, torch.float16)
    plain = reference.linear_decode(
        x, weight, bias, residual=residual, product_dtype=product, out_dtype=torch.float32, **options
    )
    exact = reference.linear_decode(
        x, weight, bias, residual=residual, product_dtype=torch.float64, out_dtype=torch.float64, **options
    )
    assert_rms_within_budget(got, [plain], exact)


def test_reference_is_pytorch(seed):
    torch.manual_seed(seed)
    x, weight, bias = torch.randn(4, 30).double(), torch.randn(9, 30).double(), torch.randn(9).double()
    norm = ops.LayerNormWeights(torch.randn(30).double(), torch.randn(30).double(), 1e-5)
    got = reference.linear_decode(
        x, weight, bias, layer_norm=norm, activation="gelu_new", residual=x[:, :9],
        product_dtype=torch.float64, out_dtype=torch.float64,
    )  # fmt: skip
    y = torch.nn.functional.layer_norm(x, (30,), *norm)
    y = torch.nn.functional.gelu(torch.nn.functional.linear(y, weight, bias), approximate="tanh") + x[:, :9]
    torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12)


def test_other_activations_fall_back(triton_device, seed):
    """Where Triton has no kernel, "auto" takes PyTorch, and "triton" raises an error that says so."""
    torch.manual_seed(seed)
    x, weight = torch.randn(3, 20, device=triton_device), torch.randn(7, 20, device=triton_device)
    missing = sorted(set(ops.ACTIVATIONS) - set(ops.TRITON_ACTIVATIONS) - {"linear"})
    assert missing
    for name in missing[:1]:
        expected = ops.ACTIVATIONS[name](x @ weight.T)
        torch.testing.assert_close(ops.linear_decode(x, weight, activation=name), expected)
        with pytest.raises(ValueError, match=f"backend='triton' cannot be used: the activation '{name}' has no"):
            ops.linear_decode(x, weight, activation=name, backend="triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 9)}, r"x must be \(R, K\) and weight \(N, K\); got \(3, 9\) and \(5, 8\)"),
        ({"x": torch.zeros(8)}, r"x must be \(R, K\)"),
        ({"x": torch.zeros(3, 8, dtype=torch.int32)}, "x must be float32, bfloat16 or float16; got torch.int32"),
        ({"weight": torch.zeros(5, 8, dtype=torch.int8)}, "an int8 weight needs weight_scale, no other takes one"),
        ({"weight_scale": torch.ones(5)}, "an int8 weight needs weight_scale, no other takes one"),
        ({"weight": torch.zeros(5, 8, dtype=torch.int8), "weight_scale": torch.ones(4)}, r"float32 of shape \(5,\)"),
        ({"weight": torch.zeros(5, 8, dtype=torch.int16)}, "weight must be float32, bfloat16 or float16"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(5,\); got \(4,\)"),
        ({"residual": torch.zeros(3, 4)}, r"residual must have shape \(3, 5\); got \(3, 4\)"),
        ({"layer_norm": ops.LayerNormWeights(torch.ones(8), torch.ones(7), 1e-5)}, r"layer_norm.bias must have shape"),
        ({"layer_norm": ops.LayerNormWeights(torch.ones(8), torch.ones(8), -1.0)}, "eps must be finite and >= 0"),
        ({"bias": torch.zeros(5, device="meta")}, "all tensors must be on one device"),
        ({"activation": "glue"}, "activation must be one of .*; got 'glue'"),
        ({"out_dtype": torch.int32}, "out_dtype must be a float dtype; got torch.int32"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)  # fmt: skip
def test_bad_inputs_are_refused(changes, message):
    given = {"x": torch.zeros(3, 8), "weight": torch.zeros(5, 8), **changes}
    with pytest.raises(ValueError, match=message) as caught:
        ops.linear_decode(given.pop("x"), given.pop("weight"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(8, 3).T}, "x must have stride 1 in the last dimension: call .contiguous()"),
        ({"weight": torch.zeros(5, 8).double()}, "it multiplies float32, bfloat16 and float16; got torch.float64"),
    ],
)
def test_triton_is_refused(triton_device, changes, message):
    given = {
        name: t.to(triton_device)
        for name, t in {"x": torch.zeros(3, 8), "weight": torch.zeros(5, 8), **changes}.items()
    }
    with pytest.raises(ValueError, match=message):
        ops.linear_decode(**given, backend="triton")
    assert ops.linear_decode(**given).shape == (3, 5)


def test_tf32_is_for_float32_alone(triton_device, monkeypatch):
    """On GPUs without tf32, even a bfloat16 product that allows tf32 does not compile."""
    told = []
    monkeypatch.setattr(linear, "launch_kernel", lambda *_, META, **arguments: told.append(META.PRECISION))
    was = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.zeros(1, 16, dtype=dtype, device=triton_device)
                ops.linear_decode(x, x, backend="triton")
    finally:
        torch.set_float32_matmul_precision(was)
    assert told == ["ieee"] * 3 + ["tf32", "ieee", "ieee"]


def test_opcheck(triton_device):
    from fastgpt2_kernels.triton.decode import linear as kernel

    x, weight = torch.randn(3, 32, device=triton_device), torch.randn(9, 32, device=triton_device)
    bias, residual, norm = torch.randn(9), torch.randn(3, 9), torch.randn(2, 32)
    bias, residual, norm = (t.to(triton_device) for t in (bias, residual, norm))
    op = kernel.linear_decode_op
    torch.library.opcheck(op, (x, weight, None, None, None, None, 0.0, "linear", None, torch.float16))
    int8, scale = ops.quantize_rows(weight)
    torch.library.opcheck(op, (x, int8, bias, scale, norm[0], norm[1], 1e-5, "gelu_tanh", residual, torch.float32))


def test_compiles_whole(triton_device, seed):
    """torch.compile(fullgraph=True) captures it without a graph break, with the same result as eager mode."""
    torch.manual_seed(seed)
    x, weight = torch.randn(3, 32, device=triton_device), torch.randn(9, 32, device=triton_device)
    norm = ops.LayerNormWeights(*torch.randn(2, 32).to(triton_device), 1e-5)

    def f(x):
        return ops.linear_decode(x * 2, weight, layer_norm=norm, activation="gelu_new", backend="triton") + 1

    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


# -- eight bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantize_rows(seed, dtype):
    """Each number is off by at most half a step, a row's largest is 127 steps, and a row of zeros stays zero."""
    torch.manual_seed(seed)
    weight = (torch.randn(20, 31) * torch.logspace(-3, 2, 20)[:, None]).to(dtype)
    weight[7] = 0.0
    values, scale = ops.quantize_rows(weight)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (20,))
    error = (values.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= scale.double()[:, None] * (0.5 + 1e-5)).all()
    assert (values.int().abs().amax(1) == torch.where(torch.arange(20) == 7, 0, 127)).all()
    assert scale[7] == 1.0
    torch.testing.assert_close(scale.double() * 127, weight.double().abs().amax(1).index_fill(0, torch.tensor(7), 127))
    assert ops.quantize_rows(weight[:, :0])[0].shape == (20, 0)


def test_quantize_rows_refuses(seed):
    for bad in (torch.zeros(3), torch.zeros(3, 4, dtype=torch.int8)):
        with pytest.raises(ValueError, match=r"quantize_rows: weight must be a float tensor \(out, in\); got torch"):
            ops.quantize_rows(bad)
