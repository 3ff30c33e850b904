"""Fixtures: kernels run on a GPU if there is one, else under Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from fastgpt2_kernels.checking.poison import Poison, canaries, nan_memory
from fastgpt2_kernels.triton import launch
from tests.kernels import interpreting


@pytest.fixture(scope="session", autouse=True)
def adjusted_interpreter() -> Iterator[None]:
    """See `tests.kernels.interpreting`."""
    if interpreter_is_on():
        with interpreting.adjusted_interpreter():
            yield
    else:
        yield


def interpreter_is_on() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are tiny, so sharing the work among threads takes longer than the work itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def triton_device() -> str:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    if interpreter_is_on():
        return "cpu"
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1")


@pytest.fixture
def interpreter(triton_device: str) -> str:
    """The device for tests that need the interpreter: they count accesses, or have faults that touch any memory."""
    if triton_device != "cpu":
        pytest.skip("only under Triton's interpreter")
    return triton_device


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN until it is written."""
    with nan_memory():
        yield


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`tiles((block_t, block_s))` replaces the tiles in attention's launch tables, and `tiles(None)` restores them."""
    shipped = launch.attention_row

    def choose(blocks: tuple[int, int] | None, use_tma: bool = False) -> None:
        def row(kernel: str, *key: object, **flags: bool) -> launch.AttentionRow:
            if blocks is None:
                return shipped(kernel, *key, **flags)
            return launch.AttentionRow(*blocks, 4, 1, use_tma and kernel == "forward")

        monkeypatch.setattr(launch, "attention_row", row)

    return choose


@pytest.fixture
def poison() -> Iterator[Poison]:
    with canaries() as poison:
        yield poison
