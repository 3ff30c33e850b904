"""Sampling against float64 with the same noise, for random combinations of options; its noise and distribution."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from fastgpt2_kernels import ops, reference
from tests.helpers import assert_within_budget, parts
from tests.kernels.traffic import Traffic

# Triton's interpreter computes NaN and inf in lanes that are masked away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
VOCABULARIES = [1, 2, 5, 13, 255, 257, 1024, 1030, 2100, 5003]
WORD = 2**32


KINDS = ("plain", "plain", "wide", "huge", "ties", "flat", "holes", "signs", "lanes")


def some_logits(kind: str, R: int, V: int) -> Tensor:
    logits = torch.randn(R, V) * {"wide": 20.0, "huge": 1e4, "flat": 0.0, "signs": 0.01}.get(kind, 3.0)
    if kind == "ties":
        logits = logits.round()
    if kind == "holes":
        logits[torch.rand(R, V) < 0.7] = -math.inf
        logits[:, -1] = 0.5
    if kind == "lanes":  # so that the largest logits are a block apart
        logits[:, 5::2048] = 20.0 + torch.rand(logits[:, 5::2048].shape)
    if kind == "signs":
        logits = logits.round(decimals=2)  # zeros of both signs
    return logits


def random_case(rng: random.Random) -> dict:
    V = rng.choice(VOCABULARIES)
    return {
        "V": V,
        "kind": rng.choice(KINDS),
        "R": rng.choice([1, 1, 1, 1, 2, 3]),
        "dtype": rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
        "padding": rng.choice([0, 1, 8, 64 - V % 64]),
        "temperature": rng.choice([None, 0.0, 0.3, 1.0, 1.0, 5.0]),
        "top_k": rng.choice([None, None, 0, 1, 2, 50, 300, 3000, V, V + 7]),
        "top_p": rng.choice([None, None, 1e-3, 0.5, 0.9, 0.95, 1.0]),
        "min_p": rng.choice([None, None, 0.0, 0.05, 0.5, 1.0]),
        # Ratios of small integers would tie in one dtype only: 13 / 1.3 is 10 in float32, but 10.0000004 in float64.
        "penalty": rng.choice([None, None, 0.7236068, 1.324718]),
        "slots": rng.random() < 0.5,
        "mark_seen": rng.random() < 0.5,
        "wide_keys": rng.random() < 0.5,
    }


def state(case: dict, rng: random.Random, slots: int, device: str) -> dict:
    """The tensors of a case. In each slot, every setting has the case's value or another one."""

    def column(name: str, dtype: torch.dtype) -> Tensor | None:
        value = case[name]
        if value is None:
            return None
        return torch.tensor([value, *(rng.choice([value, 1]) for _ in range(slots - 1))], dtype=dtype).to(device)

    keys = torch.randint(0, WORD, (slots, 2))
    return {
        "temperature": column("temperature", torch.float32),
        "top_k": column("top_k", torch.int32),
        "top_p": column("top_p", torch.float32),
        "min_p": column("min_p", torch.float32),
        "penalty": column("penalty", torch.float32),
        "keys": (keys if case["wide_keys"] else keys.to(torch.int32)).to(device),
        "positions": torch.randint(0, 2000, (slots,), dtype=torch.int32).to(device),
    }


