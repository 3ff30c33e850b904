"""Where kernels run: on a GPU where there is one, else under Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from fastgpt2_kernels.triton import launch
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
def interpreter(triton_device: str) -> str:
    """The device, for what Triton's interpreter alone can do: count accesses, survive faults that touch any memory."""
    if triton_device != "cpu":
        pytest.skip("only under Triton's interpreter")
    return triton_device


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What is allocated is NaN until it is written."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`tiles((block_t, block_s))` replaces the tiles of attention's launch tables, `tiles(None)` brings them back."""
    shipped = launch.attention_row

    def choose(blocks: tuple[int, int] | None, use_tma: bool = False) -> None:
        def row(kernel: str, *key: object, **flags: bool) -> launch.AttentionRow:
            if blocks is None:
                return shipped(kernel, *key, **flags)
            return launch.AttentionRow(*blocks, 4, 1, use_tma and kernel == "forward")

        monkeypatch.setattr(launch, "attention_row", row)

    return choose


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
