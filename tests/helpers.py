"""Helpers that several test files share: random models, and the error budget that results must keep."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from fastgpt2 import GPT2, GPT2Config
from fastgpt2.selfcheck.models import draw_parameters
from fastgpt2_kernels import ops
from fastgpt2_kernels.checking.budget import error_budget, largest_error, rms_error

TINY = GPT2Config(
    vocab_size=61,
    context_length=24,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    residual_dropout=0.0,
    embedding_dropout=0.0,
    attention_dropout=0.0,
)


def parts(count: int) -> list[ParameterSet]:
    """Divide a test over random cases into parts. `make test` runs only the first, and `make test-all` all of them."""
    return [pytest.param(i, marks=[pytest.mark.slow] if i else []) for i in range(count)]


def without_rounding(data: bytes) -> bytes:
    """Remove the probabilities from a file of samples if there is no native step.

    Without it they depend on the batch size, in their last bits.
    """
    if ops.why_not_native("decode_step", "cpu") is None:
        return data
    return re.sub(rb"(perplexity|(mean_)?logprob)\b\W+[\d.e+-]+", b"", data)


def random_model(seed: int, **changes: object) -> GPT2:
    """A tiny model in eval mode with random parameters."""
    model = GPT2(TINY.replace(**changes))
    draw_parameters(model, seed)
    return model.eval()


def random_ids(seed: int, *shape: int, vocab_size: int = TINY.vocab_size) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_within_budget(
    got: Tensor, plain: Tensor | Sequence[Tensor], exact: Tensor, what: str = "result", *,
    dtype: torch.dtype | None = None, terms: float = 0.0, floor: float = 0.0,
) -> None:  # fmt: skip
    """Assert that error(got) <= 2 x (error(plain) + eps x max|exact|). Errors are the largest differences from `exact`.

    Args:
        got: The result.
        plain: The result of the plain PyTorch expression in the dtype under test. Several may be given, which sum in
            different orders. Then the worst counts, because the largest error of a few numbers is a matter of luck.
        exact: The result in float64.
        what: What the result is called if the test fails.
        dtype: The dtype under test, whose eps is used; by default the dtype of `plain`.
        terms: The magnitude of the terms that `exact` sums. It replaces max|exact| if over nine tenths of it cancel.
        floor: How far off float64 itself may be, if everything in `exact` is that small.
    """
    plains = [plain] if isinstance(plain, Tensor) else plain
    error, *plain_errors = (_largest(t, exact, what) for t in (got, *plains))
    _hold(max(0.0, error - floor), max(plain_errors), exact, dtype or plains[0].dtype, what, terms)


def assert_rms_within_budget(
    got: Tensor, plain: Sequence[Tensor], exact: Tensor, what: str = "result", *,
    dtype: torch.dtype | None = None, terms: float = 0.0,
) -> None:  # fmt: skip
    """Assert the same budget for root-mean-square errors, which vary far less than the largest error.

    With several plain results (transformers has more than one attention) the worst of them counts.
    """
    error, *plain_errors = (_rms(t, exact, what) for t in (got, *plain))
    _hold(error, max(plain_errors), exact, dtype or plain[0].dtype, what, terms)


def _largest(got: Tensor, exact: Tensor, what: str) -> float:
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    return largest_error(got, exact)


def _rms(got: Tensor, exact: Tensor, what: str) -> float:
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    return rms_error(got, exact)


def _hold(error: float, plain_error: float, exact: Tensor, dtype: torch.dtype, what: str, terms: float = 0.0) -> None:
    limit = error_budget(plain_error, exact, dtype, terms)
    assert error <= limit, f"{what}: error {error:.3e} over the budget {limit:.3e} (plain PyTorch: {plain_error:.3e})"


def assert_close(got: Tensor, exact: Tensor, what: str = "result", tolerance: float = 1e-9) -> None:
    """Assert that max|got - exact| <= tolerance x max|exact| + 1e-13, for results in float64."""
    error, scale = _largest(got, exact, what), exact.abs().max().item() if exact.numel() else 0.0
    assert error <= tolerance * scale + 1e-13, f"{what}: error {error:.3e} at a scale of {scale:.3e}"