def check(kernel, case: dict, rng: random.Random, device: str) -> int:
    """Compare the kernel's choice with the float64 reference. Return in how many rows rounding decided."""
    R, V = case["R"], case["V"]
    buffer = torch.full((R, V + case["padding"]), 1e9)
    buffer[:, :V] = some_logits(case["kind"], R, V)
    logits = buffer.to(case["dtype"]).to(device)[:, :V]
    slots = R + 3 if case["slots"] else R
    at = torch.randperm(slots)[:R] if case["slots"] else torch.arange(R)
    tensors = state(case, rng, slots, device)
    seen = (torch.rand(slots, V + 3) < 0.3)[:, :V].to(device)
    before = seen.clone()
    # Room before and after the outputs, where mistakes would show.
    ids = torch.full((slots + 2,), -7, dtype=rng.choice([torch.int64, torch.int32]), device=device)
    logprobs = torch.full((slots + 2,), math.nan, device=device)
    kernel.sample_rows(
        logits, ids[1:-1], logprobs[1:-1], slots=at.to(torch.int32).to(device) if case["slots"] else None,
        seen=seen, mark_seen=case["mark_seen"], **tensors,
    )  # fmt: skip
    untouched = torch.ones(slots + 2, dtype=torch.bool)
    untouched[at + 1] = False
    assert (ids.cpu()[untouched] == -7).all()
    assert logprobs.cpu()[untouched].isnan().all()
    chosen = ids.cpu()[at + 1].long()
    assert ((chosen >= 0) & (chosen < V)).all(), case
    logits, tensors = logits.cpu(), {name: None if t is None else t.cpu()[at] for name, t in tensors.items()}
    rounded = hold_choice(chosen, logits, tensors, before.cpu()[at], case)
    picked = chosen[:, None]
    got = logprobs.cpu()[at + 1]
    plain = logits.float().log_softmax(-1).gather(-1, picked)[:, 0]
    assert_within_budget(got, plain, exact_logprobs(logits.double()).gather(-1, picked)[:, 0], f"{case}")
    if case["mark_seen"]:
        before[at, chosen] = True
    assert torch.equal(seen.cpu(), before.cpu())
    return rounded


def check_exact_mass(kernel, device: str) -> None:
    """A token of exactly half the mass is enough for top_p = 0.5: of masses 1, 0.5 and 0.5 only the first is drawn."""
    N = 24
    logits = torch.tensor([[0.0, -math.log(2), -math.log(2)]], device=device).repeat(N, 1)
    ids, logprobs = torch.full((N,), -1, device=device), torch.zeros(N, device=device)
    kernel.sample_rows(
        logits, ids, logprobs, keys=ops.row_keys(3, range(N), [0] * N).to(device),
        positions=torch.zeros(N, dtype=torch.int32, device=device),
        temperature=torch.ones(N, device=device), top_p=torch.full((N,), 0.5, device=device),
    )  # fmt: skip
    assert ids.tolist() == [0] * N


def test_top_p_needs_no_more_than_its_mass(triton_device):
    from fastgpt2_kernels.triton import sampling as kernel

    check_exact_mass(kernel, triton_device)


def exact_logprobs(logits: Tensor) -> Tensor:
    """log_softmax that is accurate for confident rows, where adding 1 to the sum of other tokens would lose bits."""
    largest, at = logits.max(-1, keepdim=True)
    others = (logits - largest).exp().scatter(-1, at, 0.0).sum(-1, keepdim=True)
    return logits - largest - others.log1p()


def hold_choice(chosen: Tensor, logits: Tensor, tensors: dict, seen: Tensor, case: dict) -> int:
    """Assert that float64 chooses the same token, or differs only by rounding: of scores, or of a filter's border.

    Returns the number of rows that rounding decides.
    """
    exact = reference.sampling_scores(logits.double(), seen=seen, **tensors)
    expected = exact.argmax(-1)
    differing = (chosen != expected).nonzero()[:, 0].tolist()
    for r in differing:
        tail = {name: None if t is None else t[r : r + 1] for name, t in tensors.items()}
        assert tail["temperature"] is not None, f"greedy is torch.argmax: row {r} of {case}"
        x = logits[r : r + 1].double()
        scores = []
        for nudge in (1 - 3e-6, 1 + 3e-6):
            moved = {**tail, "top_p": None, "min_p": None}
            if tail["top_p"] is not None:
                moved["top_p"] = tail["top_p"].double() * nudge
                moved["top_p"] = moved["top_p"].where(tail["top_p"] < 1, 1.0)
            if tail["min_p"] is not None:
                moved["min_p"] = tail["min_p"].double() / nudge
            scores.append(reference.sampling_scores(x, seen=seen[r : r + 1], **moved)[0])
        slack = 2.0**-22 * x[x.isfinite()].abs().max().item() + 4e-6 * float(tail["temperature"])
        least = min(scores[0].max().item(), scores[1].max().item())
        mine = max(scores[0][chosen[r]].item(), scores[1][chosen[r]].item())
        assert mine >= least - slack, f"row {r}: {mine} against {least} in {case}"
    return len(differing)


