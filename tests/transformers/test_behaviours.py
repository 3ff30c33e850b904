"""The checks of transformers' own tests of GPT-2 and of generation, rewritten for our classes.

Deterministic results are compared with transformers' class, in float64. Other files of this folder check gradients,
heads, hooks, checkpointing, resized embeddings and continued caches (test_classes.py), and training
(test_training.py). Not checked are head pruning and head masks, which transformers has removed, and flash attention,
quantized caches and tensor parallelism, which need a GPU or other packages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt2
import fastgpt2.transformers as fast
from tests.helpers import assert_close, random_ids
from tests.transformers.helpers import config, masks, pair, transformers

ROWS, LENGTH, NEW = 3, 6, 7


@pytest.fixture
def models(seed: int) -> tuple[Any, Any]:
    """transformers' model and ours, with random weights and a pad token."""
    return pair(seed, attention="sdpa")


def both(models: tuple[Any, Any], *args: Any, **options: Any) -> tuple[Any, Any]:
    return tuple(model.generate(*args, **{"max_new_tokens": NEW, "do_sample": False, **options}) for model in models)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7, "early_stopping": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "constraints": {"bad_words_ids": [[3], [4, 5]], "suppress_tokens": [6, 7], "forced_eos_token_id": 2},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "offloaded cache": {"cache_implementation": "dynamic"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", ["none", "left"])  # test_generation.py checks right padding
def test_generation(seed: int, models: tuple[Any, Any], way: str, padding: str) -> None:
    rows = 1 if "lookup" in way else ROWS
    ids, mask = random_ids(seed, rows, LENGTH).clamp_min(3), masks(seed, rows, LENGTH)[padding]
    ids = ids.masked_fill(mask == 0, 0)
    theirs, ours = both(models, ids, attention_mask=mask, **WAYS[way])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("beams", [1, 2])
def test_scores_and_everything_a_generation_returns(seed: int, models: tuple[Any, Any], beams: int) -> None:
    ids = random_ids(seed, 2, LENGTH).clamp_min(3)
    theirs, ours = both(
        models, ids, attention_mask=torch.ones_like(ids), num_beams=beams, return_dict_in_generate=True,
        output_scores=True, output_logits=True, output_hidden_states=True,
    )  # fmt: skip
    assert set(theirs) <= set(ours)
    assert torch.equal(ours.sequences, theirs.sequences)
    for key in ("scores", "logits"):
        for got, exact in zip(ours[key], theirs[key], strict=True):
            finite = exact.isfinite()
            assert_close(got[finite].double(), exact[finite].double(), key, tolerance=1e-6)
    assert len(ours.hidden_states) == len(theirs.hidden_states)


def test_assisted_generation(seed: int, models: tuple[Any, Any]) -> None:
    assistant = pair(seed + 1, n_layer=1)[1]
    ids = random_ids(seed, 1, LENGTH).clamp_min(3)
    theirs, ours = both(models, ids, attention_mask=torch.ones_like(ids))
    assisted = models[1].generate(ids, attention_mask=torch.ones_like(ids), assistant_model=assistant,
                                  max_new_tokens=NEW, do_sample=False)  # fmt: skip
    assert torch.equal(ours, theirs)
    assert torch.equal(assisted, ours)


def test_sampling_keeps_its_rules(seed: int, models: tuple[Any, Any]) -> None:
    ids = random_ids(seed, 2, LENGTH).clamp_min(3)
    model = models[1]
    samples = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=1, num_return_sequences=3, max_new_tokens=NEW
    )
    greedy = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    assert torch.equal(samples, greedy.repeat_interleave(3, 0))
    drawn = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=5.0, suppress_tokens=list(range(20)),
        num_return_sequences=8, max_new_tokens=NEW,
    )  # fmt: skip
    assert len({tuple(row) for row in drawn.tolist()}) > 2
    new = drawn[:, LENGTH:]
    assert bool((new >= 20).all())


def test_generation_from_embeddings(seed: int, models: tuple[Any, Any]) -> None:
    ids = random_ids(seed, 2, LENGTH).clamp_min(3)
    mask = torch.ones_like(ids)
    model = models[1]
    embedded = model.generate(inputs_embeds=model.transformer.wte(ids), attention_mask=mask, max_new_tokens=NEW,
                              do_sample=False)  # fmt: skip
    theirs, ours = both(models, ids, attention_mask=mask)
    assert torch.equal(ours[:, LENGTH:], embedded)
    assert torch.equal(ours, theirs)


def test_left_padding_changes_no_row(seed: int, models: tuple[Any, Any]) -> None:
    mask = masks(seed, ROWS, LENGTH)["left"]
    ids = random_ids(seed, ROWS, LENGTH).clamp_min(3).masked_fill(mask == 0, 0)
    together = models[1].generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    for row, kept, got in zip(ids, mask.bool(), together, strict=True):
        alone = models[1].generate(row[kept][None], attention_mask=kept[kept][None].long(), max_new_tokens=NEW,
                                   do_sample=False)  # fmt: skip
        assert torch.equal(alone[0, int(kept.sum()) :], got[LENGTH:])


