"""Generation: equal to transformers and to a loop without a cache; a sample does not depend on other rows."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fastgpt2 import GPT2, SamplingConfig
from fastgpt2.decode import DecodeSession, why_not_decode
from fastgpt2.generate import GenerateOptions, Sample, _run, generate
from fastgpt2.scheduler import MOST_WAITING, PREFILL_STEPS, Scheduler, _Waiting
from fastgpt2_kernels import ops

V = 67
SIZES = {"vocab_size": V, "hidden_size": 48, "num_layers": 2, "num_heads": 3, "context_length": 96}


def tiny_model(seed: int, **changes) -> GPT2:
    torch.manual_seed(seed)
    # Weights large enough that the next token depends on the whole prefix, not only on the last token.
    return GPT2(**{**SIZES, "initializer_range": 0.3, **changes}).eval()


def random_prompts(rng: random.Random, count: int, longest: int = 40) -> list[list[int]]:
    return [[rng.randrange(V) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def test_the_declared_options_are_those_that_are_taken():
    taken = {name for name, p in inspect.signature(_run).parameters.items() if p.kind is p.KEYWORD_ONLY}
    fields = {field.name for field in dataclasses.fields(SamplingConfig)}
    assert GenerateOptions.__optional_keys__ == taken - {"want_text"} | fields


class ByteTokenizer:
    """A tokenizer whose token i is byte i. Characters beyond ASCII take several tokens."""

    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(ids).decode(errors="replace")


def choose(logits: torch.Tensor, config: SamplingConfig, row: tuple[int, int, int], seen: torch.Tensor) -> torch.Tensor:
    """Choose the next token of one row for each of N logits (N, V).

    row: the prompt's index, the sample's index, and the number of tokens that the sample has.
    """
    (prompt, sample_index, position), N = row, len(logits)
    keys = ops.row_keys(config.seed, [prompt], [sample_index]).expand(N, 2).contiguous()
    positions = torch.full((N,), position, dtype=torch.int32)
    options = {"top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p or None}
    return ops.sample(
        logits, temperature=config.temperature, repetition_penalty=config.repetition_penalty, seen=seen.contiguous(),
        keys=keys, positions=positions, backend="torch", **options,
    )[0]  # fmt: skip


def assert_same(model: GPT2, one: list[Sample], other: list[Sample]) -> None:
    """Assert equality: bit for bit with a decoding step, else up to rounding, which depends on the number of rows."""
    if why_not_decode(model) is None:
        assert one == other
        return
    assert [s.token_ids for s in one] == [s.token_ids for s in other]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-4, atol=1e-4)


def assert_step_by_step(model: GPT2, got: Sample, config: SamplingConfig, *, context_shift: bool = False) -> int:
    """Assert that the introductory loop (forward pass, choose, append) gives the same tokens, without cache and batch.

    With `context_shift`, when the tokens no longer fit in the context, the loop continues from the last half context.

    Returns:
        The number of tokens that rounding decides. There the loop's logits nearly tie: moved by a few roundings, they
        give either token. Any other difference fails.
    """
    ids, stop, ties = list(got.prompt_ids), config.stop_token_ids or (), 0
    context, first = model.config.context_length, 0
    for position, token in enumerate(got.token_ids):
        assert position < config.max_new_tokens
        if context_shift and len(ids) - first > context:
            first = len(ids) - -(-context // 2)
        assert len(ids) - first <= context
        assert position == 0 or ids[-1] not in stop
        with torch.no_grad():
            logits = model(torch.tensor([ids[first:]]))[:, -1]
        seen = torch.zeros(1, V, dtype=torch.bool)
        seen[0, ids] = True
        row = (got.prompt_index, got.sample_index, position)
        if int(choose(logits, config, row, seen)) != token:
            moved = logits + 1e-5 * logits.abs().max() * (2 * torch.rand(200, V) - 1)
            assert token in choose(moved, config, row, seen.expand(200, V)).tolist()
            ties += 1
        ids.append(token)
    is_full = not context_shift and len(ids) > context
    assert ids[-1] in stop or len(got.token_ids) == config.max_new_tokens or is_full
    return ties


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_greedy_equals_transformers_on_ragged_batches(seed, dtype):
    transformers = pytest.importorskip("transformers")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=110, n_embd=48, n_layer=2, n_head=3, initializer_range=0.3, eos_token_id=5,
        bos_token_id=None,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval().to(dtype)
    ours = GPT2.from_transformers(theirs)
    ties = 0
    for got in ours.generate(random_prompts(rng, 12), temperature=0, max_new_tokens=64, batch_size=5):
        ids = torch.tensor([got.prompt_ids])
        generated = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=5
        )
        expected = generated[0, ids.shape[1] :].tolist()
        if got.token_ids != expected:
            # The tokens may differ only at a tie: where the own logits of both tokens are equal up to rounding.
            pairs = zip(got.token_ids, expected, strict=False)
            at, mine, other = next((i, a, b) for i, (a, b) in enumerate(pairs) if a != b)
            logits = theirs(generated[:, : ids.shape[1] + at]).logits[0, -1]
            assert float(logits[other] - logits[mine]) <= 8 * torch.finfo(dtype).eps * float(logits.abs().max())
            ties += 1
    assert ties <= 1


def test_alone_in_any_batch_and_step_by_step_are_one(seed):
    """This holds in at least 200 random cases, with all combinations of filters, batch sizes and numbers of samples."""
    rng = random.Random(seed)
    cases = ties = 0
    for trial in itertools.count():
        if cases >= 200:
            break
        model = tiny_model(seed + trial, tie_word_embeddings=trial % 3 > 0)
        prompts = random_prompts(rng, rng.randint(2, 6))
        options = {
            "temperature": rng.choice([0, 0.7, 1.0, 1.4]),
            "top_k": rng.choice([None, 5, 20]),
            "top_p": rng.choice([None, 0.9]),
            "min_p": rng.choice([None, 0.02]),
            "repetition_penalty": rng.choice([1.0, 1.3]),
            "max_new_tokens": rng.randint(1, 24),
            "stop_token_ids": (3, 11),
            "seed": rng.randrange(2**64),
        }
        num_samples = rng.randint(1, 3)
        batched = model.generate(prompts, num_samples=num_samples, batch_size=rng.randint(1, 8), **options)
        assert [(s.prompt_index, s.sample_index) for s in batched] == list(
            itertools.product(range(len(prompts)), range(num_samples))
        )
        other = model.generate(prompts, num_samples=num_samples, batch_size=rng.randint(9, 40), **options)
        assert_same(model, batched, other)
        for got in batched:
            ties += assert_step_by_step(model, got, SamplingConfig(**options))
            cases += 1
        alone = model.generate([prompts[-1]], sample_ids=[len(prompts) - 1], **options)[0]
        same = batched[(len(prompts) - 1) * num_samples]
        assert_same(model, [dataclasses.replace(alone, prompt_index=same.prompt_index)], [same])
    assert ties <= 3


def test_order_and_skip_change_nothing(seed):
    model, rng = tiny_model(seed), random.Random(seed)
    prompts = random_prompts(rng, 7)
    options = {"num_samples": 3, "max_new_tokens": 10, "seed": 9}
    whole = {(s.prompt_index, s.sample_index): s.token_ids for s in model.generate(prompts, **options)}
    order = rng.sample(range(7), 7)
    shuffled = model.generate([prompts[i] for i in order], sample_ids=order, batch_size=4, **options)
    assert {(order[s.prompt_index], s.sample_index): s.token_ids for s in shuffled} == whole
    done = set(rng.sample(sorted(whole), 10))
    rest = model.generate(prompts, skip=done, batch_size=3, **options)
    assert {(s.prompt_index, s.sample_index): s.token_ids for s in rest} == {
        key: ids for key, ids in whole.items() if key not in done
    }


@pytest.mark.parametrize("pack_weights", [True, False])
def test_only_the_tokens_that_are_needed_are_computed(pack_weights, seed, monkeypatch):
    """Each prompt is computed once for all its samples, each row only until it ends, and padding never."""
    model, rng = tiny_model(seed), random.Random(seed)
    computed = []

    def count(owner, name, number_of):
        method = getattr(owner, name)

        def counted(self, *args, **options):
            result = method(self, *args, **options)
            computed.append(number_of(result, *args))
            return result

        monkeypatch.setattr(owner, name, counted)

    count(GPT2, "extend", lambda _, ids, *rest: len(ids))
    count(DecodeSession, "prefill", lambda _, slots, prompts, pasts: sum(map(len, prompts)))
    count(DecodeSession, "step", lambda results, slots: len(slots) * results.num_steps)
    prompts = random_prompts(rng, 9)
    samples = model.generate(
        prompts, num_samples=4, batch_size=6, max_new_tokens=30, stop_token_ids=(1, 2, 3, 4, 5),
        pack_weights=pack_weights,
    )  # fmt: skip
    assert len({len(s.token_ids) for s in samples}) > 3
    assert sum(computed) == sum(map(len, prompts)) + sum(len(s.token_ids) - 1 for s in samples)


def test_logprobs_are_the_models_own(seed):
    model = tiny_model(seed)
    for got in model.generate(random_prompts(random.Random(seed), 4), temperature=1.7, top_k=9, max_new_tokens=12):
        ids = torch.tensor([[*got.prompt_ids, *got.token_ids]])
        logprobs = model(ids).log_softmax(-1)[0, len(got.prompt_ids) - 1 : -1]
        expected = logprobs.gather(-1, torch.tensor(got.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(got.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_a_full_context_ends_a_row_and_harms_no_other(seed):
    model, rng = tiny_model(seed), random.Random(seed)
    full = [rng.randrange(V) for _ in range(SIZES["context_length"])]
    long = full[:90]
    samples = model.generate([full, long, [1]], max_new_tokens=40, temperature=0, stop_token_ids=())
    assert [len(s.token_ids) for s in samples] == [1, 7, 40]
    assert {s.finish_reason for s in samples} == {"length"}
    assert samples[2].token_ids == model.generate([[1]], max_new_tokens=40, temperature=0)[0].token_ids


@pytest.mark.parametrize("backend", ["auto", "torch", "late"])
def test_a_shifted_context_goes_on_from_its_last_tokens(backend, seed, monkeypatch):
    """Tokens are those of the plain loop, whatever other rows there are, even in a slot that a shifted row has left."""
    if backend == "late":  # read a step after the next one has begun, as on a GPU
        monkeypatch.setattr(DecodeSession, "is_asynchronous", True)
        backend = "auto"
    rng = random.Random(seed)
    ties = shifted = 0
    for trial in range(6):
        context = 1 if trial == 0 else rng.randint(2, 16)
        model = tiny_model(seed + trial, context_length=context, backend=backend)
        prompts = random_prompts(rng, rng.randint(1, 4), longest=context)
        options = {
            "temperature": rng.choice([0, 1.0]),
            "top_k": rng.choice([None, 20]),
            "repetition_penalty": rng.choice([1.0, 1.3]),
            "max_new_tokens": rng.randint(1, 4 * context),
            "stop_token_ids": rng.choice([(), (3,)]),
            "seed": rng.randrange(2**64),
        }
        other = {"num_samples": rng.randint(1, 3), "context_shift": True}
        samples = model.generate(prompts, batch_size=rng.randint(1, 8), **options, **other)
        assert [(s.prompt_index, s.sample_index) for s in samples] == list(
            itertools.product(range(len(prompts)), range(other["num_samples"]))
        )
        for got in samples:
            ties += assert_step_by_step(model, got, SamplingConfig(**options), context_shift=True)
            shifted += len(got.prompt_ids) + len(got.token_ids) > context + 1
        assert_same(model, samples, model.generate(prompts, batch_size=rng.randint(1, 8), **options, **other))
        streamed = list(model.stream(prompts, batch_size=rng.randint(1, 8), **options, **other))
        for got in samples:
            events = [e for e in streamed if (e.prompt_index, e.sample_index) == (got.prompt_index, got.sample_index)]
            assert [e.token_id for e in events] == got.token_ids
    assert shifted > 0
    assert ties <= 3


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_prefix_is_not_copied_from_where_a_shift_has_replaced_it(batch_size, seed):
    model, rng = tiny_model(seed, context_length=32), random.Random(seed)
    common = [rng.randrange(V) for _ in range(20)]
    prompts = [[*common, *prompt] for prompt in random_prompts(rng, 5, longest=6)]
    options = {"max_new_tokens": 24, "stop_token_ids": (), "context_shift": True, "num_samples": 2, "seed": seed}
    together = model.generate(prompts, batch_size=batch_size, **options)
    alone = [s for i, prompt in enumerate(prompts) for s in model.generate([prompt], sample_ids=[i], **options)]
    assert [s.token_ids for s in together] == [s.token_ids for s in alone]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_bans_and_processors_look_at_what_a_shift_has_left_behind(backend, seed):
    model, seen = tiny_model(seed, context_length=8, backend=backend), []

    def looking(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return logits

    options = {"max_new_tokens": 40, "stop_token_ids": (), "no_repeat_ngram_size": 1, "temperature": 0}
    (got,) = model.generate([[1, 2, 3]], context_shift=True, logits_processor=looking, **options)
    whole = [*got.prompt_ids, *got.token_ids]
    assert len(set(whole)) == len(whole) == 43
    assert seen == [whole[:length] for length in range(3, 43)]
    with pytest.raises(ValueError, match="context_shift must be True or False; got 8"):
        model.generate([[1]], context_shift=8)


def test_stop_tokens(seed):
    model = tiny_model(seed)
    prompts = random_prompts(random.Random(seed), 8)
    unstopped = model.generate(prompts, max_new_tokens=60, stop_token_ids=())
    stop = {sample.token_ids[9] for sample in unstopped[:2]}
    model.config = model.config.replace(eos_token_id=tuple(stop))
    samples = model.generate(prompts, max_new_tokens=60)
    assert any(s.finish_reason == "stop" for s in samples)
    for got, free in zip(samples, unstopped, strict=True):
        assert not stop & set(got.token_ids[:-1])
        assert (got.finish_reason == "stop") == (got.token_ids[-1] in stop)
        assert free.token_ids[: len(got.token_ids)] == got.token_ids


class Script(torch.nn.Module):
    """A head whose greedy continuation of any prompt is a given text, byte by byte."""

    def __init__(self, text: str, start: int) -> None:
        super().__init__()
        self.data, self.at = text.encode(), start

    def forward(self, hidden):
        logits = torch.zeros(hidden.shape[0], 256)
        logits[:, self.data[self.at]] = 9.0
        self.at += 1
        return logits


def scripted(text: str) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(vocab_size=256, hidden_size=16, num_layers=1, num_heads=1, context_length=128).eval()
    model.tokenizer = ByteTokenizer()
    model.lm_head = Script(text, 0)
    return model


@pytest.mark.parametrize(
    ("said", "stop", "text", "tokens"),
    [
        ("hello END more", ("END",), "hello ", 9),
        ("hello END more", ("ND m", "END"), "hello ", 9),
        ("aaab", ("ab",), "aa", 4),
        ("grüße — 日本語!", ("語",), "grüße — 日本", len("grüße — 日本語".encode())),
        ("held back \ufffd", ("k \ufffd",), "held bac", 13),  # found only after the last token
        ("nothing here", ("zebra", "herez"), "nothing here", 12),
    ],
)
def test_stop_strings_and_streaming(said, stop, text, tokens):
    options = {"temperature": 0, "max_new_tokens": len(said.encode()), "stop_strings": stop, "pack_weights": False}
    model = scripted(said)
    events = list(model.stream("x", **options))
    finished = events[-1].finished
    assert finished is not None
    assert (finished.text, len(finished.token_ids)) == (text, tokens)
    assert "".join(e.text for e in events) == text
    assert finished.finish_reason == ("stop" if tokens < len(said.encode()) or said.endswith(stop) else "length")
    given = list(itertools.accumulate(e.text for e in events))
    assert all(text.startswith(part) for part in given), "text was yielded that a stop string removed later"


def test_prompts_are_read_as_room_becomes_free(seed):
    model = tiny_model(seed)
    read = []

    def prompts():
        for i in range(50):
            read.append(i)
            yield [i % V]

    results = model.generate_iter(prompts(), batch_size=2, max_new_tokens=5, stop_token_ids=())
    next(results)
    assert len(read) <= 4
    assert 1 + sum(1 for _ in results) == 50


def paths(seed: int, **changes) -> list[GPT2]:
    """A model that decodes with a decoding step, if this machine has one, and the same model on PyTorch's operators."""
    stepped = tiny_model(seed, **changes)
    plain = GPT2(stepped.config, backend="torch").eval()
    plain.load_state_dict(stepped.state_dict())
    return [stepped, plain]