@pytest.mark.parametrize("part", parts(4))
def test_random_cases(triton_device, seed, part):
    """In 4 x 50 random cases, float64 chooses the same token, except in a few rows that rounding decides."""
    from fastgpt2_kernels.triton import sampling as kernel

    torch.manual_seed(seed)
    rng = random.Random(seed)
    rounded = sum(check(kernel, random_case(rng), rng, triton_device) for _ in range(50))
    assert rounded <= 6


# -- the noise ---------------------------------------------------------------------------------------------------------


def many_draws(device: str) -> Tensor:
    """(2^17, 13) of the kernel's noise, for 2^17 positions of one random key. Drawn once for all tests."""
    if not NOISE:
        from tests.kernels.sampling_noise import of_tokens

        NOISE.append(of_tokens(torch.randint(0, WORD, (2,)), torch.arange(2**17, dtype=torch.int32), 13, device))
    return NOISE[0]


NOISE: list[Tensor] = []


def test_gumbel_of_every_kind_of_word(triton_device, seed):
    """Both tails agree with float64, up to the last word. The upper one, from 2^-24 on, has full float32 resolution."""
    from tests.kernels.sampling_noise import of_words

    edges = torch.tensor([0, 1, 2, 3, 255, 256, 2**31 - 1, 2**31, WORD - 257, WORD - 2, WORD - 1])
    small = torch.arange(2**12)
    some = torch.randint(0, WORD, (2**14 - 2**12 - len(edges),), generator=torch.Generator().manual_seed(seed))
    words = torch.cat((small, edges, some))
    got = of_words(words, triton_device)
    v = (words.double() + 0.5) / WORD
    exact = -(-torch.log1p(-v)).log()
    assert got.isfinite().all()
    assert (got - exact).abs().max() < 3e-6
    assert got.max() > 22.8  # for 2^-33; with uniform numbers of 24 bits it would end at 16.6
    assert len(got[: 2**12].unique()) == 2**12


def test_noise_depends_on_key_position_and_token_alone(triton_device, seed):
    from tests.kernels.sampling_noise import of_tokens

    generator = torch.Generator().manual_seed(seed)
    key = torch.randint(0, WORD, (2,), generator=generator)
    positions = torch.randint(0, 2**31, (4,), generator=generator, dtype=torch.int32)
    one, other = (of_tokens(key, positions, 67, triton_device, in_blocks=way) for way in (False, True))
    assert torch.equal(one, other)
    exact = reference.gumbel(key.expand(4, 2), positions, 67)
    assert (one.double() - exact).abs().max() < 3e-6
    assert len(exact.unique()) == exact.numel()
    assert (reference.gumbel(key[None] + 1, positions[:1], 67) != exact[:1]).all()


def chi_square(counts: Tensor, probs: Tensor) -> None:
    """Check counts (V,) against exact probabilities: within 5 standard deviations of the statistic, 0 where p is 0."""
    assert (counts[probs == 0] == 0).all()
    counts, expected = counts[probs > 0].double(), probs[probs > 0] * counts.sum()
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    # Wilson and Hilferty: the cube root is almost normally distributed.
    deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert deviation < 5, f"chi-square {statistic:.1f} of {freedom} degrees of freedom"


FILTERS = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 2.5},
    "top-k": {"temperature": 1.0, "top_k": 6},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "all": {"temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.08, "penalty": 1.5},
}
LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.5, 1.2, -3.0, 1.9, 0.0, -0.4, 0.9, 1.1, -0.7, 0.3]])


def settings_of(name: str, N: int) -> dict[str, Tensor]:
    settings = {
        key: torch.full((N,), value, dtype=torch.int32 if key == "top_k" else torch.float32)
        for key, value in FILTERS[name].items()
    }
    seen = torch.zeros(N, 13, dtype=torch.bool)
    seen[:, [0, 1, 4]] = True
    return {**settings, "seen": seen}


