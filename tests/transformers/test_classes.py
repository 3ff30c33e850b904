"""Our GPT-2 classes give the same results and gradients as transformers' own, in float64 to 1e-9."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2_kernels.ops import ACTIVATIONS
from tests.helpers import (
    TINY,
    assert_close,
    assert_rms_within_budget,
    assert_within_budget,
    draw_parameters,
    random_ids,
)
from tests.transformers.helpers import config, masks, pair, transformers

import fastgpt2.transformers as fast  # isort: skip  (needs transformers)

V = TINY.vocab_size
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied, odd widths": {"tie_word_embeddings": False, "n_inner": 37, "n_embd": 30, "n_head": 3},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"},
    "unscaled": {"scale_attn_weights": False, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    "cross-attention": {"add_cross_attention": True},
}


def loss_of(logits: Tensor, labels: Tensor, shifted: bool = False) -> Tensor:
    """transformers' loss without the rounding of float64 logits to float32."""
    if not shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, what: str = "") -> None:
    for (name, got), exact in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (got.grad is None) == (exact.grad is None), f"{what}{name}"
        if got.grad is not None and exact.grad is not None:
            assert_close(got.grad, exact.grad, f"{what}{name}")
    ours.zero_grad()
    theirs.zero_grad()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_and_gradients(seed: int, name: str) -> None:
    changes = CONFIGURATIONS[name]
    theirs, ours = pair(seed, **changes)
    ids, B, T = random_ids(seed, 3, 11), 3, 11
    padding = masks(seed, B, T)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    width = ours.config.n_embd
    inputs: dict[str, dict[str, Any]] = {
        "ids": {"input_ids": ids},
        **{kind: {"input_ids": ids, "attention_mask": mask} for kind, mask in padding.items()},
        "4-D mask": {"input_ids": ids, "attention_mask": torch.zeros(B, 1, T, T).masked_fill(~causal, -1e30).double()},
        "positions": {"input_ids": ids, "position_ids": torch.randint(24, (1, T)).sort().values},
        "documents": {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]])},
        "types": {"input_ids": ids, "token_type_ids": random_ids(seed + 1, B, T)},
        "embeddings": {"inputs_embeds": torch.randn(B, T, width, dtype=torch.float64)},
    }
    if "add_cross_attention" in changes:
        encoded = torch.randn(B, 5, width, dtype=torch.float64)
        inputs["encoder"] = {"input_ids": ids, "encoder_hidden_states": encoded}
        inputs["masked encoder"] = {**inputs["encoder"], "encoder_attention_mask": masks(seed, B, 5)["right"]}
    for kind, given in inputs.items():
        for cached in (False, True):
            got, exact = (m(**given, use_cache=cached).logits for m in (ours, theirs))
            kept = given.get("attention_mask", padding["none"])
            kept = padding["none"].bool() if kept.dim() == 4 else kept.bool()
            assert_close(got[kept], exact[kept], f"{kind}: logits")
        targets = ids.masked_fill(~kept, -100)
        for logits in (got, exact):
            loss_of(logits, targets).backward() if kept.all() else F.cross_entropy(
                logits.flatten(0, 1), targets.flatten()
            ).backward()
        assert_same_gradients(ours, theirs, f"{kind}: ")


@pytest.mark.parametrize("activation", sorted(transformers.activations.ACT2FN))
def test_every_activation(seed: int, activation: str) -> None:
    theirs, ours = pair(seed, activation_function=activation, n_layer=1)
    ids = random_ids(seed, 2, 7)
    got, exact = (m(ids).logits for m in (ours, theirs))
    assert_close(got, exact)
    for logits in (got, exact):
        loss_of(logits, ids).backward()
    assert_same_gradients(ours, theirs)
    assert activation in ACTIVATIONS or activation in ("prelu", "xielu")


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding(seed: int, dtype: torch.dtype, upcast: bool) -> None:
    """The error against float64 is at most twice transformers', loss and gradients included."""
    theirs, ours = pair(seed, reorder_and_upcast_attn=upcast)
    exact = pair(seed)[0]
    ids = random_ids(seed, 3, 17)
    results = {}
    for what, model in (("exact", exact), ("plain", theirs.to(dtype)), ("ours", ours.to(dtype))):
        outputs = model(ids, labels=ids)
        loss = loss_of(outputs.logits, ids) if what == "exact" else outputs.loss
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        results[what] = (outputs.logits.detach(), loss.detach(), gradients)
    got, plain, expected = results["ours"], results["plain"], results["exact"]
    assert got[1].dtype == torch.float32
    check = assert_within_budget if dtype == torch.float32 else _rms
    for what, a, b, c in zip(("logits", "loss", "gradients"), got, plain, expected, strict=True):
        check(a, b, c, what, dtype=dtype)


