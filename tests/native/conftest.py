"""The native operators' tests run where the extension was compiled and this processor can run it."""

from __future__ import annotations

import pytest
import torch

from fastgpt2_kernels import native


@pytest.fixture(params=[1, 2])
def threads(request):
    """Each test with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def needs_native():
    if (reason := native.why_not_native()) is not None:
        pytest.skip(f"native backend: {reason}")
