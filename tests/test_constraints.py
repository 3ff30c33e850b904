"""Bans, biases and logits processors in `GPT2.generate`; prompts as padded tensors; the signature."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from torch import Tensor

from fastgpt2 import GPT2, SamplingConfig
from fastgpt2.config import GPT2Config
from fastgpt2.constraints import Constraints
from fastgpt2.generate import GenerateOptions, generate, generate_iter, stream
from tests.helpers import TINY, random_ids, random_model

V = TINY.vocab_size
BANS = {
    "no_repeat_ngram_size": 2,
    "suppress_tokens": (3, 9, 17),
    "bad_words_ids": [[5], [6, 7]],
    "sequence_bias": {(8,): 1.5, (10, 11): -2.0, (12, 13, 14): 3.0},
    "min_new_tokens": 4,
}
STOPS = (1, 2, 4, 30)


def prompts(seed: int, rows: int = 5) -> list[list[int]]:
    ids = random_ids(seed, rows, 9).tolist()
    return [row[: 1 + 2 * i] for i, row in enumerate(ids)]


def banned(ids: list[int], new: int) -> dict[int, float]:
    """What `BANS` adds to the logits of a row, computed directly from the settings, token by token."""
    added: dict[int, float] = dict.fromkeys([3, 9, 17, 5], -math.inf)
    added[8] = 1.5
    for prefix, token, bias in (((6,), 7, -math.inf), ((10,), 11, -2.0), ((12, 13), 14, 3.0)):
        if tuple(ids[-len(prefix) :]) == prefix:
            added[token] = added.get(token, 0.0) + bias
    pairs = set(itertools.pairwise(ids))
    for token in range(V):
        if (ids[-1], token) in pairs or (new < 4 and token in STOPS):
            added[token] = -math.inf
    return added


@pytest.mark.parametrize("length", [1, 2, 30])
def test_logits_are_changed_as_the_settings_say(seed, length):
    generator = torch.Generator().manual_seed(seed)
    constraints = Constraints(SamplingConfig(**BANS), None, STOPS, V, torch.device("cpu"))
    assert not constraints.is_empty
    rows = torch.randint(
        5, 15, (8, length), generator=generator
    ).tolist()  # few different tokens, so that banned sequences occur
    counts = [i % 6 for i in range(8)]
    logits = torch.randn(8, V, generator=generator)
    changed = constraints.apply(logits, rows, counts)
    for row, (ids, new) in enumerate(zip(rows, counts, strict=True)):
        expected = logits[row].clone()
        for token, bias in banned(ids, new).items():
            expected[token] += bias
        torch.testing.assert_close(changed[row], expected)


def clear_greedy(model: GPT2, rows: list[list[int]], new: int) -> tuple[list[list[int]], bool]:
    """Greedy continuations under BANS, each token from a whole forward pass; and whether every choice was clear."""
    out, is_clear = [], True
    for ids in rows:
        held = list(ids)
        for count in range(new):
            logits = model(torch.tensor([held]))[0, -1].detach().clone()
            for token, bias in banned(held, count).items():
                logits[token] += bias
            best = logits.topk(2).values
            is_clear &= bool(best[0] - best[1] > 1e-3)
            held.append(int(logits.argmax()))
            if held[-1] in STOPS:
                break
        out.append(held[len(ids) :])
    return out, is_clear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_continuations_keep_to_them(seed, dtype):
    """Continuations obey the settings, with the decoding step in float32 and with PyTorch's operators in float64."""
    for attempt in range(50):
        model = random_model(seed + attempt).double()
        rows = prompts(seed + attempt)
        expected, is_clear = clear_greedy(model, rows, 12)
        if is_clear:
            break
    options = {"max_new_tokens": 12, "temperature": 0, "stop_token_ids": STOPS, **BANS}
    got = model.to(dtype).generate(rows, batch_size=3, **options)
    assert [sample.token_ids for sample in got] == expected