def by_hand(name: str) -> Tensor:
    """The probabilities (13,), computed with a plain sort."""
    options = FILTERS[name]
    penalty, temperature = options.get("penalty", 1.0), options["temperature"]
    y = [
        x / penalty if i in (0, 4) and x > 0 else x * penalty if i == 1 else x for i, x in enumerate(LOGITS[0].tolist())
    ]
    order = sorted(range(13), key=lambda i: -y[i])
    kept = [i for i in order if y[i] >= y[order[options.get("top_k", 13) - 1]]]
    mass = {i: math.exp(y[i] / temperature) for i in kept}
    total = sum(mass.values())
    kept = [i for i in kept if sum(mass[j] for j in kept if y[j] > y[i]) < options.get("top_p", 2.0) * total]
    kept = [i for i in kept if mass[i] >= options.get("min_p", 0.0) * mass[order[0]]]
    probs = torch.zeros(13, dtype=torch.float64)
    for i in kept:
        probs[i] = mass[i]
    return probs / probs.sum()


@pytest.mark.parametrize("name", FILTERS)
def test_the_filters_are_what_a_sort_says(name):
    settings = settings_of(name, 1)
    one = torch.ones(1, dtype=torch.float64)
    y = reference.penalized_logits(LOGITS.double(), settings["seen"], settings.get("penalty", one))
    filters = (settings.get(key) for key in ("top_k", "top_p", "min_p"))
    scores = reference.filtered_logits(y, settings["temperature"].double(), *filters)
    assert torch.equal(scores[0].isfinite(), by_hand(name) > 0)


@pytest.mark.parametrize("name", FILTERS)
def test_a_hundred_thousand_draws_of_the_kernels_noise(triton_device, seed, name):
    """The reference's filters and argmax, with the kernel's noise, draw 2^17 tokens from the exact distribution."""
    torch.manual_seed(seed)
    settings = settings_of(name, 1)
    y = LOGITS
    if "penalty" in settings:
        y = reference.penalized_logits(y, settings["seen"], settings["penalty"])
    y = reference.filtered_logits(
        y, settings["temperature"], *(settings.get(key) for key in ("top_k", "top_p", "min_p"))
    )
    chosen = (y + settings["temperature"] * many_draws(triton_device)).argmax(-1)
    chi_square(chosen.bincount(minlength=13), by_hand(name))


