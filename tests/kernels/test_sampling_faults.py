"""The checks of the sampling kernel catch each of these deliberate mistakes."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.kernels import test_sampling as sampling
from tests.kernels.faults import load

SOURCE = Path(__file__).parents[2] / "kernels/fastgpt2_kernels/triton/sampling.py"
# For every mistake: the right code, the wrong code, and the case that must notice it.
MUTATIONS = {
    "words out of order": ("tl.join(w0, w2), tl.join(w1, w3)", "tl.join(w0, w1), tl.join(w2, w3)", "plain"),
    "the wrong half is log1p's": ("is_low = signed >= 0", "is_low = signed < 0", "plain"),
    "only half of the key": ("low_word | (", "low_word | 0 * (", "plain"),
    "another row's position": (
        "tl.load(settings.positions_ptr + slot)",
        "tl.load(settings.positions_ptr + r)",
        "plain",
    ),
    "another row's temperature": (
        "tl.load(settings.temperature_ptr + slot)",
        "tl.load(settings.temperature_ptr + r)",
        "plain",
    ),
    "noise without temperature": ("scores = y + draw.temperature * _gumbel", "scores = y + _gumbel", "plain"),
    "a bar too high": ("* draw.scale_log2 + 1e-4)", "* draw.scale_log2 - 8.0)", "blocks"),
    "a bar that forgets temperature": ("(y - bar) * draw.scale_log2", "(y - bar) * LOG2_E", "blocks"),
    "the last of equals": ("is_best = y > best\n    best_id", "is_best = y >= best\n    best_id", "ties"),
    "the second is the best's": ("tl.where(is_best, best_id, tl.where(", "tl.where(is_best, offs, tl.where(", "lanes"),
    "the second keeps its place": ("tl.where(is_best, best, tl.maximum(second, y))", "tl.maximum(second, y)", "lanes"),
    "nothing is ever left out": ("third = tl.maximum(third, tl.minimum(y, second))", "third = third", "three"),
    "k + 1 tokens": ("k = tl.where(k <= 0, V, k)", "k = tl.where(k <= 0, V, k + 1)", "k"),
    "top-p forgotten": ("is_open = (mass_above >= limit)", "is_open = (mass_above < 0)", "p"),
    "top-p takes a token that it can do without": ("(mass_above >= limit)", "(mass_above > limit)", "exact"),
    "top-p before temperature": ("tl.minimum(1.0 / temperature, MAX_INVERSE) * LOG2_E", "LOG2_E", "p"),
    "top-p before top-k": ("mass = _mass_from(row, end, low,", 'mass = _mass_from(row, end, float("-inf"),', "k and p"),
    "min-p before temperature": ("y_max + temperature * (LN_2", "y_max + (LN_2", "min"),
    "min-p or top-k": ("low = tl.maximum(low, tl.where(min_p", "low = tl.minimum(low, tl.where(min_p", "k and min"),
    "positive logits rewarded": ("tl.where(x < 0, x * penalty, x / penalty)", "x * penalty", "penalty"),
    "penalised log-probabilities": ("step(m, rest, x, LOG2_E", "step(m, rest, y, LOG2_E", "greedy"),
    "the rest is rounded away": ("tl.where(rest < 0.5,", "tl.where(rest < 0.0,", "rows"),
    "+inf is good": (' & (row_max < float("inf"))', "", "rows"),
    "only -inf is good": ("is_good = (rest > -1.0)", "is_good = (rest > -2.0)", "rows"),
    "the choice is not marked": ("mask=is_good)", "mask=is_good & False)", "greedy"),
    "one logit past the row": ("mask=offs < end, other=float", "mask=offs <= end, other=float", "greedy"),
}
PLAIN = {
    "V": 300, "kind": "plain", "R": 3, "dtype": torch.float32, "padding": 4, "temperature": 1.7, "top_k": None,
    "top_p": None, "min_p": None, "penalty": None, "slots": True, "mark_seen": False, "wide_keys": True,
}  # fmt: skip
CASES = {
    "plain": {},
    "blocks": {"V": 9001},
    "greedy": {"temperature": None, "mark_seen": True, "penalty": 1.3, "kind": "ties"},
    "ties": {"temperature": None, "V": 5003, "kind": "flat"},
    "penalty": {"penalty": 5.0, "temperature": 6.0},
    "lanes": {"V": 4100, "top_k": 20, "kind": "lanes", "temperature": 3.0},
    "three": {"V": 7001, "top_k": 4, "kind": "lanes", "temperature": 3.0, "padding": 1},
    "k": {"top_k": 2, "temperature": 9.0},
    "p": {"top_p": 0.1, "temperature": 3.0},
    "k and p": {"top_p": 0.3, "top_k": 5, "temperature": 3.0},
    "min": {"min_p": 0.5, "temperature": 4.0},
    "k and min": {"min_p": 0.5, "temperature": 4.0, "top_k": 150},
}


def check(kernel: ModuleType, name: str, device: str) -> None:
    """Run the check of the random tests on a case, twice; or one of the cases made by hand."""
    if name == "exact":
        sampling.check_exact_mass(kernel, device)
        return
    if name != "rows":
        torch.manual_seed(7)
        rng = random.Random(11)
        for _ in range(2):
            assert sampling.check(kernel, {**PLAIN, **CASES[name]}, rng, device) == 0, "float64 chooses otherwise"
        return
    logits = torch.zeros(5, 40)
    logits[0], logits[1, 3], logits[2, 3] = -math.inf, math.inf, math.nan
    logits[3:, 9] = 12.0
    logits[4, 2] = 12.0
    ids, logprobs = torch.full((5,), -1, device=device), torch.full((5,), 5.0, device=device)
    kernel.sample_rows(logits.to(device), ids, logprobs)
    assert ids.tolist() == [0, 0, 0, 9, 2]
    assert logprobs[:3].isnan().all()
    exact = sampling.exact_logprobs(logits[3:].double())[[0, 1], [9, 2]]
    assert ((logprobs[3:].cpu().double() - exact).abs() < 1e-6 * exact.abs()).all()


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_interpreted_as_it_is(tmp_path: Path, interpreter: str) -> None:
    kernel = load(SOURCE, tmp_path)
    for name in (*CASES, "rows", "exact"):
        check(kernel, name, interpreter)


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_interpreted_mistake_is_caught(mistake: str, tmp_path: Path, interpreter: str) -> None:
    old, new, name = MUTATIONS[mistake]
    kernel = load(SOURCE, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check(kernel, name, interpreter)
