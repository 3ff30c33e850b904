"""Fixtures of the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt2.data import TokenData
from tests.train.helpers import VOCAB


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread. With it toy sizes are fastest, and give the same bits in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path: Path, seed: int) -> TokenData:
    rng = np.random.default_rng(seed)
    folder = tmp_path / "data"
    folder.mkdir()
    for name, size in (("train", 600), ("val", 100)):
        rng.integers(VOCAB, size=size).astype("<u2").tofile(folder / f"{name}.bin")
    return TokenData.open(folder)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"x{i} = {i * i}\n" for i in range(300)), encoding="utf-8")
    return path