def test_a_run_neither_uses_nor_touches_the_mode(seed, monkeypatch):
    """Two iterators take turns over a model in training mode, with dropout. One is left early and closed late."""
    options = {"max_new_tokens": 9, "num_samples": 2, "seed": 4, "stop_token_ids": ()}
    prompts = random_prompts(random.Random(seed), 5)
    for model in paths(seed, residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5):
        expected = model.generate(prompts, **options)
        model.train()
        with monkeypatch.context() as patch:
            patch.setattr(GPT2, "train", lambda *_: pytest.fail("a run changed the mode"))
            first, second, left = (model.generate_iter(prompts, **options) for _ in range(3))
            next(left)
            pairs = list(zip(first, second, strict=True))
        for found in zip(*pairs, strict=True):
            assert_same(model, sorted(found, key=lambda s: (s.prompt_index, s.sample_index)), expected)
        model.eval()
        left.close()
        assert not model.training
        assert_same(model, model.generate(prompts, **options), expected)


def test_threads_share_a_model_in_training_mode(seed):
    options = {"max_new_tokens": 8, "num_samples": 2, "seed": 4, "stop_token_ids": ()}
    prompts = random_prompts(random.Random(seed), 4)
    for model in paths(seed, residual_dropout=0.5):
        expected = model.generate(prompts, **options)
        model.train()
        with ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(model.generate, prompts, **options) for _ in range(8)]
        for run in runs:
            assert_same(model, run.result(), expected)
        assert model.training


