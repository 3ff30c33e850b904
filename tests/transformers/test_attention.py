"""Other causal models with `attn_implementation="fastgpt2"` give the same results as with their own attention."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import fastgpt2.transformers
from fastgpt2.transformers import attention
from tests.helpers import assert_close, draw_parameters, random_ids
from tests.transformers.helpers import masks, transformers

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 40}  # fmt: skip
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {**SIZES, **GROUPED},
    "Qwen2": {**SIZES, **GROUPED},
    "Qwen3": {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12},
    "GPTNeoX": {**SIZES, "num_attention_heads": 4},
    "Phi": {**SIZES, "num_attention_heads": 4},
    "Gemma": {**SIZES, **GROUPED, "head_dim": 16},
    # Without a sliding window, with one that is longer than the input, and with a shorter one.
    "Mistral": {**SIZES, **GROUPED, "sliding_window": None},
    "Mistral wide": {**SIZES, **GROUPED, "sliding_window": 30},
    "Mistral narrow": {**SIZES, **GROUPED, "sliding_window": 4},
    "OPT": {**SIZES, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}


def model_of(name: str, seed: int, attention: str) -> Any:
    kind = name.split()[0]
    settings = getattr(transformers, f"{kind}Config")(**MODELS[name], attn_implementation=attention)
    model = getattr(transformers, f"{kind}ForCausalLM")(settings)
    draw_parameters(model, seed, 0.2)
    return model.double().eval()


@pytest.mark.parametrize("name", MODELS)
def test_causal_models(seed: int, name: str) -> None:
    # "eager" would round its softmax to float32.
    exact, ours = model_of(name, seed, "sdpa"), model_of(name, seed, "fastgpt2")
    assert ours.config._attn_implementation == "fastgpt2"
    ids = random_ids(seed, 3, 11)
    for kind, mask in {**masks(seed, 3, 11), "absent": None}.items():
        kept = torch.ones(3, 11, dtype=torch.bool) if mask is None else mask.bool()
        expected = exact(ids, attention_mask=mask).logits
        for cached in (False, True):
            got = ours(ids, attention_mask=mask, use_cache=cached).logits
            assert_close(got[kept], expected[kept], kind)
        for model, logits in ((ours, got), (exact, expected)):
            model.zero_grad()
            torch.nn.functional.cross_entropy(logits[kept], ids[kept]).backward()
        for (parameter, a), b in zip(ours.named_parameters(), exact.parameters(), strict=True):
            assert_close(a.grad, b.grad, f"{kind}: {parameter}", tolerance=1e-8)
    for mask in (torch.ones_like(ids), masks(seed, 3, 11)["left"]):
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(ours.generate(ids, **options), exact.generate(ids, **options))


def gpt2_of(seed: int, attention: str) -> Any:
    """A GPT-2 of our class with the attention "fastgpt2", otherwise of transformers'."""
    settings = transformers.GPT2Config(
        vocab_size=61, bos_token_id=0, eos_token_id=0, n_embd=32, n_layer=2, n_head=4, n_positions=40,
        attn_implementation=attention, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    library = fastgpt2.transformers if attention == "fastgpt2" else transformers
    model = library.GPT2LMHeadModel(settings)
    draw_parameters(model, seed, 0.2)
    return model.double()


@pytest.mark.parametrize("name", ["Llama", "Mistral narrow", "GPT2"])
def test_packed_sequences_stay_apart(seed: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Position ids that restart begin a new sequence, which attends only to itself.

    Our operator computes this. Only with a narrow sliding window does PyTorch's.
    """
    make = gpt2_of if name == "GPT2" else functools.partial(model_of, name)
    exact, ours = make(seed, "sdpa"), make(seed, "fastgpt2")
    calls: list[str] = []
    theirs = attention.sdpa_attention_forward
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *args, **options: calls.append("sdpa") or theirs(*args, **options)
    )
    ids = random_ids(seed, 2, 12)
    positions = {
        "restarting": [[*range(5), *range(1), *range(6)], [*range(7), *range(5)]],
        "jumping": [[0, 1, 2, 7, 8, 0, 1, 2, 3, 0, 0, 0], [3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 7]],
        "one sequence": [[*range(12)], [*range(12)]],
    }
    for what, rows in positions.items():
        logits = [m(ids, position_ids=torch.tensor(rows), use_cache=False).logits for m in (ours, exact)]
        assert_close(*logits, what)
        for model, own in zip((ours, exact), logits, strict=True):
            model.zero_grad()
            torch.nn.functional.cross_entropy(own.flatten(0, 1), ids.flatten()).backward()
        for (parameter, a), b in zip(ours.named_parameters(), exact.parameters(), strict=True):
            assert_close(a.grad, b.grad, f"{what}: {parameter}", tolerance=1e-8)
    assert bool(calls) == (name == "Mistral narrow")
    alone = ours(ids[:1, 6:], position_ids=torch.arange(6)[None]).logits
    packed = ours(ids[:1], position_ids=torch.tensor(positions["restarting"][:1]), use_cache=False).logits
    assert_close(packed[:, 6:], alone, "a packed sequence and the same alone")


def test_bidirectional_attention_of_a_decoder(seed: int) -> None:
    """Attention that is not causal goes to PyTorch's operator."""
    exact, ours = (model_of("Llama", seed, attention) for attention in ("sdpa", "fastgpt2"))
    ids = random_ids(seed, 2, 7)
    for model in (exact, ours):
        model.config.is_causal = False
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    for mask in (None, masks(seed, 2, 7)["right"]):
        kept = ... if mask is None else mask.bool()
        assert_close(ours(ids, attention_mask=mask).logits[kept], exact(ids, attention_mask=mask).logits[kept])


def test_what_would_change_the_scores_is_refused(seed: int) -> None:
    settings = transformers.Gemma2Config(**SIZES, **GROUPED, head_dim=8, attn_implementation="fastgpt2")
    model = transformers.Gemma2ForCausalLM(settings).eval()
    with pytest.raises(ValueError, match=r'does not support softcap .*Gemma2Attention uses; choose "eager"'):
        model(random_ids(seed, 1, 5))


def test_dropout_is_honoured(seed: int) -> None:
    model = model_of("Llama", seed, "fastgpt2").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = random_ids(seed, 2, 9)
    for mask in (None, masks(seed, 2, 9)["right"]):
        assert not torch.equal(*(model(ids, attention_mask=mask).logits for _ in range(2)))


def test_encoder_decoder_with_a_gpt2_decoder(seed: int) -> None:
    settings = {"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 61, "n_positions": 20}
    decoder = transformers.GPT2Config(
        **settings, add_cross_attention=True, is_decoder=True, bos_token_id=1, eos_token_id=2
    )
    encoder = transformers.GPT2Config(**settings, bos_token_id=1, eos_token_id=2)
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = transformers.EncoderDecoderModel(both).double().eval()
    draw_parameters(model, seed)
    ids, other, mask = random_ids(seed, 2, 7), random_ids(seed + 1, 2, 5), masks(seed, 2, 7)["right"]
    expected = model(input_ids=ids, attention_mask=mask, decoder_input_ids=other).logits
    fastgpt2.accelerate(model)
    assert_close(model(input_ids=ids, attention_mask=mask, decoder_input_ids=other).logits, expected)
