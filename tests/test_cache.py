"""The KV cache: growth and forks keep its contents, and nothing past a slot's length is ever read."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from fastgpt2 import GPT2, KVCache
from fastgpt2_kernels import ops
from fastgpt2_kernels.native import LARGE_PAGE, use_large_pages

SIZES = {"vocab_size": 61, "hidden_size": 48, "num_layers": 2, "num_heads": 3, "context_length": 200}


def vm_flags(address: int) -> str:
    """What Linux reports about the memory mapping that contains an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line
    return ""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists() or not Path("/proc/self/smaps").exists(),
    reason="needs Linux's large pages",
)
def test_large_pages_are_asked_for():
    tensor = torch.empty(3 * LARGE_PAGE, dtype=torch.uint8)
    assert use_large_pages(tensor) is tensor
    assert " hg" in vm_flags(-(-tensor.data_ptr() // LARGE_PAGE) * LARGE_PAGE)


def test_memory_without_a_whole_large_page_stays_as_it_is():
    for tensor in (torch.arange(5), torch.empty(0), torch.empty(7, device="meta")):
        assert use_large_pages(tensor) is tensor
    assert torch.equal(use_large_pages(torch.arange(5)), torch.arange(5))


@pytest.fixture
def model(seed):
    torch.manual_seed(seed)
    return GPT2(**SIZES, initializer_range=0.2).eval()


def poisoned(model: GPT2, slots: int, capacity: int) -> KVCache:
    cache = KVCache(model.config, slots, capacity)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    return cache


def test_chunks_of_any_size_equal_one_forward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        lengths = torch.randint(1, 100, (4,), generator=generator).tolist()
        rows = [torch.randint(0, 61, (n,), generator=generator) for n in lengths]
        cache = poisoned(model, 6, 10)
        slots = torch.randperm(6, generator=generator)[:4].tolist()
        done = [0] * 4
        outputs: list[list[torch.Tensor]] = [[] for _ in rows]
        while any(d < n for d, n in zip(done, lengths, strict=True)):
            active = [i for i in range(4) if done[i] < lengths[i]]
            counts = [int(torch.randint(1, lengths[i] - done[i] + 1, (1,), generator=generator)) for i in active]
            plan = ops.plan_rows([slots[i] for i in active], counts, [done[i] for i in active])
            flat = torch.cat([rows[i][done[i] : done[i] + c] for i, c in zip(active, counts, strict=True)])
            hidden = model.extend(flat, plan, cache).split(counts)
            for i, count, part in zip(active, counts, hidden, strict=True):
                outputs[i].append(part)
                done[i] += count
        for row, output in zip(rows, outputs, strict=True):
            torch.testing.assert_close(torch.cat(output), model.hidden_states(row[None])[0], rtol=1e-4, atol=1e-4)
        assert [cache.lengths[s] for s in slots] == lengths


def test_growth_keeps_what_is_held(model):
    cache = poisoned(model, 2, 64)
    ids = torch.randint(0, 61, (2, 150))
    whole = model(ids)
    parts = [model(part, cache=cache) for part in ids.split(40, dim=1)]
    assert cache.capacity == 192
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_fork_copies_and_separates(model):
    cache = poisoned(model, 3, 64)
    prompt = torch.randint(0, 61, (7,))
    model.extend(prompt, ops.plan_rows([1], [7], [0]), cache)
    cache.fork(1, [0, 2])
    assert cache.lengths == [7, 7, 7]
    new = torch.tensor([3, 4, 5])
    hidden = model.extend(new, ops.plan_rows([0, 1, 2], [1, 1, 1], [7, 7, 7]), cache)
    for i in range(3):
        expected = model.hidden_states(torch.cat((prompt, new[i : i + 1]))[None])[0, -1]
        torch.testing.assert_close(hidden[i], expected, rtol=1e-4, atol=1e-4)


def test_a_freed_slot_takes_another_sequence(model):
    cache = poisoned(model, 1, 64)
    model(torch.randint(0, 61, (1, 30)), cache=cache)
    cache.free(0)
    ids = torch.randint(0, 61, (1, 5))
    torch.testing.assert_close(model(ids, cache=cache), model(ids), rtol=1e-4, atol=1e-4)


def test_overflow_leaves_the_cache_as_it_was(model):
    cache = KVCache(model.config, 1)
    model(torch.randint(0, 61, (1, 199)), cache=cache)
    keys = cache.keys[..., :199, :].clone()
    with pytest.raises(ValueError, match="201 tokens do not fit in the context of 200"):
        model(torch.randint(0, 61, (1, 2)), cache=cache)
    assert cache.lengths == [199]
    assert torch.equal(keys, cache.keys[..., :199, :])
