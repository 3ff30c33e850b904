"""Random linear layers for a few rows, as in decoding, and their expected results."""

from __future__ import annotations

import math
import os
import random
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt2_kernels import ops, reference
from fastgpt2_kernels.triton import launch
from tests.helpers import assert_rms_within_budget

# Triton's interpreter multiplies bfloat16 tiles wrong (it takes their bits), so bfloat16 is tested on compiled kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
CANARY = -7.5
# Tiles, besides the shipped ones, that put every kind of border within a few rows, outputs and inputs.
TILES = [(8, 16, 16), (8, 32, 32), (16, 16, 64), (16, 64, 16), (16, 32, 128), (32, 64, 64), None]


class Parts(NamedTuple):
    out: Tensor
    max: Tensor
    sum: Tensor


class Rows(NamedTuple):
    lengths: Tensor
    slots: Tensor | None
    counts: Tensor | None


def use_tiles(monkeypatch, tiles: tuple[int, int, int] | None) -> None:
    """Launch with (block_r, block_n, block_k), or with the launch table's tiles if it is None."""
    monkeypatch.undo()
    if tiles is not None:
        row = launch.LinearDecodeRow(*tiles)
        monkeypatch.setattr(launch, "linear_decode_row", lambda *_: row)


def random_case(rng: random.Random) -> dict[str, Any]:
    prologue = rng.choice(["none", "layer_norm", "layer_norm", "combine", "combine"])
    product = rng.choice(DTYPES)
    R, K = rng.choice([1, 1, 2, 3, 5, 8, 9, 17, 33, 70]), rng.choice(
        [16, 17, 30, 48, 100, 128, 130, 257, 300, 520, 768, 1000, 1700]
    )  # fmt: skip
    heads, head_size = rng.choice([(1, 16), (3, 16), (2, 40), (5, 64), (3, 80), (3, 128), (12, 64), (7, 20)])
    mean = rng.choice([0.0, 0.0, 3.0, 1000.0]) if prologue == "layer_norm" else 0.0
    return {
        "prologue": prologue,
        "R": R,
        "N": rng.choice([7, 16, 33, 50, 64, 97]),
        "K": K,
        "heads": heads,
        "head_size": head_size,
        "split_s": rng.choice([1, 4, 16]),
        "splits": rng.choice([1, 2, 3, 9]),
        "slots": rng.random() < 0.6,
        "counts": rng.random() < 0.5,
        "product": product,
        "int8": rng.random() < 0.3,
        # A mean so large that a one-pass variance would lose all digits, and a spread so small that eps matters.
        "mean": mean,
        "spread": 1.0 if mean else rng.choice([1.0, 3e-3]),
        "x_dtype": rng.choice([torch.float32, product]),
        "bias": rng.choice([None, torch.float32, product]),
        "residual": rng.choice([None, torch.float32, product, "out"]),
        "out": rng.choice([torch.float32, product]),
        "activation": rng.choice(["linear", "gelu_new"]),
        # Many programs with many steps take long under the interpreter.
        "tiles": rng.choice(TILES if R < 17 and K < 500 else TILES[4:]),
    }


def surrounded(x: Tensor, fill: float = math.nan) -> Tensor:
    """The same values as a view in the middle of a larger buffer whose rows are longer."""
    buffer = torch.full((x.shape[0] + 2, x.shape[1] + 13), fill, dtype=x.dtype, device=x.device)
    return buffer[1:-1, 8 : 8 + x.shape[1]].copy_(x)


def random_parts(case: dict[str, Any], device: str) -> tuple[Parts, Rows, int]:
    """The parts that `decode_splits` writes for R rows of one new token. Splits that a row does not have hold NaN."""
    R, H, D, splits, split_s = (case[key] for key in ("R", "heads", "head_size", "splits", "split_s"))
    num_slots = R + 3 if case["slots"] else R
    lengths = torch.randint(0, splits * split_s, (num_slots,), dtype=torch.int32)
    slots = torch.randperm(num_slots)[:R].to(torch.int32) if case["slots"] else None
    counts = (torch.rand(R) < 0.8).to(torch.int32) if case["counts"] else None
    past = lengths if slots is None else lengths[slots.long()]
    used = torch.arange(splits) * split_s <= past[:, None]
    if counts is not None:
        used &= counts[:, None] > 0
    used = used[:, None, :].expand(R, H, splits)
    parts = Parts(
        torch.randn(R, H, splits, D).where(used[..., None], math.nan),
        (torch.randn(R, H, splits) * 3).where(used, math.nan),
        (torch.rand(R, H, splits) + 0.5).where(used, math.nan),
    )
    tensors = (lengths, slots, counts)
    rows = Rows(*(None if t is None else t.to(device) for t in tensors))
    return Parts(*(t.to(device) for t in parts)), rows, split_s


