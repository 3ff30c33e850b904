"""`train_step` and `calculate_loss` on wrapped models: DDP, FSDP2, torch.compile at any length, and adapters."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from fastgpt2 import GPT2, calculate_loss, train_step
from fastgpt2.decode import why_not_decode
from tests.helpers import TINY, assert_close, assert_within_budget, random_ids, random_model

ROOT = Path(__file__).resolve().parent.parent


def test_ddp_and_fsdp_synchronise_gradients(seed: int, tmp_path: Path) -> None:
    """Two processes, each with half of a batch, take the same step as one process with all of it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.wrapped", str(rank), "2", str(tmp_path / "store"), str(seed)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


@pytest.mark.parametrize(
    ("what", "dynamic"),
    [
        ("step", None),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(("logits", "loss"), (None, True))),
        pytest.param("step", True, marks=pytest.mark.slow),
    ],
)
def test_any_length_compiles_whole(seed: int, what: str, dynamic: bool | None) -> None:
    """There are no graph breaks. The second length makes the sizes dynamic, and later ones compile nothing."""
    torch._dynamo.reset()
    counters.clear()
    model, plain = (random_model(seed, num_layers=1).double() for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (9, 17, 23):
        ids = random_ids(seed + length, 2, length)
        calls: dict[str, Callable[[Any], torch.Tensor]] = {
            "logits": lambda m, ids=ids: m(ids),
            "loss": lambda m, ids=ids: calculate_loss(m, ids, ids.roll(1, 1)),
            "step": lambda m, ids=ids: train_step(m, ids),
        }
        assert_close(calls[what](compiled).detach(), calls[what](plain).detach(), f"{what} at {length}")
    assert counters["stats"]["unique_graphs"] == (1 if dynamic else 2)
    if what == "step":
        for (name, parameter), exact in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert_close(parameter.grad, exact.grad, name)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_any_length_compiles_to_code(seed: int, dynamic: bool | None, inductor: None) -> None:
    torch._dynamo.reset()
    model, plain = random_model(seed).double(), random_model(seed).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for length in (9, 17, 23):
        ids = random_ids(seed + length, 2, length)
        assert_close(compiled(ids).detach(), plain(ids).detach(), f"logits at {length}")
        assert_close(train_step(compiled, ids), train_step(plain, ids), f"loss at {length}")
    for (name, parameter), exact in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(parameter.grad, exact.grad, name)


def test_any_length_exports(seed: int) -> None:
    model = random_model(seed).double()
    length = torch.export.Dim("length", min=2, max=TINY.context_length)
    exported = torch.export.export(model, (random_ids(seed, 2, 7),), dynamic_shapes={"input_ids": {1: length}})
    for tokens in (3, 7, 20):
        ids = random_ids(seed + tokens, 2, tokens)
        assert_close(exported.module()(ids).detach(), model(ids).detach(), f"{tokens} tokens")


def test_lora_trains_merges_and_generates(seed: int) -> None:
    peft = pytest.importorskip("peft")
    model = random_model(seed)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn", "c_fc", "c_proj"], r=2))
    ids = random_ids(seed, 3, 9)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = [train_step(adapted, ids, optimizer).item() for _ in range(8)]
    assert losses[-1] < losses[0]
    adapted.eval()
    logits, loss = adapted(ids), calculate_loss(adapted, ids, ids.roll(1, 1))
    assert "c_attn" in str(why_not_decode(model))  # the layer computes with more than its weight
    prompts = [[1, 2, 3], [4]]
    samples = adapted.generate(prompts, max_new_tokens=5, temperature=0)
    merged = adapted.merge_and_unload()
    assert isinstance(merged, GPT2)
    exact = copy.deepcopy(merged).double()
    assert_within_budget(logits, merged(ids), exact(ids), "merged logits", terms=100.0)
    assert_within_budget(
        loss, calculate_loss(merged, ids, ids.roll(1, 1)), calculate_loss(exact, ids, ids.roll(1, 1)), "merged loss"
    )
    assert [s.token_ids for s in merged.generate(prompts, max_new_tokens=5, temperature=0)] == [
        s.token_ids for s in samples
    ]
    changed = {name for name, parameter in merged.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "c_" in name and name.endswith("weight")}


def test_a_replaced_head_is_refused(seed: int) -> None:
    model = random_model(seed)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    ids = random_ids(seed, 2, 5)
    with pytest.raises(ValueError, match="replaced by a Sequential"):
        calculate_loss(model, ids, ids)


def test_other_models_and_arguments_are_refused(seed: int) -> None:
    ids = random_ids(seed, 2, 5)
    with pytest.raises(TypeError, match="or a wrapper of one; got Linear"):
        calculate_loss(torch.nn.Linear(2, 2), ids, ids)
    with pytest.raises(TypeError, match="unknown argument label_smoothing; options of the loss need targets"):
        random_model(seed)(ids, label_smoothing=0.1)
