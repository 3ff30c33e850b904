"""`from_transformers` and `to_transformers` give models that share memory and compute the same."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import fastgpt2
from fastgpt2 import GPT2
from fastgpt2.checkpoint import load_pretrained
from fastgpt2.selfcheck.models import draw_parameters
from tests.helpers import TINY, assert_close, random_ids, random_model

transformers = pytest.importorskip("transformers")


def hf_model(seed: int, **changes: object) -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(**TINY.replace(**changes).to_hf(), attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config)
    draw_parameters(model, seed)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu_new", "prelu", "xielu"])
def test_from_transformers_shares_the_storage(seed: int, tied: bool, activation: str) -> None:
    theirs = hf_model(seed, tie_word_embeddings=tied, activation_function=activation).double()
    ours = GPT2.from_transformers(theirs)
    pointers = {t.data_ptr() for t in theirs.state_dict().values()}
    assert {t.data_ptr() for t in ours.state_dict().values()} == pointers
    ids = random_ids(seed, 2, 11)
    assert_close(ours(ids), theirs(ids).logits, "logits")
    with torch.no_grad():
        theirs.transformer.h[1].mlp.c_fc.weight.mul_(1.5)
        ours.transformer.h[0].attn.c_attn.weight.mul_(0.5)
    assert_close(ours(ids), theirs(ids).logits, "logits after changes on both sides")


def test_shared_models_train(seed: int) -> None:
    theirs = hf_model(seed).double().train()
    theirs.transformer.wpe.weight.requires_grad_(False)
    ours = GPT2.from_transformers(theirs)
    assert ours.training
    ids = random_ids(seed, 2, 11)
    # transformers' own loss would round float64 logits to float32.
    torch.nn.functional.cross_entropy(theirs(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    fastgpt2.train_step(ours, ids)
    assert ours.transformer.wpe.weight.grad is None
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        mine = ours.get_parameter(name).grad
        assert mine is not None, name
        assert_close(mine.t() if "c_" in name and mine.dim() == 2 else mine, parameter.grad, name)
    optimizer.step()
    assert_close(ours.eval()(ids), theirs.eval()(ids).logits, "after a step")


def test_shared_models_generate_and_save(tmp_path: Path, seed: int) -> None:
    theirs = hf_model(seed)
    ours = GPT2.from_transformers(theirs)
    ours.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)  # contiguous weights
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    prompts = [random_ids(seed + i, 1, n)[0].tolist() for i, n in enumerate((1, 5, 9))]
    samples, expected = (m.generate(prompts, max_new_tokens=8, temperature=0) for m in (ours, loaded))
    assert [s.token_ids for s in samples] == [s.token_ids for s in expected]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu_new", "prelu", "xielu"])
def test_to_transformers(seed: int, tied: bool, activation: str) -> None:
    ours = random_model(seed, tie_word_embeddings=tied, activation_function=activation).double()
    theirs = ours.to_transformers()
    ids = random_ids(seed, 2, 11)
    assert_close(theirs(ids).logits, ours(ids), "logits")
    assert {t.data_ptr() for t in theirs.state_dict().values()} == {t.data_ptr() for t in ours.state_dict().values()}
    generated = theirs.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 15)


def test_what_is_no_plain_gpt2_is_refused(seed: int) -> None:
    with pytest.raises(TypeError, match=r"GPT2LMHeadModel; got GPT2$"):
        GPT2.from_transformers(GPT2(TINY))
    theirs = hf_model(seed)
    adapted = copy.deepcopy(theirs)
    adapted.transformer.h[0].attn.c_attn.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"unexpected keys: transformer\.h\.0\.attn\.c_attn\.extra\.weight"):
        GPT2.from_transformers(adapted)
    theirs.config.add_cross_attention = True
    with pytest.raises(ValueError, match="add_cross_attention"):
        GPT2.from_transformers(theirs)


def test_unknown_names_of_the_package_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastgpt2.nothing
