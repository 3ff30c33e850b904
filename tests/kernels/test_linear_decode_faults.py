"""The checks of the maps of a few rows catch each of these deliberate mistakes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.kernels import linear_maps
from tests.kernels.faults import load
from tests.kernels.test_linear_decode import BASE

SOURCE = Path(__file__).parents[2] / "kernels/fastgpt2_kernels/triton/decode/linear.py"
MUTATIONS = {
    "a variance in one pass": (
        "_sum_inputs(total, SHARES) / K + norm.eps",
        "tl.abs(_sum_inputs(x_k * x_k, SHARES) / K - tl.reshape(mean * mean, (BLOCK_R,))) + norm.eps",
    ),
    "no eps": ("/ K + norm.eps", "/ K"),
    "what is masked away counts in the variance": (
        "tl.where(mask_k[:, :, None], x_k.to(tl.float32) - mean, 0.0)",
        "x_k.to(tl.float32) - mean",
    ),
    "a step of the mean is left out": (
        "total = x_k.to(tl.float32)\n        for i in range(1, STEPS):",
        "total = x_k.to(tl.float32)\n        for i in range(2, STEPS):",
    ),
    "a step of the variance is left out": (
        "total = centred * centred\n        for i in range(1, STEPS):",
        "total = centred * centred\n        for i in range(2, STEPS):",
    ),
    "the LayerNorm's bias is left out": ("* rstd * g + b", "* rstd * g"),
    "the LayerNorm's weight is always the first step's": (
        "norm.weight_ptr + first_k + offs_k",
        "norm.weight_ptr + first_k + offs_b",
    ),
    "shares overlap": ("mask_k = offs_b < share_end", "mask_k = offs_b < K - first_k"),
    "the first step's operand is used again": ("w, x_k = w_next, x_next", "w = w_next"),
    "half of the shares": ("x = even + odd", "x = even"),
    "the scale of the next output": ("scale_ptr + offs_n,", "scale_ptr + offs_n + 1,"),
    "no bias": ("if bias_ptr is not None:", "if bias_ptr is not None and scale_ptr is not None:"),
    "no activation": ("y = _activation(y, ACTIVATION)", "y = y"),
    "the residual's rows are as far apart as out's": ("rows * residual.stride", "rows * out.stride"),
    "one output too many": ("offs_r < sizes.R, offs_n < sizes.N", "offs_r < sizes.R, offs_n < sizes.N + 1"),
    "one row too many": ("offs_r < sizes.R, offs_n < sizes.N", "offs_r < sizes.R + 1, offs_n < sizes.N"),
    "rows for slots": (
        "slot = tl.load(splits.slots_ptr + offs_r, mask=mask_r, other=0) if splits.slots_ptr is not None else offs_r",
        "slot = offs_r",
    ),
    "counts are not looked at": (
        "if splits.counts_ptr is not None:",
        "if splits.counts_ptr is not None and META.SPLIT_S < 0:",
    ),
    "a split that is not there": ("tl.minimum(past // META.SPLIT_S + 1, splits.MAX_SPLITS)", "splits.MAX_SPLITS"),
    "the last split is left out": ("past // META.SPLIT_S + 1", "past // META.SPLIT_S"),
    "earlier splits are not scaled down": ("acc = acc * alpha[:, :, None, :] +", "acc = acc +"),
    "sums are not scaled down": ("l = l * alpha +", "l = l +"),
    "-inf - (-inf)": ('m_used = tl.where(m_new == float("-inf"), 0.0, m_new)', "m_used = m_new"),
    "division by no sum": ("tl.where(l == 0.0, 1.0, l)", "l"),
    "grains as wide as 16, whatever the head": ("GRAIN=math.gcd(16, head_size)", "GRAIN=16"),
}
CASES = [
    {"prologue": "none", "R": 9, "tiles": (8, 16, 16), "int8": True, "residual": torch.float16},
    {"prologue": "none", "R": 3, "activation": "gelu_new", "tiles": (8, 32, 32)},
    {"prologue": "none", "R": 3, "K": 129, "tiles": (8, 16, 64), "residual": "out"},
    {"prologue": "layer_norm", "mean": 1000.0, "tiles": (8, 16, 64)},
    {"prologue": "layer_norm", "mean": 3.0, "tiles": (8, 16, 16), "K": 700, "product": torch.float32},
    {"prologue": "layer_norm", "spread": 3e-3, "tiles": (8, 16, 64)},
    {"prologue": "combine", "R": 9, "tiles": (8, 16, 16), "product": torch.float32},
]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(kernel: ModuleType, monkeypatch, device: str) -> None:
    torch.manual_seed(3)
    for changes in CASES:
        case = {**BASE, **changes}
        linear_maps.use_tiles(monkeypatch, case["tiles"])
        linear_maps.check(kernel, case, device)


def test_interpreted_as_it_is(tmp_path, monkeypatch, interpreter):
    check(load(SOURCE, tmp_path), monkeypatch, interpreter)


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_interpreted_mistake_is_caught(mistake, tmp_path, monkeypatch, interpreter):
    old, new = MUTATIONS[mistake]
    kernel = load(SOURCE, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check(kernel, monkeypatch, interpreter)
