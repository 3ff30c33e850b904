"""Cached attention with one and with several new tokens per row, against the reference in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastgpt2_kernels import reference
from fastgpt2_kernels.native import decode
from tests.helpers import assert_within_budget

pytestmark = pytest.mark.usefixtures("needs_native")
CACHE_DTYPES = [torch.float32, torch.bfloat16]


def expected(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Sequence[int], counts: Sequence[int], pasts: Sequence[int]
) -> Tensor:
    """The reference in the caches' dtype. It writes to the caches."""
    counts_R, slots_R = torch.tensor(counts), torch.tensor(slots)
    lengths = torch.zeros(keys.shape[0], dtype=torch.int64)
    lengths[slots_R] = torch.tensor(pasts)
    starts = counts_R.cumsum(0) - counts_R
    return reference.decode_attention(
        qkv.to(keys.dtype), keys, values, lengths, starts=starts, counts=counts_R, slots=slots_R
    )


def check_attention(
    seed: int, H: int, D: int, counts: Sequence[int], pasts: Sequence[int], dtype: torch.dtype, *, room: int = 3
) -> None:
    """Rows in shuffled slots of the middle one of three layers. All other memory is NaN and must not change.

    New keys and values are exact in the cache's dtype. Everything else is float32 for either dtype, within its budget.
    """
    generator = torch.Generator().manual_seed(seed)
    L, S = 3, len(counts) + 2
    T = max(c + p for c, p in zip(counts, pasts, strict=True)) + room
    slots = torch.randperm(S, generator=generator)[: len(counts)].tolist()
    keys, values = (torch.full((L, S, H, T, D), math.nan, dtype=dtype) for _ in range(2))
    for slot, past in zip(slots, pasts, strict=True):
        for cache in (keys, values):
            cache[1, slot, :, :past] = torch.randn(H, past, D, generator=generator)
    qkv = torch.randn(sum(counts), 3 * H * D, generator=generator) * 2
    qkv[:, H * D :] = qkv[:, H * D :].to(dtype).float()
    exact_keys, exact_values = keys[1].double(), values[1].double()
    plain_keys, plain_values = keys[1].clone().float(), values[1].clone().float()
    exact = expected(qkv, exact_keys, exact_values, slots, counts, pasts)
    plain = expected(qkv, plain_keys, plain_values, slots, counts, pasts)
    got = decode.attention(qkv, keys, values, 1, slots, counts, pasts)
    assert_within_budget(got, plain, exact, f"attention {dtype} H={H} D={D} counts={counts} pasts={pasts}")
    for cache, right in ((keys, plain_keys), (values, plain_values)):
        assert torch.equal(cache[1].float().nan_to_num(7.0), right.nan_to_num(7.0)), "the cache differs"
        assert cache[[0, 2]].isnan().all(), "another layer's cache was written"


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 33, 64, 80, 128, 256])
def test_one_new_token_a_row(seed, threads, head_size, dtype):
    rng = random.Random(seed)
    pasts = [0, 1, 3, 255, 256, 600, rng.randint(1, 500)]
    check_attention(seed, 3, head_size, [1] * len(pasts), pasts, dtype, room=rng.randint(0, 3))


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [1, 16, 33, 64, 256])
def test_several_new_tokens_a_row(seed, threads, head_size, dtype):
    rng = random.Random(seed)
    counts = [2, 48, 1, 49, 130, rng.randint(2, 60)]
    pasts = [0, 5, 7, 100, 0, rng.randint(0, 300)]
    check_attention(seed, 2, head_size, counts, pasts, dtype)


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 5, 60]], ids=["one", "several"])
def test_new_keys_and_values_are_rounded_to_nearest(seed, counts):
    """The cache rounds to bfloat16 as PyTorch does, ties to even, for large, small and non-finite numbers."""
    generator = torch.Generator().manual_seed(seed)
    H, D = 2, 33
    bits = torch.randint(-(2**31), 2**31, (sum(counts), 3 * H * D), generator=generator).int()
    bits[:, ::3] = (bits[:, ::3] & ~0xFFFF) | 0x8000  # ties
    qkv = bits.view(torch.float32)
    qkv[0, -5:] = torch.tensor([math.nan, math.inf, -math.inf, 3.4e38, 1e-40])
    keys, values = (torch.zeros(1, 3, H, 70, D, dtype=torch.bfloat16) for _ in range(2))
    decode.attention(qkv, keys, values, 0, range(3), counts, [4] * 3)
    start = 0
    for row, count in enumerate(counts):
        new = qkv[start : start + count].view(count, 3, H, D).to(torch.bfloat16)
        for cache, right in ((keys, new[:, 1]), (values, new[:, 2])):
            got = cache[0, row, :, 4 : 4 + count].transpose(0, 1)
            assert torch.equal(got.isnan(), right.isnan())
            assert torch.equal(got.nan_to_num(7.0), right.nan_to_num(7.0))
        start += count


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
def test_a_row_has_the_same_bits_whatever_its_neighbours_and_threads(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    H, D, T = 2, 40, 700
    counts, pasts = [1, 1, 90, 7, 1], [600, 3, 250, 0, 255]
    held = torch.randn(2, 1, 5, H, T, D, generator=generator).to(dtype)
    qkv = torch.randn(sum(counts), 3 * H * D, generator=generator)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(decode.attention(qkv, *held.clone(), 0, range(5), counts, pasts))
            alone, start = [], 0
            for r, (count, past) in enumerate(zip(counts, pasts, strict=True)):
                alone.append(decode.attention(qkv[start : start + count], *held.clone(), 0, [r], [count], [past]))
                start += count
            outs.append(torch.cat(alone))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_row_that_does_not_fit_is_nan_and_writes_nothing(seed, threads):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, 3, 2, 9, 16, generator=generator)
    before = keys.clone(), values.clone()
    qkv = torch.randn(6, 96, generator=generator)
    got = decode.attention(qkv, keys, values, 0, [0, 1, 7], [1, 4, 1], [9, 6, 2])
    assert got.isnan().all()
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


def test_what_does_not_fit_is_refused_in_one_sentence():
    cache = torch.zeros(2, 3, 2, 9, 16)
    qkv = torch.zeros(2, 96)
    for arguments, message in [
        ((qkv, cache, cache, 2, [0, 1], [1, 1], [0, 0]), "layer"),
        ((qkv, cache, cache, 0, [0, 0], [1, 1], [0, 0]), "all different"),
        ((qkv, cache, cache, 0, [0, 1], [1, 0], [0, 0]), "counts"),
        ((qkv, cache, cache, 0, [0, 1], [1, 2], [0, 0]), "counts"),
        ((qkv[:, :-1], cache, cache, 0, [0, 1], [1, 1], [0, 0]), "qkv must be"),
        ((qkv, cache.double(), cache, 0, [0, 1], [1, 1], [0, 0]), "keys must be float32"),
        ((qkv, cache, cache[:, :2], 0, [0, 1], [1, 1], [0, 0]), "share shape"),
        ((qkv, cache, cache.bfloat16(), 0, [0, 1], [1, 1], [0, 0]), "dtype"),
        ((qkv, *[cache.transpose(3, 4).contiguous().transpose(3, 4)] * 2, 0, [0, 1], [1, 1], [0, 0]), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            decode.attention(*arguments)
        assert "\n" not in str(error.value)