def combined(parts: Parts, dtype: torch.dtype) -> Tensor:
    """The output of attention (R, C), combined from the parts; 0 for a row that has none."""
    used = ~parts.max.isnan()
    m = parts.max.to(dtype).where(used, -math.inf)
    weight = torch.exp2(m - m.amax(-1, keepdim=True).clamp_min(-1e30))
    l = (weight * parts.sum.to(dtype).where(used, 0.0)).sum(-1, keepdim=True)
    out = (weight[..., None] * parts.out.to(dtype).where(used[..., None], 0.0)).sum(-2)
    return (out / l.where(l > 0, 1.0)).flatten(1)


def check(kernel: ModuleType, case: dict[str, Any], device: str) -> Tensor:
    """Launch the case's linear layer, check it by the 2x rule, and return its result."""
    R, N, product = case["R"], case["N"], case["product"]
    is_combined = case["prologue"] == "combine"
    K = case["heads"] * case["head_size"] if is_combined else case["K"]

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    weight, scale = draw(N, K, dtype=product) / K**0.5, None
    if case["int8"]:
        weight, scale = ops.quantize_rows(weight)
    weight = surrounded(weight, 0 if case["int8"] else math.nan)
    # The products of an int8 weight have the dtype of the bias, else of the LayerNorm, else of x.
    bias = None if case["bias"] is None else draw(N, dtype=product if case["int8"] else case["bias"])
    layer_norm = None
    if case["prologue"] == "layer_norm":
        layer_norm = ops.LayerNormWeights(draw(K, dtype=product), draw(K, dtype=product), 1e-5)
    if is_combined:
        parts, rows, split_s = random_parts(case, device)
        x, plain_x, exact_x = kernel.Attended(parts, rows, split_s), combined(parts, torch.float32), combined(
            parts, torch.float64
        )  # fmt: skip
        if case["int8"] and bias is None:
            product = torch.float32
    else:
        x_dtype = product if case["int8"] and layer_norm is None else case["x_dtype"]
        x = (draw(R, K) * case["spread"] + case["mean"]).to(x_dtype)
        x = surrounded(x) if R % 2 else x
        plain_x = exact_x = x
    buffer = torch.full((R + 2, N + 9), CANARY, dtype=case["out"], device=device)
    out = buffer[1:-1, 4 : 4 + N].fill_(math.nan)
    residual = None
    if case["residual"] == "out":
        residual = out.copy_(draw(R, N))
    elif case["residual"] is not None:
        residual = surrounded(draw(R, N, dtype=case["residual"]))
    before = None if residual is None else residual.clone()
    kernel.linear_decode_out(
        x, weight, out, bias=bias, weight_scale=scale, layer_norm=layer_norm,
        activation=ops.TRITON_ACTIVATIONS.get(case["activation"], "linear"),
        residual=residual,
    )  # fmt: skip

    def expected(x: Tensor, order: Tensor, product: torch.dtype, out: torch.dtype) -> Tensor:
        norm = layer_norm
        if norm is not None:
            norm = ops.LayerNormWeights(norm.weight[order], norm.bias[order], norm.eps)
        return reference.linear_decode(
            x[:, order], weight[:, order], bias, weight_scale=scale, layer_norm=norm, activation=case["activation"],
            residual=before, product_dtype=product, out_dtype=out,
        )  # fmt: skip

    orders = [torch.arange(K), torch.arange(K).flip(0), torch.randperm(K)]
    plains = [expected(plain_x, order.to(device), product, case["out"]) for order in orders]
    exact = expected(exact_x, orders[0].to(device), torch.float64, torch.float64)
    assert_rms_within_budget(out, plains, exact, f"{case}", terms=4.0 * case["mean"])
    rest = buffer.clone()
    rest[1:-1, 4 : 4 + N] = CANARY
    assert (rest == CANARY).all(), f"written outside its output: {case}"
    if before is not None and case["residual"] != "out":
        assert torch.equal(residual, before)
    return out.clone()
