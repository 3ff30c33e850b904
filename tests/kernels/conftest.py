"""Where kernels run: on a GPU where there is one, else under Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import pytest
import torch

from tests.kernels.poison import Poison


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are tiny: handing them to several threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def triton_device() -> str:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1")


@pytest.fixture
def fixed_order_dot(monkeypatch) -> None:
    """The interpreter's `tl.dot` in one order of summing.

    NumPy's matrix product chooses the order by the operands' shapes; a tensor core adds up every element of the result
    by itself, whatever is beside it.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data.copy()
        for k in range(a.data.shape[-1]):
            left, right = (x.astype(total.dtype) for x in (a.data[..., k, None], b.data[..., k, None, :]))
            total = total + left * right
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    return Poison(monkeypatch)
