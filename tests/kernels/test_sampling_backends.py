"""Sampling on every backend: one token for the same noise, filters as in transformers, a result for every row."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2 import SamplingConfig
from fastgpt2_kernels import ops, reference
from fastgpt2_kernels.backends import implementation
from fastgpt2_kernels.torch import sampling as torch_sampling
from tests.kernels.test_sampling import check, chi_square, random_case

# Triton's interpreter computes NaN and inf in lanes that are masked away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def need(backend: str) -> None:
    why_not = {"native": ops.why_not_native, "triton": ops.why_not_triton}.get(backend)
    if why_not is not None and (reason := why_not("sample", "cpu")) is not None:
        pytest.skip(reason)


def kernel(backend: str) -> SimpleNamespace:
    """A backend's function with the arguments that `check` gives to the Triton launcher."""

    def sample_rows(logits: Tensor, ids: Tensor, logprobs: Tensor, **options: Any) -> None:
        slots, seen, mark_seen = (options.pop(name) for name in ("slots", "seen", "mark_seen"))
        if options["temperature"] is None:  # like `ops.sample` for greedy rows
            options |= dict.fromkeys(("top_k", "top_p", "min_p"))
        implementation("sample", backend)(logits, ids, logprobs, slots, options, seen, mark_seen)

    return SimpleNamespace(sample_rows=sample_rows)


@pytest.mark.parametrize("gathered", [0, 20, 2048])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_random_cases(monkeypatch, seed, backend, gathered):
    """The cases of the Triton kernel pass by the same rule, whether or not the few tokens of top-k are gathered."""
    need(backend)
    if backend == "torch":
        monkeypatch.setattr(torch_sampling, "_MOST_GATHERED", gathered)
        monkeypatch.setattr(torch_sampling, "_BLOCK_TOKENS", 2 * max(gathered, 1))
    torch.manual_seed(seed)
    rng = random.Random(seed)
    rounded = sum(check(kernel(backend), random_case(rng), rng, "cpu") for _ in range(150))
    assert rounded <= 12


def test_noise_is_the_references(seed):
    """The random words agree, for all tokens and for some. The rough noise never drops a token that may win."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(2**32, (3, 2), generator=generator)
    positions = torch.randint(2**31, (3,), generator=generator, dtype=torch.int32)
    exact = reference.gumbel(keys, positions, 4003)
    words, _ = torch_sampling._noise(keys, positions, 4003, None)
    every = torch.stack(words, -1).flatten(-2)[:, :4003]
    assert torch.equal(reference.gumbel_of_words(every), exact)
    ids = torch.randint(4003, (3, 50), generator=generator)
    (some,), _ = torch_sampling._noise(keys, positions, 4003, ids)
    assert torch.equal(some, every.gather(-1, ids))
    edges = torch.tensor([0, 1, 2, 255, 2**31, *(2**32 - n for n in (2**12, 257, 100, 2, 1))])
    all_words = torch.cat((edges, torch.randint(2**32, (10_000,), generator=generator)))
    wait = (-reference.gumbel_of_words(all_words)).exp()
    ratio = wait / torch_sampling._rough_wait(all_words)
    assert ratio.min() > 0.98
    assert ratio.max() / ratio.min() < torch_sampling._MARGIN


def test_the_same_tokens_on_every_backend(triton_device, seed):
    """This holds for random combinations of settings, except in a few rows that rounding may decide."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    differing = rows = 0
    for _ in range(20):
        R, V = 4, rng.choice([7, 300, 2100])
        logits = torch.randn(R, V) * rng.choice([0.5, 3.0, 10.0])
        seen = torch.rand(R, V) < 0.2
        options: dict[str, Any] = {
            "temperature": rng.choice([0.0, 0.7, 1.0, 2.0]), "top_k": rng.choice([None, 1, 5, 60, 3000]),
            "top_p": rng.choice([None, 1e-46, 0.05, 0.9, 1]), "min_p": rng.choice([None, 0, 0.05]),
            "repetition_penalty": rng.choice([1, 1.3]),
            "keys": ops.row_keys(rng.randrange(2**64), range(R), range(R)),
            "positions": torch.randint(1000, (R,), dtype=torch.int32),
        }  # fmt: skip
        found = {}
        for backend in ("triton", "native", "torch"):
            if backend == "native" and ops.why_not_native("sample", "cpu") is not None:
                continue
            device = triton_device if backend == "triton" else "cpu"
            moved = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in options.items()}
            ids, _ = ops.sample(logits.to(device), seen=seen.to(device), backend=backend, **moved)
            found[backend] = ids.cpu()
        rows += R
        differing += sum((ids != found["torch"]).sum().item() for ids in found.values())
    assert differing <= 2, f"{differing} of {rows} rows"


# -- transformers' filters ---------------------------------------------------------------------------------------------


def transformers_probabilities(logits: Tensor, config: SamplingConfig, history: list[int]) -> Tensor:
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
    pytest.importorskip("transformers")
    torch.manual_seed(seed)
    V, N = 60, 3000
    logits = torch.randn(V) * 3
    history = torch.randint(0, V, (9,)).tolist()
    config = SamplingConfig(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=1.3)
    seen = torch.zeros(V, dtype=torch.bool)
    seen[history] = True
    ids, _ = ops.sample(
        logits.expand(N, V), temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=1.3,
        seen=seen.expand(N, V).contiguous(), keys=ops.row_keys(seed, [0] * N, range(N)),
        positions=torch.zeros(N, dtype=torch.int32), backend="torch",
    )  # fmt: skip
    expected = transformers_probabilities(logits, config, history).double()
    counts = ids.bincount(minlength=V)
    assert not counts[expected == 0].any(), "a token that the filters removed was drawn"
    # The chi-square statistic needs frequent tokens, so rare ones are merged.
    is_rare = (expected > 0) & (expected * N < 10)
    groups = [[*t[expected * N >= 10].tolist(), t[is_rare].sum().item()] for t in (counts, expected)]
    if expected[is_rare].sum() * N < 10:
        groups = [group[:-1] for group in groups]
    if len(groups[0]) > 1:
        shares = torch.tensor(groups[1], dtype=torch.float64)
        chi_square(torch.tensor(groups[0]), shares / shares.sum())