def test_weights_that_change_during_a_run_end_it(seed):
    """A change ends the run whenever it happens, while rows are decoded or while prompts are still waiting."""
    for model, after in itertools.product(paths(seed), (1, 6, 20)):
        events = model.stream(random_prompts(random.Random(seed), 6), max_new_tokens=9, batch_size=3, stop_token_ids=())
        for _ in range(after):
            next(events)
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.bias.add_(1.0)
        with pytest.raises(RuntimeError, match="the model's weights changed during the run; start a new run"):
            list(events)
        assert len(model.generate([[1]], max_new_tokens=2, stop_token_ids=())[0].token_ids) == 2


def test_a_seed_draws_the_same_samples_on_every_path(seed):
    """A decoding step and PyTorch's operators give the same tokens, except where rounding decides."""
    prompts = random_prompts(random.Random(seed), 12)
    differing = 0
    for options in ({}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 30, "repetition_penalty": 1.3}):
        one, other = (
            model.generate(prompts, max_new_tokens=8, stop_token_ids=(), seed=seed, **options) for model in paths(seed)
        )
        differing += sum(a.token_ids != b.token_ids for a, b in zip(one, other, strict=True))
    assert differing <= 1


def test_nan_weights_are_reported_not_sampled(seed):
    model = tiny_model(seed)
    model.transformer.ln_f.bias.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="logits for prompt 0 after 0 tokens are NaN, infinite or all banned"):
        model.generate([[1, 2]])