def _rms(got: Tensor, plain: Tensor, exact: Tensor, what: str, *, dtype: torch.dtype) -> None:
    assert_rms_within_budget(got, [plain], exact, what, dtype=dtype)


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_loss_without_logits(seed: int) -> None:
    theirs, ours = pair(seed)
    ids = random_ids(seed, 3, 9)
    labels = ids.masked_fill(torch.rand(3, 9) < 0.3, -100)
    shifted = labels.roll(-1, 1)
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "number of items": {"num_items_in_batch": torch.tensor(50)},
        "number as an int": {"num_items_in_batch": 7},
        "shifted": {"shift_labels": shifted},
        "other index": {"ignore_index": int(ids[0, 3])},
    }
    for what, given in cases.items():
        got = ours(ids, labels=labels if what != "other index" else ids, skip_logits=True, **given)
        assert got.logits is None
        got.loss.backward()
        logits = theirs(ids).logits
        if what == "shifted":
            loss = loss_of(logits, shifted, shifted=True)
        elif what == "other index":
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=int(ids[0, 3]))
        else:
            loss = loss_of(logits, labels)
        if (items := given.get("num_items_in_batch")) is not None:
            loss = loss * (labels[:, 1:] != -100).sum() / items
        loss.backward()
        assert_close(got.loss.detach(), loss.detach(), what)
        assert_same_gradients(ours, theirs, f"{what}: ")
    assert ours(ids, labels=torch.full_like(ids, -100)).loss.isnan()
    assert theirs(ids, labels=torch.full_like(ids, -100)).loss.isnan()


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("skips", [False, True])
def test_loss_of_padded_batches(seed: int, side: str, counted: bool, skips: bool) -> None:
    """The loss is that of transformers even if labels at padding count, so that the hidden states there matter."""
    theirs, ours = pair(seed, attention="sdpa")
    ids, mask = random_ids(seed, 3, 9), masks(seed, 3, 9)[side]
    labels = ids if counted else ids.masked_fill(mask == 0, -100)
    got = ours(ids, attention_mask=mask, labels=labels, skip_logits=skips).loss
    exact = loss_of(theirs(ids, attention_mask=mask).logits, labels)
    assert_close(got.detach(), exact.detach())
    got.backward()
    exact.backward()
    assert_same_gradients(ours, theirs)


def test_when_logits_are_there(seed: int) -> None:
    _, model = pair(seed)
    ids = random_ids(seed, 2, 5)
    for training in (False, True):
        model.train(training)
        assert (model(ids, labels=ids).logits is None) == training
        assert model(ids).logits.shape == (2, 5, V)
        assert model(ids, labels=ids, skip_logits=False).logits.shape == (2, 5, V)
        assert model(ids, labels=ids, skip_logits=True).logits is None
        loss, logits, *_ = model(ids, labels=ids, return_dict=False)
        assert loss.shape == ()
        assert logits.shape == (2, 5, V)
    model.skip_logits = False
    assert model(ids, labels=ids).logits.shape == (2, 5, V)
    model.eval().skip_logits = True
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, skip_logits=False).logits.shape == (2, 5, V)
    with pytest.raises(ValueError, match="skip_logits=True needs labels"):
        model(ids, skip_logits=True)


def test_what_is_not_plain_is_left_to_transformers(seed: int) -> None:
    """With a user's own loss, a hook on the head or a replaced head, logits are computed and go through it."""
    theirs, ours = pair(seed)
    ids = random_ids(seed, 2, 7)
    expected = theirs(ids, labels=ids).loss
    seen: list[Any] = []
    handle = ours.lm_head.register_forward_hook(lambda module, args, output: output * 0)
    assert abs(ours(ids, labels=ids).loss.item() - math.log(V)) < 1e-6
    handle.remove()
    ours.loss_function = lambda logits, labels, vocab_size, **kwargs: seen.append(logits) or logits.sum()
    assert ours(ids, labels=ids).loss == seen[0].sum()
    del ours._loss_function
    ours.lm_head = nn.Sequential(ours.lm_head)
    torch.testing.assert_close(ours(ids, labels=ids).loss, expected, rtol=1e-6, atol=0.0)