def test_continuing_a_generation_from_its_cache(seed: int, models: tuple[Any, Any]) -> None:
    ids = random_ids(seed, 1, LENGTH).clamp_min(3)
    for model in models:
        model.generation_config.eos_token_id = None
    theirs, ours = both(models, ids, attention_mask=torch.ones_like(ids))
    part = models[1].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False,
                              return_dict_in_generate=True)  # fmt: skip
    rest = models[1].generate(part.sequences, attention_mask=torch.ones_like(part.sequences), max_new_tokens=NEW - 3,
                              past_key_values=part.past_key_values, do_sample=False)  # fmt: skip
    assert torch.equal(rest, ours)
    assert torch.equal(theirs, ours)


def test_a_padded_row_and_a_batch_have_a_rows_own_results(seed: int, models: tuple[Any, Any]) -> None:
    mask = masks(seed, ROWS, 9)["right"]
    ids = random_ids(seed, ROWS, 9)
    logits = models[1](ids, attention_mask=mask).logits
    for row, kept, got in zip(ids, mask.bool(), logits, strict=True):
        assert_close(got[kept], models[1](row[kept][None]).logits[0], "a row")


@pytest.mark.parametrize("name", [name for name in fast.__all__ if name.startswith("GPT2")])
def test_saved_and_loaded(name: str, seed: int, tmp_path: Path) -> None:
    """The weights of a model without a head load into every class, and a saved folder gives the same numbers."""
    model = pair(seed, name)[1].float()
    model.save_pretrained(tmp_path)
    loaded, notes = getattr(fast, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    ids = random_ids(seed, 1, 5)
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    base = fast.GPT2Model.from_pretrained(tmp_path)
    assert torch.equal(base.wte.weight, getattr(model, "transformer", model).wte.weight)


def test_tied_weights_stay_tied(seed: int, tmp_path: Path) -> None:
    model = fast.GPT2LMHeadModel(config())
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    loaded = fast.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded.train()(random_ids(seed, 2, 5), labels=random_ids(seed, 2, 5)).loss.backward()
    optimizer.step()
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_outputs_as_tuples_and_hidden_states(seed: int, models: tuple[Any, Any]) -> None:
    ids = random_ids(seed, 2, 5)
    theirs, ours = (m(ids, labels=ids, output_hidden_states=True, return_dict=False) for m in models)
    assert len(ours) == len(theirs)
    assert_close(ours[1], theirs[1], "logits")
    hidden_ours, hidden_theirs = (next(x for x in r if isinstance(x, tuple)) for r in (ours, theirs))
    for got, exact in zip(hidden_ours, hidden_theirs, strict=True):
        assert_close(got, exact, "hidden states")


def test_initialisation_is_transformers(seed: int) -> None:
    torch.manual_seed(seed)
    theirs = transformers.GPT2LMHeadModel(config())
    torch.manual_seed(seed)
    ours = fast.GPT2LMHeadModel(config())
    for (name, got), exact in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(got, exact), name


def _graphs(model: Any, inputs: list[dict[str, Tensor]]) -> tuple[int, int]:
    """The numbers of graphs and graph breaks of a compiled model over several inputs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager")
    for given in inputs:
        compiled(**given)
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler itself
@pytest.mark.parametrize("kind", ["ids", "mask", "labels", "training"])
def test_compiles_in_no_more_graphs_than_transformers(seed: int, models: tuple[Any, Any], kind: str) -> None:
    inputs = []
    for length in (9, 17, 23):
        ids = random_ids(seed + length, 2, length)
        more = {"mask": {"attention_mask": masks(seed, 2, length)["left"]}, "ids": {}}.get(kind, {"labels": ids})
        inputs.append({"input_ids": ids, "use_cache": False, **more})
    if kind == "training":
        for model in models:
            model.train()
    (graphs, breaks), (our_graphs, our_breaks) = (_graphs(model, inputs) for model in models)
    assert our_graphs <= graphs
    assert our_breaks <= breaks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_whole(seed: int, models: tuple[Any, Any], dynamic: bool | None) -> None:
    torch._dynamo.reset()
    theirs, ours = models
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (9, 17, 23):
        ids = random_ids(seed + length, 2, length)
        given = {"use_cache": False, "attention_mask": masks(seed, 2, length)["right"]}
        kept = given["attention_mask"].bool()
        assert_close(compiled(ids, **given).logits[kept], theirs(ids, **given).logits[kept], f"logits at {length}")
        assert_close(compiled(ids, labels=ids, use_cache=False).loss.detach(), ours(ids, labels=ids).loss.detach())


def test_the_plain_model_of_these_classes(seed: int) -> None:
    model = pair(seed)[1]
    ids = random_ids(seed, 2, 7)
    assert_close(fastgpt2.GPT2.from_transformers(model)(ids), model(ids).logits)
    assert_close(
        fastgpt2.accelerate(fastgpt2.GPT2.from_transformers(model).to_transformers())(ids).logits, model(ids).logits
    )
