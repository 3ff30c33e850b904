"""Scores equal transformers' in float64, however sequences are packed, for whole sequences and after a prefix."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from transformers import GPT2LMHeadModel

import fastgpt2
from fastgpt2 import GPT2, score
from fastgpt2.scoring import score_iter
from tests.helpers import TINY, assert_within_budget, random_model


def twin(model: GPT2, folder) -> GPT2LMHeadModel:
    model.save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder, dtype=model.dtype).eval()


def hf_logprobs(model: GPT2LMHeadModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of every token but the first, computed one sequence at a time, without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def random_sequences(rng: random.Random, count: int, least: int = 2) -> list[list[int]]:
    return [
        [rng.randrange(TINY.vocab_size) for _ in range(rng.randint(least, TINY.context_length + 1))]
        for _ in range(count)
    ]


def test_scores_are_those_of_transformers(tmp_path, seed):
    rng = random.Random(seed)
    model = random_model(seed).double()
    reference = twin(model, tmp_path)
    sequences = random_sequences(rng, 1000)
    scores = score(model, sequences, batch_tokens=rng.randint(1, 300))
    assert [s.index for s in scores] == list(range(1000))
    for ids, got in zip(sequences, scores, strict=True):
        exact = hf_logprobs(reference, ids)
        assert got.token_ids == tuple(ids)
        assert got.logprobs == pytest.approx(exact.tolist(), rel=1e-9, abs=1e-12)
        assert got.logprob == pytest.approx(exact.sum().item(), rel=1e-9)
        # transformers' own loss rounds the logits to float32 first, so the mean is taken here.
        assert got.perplexity == pytest.approx(math.exp(-exact.mean().item()), rel=1e-9)


def test_float32_is_within_the_budget(tmp_path, seed):
    model = random_model(seed)
    exact_model = twin(random_model(seed).double(), tmp_path / "exact")
    plain_model = twin(model, tmp_path / "plain")
    sequences = random_sequences(random.Random(seed), 20)
    got = torch.tensor([p for s in score(model, sequences) for p in s.logprobs])
    exact = torch.cat([hf_logprobs(exact_model, ids) for ids in sequences])
    plain = torch.cat([hf_logprobs(plain_model, ids) for ids in sequences])
    assert_within_budget(got, plain, exact, "log-probabilities")


def test_prefixes(seed):
    rng = random.Random(seed)
    model = random_model(seed).double()
    sequences = random_sequences(rng, 20)
    cuts = [rng.randrange(len(ids)) for ids in sequences]
    prefixes = [ids[:cut] for ids, cut in zip(sequences, cuts, strict=True)]
    rests = [ids[cut:] for ids, cut in zip(sequences, cuts, strict=True)]
    whole = score(model, sequences)
    with_prefix = score(model, rests, prefixes=prefixes)
    after = score(model, rests, prefixes=prefixes, after_prefix=True)
    for cut, all_of_it, one, other in zip(cuts, whole, with_prefix, after, strict=True):
        assert one.logprobs == pytest.approx(all_of_it.logprobs, rel=1e-9)
        assert other.logprobs == pytest.approx(all_of_it.logprobs[max(0, cut - 1) :], rel=1e-9)
        assert other.start == max(1, cut)


def test_text_and_one_prefix_for_all(tiny_checkpoint):
    model = GPT2.from_pretrained(tiny_checkpoint)
    encode = model.tokenizer.encode
    (first, second) = score(model, ["def add", "b"], prefixes="return", after_prefix=True)
    assert first.token_ids == tuple(encode("return") + encode("def add"))
    assert second.token_ids == tuple(encode("return") + encode("b"))
    assert len(second.logprobs) == 1
    assert score(model, "return b")[0].token_ids == tuple(encode("return b"))


def test_the_model_stays_as_it_was(seed):
    model = random_model(seed, residual_dropout=0.5).train()
    one, other = (score(model, [[1, 2, 3]])[0].logprobs for _ in range(2))
    assert one == other
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_scores_come_as_they_are_read(seed):
    model = random_model(seed)

    def sequences():
        yield from [[1, 2, 3]] * 2
        raise KeyError("the third sequence was read")

    scores = score_iter(model, sequences(), batch_tokens=2)
    assert next(scores).index == 0
    with pytest.raises(KeyError):
        list(scores)


def test_logits_that_are_no_numbers(seed):
    model = random_model(seed)
    with torch.no_grad():
        model.transformer.wte.weight[5] = math.nan
    assert score(random_model(seed), [[1, 5, 2]])
    with pytest.raises(RuntimeError, match="logits for sequence 0 are NaN or infinite"):
        score(model, [[1, 5, 2]])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([[1]],), ValueError, "sequence 0 has no token with another one before it; give it a prefix"),
        (([[1, 2], []],), ValueError, "sequence 1 has no token with another one before it"),
        (([[1, 2], [1] * 26],), ValueError, "sequence 1 has 26 tokens; the context scores at most 25; shorten it"),
        (([[1, 61]],), ValueError, "sequence 0 holds the token id 61; ids must be in [0, 61)"),
        (([[1, -1]],), ValueError, "sequence 0 holds the token id -1"),
        (([[1, 1.5]],), TypeError, "token ids must be integers; sequence 0 holds 1.5"),
        (([[True]],), TypeError, "token ids must be integers; sequence 0 holds True"),
        ((["abc"],), ValueError, "sequence 0 is text, but the model has no tokenizer"),
        (([7],), TypeError, "a sequence must be text or token ids; sequence 0 is int"),
        (([b"ab"],), TypeError, "a sequence must be text or token ids; sequence 0 is bytes"),
    ],
)
def test_bad_sequences(arguments, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        score(random_model(0), *arguments)


def test_bad_arguments():
    model = random_model(0)
    with pytest.raises(ValueError, match="prefixes must have one for every sequence; there is none for 1"):
        score(model, [[1, 2], [3]], prefixes=[[1]])
    for value in (0, True, 1.5):
        with pytest.raises(ValueError, match="batch_tokens must be an int >= 1; got"):
            score(model, [[1, 2]], batch_tokens=value)
    with pytest.raises(ValueError, match="no token with another one before it"):
        score(model, [[]], prefixes=[[1, 2]], after_prefix=True)
    assert fastgpt2.score is score