# -- other heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["GPT2Model", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification", "GPT2ForTokenClassification",
             "GPT2ForQuestionAnswering"],
)  # fmt: skip
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_every_head(seed: int, name: str, padding: str) -> None:
    theirs, ours = pair(seed, name, attention="sdpa", num_labels=3, classifier_dropout=0.0, summary_first_dropout=0.0)
    ids, mask = random_ids(seed, 3, 9).clamp_min(1), masks(seed, 3, 9)[padding]
    ids = ids.masked_fill(mask == 0, 0)
    labels: dict[str, dict[str, Tensor]] = {
        "GPT2Model": {},
        "GPT2DoubleHeadsModel": {"labels": ids, "mc_labels": torch.tensor([0, 0, 0])},
        "GPT2ForSequenceClassification": {"labels": torch.tensor([2, 0, 1])},
        "GPT2ForTokenClassification": {"labels": torch.randint(3, (3, 9))},
        "GPT2ForQuestionAnswering": {
            "start_positions": torch.tensor([0, 3, 8]),
            "end_positions": torch.tensor([1, 3, 20]),
        },
    }
    given = {"input_ids": ids, "attention_mask": mask, **labels[name]}
    if name == "GPT2DoubleHeadsModel":
        given = {key: value[:, None] if value.dim() == 2 else value for key, value in given.items()}
    got, exact = ours(**given), theirs(**given)
    assert type(got) is type(exact)
    assert list(got) == list(exact)
    for key in got:
        if key not in ("past_key_values", "cache"):
            kept = mask.bool() if name == "GPT2Model" else ...
            assert_close(got[key][kept], exact[key][kept], key)
    for output in (got, exact):
        losses = [output[key] for key in ("loss", "mc_loss") if key in output]
        (sum(losses) if losses else output.last_hidden_state[mask.bool()].square().sum()).backward()
    assert_same_gradients(ours, theirs)
    names, theirs_names = ([*inspect.signature(type(m).forward).parameters] for m in (ours, theirs))
    assert [name for name in names if name != "skip_logits"] == theirs_names


def test_two_heads_train_without_the_logits(seed: int) -> None:
    """Losses and gradients are the same, and the language modelling head is not called."""
    theirs, ours = pair(seed, "GPT2DoubleHeadsModel", attention="sdpa", num_labels=3, summary_first_dropout=0.0)
    ids = random_ids(seed, 3, 2, 9)
    given = {"input_ids": ids, "labels": ids.masked_fill(ids % 3 == 0, -100), "mc_labels": torch.tensor([0, 1, 1])}
    ours.train()
    with torch.no_grad():
        assert ours(**given, skip_logits=False).logits.shape == (3, 2, 9, ours.config.vocab_size)
        assert ours(**given, return_dict=False)[2].shape == (3, 2, 9, ours.config.vocab_size)
        assert ours.eval()(**given).logits is not None
    ours.train()
    linear = torch.nn.Linear.forward
    calls: list[torch.Size] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", lambda layer, x: calls.append(layer.weight.shape) or linear(layer, x))
        got = ours(**given)
    assert ours.lm_head.weight.shape not in calls
    exact = theirs(**given)
    assert got.logits is None
    assert_close(got.loss, exact.loss, "loss")
    assert_close(got.mc_loss, exact.mc_loss, "mc_loss")
    assert_close(got.mc_logits, exact.mc_logits, "mc_logits")
    for output in (got, exact):
        (output.loss + output.mc_loss).backward()
    assert_same_gradients(ours, theirs)
    with pytest.raises(ValueError, match="GPT2DoubleHeadsModel: skip_logits=True needs labels"):
        ours(ids, skip_logits=True)


# -- around the computation --------------------------------------------------------------------------------------------


def test_classes_are_transformers_own(seed: int) -> None:
    for name in fast.__all__:
        ours, theirs = getattr(fast, name), getattr(transformers, name, None)
        if theirs is None:
            assert name in ("accelerate", "unaccelerate")
            continue
        assert issubclass(ours, theirs)
        assert ours.__name__ == theirs.__name__
        model, plain = ours(config()), theirs(config())
        assert {k: v.shape for k, v in model.state_dict().items()} == {
            k: v.shape for k, v in plain.state_dict().items()
        }
        names = [type(module).__name__ for module in model.modules()]
        assert names == [
            type(module).__name__ for module in plain.modules()
        ]  # FSDP and device maps look for these names
        parameters = set(inspect.signature(theirs.forward).parameters)
        assert set(inspect.signature(ours.forward).parameters) - parameters <= {"skip_logits"}
    assert model.config._attn_implementation == "fastgpt2"