# -- odd settings and logits ----------------------------------------------------------------------------------------

STRANGE: dict[str, dict[str, Any]] = {
    "top_p that float32 holds as 0": {"top_p": 1e-300},
    "the smallest top_p": {"top_p": 5e-324, "top_k": 2},
    "a temperature past float32": {"temperature": 1e300},
    "a temperature past float64": {"temperature": 10**400},
    "a temperature that is 0 in float32": {"temperature": 1e-300},
    "a temperature among the subnormals": {"temperature": 1e-42},
    "min_p that is 0 in float32": {"min_p": 1e-300},
    "a top_k past int32": {"top_k": 2**40},
    "a penalty that makes infinities": {"repetition_penalty": 1e-300},
    "a penalty that makes negative ones": {"repetition_penalty": 1e300},
    "the same with filters": {"repetition_penalty": 1e-300, "top_p": 0.9, "top_k": 3, "min_p": 0.1},
    "the other with filters": {"repetition_penalty": 1e300, "top_p": 0.9, "top_k": 3, "min_p": 0.1},
    "everything small": {"temperature": 1e-300, "top_p": 1e-300, "min_p": 1e-300},
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_settings_have_one_result(triton_device, seed, name):
    """Every backend gives the same tokens, with finite log-probabilities. Generation accepts the same settings."""
    torch.manual_seed(seed)
    logits = torch.randn(6, 70)
    logits[0] = -logits[0].abs() - 1  # all logits below 0
    logits[1, 4:] = -math.inf
    logits[2] = 3.0
    seen = torch.rand(6, 70) < 0.3
    seen[0] = True
    options = {"keys": ops.row_keys(seed, range(6), range(6)), "positions": torch.zeros(6, dtype=torch.int32)}
    found = []
    for backend in ("torch", "native", "triton"):
        if backend == "native" and ops.why_not_native("sample", "cpu") is not None:
            continue
        device = triton_device if backend == "triton" else "cpu"
        moved = {key: t.to(device) for key, t in options.items()}
        ids, logprobs = ops.sample(logits.to(device), seen=seen.to(device), backend=backend, **STRANGE[name], **moved)
        assert logprobs.isfinite().all(), backend
        found.append(ids.tolist())
    assert all(ids == found[0] for ids in found), found
    if "top_p" in STRANGE[name] and "repetition_penalty" not in STRANGE[name]:
        assert (logits.gather(-1, torch.tensor(found[0])[:, None])[:, 0] == logits.amax(-1)).all()
    config = {**STRANGE[name], "top_k": STRANGE[name].get("top_k")}
    assert all(math.isfinite(value) for value in (slot.item() for slot in _slot_settings(config)))


def _slot_settings(config: dict[str, Any]) -> list[Tensor]:
    """The settings as a decoding session stores them."""
    from fastgpt2.step_inputs import slot_sampling

    seen = torch.zeros(1, 70, dtype=torch.bool)
    settings = slot_sampling(SamplingConfig(**config), 1, seen, torch.device("cpu"))
    return [t for name, t in settings._asdict().items() if t is not None and name != "seen"]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_rows_that_cannot_be_sampled(backend):
    """Rows with NaN, +inf or only -inf give token 0 and NaN, and mark nothing. For Triton see test_sampling.py."""
    need(backend)
    logits = torch.zeros(4, 50)
    logits[0, 7], logits[1, 7], logits[2] = math.nan, math.inf, -math.inf
    seen = torch.zeros(4, 50, dtype=torch.uint8)
    ids, logprobs = ops.sample(
        logits, top_p=0.5, top_k=20, seen=seen, mark_seen=True, backend=backend,
        keys=ops.row_keys(1, range(4), range(4)), positions=torch.zeros(4, dtype=torch.int32),
    )  # fmt: skip
    assert ids[:3].tolist() == [0, 0, 0]
    assert logprobs.isnan().tolist() == [True, True, True, False]
    assert seen.sum(-1).tolist() == [0, 0, 0, 1]


def test_float64_logits_are_sampled_in_float64():
    """Two logits that float32 cannot tell apart are sampled on PyTorch's operators, on every machine."""
    logits = torch.tensor([[1.0, 1.0 + 2.0**-40]], dtype=torch.float64)
    assert ops.sample(logits, temperature=0.0)[0].tolist() == [1]
    need("native")
    with pytest.raises(ValueError, match="backend='native' cannot be used: it computes in float32; got float64"):
        ops.sample(logits, temperature=0.0, backend="native")


def test_the_compiler_takes_it_whole(seed):
    torch.manual_seed(seed)
    logits = torch.randn(2, 40)
    state = {"keys": ops.row_keys(seed, range(2), range(2)), "positions": torch.zeros(2, dtype=torch.int32)}

    def step(x: Tensor) -> Tensor:
        return ops.sample(x * 2, top_k=5, top_p=0.9, **state)[0]

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(logits), step(logits))
