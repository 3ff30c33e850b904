"""The native operators' tests run where the extension was compiled and this processor can run it."""

from __future__ import annotations

import os

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


# Every instruction set of this processor that was compiled, or the one that the variable names.
ISAS = [name for name, is_usable in native.isas().items() if is_usable]
if os.environ.get(native.ISA_VARIABLE) or not ISAS:
    ISAS = [os.environ.get(native.ISA_VARIABLE, "")]


@pytest.fixture(params=ISAS)
def needs_native(request, monkeypatch):
    """Each test on every instruction set, in one process: a process of its own would mostly import PyTorch."""
    if (reason := native.why_not_native()) is not None:
        pytest.skip(f"native backend: {reason}")
    monkeypatch.setattr(native, "_choice", lambda: (request.param, None))
