"""Fixtures of the tests of file formats."""

from __future__ import annotations

import pytest

from fastgpt2 import GPT2
from tests.helpers import random_model


@pytest.fixture
def model(seed: int) -> GPT2:
    return random_model(seed)
