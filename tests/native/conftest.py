"""Fixtures: the native tests run if the extension was compiled and this processor can run it."""

from __future__ import annotations

import os

import pytest

from fastgpt2_kernels import native


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """Run the native backend with one thread and with two. PyTorch keeps its own number, for a fast reference."""
    monkeypatch.setattr(native, "num_threads", lambda: request.param)
    return request.param


# Every compiled instruction set that this processor has, or the one that the environment variable names.
ISAS = [name for name, is_usable in native.isas().items() if is_usable]
if os.environ.get(native.ISA_VARIABLE) or not ISAS:
    ISAS = [os.environ.get(native.ISA_VARIABLE, "")]


@pytest.fixture(params=ISAS)
def needs_native(request, monkeypatch):
    """Run each test on every instruction set, in one process, because a new one would mostly import PyTorch."""
    if (reason := native.why_not_native()) is not None:
        pytest.skip(f"native backend: {reason}")
    monkeypatch.setattr(native, "_choice", lambda: (request.param, None))