def test_the_noise_is_gumbels(triton_device, seed):
    """1.7 million draws pass the Kolmogorov-Smirnov test, and have the right number of very large values."""
    torch.manual_seed(seed)
    noise = many_draws(triton_device).flatten().double()
    n = len(noise)
    uniform = (-(-noise).exp()).exp().sort().values
    distance = (uniform - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance * math.sqrt(n) < 2.2  # 1 in 8000
    for at in (4.0, 6.0, 8.0, 10.0):
        expected = -n * math.expm1(-math.exp(-at))
        assert abs((noise > at).sum().item() - expected) < 5 * math.sqrt(expected) + 1


@pytest.mark.parametrize("name", ["temperature", "top-k", "top-p", "min-p", "all"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_distribution(triton_device, seed, name, backend):
    """The whole operator draws 1e5 rows with the exact probabilities. The interpreter, which is slow, draws fewer."""
    N = 60 if backend == "triton" and triton_device == "cpu" else 100_000
    settings = settings_of(name, N)
    settings["repetition_penalty"] = settings.pop("penalty", 1.0)
    tensors = {key: value.to(triton_device) if isinstance(value, Tensor) else value for key, value in settings.items()}
    ids, _ = ops.sample(
        LOGITS.to(triton_device).expand(N, 13),
        keys=ops.row_keys(seed, range(N), [0] * N).to(triton_device),
        positions=torch.zeros(N, dtype=torch.int32, device=triton_device), backend=backend, **tensors,
    )  # fmt: skip
    chi_square(ids.cpu().bincount(minlength=13), by_hand(name))


# -- what a user relies on ---------------------------------------------------------------------------------------------


def test_neighbours_do_not_matter(triton_device, seed):
    """A row is bitwise the same alone, in batches of 3 and 17, and in other slots."""
    torch.manual_seed(seed)
    V = 300
    logits = torch.randn(17, V, device=triton_device) * 3
    keys = ops.row_keys(seed, range(17), range(17)).to(triton_device)
    positions = torch.arange(17, dtype=torch.int32, device=triton_device)
    options = {"temperature": 1.1, "top_k": 40, "top_p": 0.9, "keys": keys, "positions": positions, "backend": "triton"}
    everything = ops.sample(logits, **options)
    again = ops.sample(logits, **options)
    for rows in ([5], [16, 3, 9]):
        slots = torch.tensor(rows, dtype=torch.int32, device=triton_device)
        some = ops.sample(logits[rows], slots=slots, **options)
        for a, b in zip(everything, some, strict=True):
            assert torch.equal(a[rows], b)
    assert all(torch.equal(a, b) for a, b in zip(everything, again, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}, {"top_p": 0.5}]
)
def test_rows_that_cannot_be_sampled(triton_device, backend, options):
    """Rows with NaN, +inf or only -inf give id 0 and NaN, and mark nothing. Other rows are not affected."""
    V = 600
    logits = torch.full((5, V), -math.inf)
    logits[1, V - 1] = math.nan
    logits[2, 3] = math.inf
    logits[3, 7], logits[4] = -5.0, 0.0
    logits[1, :-1] = 1.0
    seen = torch.zeros(5, V, dtype=torch.bool, device=triton_device)
    ids, logprobs = ops.sample(
        logits.to(triton_device), **options, seen=seen, mark_seen=True, backend=backend,
        keys=ops.row_keys(1, range(5), range(5)).to(triton_device),
        positions=torch.zeros(5, dtype=torch.int32, device=triton_device),
    )  # fmt: skip
    assert ids[:4].tolist() == [0, 0, 0, 7]
    assert logprobs.isnan().tolist() == [True, True, True, False, False]
    assert logprobs[3] == 0
    assert abs(logprobs[4].item() + math.log(V)) < 1e-5
    assert seen.sum(-1).tolist() == [0, 0, 0, 1, 1]


def test_greedy_is_argmax(triton_device, seed):
    """Ties go to the lowest index. Temperature 0 and top-k 1 mean the same, as numbers and as tensors."""
    torch.manual_seed(seed)
    logits = (torch.randn(3, 4500) * 2).round().to(triton_device)
    keys = ops.row_keys(seed, range(3), range(3)).to(triton_device)
    positions = torch.zeros(3, dtype=torch.int32, device=triton_device)
    ones = torch.ones(3, device=triton_device)
    for options in (
        {"temperature": 0.0}, {"top_k": 1}, {"top_k": ones.int()}, {"temperature": ones * 0},
        {"temperature": ones * 0, "top_p": 0.3}, {"min_p": 1.0, "temperature": ones * 0},
    ):  # fmt: skip
        for backend in ("torch", "triton"):
            ids, _ = ops.sample(logits, keys=keys, positions=positions, backend=backend, **options)
            assert torch.equal(ids, logits.argmax(-1)), (options, backend)


def test_interpreted_traffic(monkeypatch, interpreter, seed):
    """A row is read once for greedy, temperature, min-p and top-k; for top-p alone twice, if its first try succeeds.

    The chosen logit is read once more.
    """
    torch.manual_seed(seed)
    logits = torch.randn(1, 4 * 2048 + 77)
    logits[0, 5] = 14.0  # nearly all the mass, so the first try stands
    state = {"keys": ops.row_keys(seed, [0], [0]), "positions": torch.zeros(1, dtype=torch.int32)}
    for options, passes in (
        ({"temperature": 0.0}, 1), ({"temperature": 0.8}, 1), ({"top_k": 20}, 1), ({"top_k": 20, "top_p": 0.9}, 1),
        ({"min_p": 0.2}, 1), ({"top_p": 0.999}, 2),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            traffic = Traffic(patch, logits=logits)
            ids, _ = ops.sample(logits, backend="triton", **state, **options)
            reads = traffic.reads["logits"][0]
            reads[ids.item()] -= 1 + (reads[ids.item()] > passes + 1)
            assert (reads == passes).all(), (options, reads.unique())
            assert not traffic.writes["logits"].any()


def test_opcheck(triton_device, seed):
    from fastgpt2_kernels.triton import sampling as kernel

    logits = torch.randn(3, 40, device=triton_device)
    ids = torch.zeros(3, dtype=torch.int64, device=triton_device)
    logprobs, ones = torch.zeros(3, device=triton_device), torch.ones(3, device=triton_device)
    keys = ops.row_keys(seed, range(3), range(3)).to(triton_device)
    seen = torch.zeros(3, 40, dtype=torch.bool, device=triton_device)
    arguments = (logits, ids, logprobs, None, keys, ones.int(), ones, None, ones * 0.9, None, ones * 1.2, seen, True)
    torch.library.opcheck(kernel.sample_op, arguments)
    torch.library.opcheck(kernel.sample_op, (logits, ids, logprobs, *[None] * 9, False))


def test_compiles_whole(triton_device, seed):
    torch.manual_seed(seed)
    logits = torch.randn(2, 40, device=triton_device)
    keys = ops.row_keys(seed, range(2), range(2)).to(triton_device)
    positions = torch.zeros(2, dtype=torch.int32, device=triton_device)

    def step(x):
        return ops.sample(x * 2, top_k=5, top_p=0.9, keys=keys, positions=positions, backend="triton")

    for a, b in zip(step(logits), torch.compile(step, fullgraph=True, backend="aot_eager")(logits), strict=True):
        assert torch.equal(a, b)


def test_row_keys():
    """Keys differ between seeds, 64-bit prompts and samples, and are the same computed one by one or together."""
    prompts = [0, 1, 2**32, 2**64 - 1]
    everything = torch.cat([ops.row_keys(s, prompts, [n] * 4) for s in (0, 1, 2**64 - 1) for n in (0, 1, 2**32 - 1)])
    assert everything.dtype == torch.int64
    assert ((everything >= 0) & (everything < WORD)).all()
    assert len(everything.unique(dim=0)) == 36
    assert torch.equal(ops.row_keys(7, [5, 6], [1, 2])[1:], ops.row_keys(7, [6], [2]))
    assert ops.row_keys(7, [], []).shape == (0, 2)
    for arguments in ((-1, [0], [0]), (0, [2**64], [0]), (0, [0], [2**32]), (0, [0], [0, 1])):
        with pytest.raises(ValueError, match="row_keys: "):
            ops.row_keys(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature must be finite and >= 0; got -1.0"),
        ({"temperature": math.inf}, "temperature must be finite"),
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"temperature": None}, "temperature must be a number or a tensor"),
        ({"temperature": torch.tensor([1.0, -2.0])}, "got -2.0"),
        ({"temperature": torch.ones(2).double()}, r"temperature must be float32 of shape \(2,\)"),
        ({"top_k": 0}, "top_k must be an int >= 1; got 0"),
        ({"top_k": 2.0}, "top_k must be an int >= 1; got 2.0"),
        ({"top_k": torch.ones(2)}, r"top_k must be int32 of shape \(2,\), dense; got torch.float32 \(2,\)"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": torch.ones(3)}, "top_p must be float32 of shape"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]; got 1.5"),
        ({"repetition_penalty": 0.0, "seen": torch.zeros(2, 9, dtype=torch.bool)}, "must be finite and > 0; got 0.0"),
        ({"repetition_penalty": 1.2}, "need `seen`"),
        ({"mark_seen": True}, "need `seen`"),
        ({"seen": torch.zeros(2, 8, dtype=torch.bool)}, "seen must be bool or uint8"),
        ({"keys": None}, "needs `keys`"),
        ({"keys": torch.zeros(2, 2)}, "keys must be int64 or int32"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "positions must be int32"),
        ({"slots": torch.tensor([0, 2], dtype=torch.int32)}, r"slots must be in \[0, 2\); got 2"),
        ({"slots": torch.tensor([0, 1])}, "slots must be int32"),
        ({"out": (torch.zeros(2), torch.zeros(2))}, r"out\[0\] must be int64 or int32"),
        ({"logits": torch.zeros(2, 3, 4)}, r"logits must be floating-point \(R, V\)"),
        ({"logits": torch.zeros(2, 0)}, "logits must be floating-point"),
        ({"logits": torch.zeros(2, 9, dtype=torch.int32)}, "logits must be floating-point"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)  # fmt: skip
def test_what_is_refused(changes, message):
    arguments = {
        "logits": torch.zeros(2, 9), "keys": torch.zeros(2, 2, dtype=torch.int64),
        "positions": torch.zeros(2, dtype=torch.int32), "backend": "torch", **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.sample(arguments.pop("logits"), **arguments)


def test_no_rows(triton_device):
    ids, logprobs = ops.sample(torch.zeros(0, 9, device=triton_device), temperature=0.0, backend="triton")
    assert ids.shape == logprobs.shape == (0,)