def test_an_empty_prompt_begins_with_bos(seed):
    model = tiny_model(seed, bos_token_id=7)
    empty, seven = model.generate([[], [7]], sample_ids=[0, 0], max_new_tokens=9)
    assert empty.token_ids == seven.token_ids


def test_text_comes_back_without_the_stop_token(seed):
    torch.manual_seed(seed)
    model = GPT2(vocab_size=256, hidden_size=16, num_layers=1, num_heads=1, context_length=64, eos_token_id=0).eval()
    model.tokenizer = ByteTokenizer()
    got = model.generate("ab", max_new_tokens=20)[0]
    ids = got.token_ids[:-1] if got.token_ids[-1] == 0 else got.token_ids
    assert got.text == bytes(ids).decode(errors="replace")
    assert isinstance(got, Sample)
    assert generate(model, "ab", max_new_tokens=20) == [got]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_keep_rows_apart(seed, dtype):
    model, rng = tiny_model(seed).to(dtype), random.Random(seed)
    prompts = random_prompts(rng, 6)
    options = {"max_new_tokens": 12, "num_samples": 2}
    if dtype == torch.bfloat16 and (reason := why_not_decode(model)) is not None:
        pytest.skip(f"PyTorch's operators round to bfloat16 by the number of rows: {reason}")
    one, other = (model.generate(prompts, batch_size=n, **options) for n in (1, 12))
    assert_same(model, one, other)


