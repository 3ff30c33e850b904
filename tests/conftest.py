"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-rows", action="store_true", help="compile every launch row, instead of one for each kernel and dtype"
    )


@pytest.fixture
def seed() -> int:
    """A fresh seed for every run. A failure prints it, and FASTGPT2_TEST_SEED repeats it."""
    chosen = int(os.environ.get("FASTGPT2_TEST_SEED", random.randrange(2**31)))
    print(f"seed {chosen} (repeat with FASTGPT2_TEST_SEED={chosen})")
    return chosen


@pytest.fixture(scope="session", autouse=True)
def unsynced_files() -> Iterator[None]:
    """Turn fsync off: no test cuts the power, and waiting for the disk would only slow the suite down."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def forkserver() -> Iterator[BaseContext]:
    """A server that forks processes in which everything is imported and nothing has run yet.

    All tests share it, because a process can have only one.
    """
    import multiprocessing
    from multiprocessing.forkserver import ensure_running

    context = multiprocessing.get_context("forkserver")
    # AdamW's constructor imports torch._dynamo, which takes seconds.
    commands = [f"fastgpt2.cli.{name}" for name in ("parser", "generate", "score", "train", "convert")]
    libraries = ["tokenizers", "torch._dynamo", "transformers.models.gpt2.modeling_gpt2"]
    context.set_forkserver_preload(["fastgpt2.checkpoint", *commands, *libraries])
    with pytest.MonkeyPatch.context() as patch:
        # Older Pythons do not pass our sys.path to the server, which then silently imports nothing.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ensure_running()
        yield context


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A folder with a tiny random GPT-2 and a byte-level tokenizer. Tests must not write to it."""
    from fastgpt2 import GPT2
    from fastgpt2.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("tiny-gpt2")
    tokenizer = Tokenizer.train(["def add(a, b):\n    return a + b\n"] * 4, 280)
    torch.manual_seed(random.randrange(2**31))
    model = GPT2(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=2, context_length=64,
        initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model.tokenizer = tokenizer
    model.save_pretrained(folder)
    return folder
