"""The checks of decode_attention catch each of these deliberate mistakes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.kernels.faults import load
from tests.kernels.test_decode_attention import CASES, check, check_full, pytestmark  # noqa: F401

SOURCE = Path(__file__).parents[2] / "kernels/fastgpt2_kernels/triton/decode/attention.py"
# Deliberate faults: the case that must notice it, the right code, and the wrong code.
MUTATIONS = {
    "a token does not see itself": ("one", "is_here & (offs_t <= t)", "is_here & (offs_t < t)"),
    "tokens see later ones": ("few", "is_here & (offs_t <= t)", "is_here"),
    "tokens see later ones, on tensor cores": (
        "few on tensor cores",
        "(offs_t[None, :] <= offs_t[:, None]) & is_here[None, :]",
        "(offs_t[None, :] >= 0) & is_here[None, :]",
    ),
    "new keys of the next split too": (
        "few",
        "(past + offs_t >= split_start) & (past + offs_t < split_start + META.SPLIT_S)",
        "(past + offs_t >= split_start)",
    ),
    "a key past the length": ("one", "split_start + offs_s < past", "split_start + offs_s <= past"),
    "the last cached key left out": ("one", "split_start + offs_s < past", "split_start + offs_s < past - 1"),
    "splits added as they are": ("one", "acc = acc * alpha + acc_i * beta", "acc = acc + acc_i"),
    "sums of splits not rescaled": ("one", "l = l * alpha + l_i * beta", "l = l + l_i"),
    "the last split left out": ("one", "tl.cdiv(past + t + 1, META.SPLIT_S)", "tl.cdiv(past + t, META.SPLIT_S)"),
    "one split too many": ("one", "tl.cdiv(past + t + 1, META.SPLIT_S)", "tl.cdiv(past + t + 2, META.SPLIT_S)"),
    "keys not appended": ("one", "    tl.store(k_ptr + at, k, mask=mask)\n", ""),
    "keys appended as values": ("one", "tl.store(v_ptr + at, v, mask=mask)", "tl.store(v_ptr + at, k, mask=mask)"),
    "appended one further": ("one", "at = tl.cast(past, tl.int64) * D", "at = tl.cast(past + 1, tl.int64) * D"),
    "every row its own slot": ("one", "slot = tl.load(rows.slots_ptr + r)", "slot = slot"),
    "no scale": ("one", "scale_log2 = scale * LOG2_E", "scale_log2 = LOG2_E + 0 * scale"),
    "exponentials of base e": ("one", "scale_log2 = scale * LOG2_E", "scale_log2 = scale"),
    "a row of no tokens": ("one", "(count > 0) & (split_start < past + count)", "(split_start < past + 1)"),
    "queries of the first head": ("one", "* qkv.stride + h * META.D", "* qkv.stride"),
    "parts of tokens mixed up": ("few", "at = part + t * (H * MAX_SPLITS)\n", "at = part + t\n"),
    "the first layer": ("indirect", "layer * stride_layer + ", ""),
    "the end of the cache": ("full", "(past <= capacity - count)", "(past <= capacity)"),
    "the end of the cache in memory": ("full, indirect", "tl.minimum(block // D, rows.S)", "tl.minimum(block, rows.S)"),
    "a negative length": ("full", "(past >= 0) & (count", "(count"),
    "a slot too many": ("full", "(slot >= 0) & (slot < rows.num_slots)", "(slot >= 0) & (slot <= rows.num_slots)"),
    "tokens before the first": ("full", "(start >= 0) & (start <= rows.N - count)", "(start <= rows.N - count)"),
    "NaN in the first token only": (
        "full",
        "range(tl.maximum(-start, 0), tl.minimum(count, N - start)):",
        "range(0, 1):",
    ),
}


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_interpreted_mistake_is_caught(interpreter, tmp_path, mistake):
    torch.manual_seed(0)
    random.seed(1)
    case, right, wrong = MUTATIONS[mistake]
    kernel = load(SOURCE, tmp_path, right, wrong)
    with pytest.raises(AssertionError, match=r"over the budget|outside its rows|caches differ"):
        (check_full if "full" in case else check)(kernel, CASES[case], interpreter)
