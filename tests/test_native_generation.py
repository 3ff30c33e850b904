"""Generation on a CPU with the native backend: the code around the step, and what it keeps between runs."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch

from fastgpt2 import GPT2, decode
from fastgpt2.decode import why_not_decode
from fastgpt2.weights_mark import WeightsMark
from fastgpt2_kernels import ops
from tests.helpers import random_model

V = 61


@pytest.fixture
def model(seed: int) -> GPT2:
    """A model whose tokens vary: its head is untied, its biases lie around 0, and its embeddings are large."""
    model = random_model(seed, tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.sub_(1.0)
            elif name.endswith(("wte.weight", "wpe.weight")):
                parameter.mul_(4.0)
    if (reason := why_not_decode(model)) is not None:
        pytest.skip(reason)
    return model


def prompts(seed: int, count: int = 6) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(1, 9))] for _ in range(count)]


def tokens(model: GPT2, seed: int, **options: object) -> list[list[int]]:
    options = {"max_new_tokens": 12, "temperature": 0, "stop_token_ids": (), **options}
    return [s.token_ids for s in model.generate(prompts(seed), **options)]


def test_the_same_tokens_as_pytorchs_operators(model, seed):
    """Greedy tokens in float32 agree. The weights are random, so logits do not tie."""
    assert tokens(model, seed) == tokens(model, seed, pack_weights=False)


def test_a_stream_s_tokens_are_those_of_whole_samples(model, seed):
    """A stream makes one step per call, and a run of whole samples makes many.

    Some samples end early, and others take their slots.
    """
    rng = random.Random(seed)
    options = {"max_new_tokens": rng.randint(17, 60), "num_samples": 2, "batch_size": 3, "seed": seed}
    whole = {(s.prompt_index, s.sample_index): s for s in model.generate(prompts(seed), **options)}
    streamed: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for event in model.stream(prompts(seed), **options):
        streamed.setdefault((event.prompt_index, event.sample_index), []).append((event.token_id, event.logprob))
    assert len({len(s.token_ids) for s in whole.values()}) > 1
    assert streamed == {key: list(zip(s.token_ids, s.logprobs, strict=True)) for key, s in whole.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.copy_(w.flip(0)),
        lambda w: w.data.copy_(w.flip(0)),
        lambda w: w.data.copy_(w.flip(1)),
        lambda w: w.data.mul_(1.5),
        lambda w: setattr(w, "data", w.flip(0).clone()),
    ],
    ids=["in place", "rows by .data", "columns by .data", "scaled by .data", "another .data"],
)
def test_weights_that_changed_between_runs_are_noticed(model, seed, change):
    before = tokens(model, seed)
    with torch.no_grad():
        change(model.transformer.h[0].mlp.c_fc.weight)
    after = tokens(model, seed)
    assert after == tokens(model, seed, pack_weights=False)
    assert after != before


def test_a_mark_holds_until_something_changes(seed):
    """A change is noticed even in large tensors, of which only some numbers are compared. NaN equals itself here."""
    model = torch.nn.Linear(300, 400)
    with torch.no_grad():
        model.bias[3] = torch.nan
    mark = WeightsMark(model)
    assert mark.still_holds(model)
    for change in (
        lambda: model.load_state_dict(model.state_dict()),
        lambda: model.weight.data.copy_(model.weight[torch.randperm(400)]),
        lambda: model.weight.data.copy_(model.weight[:, torch.randperm(300)]),
        lambda: model.bias.data.zero_(),
        lambda: setattr(model, "bias", torch.nn.Parameter(model.bias.clone())),
        lambda: model.double(),
    ):
        mark = WeightsMark(model)
        with torch.no_grad():
            change()
        assert not mark.still_holds(model)


def test_packed_weights_are_kept_for_the_next_run_and_go_with_the_model(model, seed, monkeypatch):
    packed = []
    pack = ops.pack_step_weights
    monkeypatch.setattr(ops, "pack_step_weights", lambda weights: packed.append(1) or pack(weights))
    decode.drop_sessions(model)
    for batch_size in (2, 6, 6):  # a session with another number of slots uses the same packed weights
        tokens(model, seed, batch_size=batch_size)
    assert len(packed) == 1
    assert model in decode._PACKED
    model.train()
    assert model not in decode._PACKED
    assert model not in decode._KEPT
    tokens(model, seed)  # in training mode, which the run does not change
    assert model.training
    assert model not in decode._KEPT
    model.eval()
    tokens(model, seed)
    gone = weakref.ref(model)
    kept = weakref.ref(decode._KEPT[model])
    del model
    gc.collect()
    # If the test's fixture still holds the model, both are alive.
    assert (gone() is None) == (kept() is None)


def test_int8_weights(model, seed):
    """Logits of 8-bit weights are close to the model's, so at least half of the rows begin with the same token."""
    exact, got = tokens(model, seed), tokens(model, seed, weight_dtype="int8")
    assert sum(a[0] == b[0] for a, b in zip(exact, got, strict=True)) >= 3
    assert tokens(model, seed, weight_dtype=torch.int8, batch_size=2) == got
    assert tokens(model, seed) == exact  # the model itself has not changed
    # With 8-bit weights, too, a sample has the same bits whatever other rows there are.
    options = {"max_new_tokens": 12, "seed": 5, "stop_token_ids": (), "weight_dtype": "int8"}
    together = model.generate(prompts(seed), **options)
    alone = model.generate([prompts(seed)[3]], sample_ids=[3], **options)[0]
    assert (alone.token_ids, alone.logprobs) == (together[3].token_ids, together[3].logprobs)


def test_two_runs_at_once(model, seed):
    """Each run has its own session; they share the packed weights."""
    options = {"max_new_tokens": 10, "seed": 3, "stop_token_ids": (), "num_samples": 2}
    expected = [s.token_ids for s in model.generate(prompts(seed), **options)]
    first, second = (model.generate_iter(prompts(seed), **options) for _ in range(2))
    found: list[list] = [[], []]
    for pair in zip(first, second, strict=True):
        for samples, sample in zip(found, pair, strict=True):
            samples.append(sample)
    for samples in found:
        samples.sort(key=lambda s: (s.prompt_index, s.sample_index))
        assert [s.token_ids for s in samples] == expected


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"weight_dtype": "int4"}, "weight_dtype must be None or 'int8'; got 'int4'"),
        ({"activation_function": "prelu"}, {"weight_dtype": "int8"}, "the activation 'prelu' has no kernel"),
        ({}, {"weight_dtype": "int8", "pack_weights": False}, "it packs the weights, and pack_weights is False"),
    ],
)
def test_what_cannot_be_in_8_bits_is_refused(changes, options, message, model, seed):
    with pytest.raises(ValueError, match=message):
        random_model(seed, **changes).generate([[1]], max_new_tokens=2, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_decode_on_pytorchs_operators(dtype, model, seed):
    other = model.to(dtype)
    assert "it takes float32 and bfloat16" in str(why_not_decode(other))
    assert len(tokens(other, seed)) == 6


def test_a_model_of_the_native_backend(model, seed):
    """The model trains and evaluates on PyTorch's operators, and generates with the native step."""
    named = GPT2(model.config, backend="native").eval()
    named.load_state_dict(model.state_dict())
    assert tokens(named, seed) == tokens(model, seed)
    ids = torch.tensor(prompts(seed, 1))
    torch.testing.assert_close(named(ids), model(ids))
    with pytest.raises(ValueError, match="layer_norm has no native kernel in this version"):
        ops.layer_norm(torch.ones(2, 3), torch.ones(3), torch.ones(3), 1e-5, backend="native")
