"""The native sampler draws the same tokens as the reference, except for ties: same noise, same filters."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from fastgpt2_kernels import reference
from fastgpt2_kernels.native import decode
from fastgpt2_kernels.types import SlotSampling, SlotState
from tests.helpers import assert_within_budget

pytestmark = pytest.mark.usefixtures("needs_native")

CPU = torch.device("cpu")
FILTERS = {
    "greedy": {},
    "temperature": {"temperature": (0.3, 1.5)},
    "top-k": {"temperature": (0.5, 1.2), "top_k": (0, 60)},
    "large top-k": {"temperature": (0.5, 1.2), "top_k": (1000, 6000)},
    "top-p": {"temperature": (0.5, 1.2), "top_p": (0.05, 1.0)},
    "min-p": {"temperature": (0.5, 1.2), "min_p": (0.0, 0.3)},
    "penalty": {"penalty": (0.7, 1.6)},
    "all": {
        "temperature": (0.5, 1.2),
        "top_k": (1, 80),
        "top_p": (0.3, 1.0),
        "min_p": (0.0, 0.1),
        "penalty": (1.1, 1.6),
    },
}


def draw_settings(rng: random.Random, name: str, S: int, V: int) -> SlotSampling:
    settings: dict[str, Tensor] = {}
    for key, (low, high) in FILTERS[name].items():
        if key == "top_k":
            settings[key] = torch.tensor([rng.randint(low, high) for _ in range(S)], dtype=torch.int32)
        else:
            settings[key] = torch.tensor([rng.uniform(low, high) for _ in range(S)])
    if "penalty" in settings:
        settings["seen"] = torch.rand(S, V, generator=torch.Generator().manual_seed(rng.randrange(2**31))) < 0.3
    if "temperature" in settings:
        settings["temperature"][0] = 0.0
    return SlotSampling(**settings)


def check_sampling(seed: int, name: str, V: int, *, R: int = 5, spread: float = 2.0) -> None:
    """R of 2 R slots are sampled. They get the reference's tokens, and the other slots do not change."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    S = 2 * R
    state, sampling = SlotState.idle(S, CPU), draw_settings(rng, name, S, V)
    state.keys.copy_(torch.randint(2**32, (S, 2), generator=generator))
    state.produced.copy_(torch.randint(2**20, (S,), generator=generator))
    state.tokens.fill_(-7)
    logits = torch.randn(R, V + 3, generator=generator)[:, :V] * spread
    slots = torch.randperm(S, generator=generator)[:R].int()
    here = slots.long()
    settings = {key: None if t is None else t[here].clone() for key, t in sampling._asdict().items()}
    noise = {"keys": state.keys[here], "positions": state.produced[here]}
    scores = reference.sampling_scores(logits.double(), **settings, **noise)
    seen = None if sampling.seen is None else sampling.seen.clone()
    decode.sample(logits, slots, state, sampling)
    tokens = state.tokens[here].long()
    chosen, best = scores.gather(1, tokens[:, None])[:, 0], scores.amax(1)
    # The best of the reference's scores, or one so close that rounding decides.
    assert (best - chosen <= 1e-4 * best.abs().clamp_min(1.0)).all(), (name, best, chosen)
    exact, plain = (logits.to(t).log_softmax(-1).gather(1, tokens[:, None]) for t in (torch.float64, torch.float32))
    assert_within_budget(state.logprobs[here, None], plain, exact, "log-probabilities")
    others = torch.ones(S, dtype=torch.bool)
    others[here] = False
    assert (state.tokens[others] == -7).all()
    if seen is not None and sampling.seen is not None:
        seen[here, tokens] = True
        assert torch.equal(sampling.seen, seen)


@pytest.mark.parametrize("vocab_size", [1, 61, 4099, 50257])
@pytest.mark.parametrize("name", FILTERS)
def test_tokens_are_the_reference_s(seed, threads, name, vocab_size):
    for i in range(4):
        check_sampling(seed + i, name, vocab_size, spread=(0.3, 1.0, 3.0, 8.0)[i])


def test_ties_go_to_the_lowest_token(seed):
    state = SlotState.idle(2, CPU)
    logits = torch.zeros(2, 5000)
    logits[0, [4000, 4500]] = 1.0
    slots = torch.arange(2, dtype=torch.int32)
    decode.sample(logits, slots, state, SlotSampling())
    assert state.tokens.tolist() == [4000, 0]
    # top-k keeps all of several equal logits, and a temperature of 0 is greedy whatever the filters.
    settings = {"top_k": torch.tensor([1, 3], dtype=torch.int32), "top_p": torch.tensor([0.1, 0.1])}
    decode.sample(logits, slots, state, SlotSampling(temperature=torch.zeros(2), **settings))
    assert state.tokens.tolist() == [4000, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_token_0_and_nan(seed, bad):
    state = SlotState.idle(3, CPU)
    logits = torch.randn(3, 999)
    logits[1, 500] = bad
    logits[2] = -math.inf
    temperature = torch.ones(3)
    decode.sample(logits, torch.arange(3, dtype=torch.int32), state, SlotSampling(temperature=temperature))
    assert state.tokens[1:].tolist() == [0, 0]
    assert state.logprobs.isnan().tolist() == [False, True, True]


def test_tokens_without_probability_are_never_chosen(seed, threads):
    state = SlotState.idle(64, CPU)
    state.keys.copy_(torch.randint(2**32, (64, 2), generator=torch.Generator().manual_seed(seed)))
    logits = torch.full((64, 3001), -math.inf)
    allowed = torch.tensor([5, 1700, 3000])
    logits[:, allowed] = torch.tensor([0.0, 1.0, 0.5])
    slots = torch.arange(64, dtype=torch.int32)
    settings = {"top_k": torch.full((64,), 50, dtype=torch.int32), "top_p": torch.full((64,), 0.9999)}
    for sampling in (
        SlotSampling(temperature=torch.full((64,), 2.0)),
        SlotSampling(temperature=torch.full((64,), 2.0), **settings),
    ):
        decode.sample(logits, slots, state, sampling)
        assert set(state.tokens.tolist()) == set(allowed.tolist())


def test_what_does_not_fit_is_refused_in_one_sentence():
    state, logits, slots = SlotState.idle(3, CPU), torch.zeros(2, 9), torch.tensor([0, 1], dtype=torch.int32)
    for arguments, message in [
        ((logits.double(), slots, state, SlotSampling()), "logits must be float32"),
        ((logits, slots.long(), state, SlotSampling()), "slots must be"),
        ((logits, slots + 2, state, SlotSampling()), "out of range"),
        ((logits, slots, state, SlotSampling(temperature=torch.ones(2))), "temperature must be"),
        ((logits, slots, state, SlotSampling(penalty=torch.ones(3))), "seen"),
        ((logits, slots, state._replace(keys=torch.zeros(3, 2)), SlotSampling()), "keys must be"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            decode.sample(*arguments)
        assert "\n" not in str(error.value)
