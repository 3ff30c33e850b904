"""A prefix that prompts share is computed once. Their samples are the same as if each were generated alone."""

from __future__ import annotations

import random

import pytest
import torch

from fastgpt2 import GPT2
from fastgpt2.decode import why_not_decode
from fastgpt2.prefixes import MIN_COMPUTED, MIN_SHARED, Holder, PrefixIndex, common_prefix
from tests.helpers import random_model

V = 61


def families(rng: random.Random, count: int, longest: int = 60) -> list[tuple[int, ...]]:
    """Prompts that share prefixes of any length, in random order. Some are duplicates, some are prefixes of others."""
    prompts = [tuple(rng.randrange(V) for _ in range(rng.randint(1, longest)))]
    while len(prompts) < count:
        stem = rng.choice(prompts)
        kept = stem[: rng.choice([0, len(stem), rng.randint(0, len(stem))])]
        tail = tuple(rng.randrange(V) for _ in range(rng.choice([0, 1, 5, 20])))
        if 0 < len(kept + tail) <= longest:
            prompts.append(kept + tail)
    rng.shuffle(prompts)
    return prompts


def tree_size(prompts: list[tuple[int, ...]]) -> int:
    return len({prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)})


def test_the_common_prefix_of_two(seed):
    rng = random.Random(seed)
    for _ in range(300):
        one, other = (tuple(rng.randrange(2) for _ in range(rng.randint(0, 12))) for _ in range(2))
        expected = next((i for i, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))  # noqa: B905
        assert common_prefix(one, other) == expected


def test_what_is_copied_is_there_and_alike(seed):
    rng = random.Random(seed)
    for _ in range(40):
        prompts = families(rng, rng.randint(2, 40))
        held = dict(enumerate(prompts[: rng.randint(0, 10)]))
        index = PrefixIndex(held)
        new = [index.add(ids) for ids in prompts]
        known: list[Holder] = []
        for holder in new:
            assert 0 <= holder.shared <= max(0, len(holder.ids) - MIN_COMPUTED)
            if holder.source is None:
                assert (holder.shared, holder.wave) == (0, 0)
            else:
                assert holder.source in known or held[holder.source.slot] == holder.source.ids
                assert holder.ids[: holder.shared] == holder.source.ids[: holder.shared]
                assert holder.shared >= MIN_SHARED
                assert holder.wave == holder.source.wave + 1
            known.append(holder)
        computed = sum(len(holder.ids) - holder.shared for holder in new)
        assert computed <= tree_size(prompts) + MIN_SHARED * len(prompts)


def test_many_prompts_with_one_beginning_take_two_passes(seed):
    rng = random.Random(seed)
    common = tuple(rng.randrange(V) for _ in range(50))
    index = PrefixIndex({})
    holders = [index.add((*common, *(rng.randrange(V) for _ in range(4)))) for _ in range(64)]
    assert [holder.wave for holder in holders] == [0, *[1] * 63]
    assert sum(len(holder.ids) - holder.shared for holder in holders) <= 50 + 64 * 4


@pytest.mark.parametrize(
    ("backend", "changes", "options"),
    [
        ("auto", {}, {}),
        ("auto", {}, {"repetition_penalty": 1.3}),
        ("auto", {}, {"weight_dtype": "int8"}),
        ("auto", {"dtype": torch.bfloat16}, {}),
        ("torch", {"dtype": torch.float64}, {}),
    ],
    ids=["native", "penalty", "int8", "bfloat16", "torch"],
)
def test_samples_are_what_they_are_without_sharing(backend, changes, options, seed, monkeypatch):
    rng = random.Random(seed)
    model = random_model(seed, context_length=80).to(changes.get("dtype", torch.float32))
    model.backend = backend
    is_exact = why_not_decode(model) is None
    if backend == "auto" and not is_exact:
        pytest.skip(f"{why_not_decode(model)}")
    prompts = families(rng, 30 if backend == "auto" else 12)
    options = {"max_new_tokens": 9, "num_samples": 2, "seed": seed, "stop_token_ids": list(range(9)), **options}
    computed = count_prefilled(model, monkeypatch)
    alone = [
        sample
        for index, prompt in enumerate(prompts)
        for sample in model.generate([prompt], sample_ids=[index], **options)
    ]
    assert sum(computed) == sum(map(len, prompts))
    for batch_size in (1, rng.randint(2, 20), 60):
        computed.clear()
        together = model.generate(prompts, batch_size=batch_size, **options)
        assert [s.token_ids for s in together] == [s.token_ids for s in alone]
        if is_exact:
            assert [s.logprobs for s in together] == [s.logprobs for s in alone]
        if batch_size == 60:
            assert sum(computed) <= tree_size(prompts) + MIN_SHARED * len(prompts)


def count_prefilled(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of prompt tokens of every forward pass from now on."""
    from fastgpt2.scheduler import Scheduler

    computed: list[int] = []
    extend = Scheduler._extend

    def counted(self, slots, new, pasts):
        computed.append(sum(map(len, new)))
        return extend(self, slots, new, pasts)

    monkeypatch.setattr(Scheduler, "_extend", counted)
    return computed


def test_a_prefix_outlives_the_row_that_computed_it(seed, monkeypatch):
    """With more prompts than slots, later prompts find their prefix in slots that are free again, or still in use."""
    rng = random.Random(seed)
    model = random_model(seed, context_length=80)
    common = [rng.randrange(V) for _ in range(40)]
    prompts = [[*common, rng.randrange(V)] for _ in range(20)]
    computed = count_prefilled(model, monkeypatch)
    model.generate(prompts, batch_size=3, max_new_tokens=rng.randint(1, 5), seed=seed)
    assert sum(computed) == len(common) + 1 + MIN_COMPUTED * (len(prompts) - 1)
