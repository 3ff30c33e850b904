"""Toy models, settings and training runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fastgpt2 import GPT2
from fastgpt2.cli import train as command
from fastgpt2.config import TrainConfig

VOCAB, CONTEXT = 23, 8
TIMING = ("tokens_per_s", "mfu")


def make_model(dropout: float = 0.0, **fields: Any) -> GPT2:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "context_length": CONTEXT, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    return GPT2(**{**sizes, **fields}, dropout_rate=dropout)


def make_config(**fields: Any) -> TrainConfig:
    small = {"steps": 12, "batch_size": 4, "log_interval": 3, "eval_interval": 4, "checkpoint_interval": 5}
    return TrainConfig(**{**small, "warmup_steps": 3, "dtype": "fp32", "lr": 1e-2, **fields})


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def weights(model: GPT2) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


TINY = [
    "--layers",
    "1",
    "--hidden-size",
    "16",
    "--heads",
    "2",
    "--context",
    "8",
    "--batch-size",
    "2",
    "--dtype",
    "fp32",
]


def run_command(out: Path, *arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = [str(a) for a in arguments]
    return command.run(parser.parse_args([*given, "--out", str(out), *(TINY if "--resume" not in given else [])]))
