"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-rows", action="store_true", help="compile every launch row, not one a kernel and dtype")


@pytest.fixture
def seed() -> int:
    """A fresh seed every run, printed with a failure; FASTGPT2_TEST_SEED repeats one."""
    chosen = int(os.environ.get("FASTGPT2_TEST_SEED", random.randrange(2**31)))
    print(f"seed {chosen} (repeat with FASTGPT2_TEST_SEED={chosen})")
    return chosen


@pytest.fixture(scope="session")
def inductor() -> None:
    """Skip where PyTorch's own compiler compiles nothing: without a C++ compiler, or with a space in a path to it."""
    from torch._inductor.exc import InductorError

    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except InductorError as error:
        pytest.skip(f"torch.compile does not work on this machine: {str(error).splitlines()[0]}")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A folder with a tiny random GPT-2 and a byte-level tokenizer. Not to be written to."""
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