def test_integers_of_numpy_and_torch_are_token_ids(seed):
    model = tiny_model(seed)
    ids = [3, 4, 5]
    same = [ids, np.array(ids, dtype=np.uint8), torch.tensor(ids), list(np.array(ids)), range(3, 6)]
    samples = generate(model, same, max_new_tokens=1)
    assert [sample.prompt_ids for sample in samples] == [tuple(ids)] * len(same)
    assert all(type(token) is int for sample in samples for token in sample.prompt_ids)


def test_free_slots_wait_for_each_other_and_not_for_ever(seed, monkeypatch):
    """Rows end at different times. Waiting makes fewer prefills, and the same tokens for every prompt."""
    model = paths(seed)[0].double()  # no two tokens tie
    rng = random.Random(seed)
    prompts = [[rng.randrange(V) for _ in range(rng.randint(1, 5))] for _ in range(40)]
    prefills: list[int] = []
    prefill = Scheduler._prefill

    def counted(self, prompts):
        # Together, the free slots have idled at most one step longer than a prefill costs.
        assert not self.rows or self.waiting.idle < self.waiting.most + self.cache.num_slots
        prefills.append(len(prompts))
        return prefill(self, prompts)

    monkeypatch.setattr(Scheduler, "_prefill", counted)
    found = []
    for steps in (0.0, 2.0):
        monkeypatch.setattr("fastgpt2.scheduler.PREFILL_STEPS", dict.fromkeys(PREFILL_STEPS, steps))
        options = {
            "max_new_tokens": 12,
            "temperature": 1.0,
            "seed": seed % 1000,
            "stop_token_ids": list(range(0, V, 9)),
        }
        samples = model.generate(prompts, batch_size=6, **options)
        found.append(([s.token_ids for s in samples], len(prefills)))
        assert sum(prefills) == len(prompts)
        prefills.clear()
    assert found[0][0] == found[1][0]
    assert found[1][1] < found[0][1]


