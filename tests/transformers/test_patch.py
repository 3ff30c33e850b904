"""`accelerate` and `unaccelerate`: existing models, models inside others, and models that are built later."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fastgpt2
import fastgpt2.transformers as fast
from tests.helpers import assert_close, random_ids
from tests.transformers.helpers import config, masks, pair, transformers

OURS, THEIRS = "fastgpt2.transformers.modeling", "transformers.models.gpt2.modeling_gpt2"


def modules_of(model: nn.Module) -> set[str]:
    """The packages that define the classes of a GPT-2's modules."""
    modules = [m for m in model.modules() if type(m).__name__ != "GPT2SequenceSummary"]
    return {type(m).__module__ for m in modules if type(m).__name__.startswith(("GPT2", "LayerNorm"))}


@pytest.fixture
def patched() -> Iterator[None]:
    fastgpt2.accelerate()
    yield
    fastgpt2.unaccelerate()


@pytest.mark.parametrize(
    "name",
    ["GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification",
     "GPT2ForTokenClassification", "GPT2ForQuestionAnswering"],
)  # fmt: skip
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_place_and_back(seed: int, name: str, attention: str) -> None:
    model, _ = pair(seed, name, attention)
    ids, mask = random_ids(seed, 1, 9), masks(seed, 1, 9)["none"]
    before = model(ids, attention_mask=mask)[0].detach()
    parameters, classes = list(model.parameters()), [type(m) for m in model.modules()]
    for _ in range(2):  # doing it twice changes nothing
        assert fastgpt2.accelerate(model) is model
        assert type(model) is getattr(fast, name)
        assert modules_of(model) == {OURS}
        assert model.config._attn_implementation == "fastgpt2"
        assert_close(model(ids, attention_mask=mask)[0].detach(), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert len(model(ids, output_hidden_states=True).hidden_states) == 3
    assert fastgpt2.unaccelerate(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert model.config._attn_implementation == attention
    assert torch.equal(model(ids, attention_mask=mask)[0], before)


def test_an_optimizer_made_before_keeps_working(seed: int) -> None:
    plain, _ = pair(seed)
    model = copy.deepcopy(plain).train()
    ids = random_ids(seed, 3, 9)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (plain, model)]
    fastgpt2.accelerate(model)
    for m, optimizer in zip((plain, model), optimizers, strict=True):
        for _ in range(3):
            logits = m(ids).logits
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, got), exact in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(got.detach(), exact.detach(), name, tolerance=1e-7)  # Adam divides by numbers that may be tiny


def test_attention_weights_that_were_asked_for_stay(seed: int) -> None:
    model, _ = pair(seed, output_attentions=True)
    fastgpt2.accelerate(model)
    assert model.config._attn_implementation == "eager"
    assert len(model(random_ids(seed, 1, 4)).attentions) == 2


def test_copies_and_pickles(seed: int) -> None:
    model = fastgpt2.accelerate(pair(seed)[0])
    ids = random_ids(seed, 2, 5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is fast.GPT2LMHeadModel
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_classes_of_the_users_own(seed: int) -> None:
    """A subclass keeps its class and its forward; the modules inside become ours."""

    class Doubled(transformers.GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 2
            return outputs

    theirs, _ = pair(seed)
    model = Doubled(config()).double().eval()
    model.load_state_dict(theirs.state_dict())
    ids = random_ids(seed, 2, 5)
    fastgpt2.accelerate(model)
    assert type(model) is Doubled
    assert modules_of(model.transformer) == {OURS}
    assert_close(model(ids).logits, 2 * theirs(ids).logits)
    wrapper = nn.ModuleDict({"gpt": theirs})
    assert fastgpt2.accelerate(wrapper) is wrapper
    assert modules_of(wrapper) == {OURS}


@pytest.mark.filterwarnings("ignore")  # peft warns of tied heads and of deprecated parts of transformers
def test_inside_peft(seed: int) -> None:
    peft = pytest.importorskip("peft")
    theirs, _ = pair(seed)
    settings = peft.LoraConfig(
        target_modules=["c_attn", "c_fc", "lm_head"], r=2, fan_in_fan_out=True, task_type="CAUSAL_LM",
        modules_to_save=["ln_2"], init_lora_weights=False,
    )  # fmt: skip
    plain = peft.get_peft_model(theirs, settings).double()
    model = copy.deepcopy(plain)
    assert fastgpt2.accelerate(model) is model
    assert type(model.get_base_model()) is fast.GPT2LMHeadModel
    ids = random_ids(seed, 3, 7).clamp_min(3)  # `generate` takes 0 as padding
    for m in (plain, model):
        logits = m(input_ids=ids, labels=ids, skip_logits=False).logits if m is model else m(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for (name, got), exact in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (got.grad is None) == (exact[1].grad is None), name
        if got.grad is not None:
            assert_close(got.grad, exact[1].grad, name)
    generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, plain.generate(input_ids=ids, max_new_tokens=3, do_sample=False))
    merged, exact_merged = model.eval().merge_and_unload(), plain.eval().merge_and_unload()
    assert_close(merged(ids).logits, exact_merged(ids).logits)


def test_models_to_come(seed: int, tmp_path: Path, patched: None) -> None:
    theirs, _ = pair(seed)
    assert modules_of(theirs) == {OURS}
    theirs.float().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is fast.GPT2LMHeadModel
    assert model.config._attn_implementation == "fastgpt2"
    for auto in ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"):
        assert modules_of(getattr(transformers, auto).from_config(config())) == {OURS}
    fastgpt2.unaccelerate()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert modules_of(plain) == {THEIRS, "torch.nn.modules.normalization"}
    assert modules_of(model) == {OURS}  # existing models keep their classes
    ids = random_ids(seed, 2, 5)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_pipeline(tiny_checkpoint: Path, patched: None) -> None:
    pipe = transformers.pipeline("text-generation", model=str(tiny_checkpoint))
    assert type(pipe.model) is fast.GPT2LMHeadModel
    got = pipe("def add(", max_new_tokens=6, do_sample=False, pad_token_id=0)
    fastgpt2.unaccelerate()
    plain = transformers.pipeline("text-generation", model=str(tiny_checkpoint))
    assert type(plain.model) is transformers.GPT2LMHeadModel
    assert got == plain("def add(", max_new_tokens=6, do_sample=False, pad_token_id=0)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="must be or hold a GPT-2 of transformers; got Linear"):
        fastgpt2.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="hold a GPT-2 of transformers; got GPT2"):
        fastgpt2.accelerate(fastgpt2.GPT2(vocab_size=5, hidden_size=4, num_layers=1, num_heads=1))


def test_without_transformers() -> None:
    """`import fastgpt2` works, and functions that need transformers name the extra to install."""
    code = """
import sys
sys.modules["transformers"] = None
import fastgpt2
for use in (lambda: __import__("fastgpt2.transformers"), fastgpt2.accelerate, fastgpt2.unaccelerate):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all('pip install "fastgpt2[transformers]"' in line for line in lines)
