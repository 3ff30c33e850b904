"""Training with our classes is like training with transformers' own, in its Trainer and in plain loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt2
from tests.helpers import random_ids
from tests.transformers.helpers import config, pair, transformers

pytest.importorskip("accelerate")
# accelerate and the Trainer warn about their own doings: pinned memory without a GPU, and deprecated settings.
pytestmark = pytest.mark.filterwarnings("ignore")


class Rows(torch.utils.data.Dataset):
    """Rows of different lengths."""

    def __init__(self, seed: int, count: int = 12) -> None:
        ids = random_ids(seed, count, 14).clamp_min(3)
        self.rows = [ids[i, : 5 + i % 9].tolist() for i in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index]}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer(model: Any, folder: Path, seed: int, **changes: Any) -> Any:
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 0.01,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 1, "disable_tqdm": True, "save_strategy": "no",
        "max_grad_norm": 1.0, "remove_unused_columns": True,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **changes})
    data = Rows(seed)
    return transformers.Trainer(model, arguments, data_collator=collate, train_dataset=data, eval_dataset=data)


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"bf16": True}, marks=pytest.mark.slow),
        pytest.param({"label_smoothing_factor": 0.1}, marks=pytest.mark.slow),
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_trainer(seed: int, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Training and evaluation losses are those of transformers' class, as closely as the dtype allows."""
    tolerance = 0.02 if "bf16" in changes else 1e-4
    runs = [trainer(model.float().train(), tmp_path, seed, **changes) for model in pair(seed)]
    for run in runs:
        run.train()
    theirs, ours = map(losses, runs)
    assert len(ours) == 4
    assert ours == pytest.approx(theirs, rel=tolerance)
    assert ours[0] != ours[-1]
    evaluated = [run.evaluate()["eval_loss"] for run in runs]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=10 * tolerance)
    predicted = [run.predict(Rows(seed)).predictions for run in runs]
    assert predicted[0].shape == predicted[1].shape


@pytest.mark.slow
def test_resume(seed: int, tmp_path: Path) -> None:
    """A run that stops after 2 of 4 steps and resumes ends with bit-identical weights."""
    whole = trainer(pair(seed)[1].float().train(), tmp_path / "whole", seed)
    whole.train()
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer(pair(seed)[1].float().train(), tmp_path / "cut", seed, **settings).train()
    resumed = trainer(fastgpt2.transformers.GPT2LMHeadModel(config()), tmp_path / "cut", seed, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    for (name, got), expected in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, expected), name


def test_plain_loop_overfits_and_accelerate_wraps_it(seed: int) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(seed)
    model = fastgpt2.transformers.GPT2LMHeadModel(config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    loader = torch.utils.data.DataLoader([random_ids(seed, 9)] * 4, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    history = []
    for _ in range(30):
        for ids in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                history.append(loss.item())
    assert history[0] == pytest.approx(math.log(61), rel=0.1)
    assert history[-1] < 0.1


@pytest.mark.slow
def test_lora_in_the_trainer(seed: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    runs = []
    for model in pair(seed):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        runs.append(trainer(peft.get_peft_model(model.float().train(), settings), tmp_path, seed))
        runs[-1].train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)
    runs[1].model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(pair(seed)[0].float(), tmp_path / "adapter")
    ids = random_ids(seed, 2, 6)
    torch.testing.assert_close(again(ids).logits, runs[1].model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
