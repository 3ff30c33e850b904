"""GPT2: building, initialisation, dropout, torch.compile, the introductory loop, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2 import GPT2, GPT2Config, KVCache
from fastgpt2_kernels import ops, reference
from tests.helpers import TINY, assert_close, random_ids, random_model

# -- building ----------------------------------------------------------------------------------------------------------


def test_the_introductory_constructor() -> None:
    sizes: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "num_layers": 2, "num_heads": 8}
    model = GPT2(**sizes, feedforward_dim=64, dropout_rate=0.1)
    assert model(random_ids(0, 2, 7)).shape == (2, 7, 100)
    config = model.config
    assert config.residual_dropout == config.embedding_dropout == config.attention_dropout == 0.1
    assert GPT2(**sizes, dropout_rate=0.1, attention_dropout=0.0).config.attention_dropout == 0.0
    assert GPT2.from_config("distilgpt2", num_layers=1, hidden_size=24, vocab_size=9).config.num_heads == 12


def test_the_introductory_loop(seed: int) -> None:
    """The introductory loop: forward pass, softmax, multinomial, append."""
    torch.manual_seed(seed)
    model = random_model(seed)
    ids = random_ids(seed, 2, 3)
    for _ in range(5):
        with torch.no_grad():
            logits = model(ids)
        probabilities = F.softmax(logits[:, -1, :], dim=-1)
        ids = torch.cat((ids, torch.multinomial(probabilities, num_samples=1)), dim=1)
    assert ids.shape == (2, 8)


def test_initialisation(seed: int) -> None:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=1000, context_length=256, hidden_size=128, num_layers=8, num_heads=4)
    model = GPT2(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            n = parameter.numel()
            # 6 standard errors of a normal sample's mean and standard deviation
            assert abs(parameter.mean().item()) < 6 * std / math.sqrt(n), name
            assert abs(parameter.std().item() - std) < 6 * std / math.sqrt(2 * n), name
    assert model.lm_head.weight is model.transformer.wte.weight
    assert GPT2(config.replace(tie_word_embeddings=False)).lm_head.weight is not model.transformer.wte.weight


@pytest.mark.parametrize("activation", ["prelu", "xielu"])
def test_learned_activations_have_weights(activation: str) -> None:
    names = [name for name, _ in GPT2(TINY.replace(activation_function=activation)).named_parameters()]
    assert any(".mlp.act." in name for name in names)


# -- dropout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["residual_dropout", "embedding_dropout", "attention_dropout"])
def test_each_dropout_acts_alone_and_is_reproducible(seed: int, which: str) -> None:
    model = random_model(seed, **{which: 0.4})
    ids = random_ids(seed, 2, 16)
    evaluated = model(ids)

    def trained(manual_seed: int) -> Tensor:
        torch.manual_seed(manual_seed)
        return model.train()(ids)

    first = trained(seed)
    assert not torch.allclose(first, evaluated)
    assert torch.equal(first, trained(seed))
    assert not torch.allclose(first, trained(seed + 1))
    assert torch.equal(random_model(seed).train()(ids), random_model(seed)(ids))


def test_dropout_rates(seed: int) -> None:
    """Each dropout zeroes the right share of its values, and scales the others accordingly."""
    torch.manual_seed(seed)
    p, n = 0.3, 24 * 512
    model = random_model(seed, hidden_size=512, num_layers=1, embedding_dropout=p, residual_dropout=p).train()
    seen: dict[str, Tensor] = {}
    block = model.transformer.h[0]
    block.ln_1.register_forward_pre_hook(lambda _, inputs: seen.update(embedded=inputs[0]))
    block.ln_2.register_forward_hook(lambda _, inputs, outputs: seen.update(attended=outputs[1]))
    model.transformer.ln_f.register_forward_pre_hook(lambda _, inputs: seen.update(out=inputs[0]))
    model(random_ids(seed, 1, 24))
    bound = 6 * math.sqrt(p * (1 - p) / n)
    added = (seen["attended"] - seen["embedded"], seen["out"] - seen["attended"])
    for dropped in (seen["embedded"], *added):
        assert abs((dropped == 0).double().mean().item() - p) < bound
    q = k = torch.zeros(1, 1, 1, 8)
    v = torch.ones(1, 1, 1, 8).expand(20000, 1, 1, 8)
    out = ops.causal_attention(q.expand_as(v), k.expand_as(v), v, dropout_p=p)[:, 0, 0, 0]
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    assert abs((out == 0).double().mean().item() - p) < 6 * math.sqrt(p * (1 - p) / 20000)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_compile_takes_the_model_whole(seed: int, training: bool) -> None:
    """The model compiles to one graph. Anything that makes PyTorch break the graph is an error here."""
    for attention_dropout in (0.0, 0.1):
        model = random_model(seed, num_layers=2, residual_dropout=0.1, attention_dropout=attention_dropout)
        ids = random_ids(seed, 2, 9)
        compiled = torch.compile(model.train(training), fullgraph=True, backend="aot_eager")
        results = []
        for one in (compiled, model):
            torch.manual_seed(seed)
            results.append(one(ids))
        if training and attention_dropout:  # compiled code draws its random numbers in another order
            assert results[0].isfinite().all()
        else:
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler deprecates its own internals
def test_compiled_forward_equals_eager(seed: int) -> None:
    """The test is skipped where torch.compile cannot work: without a C++ compiler, or with a space in its path."""
    from torch._inductor.exc import InductorError

    model = random_model(seed, num_layers=1)
    ids = random_ids(seed, 2, 9)
    compiled = torch.compile(model)
    with torch.no_grad():
        try:
            logits = compiled(ids)
        except InductorError:
            try:
                torch.compile(lambda x: x + 1)(torch.ones(2))
            except InductorError as error:
                pytest.skip(f"torch.compile does not work on this machine: {str(error).splitlines()[0]}")
            raise
        torch.testing.assert_close(logits, model(ids), rtol=1e-4, atol=1e-4)


# -- what is refused ---------------------------------------------------------------------------------------------------

IDS = torch.zeros(2, 5, dtype=torch.int64)
MODEL = GPT2(TINY).eval()
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a number for a configuration": (lambda: GPT2(5), TypeError, "config must be a GPT2Config; got int"),
    "a configuration and a field": (lambda: GPT2(TINY, vocab_size=3), TypeError, "got a config and vocab_size"),
    "an unknown field": (lambda: GPT2(n_layer=3), TypeError, "unknown argument n_layer"),
    "an unknown backend": (lambda: GPT2(TINY, backend="cuda"), ValueError, "got 'cuda'"),
    "ids of one dimension": (lambda: MODEL(IDS[0]), ValueError, r"must be a \(B, T\) tensor of token ids; got \(5,\)"),
    "a list of ids": (lambda: MODEL([[1, 2]]), ValueError, "got list"),
    "ids as floats": (lambda: MODEL(IDS.float()), ValueError, r"must be int64 or int32; got torch\.float32"),
    "an id past the vocabulary": (lambda: MODEL(IDS + 61), ValueError, r"must be in \[0, 61\) .*; got 61"),
    "a negative id": (lambda: MODEL(IDS - 1), ValueError, "got -1"),
    "a row past the context": (
        lambda: MODEL(IDS[:1, :1].expand(1, 25)),
        ValueError,
        "25 tokens do not fit in the context",
    ),
    "positions of another shape": (lambda: MODEL(IDS, position_ids=IDS[:1]), ValueError, r"shape \(2, 5\)"),
    "positions past the context": (lambda: MODEL(IDS, position_ids=IDS + 24), ValueError, r"\[0, 24\) .*; got 24"),
    "a document past the context": (
        lambda: MODEL(IDS[:1, :1].expand(1, 25), cu_seqlens=torch.tensor([0, 25])),
        ValueError,
        r"\[0, 24\) \(the context\); got 24",
    ),
    "a cache of other rows": (
        lambda: MODEL(IDS, cache=KVCache(TINY, 3)),
        ValueError,
        "a row for each of the cache's 3 slots; got 2 rows",
    ),
    "a cache and positions": (
        lambda: MODEL(IDS, cache=KVCache(TINY, 2), position_ids=IDS),
        ValueError,
        "a cache cannot be combined with position_ids",
    ),
    "a cache in training mode": (
        lambda: GPT2(TINY)(IDS, cache=KVCache(TINY, 2)),
        ValueError,
        r"call model\.eval\(\) first",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    call, error, message = REFUSED[what]
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_a_full_cache_is_left_as_it_was() -> None:
    cache = KVCache(TINY, 2)
    MODEL(IDS, cache=cache)
    with pytest.raises(ValueError, match="25 tokens do not fit in the context of 24"):
        MODEL(IDS[:, :1].expand(2, 20), cache=cache)
    assert cache.lengths == [5, 5]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    assert MODEL(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 61)


@pytest.mark.parametrize(("T", "S"), [(300, 300), (1, 1), (130, 260)])
def test_attention_with_dropout_keeps_a_byte_for_a_score(seed: int, T: int, S: int) -> None:
    """On a CPU, only the dropout mask is stored, a byte per score, and backward computes the scores again.

    First and second derivatives are those of the reference with the same mask.
    """
    B, H, D, p = 2, 2, 4, 0.3
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, n, D, dtype=torch.float64, generator=generator).requires_grad_() for n in (T, S, S))
    saved: list[int] = []
    torch.manual_seed(seed)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        out = ops.causal_attention(q, k, v, dropout_p=p, backend="torch")
    assert sum(saved) <= q.nbytes + k.nbytes + v.nbytes + B * H * T * S
    torch.rand(7)  # the generator moves on before backward
    keep = torch.zeros(B, H, T, S, dtype=torch.bool)
    start = 0
    for drop in out.grad_fn.saved_tensors[3:]:
        n, seen = drop.shape[2:]
        keep[:, :, start : start + n, :seen] = ~drop
        start += n
    assert start == T
    seen = torch.ones(T, S).tril(S - T).sum().item() * B * H
    kept = keep.tril(S - T).sum().item()
    assert abs(kept - (1 - p) * seen) <= 6 * math.sqrt(seen * p * (1 - p))
    exact = reference.causal_attention(q, k, v, scale=D**-0.5, keep=keep, dropout_p=p)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    results = []
    for one in (out, exact):
        plain = torch.autograd.grad((one * weights).sum(), (q, k, v), retain_graph=True)
        first = torch.autograd.grad((one * weights).sum(), (q, k, v), create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v))
        results.append((one, *plain, *first, *second))
    for got, want in zip(*results, strict=True):
        assert_close(got.detach(), want.detach())
