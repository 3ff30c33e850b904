"""Checks of every operator and its gradients, on every available backend, against float64 by the 2x rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastgpt2.selfcheck.report import Finding, error_finding
from fastgpt2_kernels import ops
from fastgpt2_kernels.checking.budget import error_budget, largest_error, rms_error
from fastgpt2_kernels.checking.cases import FUSED, PLAIN, Case, Inputs, cases_of
from fastgpt2_kernels.checking.poison import canaries, nan_memory

SEED = 20


def check_operators(device: torch.device, operators: Sequence[str] = ops.OPERATORS) -> Iterator[Finding]:
    """Check the operators, and yield a finding for each backend of each one."""
    for operator in operators:
        for backend in ops.backends_of(operator):
            reason = why_not(operator, backend, device)
            yield _check(operator, backend, device) if reason is None else _skipped(operator, backend, reason)


def why_not(operator: str, backend: str, device: torch.device) -> str | None:
    """Why `operator` cannot run on `backend` here, in one sentence; None if it can."""
    if backend == "triton":
        # A kernel that has failed before in this process is no reason to skip it: `()` is no operator's size.
        return ops.why_not_triton(operator, device, ())
    return ops.why_not_native(operator, device) if backend == "native" else None


def _skipped(name: str, backend: str, reason: str) -> Finding:
    return Finding(name, backend, "skipped", None, reason)


def dtypes_of(backend: str, device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes that a backend is checked in."""
    if device.type == "cuda":
        return torch.float32, torch.bfloat16, torch.float16
    if backend == "triton":  # Triton's interpreter computes wrong bfloat16 products
        return torch.float32, torch.float16
    return torch.float32, torch.bfloat16


def _check(operator: str, backend: str, device: torch.device) -> Finding:
    """Run an operator's cases. The finding names the first that fails, or else the one closest to its error budget."""
    worst, where, count = 0.0, "", 0
    for case in (case for case in cases_of(device) if case.operator == operator):
        for dtype in case.dtypes or dtypes_of(backend, device):
            place = f"{case.title}, {str(dtype).removeprefix('torch.')}"
            try:
                share, wrong = run_case(case, backend, device, dtype)
            except Exception as error:  # a kernel, a compiler or a driver can raise anything
                return error_finding(operator, backend, place, error)
            if wrong is not None:
                return Finding(operator, backend, "failed", share, f"{place}: {wrong}")
            count += 1
            if share is not None and share >= worst:
                worst, where = share, place
    return Finding(operator, backend, "ok", worst, f"{count} cases; nearest to its budget: {where}")


def run_case(
    case: Case, backend: str, device: torch.device, dtype: torch.dtype, seed: int = SEED
) -> tuple[float | None, str | None]:
    """Run one case. Returns the largest error as a share of its budget or None, and what is wrong or None."""
    inputs = Inputs(seed, device, dtype)
    with nan_memory(), canaries() as poison:
        got = [result.detach().clone() for result in case.run(inputs, backend)]
        if not poison.is_intact():
            return None, "wrote outside its results"
    if not inputs.are_untouched():
        return None, "wrote outside its inputs"
    plain = [case.run(Inputs(seed, device, dtype), way) for way in ((PLAIN, FUSED) if case.has_fused else (PLAIN,))]
    exact = case.run(Inputs(seed, device, torch.float64, rounded=dtype), PLAIN)
    return compare(got, plain, exact, dtype)


def compare(
    got: Sequence[Tensor],
    plain: Sequence[Sequence[Tensor]],
    exact: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    is_rms: bool = False,
) -> tuple[float | None, str | None]:
    """Compare results with the exact ones by the 2x rule.

    Args:
        got: The results to check.
        plain: The results of plain PyTorch expressions in the same dtype. If there are several, which sum in different
            orders, the least accurate one sets the budget.
        exact: The results in float64.
        dtype: The dtype of the computation.
        is_rms: Whether to compare the root mean square of each result's errors instead of the largest error. This suits
            results of many successive roundings.

    Returns:
        The largest error of any result as a share of its budget, and what is wrong, or None. The share is None where
        it is not a number that JSON has: the result is NaN or infinite, or the budget is 0.
    """
    worst, error_of = 0.0, rms_error if is_rms else largest_error
    for index, (mine, right, *theirs) in enumerate(zip(got, exact, *plain, strict=True)):
        error = error_of(mine, right)
        budget = error_budget(max(error_of(their, right) for their in theirs), right, dtype)
        share = 0.0 if error == 0 else error / budget if budget else math.inf
        if not error <= budget:
            what = "is NaN" if math.isnan(error) else f"is off by {error:.3g}, the budget is {budget:.3g}"
            return share if math.isfinite(share) else None, f"result {index} {what}"
        worst = max(worst, share)
    return worst, None