def test_folders_are_the_same(seed: int, tmp_path: Path) -> None:
    theirs, ours = (model.float() for model in pair(seed))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file
    loaded = fast.GPT2LMHeadModel.from_pretrained(
        tmp_path / "theirs", dtype=torch.bfloat16, low_cpu_mem_usage=True, attn_pdrop=0.25, output_hidden_states=True
    )
    assert loaded.dtype == torch.bfloat16
    assert type(loaded.transformer.h[0]).__module__ == "fastgpt2.transformers.modeling"
    assert loaded.transformer.h[0].attn.attn_dropout.p == 0.25
    ids = random_ids(seed, 2, 5)
    assert len(loaded(ids).hidden_states) == 3
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(again(ids).logits, transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")(ids).logits)


def test_hooks_see_and_change_what_they_do_in_transformers(seed: int) -> None:
    """Hooks on every module see the same values in the same order, forward and backward."""
    ids, seen = random_ids(seed, 2, 6), []
    for model in pair(seed):
        calls: list[tuple[str, Tensor]] = []
        for name, module in model.named_modules():
            if not name or isinstance(module, (nn.ModuleList, nn.Dropout)) or name == "transformer":
                continue

            def note(module: nn.Module, args: Any, output: Any, name: str = name, calls: Any = calls) -> Any:
                output = output[0] if isinstance(output, tuple) else output
                calls.append((name, output.detach().clone()))
                return None

            def double(module: nn.Module, args: Any) -> Any:
                return (args[0] * 1.25, *args[1:]) if args[0].is_floating_point() else None

            module.register_forward_hook(note)
            module.register_forward_pre_hook(double)
        logits = model(ids).logits
        loss_of(logits, ids).backward()
        seen.append(calls)
    assert [name for name, _ in seen[0]] == [name for name, _ in seen[1]]
    for (name, exact), (_, got) in zip(*seen, strict=True):
        assert_close(got, exact, name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(seed: int, reentrant: bool) -> None:
    theirs, ours = pair(seed)
    ids = random_ids(seed, 2, 9)
    mask = masks(seed, 2, 9)["right"]
    for model in (theirs, ours):
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        labels = ids.masked_fill(mask == 0, -100)
        outputs = model(ids, attention_mask=mask, labels=labels, use_cache=False)
        (outputs.loss if model is ours else loss_of(outputs.logits, labels)).backward()
    assert_same_gradients(ours, theirs)


def test_attention_weights_are_refused_or_eager(seed: int) -> None:
    theirs, ours = pair(seed)
    ids = random_ids(seed, 2, 5)
    with pytest.raises(ValueError, match='output_attentions needs attn_implementation="eager"'):
        ours(ids, output_attentions=True)
    ours.set_attn_implementation("eager")
    got, exact = (m(ids, output_attentions=True, output_hidden_states=True) for m in (ours, theirs))
    for a, b in zip(got.attentions + got.hidden_states, exact.attentions + exact.hidden_states, strict=True):
        assert_close(a, b)


def test_dropout_in_training(seed: int) -> None:
    """Each of the three dropouts changes the result in training mode, and none in eval mode."""
    ids = random_ids(seed, 2, 9)
    for changes in ({"attn_pdrop": 0.5}, {"resid_pdrop": 0.5}, {"embd_pdrop": 0.5}):
        theirs, ours = pair(seed, **changes)
        assert_close(ours(ids).logits, theirs(ids).logits)
        ours.train()
        for mask in (None, masks(seed, 2, 9)["right"]):
            assert not torch.equal(*(ours(ids, attention_mask=mask).logits for _ in range(2)))


def test_continue_from_a_cache(seed: int) -> None:
    """A cache can be continued token by token and in pieces, also after left padding. Beams reorder its rows."""
    theirs, ours = pair(seed)
    ids, mask = random_ids(seed, 3, 12), masks(seed, 3, 12)["left"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for kind in ("none", "left"):
        kept = torch.ones_like(mask) if kind == "none" else mask
        whole = theirs(ids, attention_mask=kept, position_ids=positions if kind == "left" else None).logits
        for splits in ([5, 1, 1, 1, 4], [1] * 12, [12]):
            past, start, parts = None, 0, []
            for count in splits:
                end = start + count
                given = {} if kind == "none" else {"position_ids": positions[:, start:end]}
                if kind == "left" or start == 0:
                    given["attention_mask"] = kept[:, :end]
                step = ours(ids[:, start:end], past_key_values=past, use_cache=True, **given)
                past, start = step.past_key_values, end
                parts.append(step.logits)
            got = torch.cat(parts, 1)
            assert_close(got[kept.bool()], whole[kept.bool()], f"{kind} {splits}")
    past.reorder_cache(torch.tensor([2, 0, 0]))
    assert past.get_seq_length() == 12


def test_resized_embeddings(seed: int) -> None:
    theirs, ours = pair(seed)
    for model in (theirs, ours):
        torch.manual_seed(seed)
        model.resize_token_embeddings(70, mean_resizing=False)
        draw_parameters(model, seed)
    ids = random_ids(seed, 2, 6, vocab_size=70)
    assert_close(ours(ids).logits, theirs(ids).logits)
    assert_close(ours(ids, labels=ids).loss.detach(), loss_of(theirs(ids).logits, ids).detach())