def test_waiting_ends():
    """Waiting ends when it has cost enough, or after enough steps. Without free slots or prompts nothing waits."""
    waiting = _Waiting(8.0)
    assert not waiting.is_over
    assert waiting.steps_left(0) == MOST_WAITING
    assert [waiting.steps_left(n) for n in (1, 3, 8, 32)] == [8, 3, 1, 1]
    waiting.note(0, 10)
    waiting.note(3, 2)
    assert (waiting.is_over, waiting.steps_left(3)) == (False, 1)
    waiting.note(3, 1)
    assert waiting.is_over
    waiting.begin()
    assert not waiting.is_over
    waiting.most = 1e9
    waiting.note(1, MOST_WAITING)
    assert waiting.is_over
    assert _Waiting(8.0, is_needless=True).steps_left(8) == MOST_WAITING
    assert _Waiting(0.0).is_over


def test_prompts_that_are_too_long_are_truncated_on_the_left(seed):
    """A prompt is truncated to leave room for all new tokens, but never to less than half the context."""
    rng = random.Random(seed)
    model = tiny_model(seed)
    context = SIZES["context_length"]
    for new in (1, rng.randint(2, 40), context // 2 + 1, 10 * context):
        kept = max(context + 1 - new, context // 2)
        lengths = [kept, kept + 1, context, context + 1, 3 * context]
        prompts = [[rng.randrange(V) for _ in range(length)] for length in lengths]
        options = {"max_new_tokens": new, "stop_token_ids": [], "seed": seed}
        got = model.generate(prompts, truncate="left", **options)
        assert [s.prompt_ids for s in got] == [tuple(prompt[-kept:]) for prompt in prompts]
        assert {len(s.token_ids) for s in got} == {min(new, context + 1 - kept)}
        assert_same(model, got, model.generate([prompt[-kept:] for prompt in prompts], **options))
    with pytest.raises(ValueError, match="prompt 1 has 97 tokens; the context holds 96; shorten the prompt, or"):
        model.generate([[1], [1] * (context + 1)], truncate="error")
    with pytest.raises(ValueError, match="truncate must be 'error' or 'left'; got 'right'"):
        model.generate([[1]], truncate="right")
