"""`fastgpt2 check` on the Triton kernels, on a GPU or under the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgpt2.selfcheck.models import check_models
from fastgpt2.selfcheck.operators import check_operators
from fastgpt2_kernels import backends, ops

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def failed(findings: Any) -> list[Any]:
    return [finding for finding in findings if finding.status == "failed"]


def test_the_kernels_of_a_broken_operator_are_named(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(triton_device)
    findings = [f for f in check_operators(device, ["linear_decode"]) if f.backend == "triton"]
    assert [f.status for f in findings] == ["ok"]
    right = backends.implementation("linear_decode", "triton")
    monkeypatch.setattr("fastgpt2_kernels.triton.decode.linear.linear_decode", lambda *args: right(*args) * 1.01)
    assert [(f.name, f.backend) for f in failed(check_operators(device, ["linear_decode"]))] == [
        ("linear_decode", "triton")
    ]


@pytest.mark.slow
def test_every_kernel_passes(triton_device: str) -> None:
    findings = [*check_operators(torch.device(triton_device))]
    assert failed(findings) == []
    with_kernels = {name for name in ops.OPERATORS if "triton" in ops.backends_of(name)}
    assert {f.name for f in findings if f.backend == "triton" and f.status == "ok"} == with_kernels


@pytest.mark.slow
def test_whole_models_pass(triton_device: str) -> None:
    findings = [*check_models(torch.device(triton_device))]
    assert failed(findings) == []
    done = {f.name for f in findings if f.backend == "triton" and f.status == "ok"}
    assert done >= {"training", "prefill = decode", "row alone = in batch", "greedy = transformers"}
