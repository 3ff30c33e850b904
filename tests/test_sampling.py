"""Sampling: the generator's known answers, every filter against transformers', the distribution that is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastgpt2.config import SamplingConfig
from fastgpt2.sampling import penalize_repetition, philox4x32, sample, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that Random123 ships
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert tuple(philox4x32(np.array([counter], dtype=np.uint64), key)[0]) == expected


def test_uniforms_depend_on_every_number_and_on_nothing_else():
    base = float(uniforms(5, [7], [1], [3])[0])
    others = [uniforms(6, [7], [1], [3]), uniforms(5, [8], [1], [3]), uniforms(5, [7], [2], [3])]
    others += [uniforms(5, [7], [1], [4]), uniforms(5 + 2**32, [7], [1], [3]), uniforms(5, [7 + 2**32], [1], [3])]
    assert base not in [float(u[0]) for u in others]
    assert float(uniforms(5, [1, 7, 9], [4, 1, 0], [0, 3, 3])[1]) == base


def test_uniforms_are_uniform():
    draws = uniforms(11, range(100_000), [0] * 100_000, [2] * 100_000)
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    counts = torch.histc(draws, bins=50, min=0, max=1)
    chi2 = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi2 < 49 + 5 * math.sqrt(2 * 49)


def drawn_probabilities(logits: torch.Tensor, config: SamplingConfig, grid: int = 2_000, seen=None) -> torch.Tensor:
    """What `sample` draws from one row of logits, to within 1 / grid (an even grid of uniforms)."""
    uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    rows = logits.expand(grid, -1)
    ids = sample(rows, config, uniform, None if seen is None else seen.expand(grid, -1))
    return torch.bincount(ids, minlength=logits.numel()) / grid


def transformers_probabilities(logits: torch.Tensor, config: SamplingConfig, history: list[int]) -> torch.Tensor:
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as lp

    steps = LogitsProcessorList()
    if config.repetition_penalty != 1.0:
        steps.append(lp.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    steps.append(lp.TemperatureLogitsWarper(config.temperature))
    if config.top_k is not None:
        steps.append(lp.TopKLogitsWarper(config.top_k))
    if config.top_p is not None:
        steps.append(lp.TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        steps.append(lp.MinPLogitsWarper(config.min_p))
    return steps(torch.tensor([history]), logits[None].clone())[0].softmax(-1)


@pytest.mark.parametrize("top_k", [None, 1, 7, 500])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.0, 0.1])
def test_filters_draw_what_transformers_draws(top_k, top_p, min_p, seed):
    torch.manual_seed(seed)
    logits = torch.randn(300) * 3
    history = torch.randint(0, 300, (20,)).tolist()
    config = SamplingConfig(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=1.3)
    seen = torch.zeros(300, dtype=torch.bool)
    seen[history] = True
    got = drawn_probabilities(logits, config, seen=seen)
    expected = transformers_probabilities(logits, config, history)
    assert float((got - expected).abs().max()) <= 1.5 / 2_000
    assert not got[expected == 0].any(), "a token that the filters removed was drawn"


@pytest.mark.parametrize("top_p", [1e-300, 1e-46, 1e-12])
def test_the_likeliest_token_stays_however_small_top_p(top_p):
    logits = torch.tensor([[0.1, 0.3, 0.2]])
    for uniform in (0.0, 0.5, 1.0 - 2.0**-53):
        for top_k in (None, 2):
            config = SamplingConfig(top_p=top_p, top_k=top_k)
            assert sample(logits, config, torch.tensor([uniform], dtype=torch.float64)).tolist() == [1]


def test_top_p_among_equals():
    flat = torch.zeros(2100)  # all of one probability, so of one bin of the histogram
    got = drawn_probabilities(flat, SamplingConfig(top_p=0.9), grid=4_000)
    assert 1885 <= int((got > 0).sum()) <= 1895


def test_large_vocabularies_draw_every_token_with_its_probability(seed):
    """The blocks of the inverse CDF and their edges: a vocabulary that is no multiple of them."""
    torch.manual_seed(seed)
    logits = torch.randn(1000)
    logits[torch.randperm(1000)[:500]] = -math.inf
    got = drawn_probabilities(logits, SamplingConfig(), grid=50_000)
    assert float((got - logits.softmax(-1)).abs().max()) <= 1.5 / 50_000 + 1e-6
    assert not got[logits == -math.inf].any()


def test_chi_square_of_independent_draws():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -math.inf, 0.5])
    n = 100_000
    draws = sample(logits.expand(n, -1), SamplingConfig(temperature=0.7), uniforms(3, range(n), [0] * n, [0] * n))
    counts = torch.bincount(draws, minlength=6).double()
    expected = (logits.double() / 0.7).softmax(-1) * n
    keep = expected > 0
    chi2 = float(((counts - expected)[keep] ** 2 / expected[keep]).sum())
    assert counts[4] == 0
    assert chi2 < 4 + 5 * math.sqrt(2 * 4)


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.01}])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(uniform, options):
    logits = torch.tensor([[-math.inf, 1.0, 0.3, -math.inf, 0.1, -math.inf]])
    token = sample(logits, SamplingConfig(**options), torch.tensor([uniform], dtype=torch.float64))
    assert int(token) in (1, 2, 4)


def test_greedy_needs_no_randomness_and_prefers_the_first_of_equals():
    logits = torch.tensor([[0.0, 5.0, 5.0], [1.0, -1.0, 0.0]])
    assert sample(logits, SamplingConfig(temperature=0)).tolist() == [1, 0]
    assert sample(logits, SamplingConfig(top_k=1, temperature=2.0)).tolist() == [1, 0]


def test_rows_are_independent(seed):
    torch.manual_seed(seed)
    logits = torch.randn(9, 400)
    uniform = torch.rand(9, dtype=torch.float64)
    for options in ({}, {"top_k": 20, "top_p": 0.8}, {"top_p": 0.9}, {"min_p": 0.05}):
        config = SamplingConfig(**options)
        together = sample(logits, config, uniform)
        alone = [int(sample(logits[i : i + 1], config, uniform[i : i + 1])) for i in range(9)]
        assert together.tolist() == alone


def test_half_precision_logits_are_widened():
    logits = torch.randn(2, 50, dtype=torch.bfloat16)
    uniform = torch.rand(2, dtype=torch.float64)
    assert torch.equal(sample(logits, SamplingConfig(), uniform), sample(logits.float(), SamplingConfig(), uniform))


def test_repetition_penalty_signs():
    logits = torch.tensor([[2.0, -2.0, 2.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0]]


def test_sampling_without_uniforms_is_refused():
    with pytest.raises(ValueError, match="needs one uniform number a row"):
        sample(torch.zeros(1, 3), SamplingConfig())