SETTINGS = [{}, {"top_k": 7, "temperature": 1.4}, {"top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_processor_that_changes_nothing_changes_no_sample(seed, settings):
    """With a processor, tokens are chosen outside the decoding step. The logits and random numbers stay the same."""
    model = random_model(seed)
    options = {"num_samples": 3, "max_new_tokens": 8, "seed": seed, "batch_size": 4, **settings}
    plain = model.generate(prompts(seed), **options)
    seen: list[int] = []

    def same(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(ids.shape[1])
        assert logits.shape == (1, V)
        return logits

    through = model.generate(prompts(seed), logits_processor=same, **options)
    assert [s.token_ids for s in through] == [s.token_ids for s in plain]
    assert sorted(seen) == sorted(
        len(s.prompt_ids) + i for s in plain for i in range(len(s.token_ids))
    )  # it saw every row before every token
    for mine, expected in zip(through, plain, strict=True):
        torch.testing.assert_close(torch.tensor(mine.logprobs), torch.tensor(expected.logprobs))


def test_a_processor_decides_and_log_probabilities_stay_the_models_own(seed):
    model = random_model(seed)

    def only(ids: Tensor, logits: Tensor) -> Tensor:
        return torch.full_like(logits, -math.inf).index_fill(1, (ids[0, -1:] + 1) % V, 0.0)

    (sample,) = model.generate([[7]], max_new_tokens=5, stop_token_ids=(), logits_processor=only)
    assert sample.token_ids == [8, 9, 10, 11, 12]
    ids = torch.tensor([[7, *sample.token_ids]])
    expected = model(ids[:, :-1]).log_softmax(-1)[0].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(sample.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_errors_of_constraints(seed):
    model = random_model(seed)
    for options, message in (
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be an int >= 0; got -1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens must be at most max_new_tokens"),
        ({"suppress_tokens": [0.5]}, "suppress_tokens must be a list of token ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be a list of lists of token ids, none empty"),
        ({"bad_words_ids": [3]}, "bad_words_ids must be a list of lists"),
        ({"sequence_bias": {3: 1.0}}, "sequence_bias must be a mapping of tuples"),
        ({"sequence_bias": {(3,): math.inf}}, "sequence_bias must be a mapping of tuples"),
        ({"suppress_tokens": [V]}, rf"must name ids in \[0, {V}\); got {V}"),
        ({"logits_processor": lambda ids, logits: logits[0]}, r"must return logits of shape \(1, 61\); got \(61,\)"),
        ({"logits_processor": lambda ids, logits: None}, "got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate([[1]], **options)
    with pytest.raises(TypeError, match="logits_processor must be callable; got int"):
        model.generate([[1]], logits_processor=3)
    with pytest.raises(RuntimeError, match="all banned"):
        model.generate([[1]], suppress_tokens=list(range(V)))


# -- padded tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_rows_of_a_padded_tensor_are_what_they_are_without_padding(seed, side):
    model = random_model(seed, pad_token_id=0)
    rows = prompts(seed)
    mask = torch.zeros(5, 12, dtype=torch.int64)
    ids = torch.zeros(5, 12, dtype=torch.int64)
    for r, row in enumerate(rows):
        columns = torch.randperm(12)[: len(row)].sort().values
        columns = {"left": torch.arange(12)[-len(row) :], "right": torch.arange(12)[: len(row)]}.get(side, columns)
        ids[r, columns], mask[r, columns] = torch.tensor(row), 1
    options = {"max_new_tokens": 6, "seed": seed}
    expected = model.generate(rows, **options)
    for kind in (torch.int64, torch.bool, torch.float32):
        assert model.generate(ids, attention_mask=mask.to(kind), **options) == expected


@pytest.mark.parametrize(
    ("rows", "ends", "is_refused"),
    [
        ([[5, 6, 7], [0, 8, 9]], {}, True),
        ([[5, 6, 7], [8, 9, 0]], {}, True),
        ([[0, 6, 7], [0, 8, 9]], {}, True),  # padded even in the longest row, to some multiple
        ([[5, 6, 7], [8, 0, 9]], {}, False),  # in the middle it is a token
        ([[5, 6, 7], [8, 9, 4]], {}, False),
        ([[0, 6, 7], [0, 8, 9]], {"bos_token_id": 0}, False),  # the bos token that begins every text
        ([[5, 6, 0], [8, 9, 0]], {"eos_token_id": 0}, False),
        ([[0, 0, 7], [0, 8, 9]], {"bos_token_id": 0}, True),
        ([[5, 6, 7], [0, 8, 9]], {"bos_token_id": 0}, True),
        ([[0, 0, 7], [0, 0, 9]], {"bos_token_id": 0}, True),
    ],
)
def test_a_tensor_that_seems_padded_needs_a_mask(seed, rows, ends, is_refused):
    model = random_model(seed, pad_token_id=0, **ends)
    ids = torch.tensor(rows)
    options = {"max_new_tokens": 2, "stop_token_ids": ()}
    if is_refused:
        with pytest.raises(ValueError, match="begin or end with the pad token 0; give attention_mask"):
            model.generate(ids, **options)
    else:
        assert [list(s.prompt_ids) for s in model.generate(ids, **options)] == rows
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert [list(sample.prompt_ids) for sample in whole] == rows
    assert [list(s.prompt_ids) for s in model.generate(rows, **options)] == rows  # lists have no padding


def test_errors_of_masks(seed):
    model = random_model(seed)
    ids = random_ids(seed, 2, 3)
    for prompt, mask, message in (
        (ids.tolist(), torch.ones(2, 3), "needs a tensor of prompts; got list"),
        (ids, torch.ones(2, 4), r"must be a tensor \(2, 3\), as prompts; got \(2, 4\)"),
        (ids, [[1, 1, 1]] * 2, "as prompts; got list"),
        (ids, torch.full((2, 3), 2), "0 at padding and 1 at tokens; got 2"),
        (ids, torch.zeros(2, 3), "prompt 0 is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(prompt, attention_mask=mask)


def test_signatures_list_the_options():
    options = set(GenerateOptions.__annotations__)
    assert set(SamplingConfig.__dataclass_fields__) <= options
    for function in (generate, generate_iter, stream, GPT2.generate, GPT2.generate_iter, GPT2.stream):
        parameters = inspect.signature(function).parameters
        assert set(parameters) - {"self", "model", "prompts"} == options
        for name, field in SamplingConfig.__dataclass_fields__.items():
            assert parameters[name].default == field.default
        assert parameters["num_samples"].default == 1
    model = GPT2(GPT2Config(vocab_size=8, hidden_size=8, num_layers=1, num_heads=1, context_length=8))
    assert "self" not in inspect.signature(model.generate).parameters
    with pytest.raises(TypeError, match="unknown argument max_new_token; there are attention_mask, num_samples"):
        model.generate([[1]], max_new_token=3)
