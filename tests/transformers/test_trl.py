"""Our classes train like transformers' own in TRL's SFTTrainer, with padded, padding-free and packed batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastgpt2.transformers
from tests.helpers import random_ids
from tests.transformers.helpers import config, transformers

pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def tokenizer() -> Any:
    """A tokenizer with a token for each letter. TRL needs little more than the ids of padding and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", *(chr(ord("a") + i) for i in range(20))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def train(library: Any, folder: Path, seed: int, changes: dict[str, Any]) -> tuple[list[dict[str, float]], Any]:
    """Train, and return what is logged at each step, and the model."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(seed)
    model = library.GPT2LMHeadModel(config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)).double()
    ids = random_ids(seed, 12, 14) % 20 + 3
    rows = [ids[i, : 3 + i % 9].tolist() for i in range(12)]
    arguments = SFTConfig(
        str(folder), max_steps=4, per_device_train_batch_size=3, learning_rate=0.01, logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, save_strategy="no", seed=1,
        **{"max_length": 16, **changes},
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": rows})
    trainer = SFTTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer())
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [*log, trainer.evaluate()], model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"padding_free": True, "max_length": None},
        {"packing": True},
        {"packing": True, "packing_strategy": "wrapped"},
    ],
    ids=["padded", "padding-free", "packed", "wrapped"],
)
def test_sft_trainer_as_with_transformers(seed: int, tmp_path: Path, changes: dict[str, Any]) -> None:
    ours, model = train(fastgpt2.transformers, tmp_path / "ours", seed, changes)
    theirs, exact = train(transformers, tmp_path / "theirs", seed, changes)
    assert len(ours) == 5
    names = ["loss", "eval_loss", "entropy", "eval_entropy", "mean_token_accuracy", "grad_norm"]
    for got, want in zip(ours, theirs, strict=True):
        measured = {name: want[name] for name in names if name in want}
        assert measured
        assert {name: got[name] for name in measured} == pytest.approx(measured, rel=1e-6)
    for (name, parameter), expected in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-8, msg=name)
