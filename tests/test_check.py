"""`fastgpt2 check`: it passes for correct kernels, and fails and names a wrong one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastgpt2
import fastgpt2.decode
from fastgpt2 import machine
from fastgpt2.cli import main
from fastgpt2.selfcheck import models, run, speed
from fastgpt2.selfcheck.models import check_models
from fastgpt2.selfcheck.operators import check_operators, run_case
from fastgpt2.selfcheck.report import Finding, Report, Timing
from fastgpt2.selfcheck.speed import Shapes, time_operators
from fastgpt2_kernels import backends, ops
from fastgpt2_kernels.checking.budget import error_budget, largest_error
from fastgpt2_kernels.checking.cases import CASES
from fastgpt2_kernels.checking.poison import MARGIN, canaries, is_untouched, nan_memory, within_poison
from fastgpt2_kernels.torch import decode as torch_decode

CPU = torch.device("cpu")
TINY = Shapes(1, 8, 2, 6, models._CONFIG)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`broken(operator, backend)` makes every result of that operator on that backend 1% too large."""

    def scaled(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value * 1.01
        return type(value)(map(scaled, value)) if type(value) in (tuple, list) else value

    def apply(operator: str, backend: str) -> None:
        module, name = backends._PLACES[operator, backend]
        right = backends.implementation(operator, backend)
        if (operator, backend) == ("cached_attention", "torch"):  # the operator calls this function, not the table's
            module, name = "fastgpt2_kernels.torch.decode", "cached_attention"
            right = torch_decode.cached_attention

        def wrong(*args: Any, **kwargs: Any) -> Any:
            result = right(*args, **kwargs)
            for written in args if result is None else ():  # results may be written to arguments
                if isinstance(written, torch.Tensor) and written.is_floating_point() and written.dim() == 2:
                    written.mul_(1.01)
            if operator == "sample":
                args[2].mul_(1.01)
            return scaled(result)

        monkeypatch.setattr(f"{module}.{name}", wrong)

    return apply


def test_every_operator_has_a_case() -> None:
    assert {case.operator for case in CASES} == set(ops.OPERATORS)


def test_what_is_right_passes() -> None:
    findings = [*check_operators(CPU)]
    assert [f for f in findings if f.status == "failed"] == []
    assert {f.name for f in findings if f.status == "ok"} >= {
        name for name in ops.OPERATORS if "torch" in ops.backends_of(name)
    }
    assert all(0 < f.share <= 1 for f in findings if f.status == "ok")
    assert all(f.detail for f in findings if f.status == "skipped")


@pytest.mark.parametrize("operator", [name for name in ops.OPERATORS if "torch" in ops.backends_of(name)])
def test_a_broken_operator_is_named(broken: Callable[[str, str], None], operator: str) -> None:
    broken(operator, "torch")
    failed = [f for f in check_operators(CPU, [operator]) if f.status == "failed"]
    assert [(f.name, f.backend) for f in failed] == [(operator, "torch")]
    assert "result" in failed[0].detail


def test_an_operator_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no such\n  kernel")

    monkeypatch.setattr("fastgpt2_kernels.torch.layers.layer_norm", fail)
    (failed,) = [f for f in check_operators(CPU, ["layer_norm"]) if f.status == "failed"]
    assert failed.detail == "C=96, float32: RuntimeError: no such kernel"


def test_writing_beside_results_and_inputs_is_seen() -> None:
    def beside_results(inputs: Any, backend: str) -> list[torch.Tensor]:
        out = inputs(0, 4).detach().new_empty((4,))
        if backend == "torch":
            torch.as_strided(out, (1,), (1,), out.storage_offset() + 4).fill_(0.0)
        return [out.copy_(inputs(0, 4).detach())]

    def beside_inputs(inputs: Any, backend: str) -> list[torch.Tensor]:
        x = inputs(0, 4).detach()
        torch.as_strided(x, (1,), (1,), x.storage_offset() - 1).fill_(0.0)
        return [x]

    def unwritten(inputs: Any, backend: str) -> list[torch.Tensor]:
        x = inputs(0, 4).detach()
        return [torch.empty(4) if backend == "torch" else x]

    case = next(case for case in CASES if case.operator == "activation")
    for broken, message in (
        (beside_results, "wrote outside its results"),
        (beside_inputs, "wrote outside its inputs"),
        (unwritten, "result 0 is NaN"),
    ):
        assert run_case(case._replace(run=broken), "torch", CPU, torch.float32)[1] == message


def test_poison() -> None:
    with canaries() as poison:
        made = torch.zeros(1).new_empty((3, 2))
        assert made.isnan().all()
        assert poison.is_intact()
        whole = torch.ones(1, dtype=torch.int32).new_empty((3,), dtype=torch.int32)
        torch.as_strided(whole, (1,), (1,), whole.storage_offset() + 3).fill_(5)
        assert not poison.is_intact()
    with nan_memory():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    inside, buffer = within_poison(torch.arange(3.0))
    assert inside.tolist() == [0.0, 1.0, 2.0]
    assert is_untouched(buffer)
    buffer[MARGIN - 1] = 0.0
    assert not is_untouched(buffer)


def test_budget() -> None:
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert error_budget(0.5, exact, torch.float32) == 2 * (0.5 + 4 * torch.finfo(torch.float32).eps)
    assert largest_error(torch.tensor([1.0, -4.5]), exact) == 0.5
    assert largest_error(torch.tensor([1.0, float("nan")]), exact) != largest_error(torch.tensor([1.0, 1.0]), exact)
    with pytest.raises(ValueError, match=r"must have shape \(2,\); got \(1,\)"):
        largest_error(torch.ones(1), exact)


def test_whole_models_pass() -> None:
    findings = [*check_models(CPU)]
    assert [f for f in findings if f.status == "failed"] == []
    (beside,) = [f for f in findings if f.name == "greedy = transformers"]
    assert beside.status == "ok"
    if ops.why_not_native("decode_step", CPU) is None:
        assert {f.name for f in findings if f.backend == "native"} == {"prefill = decode", "row alone = in batch"}


def test_without_transformers_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    finding = models._beside_transformers(CPU)
    assert (finding.status, finding.detail) == ("skipped", "the package transformers is not installed")


@pytest.mark.skipif(ops.why_not_native("decode_step", CPU) is not None, reason="no native backend here")
def test_decoding_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check notices a step with wrong log-probabilities, and one whose rows depend on the batch size."""
    read = fastgpt2.decode.Results.read
    monkeypatch.setattr(
        fastgpt2.decode.Results, "read", lambda self: (read(self)[0], [p - 0.01 for p in read(self)[1]])
    )
    assert models._decoding(CPU, torch.float32, "native").status == "failed"
    monkeypatch.undo()
    step = fastgpt2.decode.DecodeSession.step

    def counted(self: Any, slots: Any) -> Any:
        results = step(self, slots)
        return results._replace(logprobs=results.logprobs + 1e-6 * len(slots))

    monkeypatch.setattr(fastgpt2.decode.DecodeSession, "step", counted)
    finding = models._alone(CPU, torch.float32, "native")
    assert (finding.name, finding.status) == ("row alone = in batch", "failed")


def test_every_operator_that_runs_here_is_timed() -> None:
    limits = {"bandwidth": 1e9, "float32": 1e9}
    timings = [*time_operators(CPU, limits, TINY, seconds=0.0)]
    expected = {"causal_attention_packed", "layer_norm", "bias_activation", "cross_entropy", "linear_cross_entropy"}
    expected |= {"linear_decode", "decode_attention", "sample"}
    if ops.why_not_native("decode_step", CPU) is None:
        expected.add("decode_step")
    assert {t.name for t in timings} == expected
    for t in timings:
        assert t.seconds > 0
        assert t.peer_seconds > 0
        rates = [value for value in (t.tflops and t.tflops * 1e3, t.gbps) if value is not None]
        assert t.limit_share == pytest.approx(max(rates))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """Replace `check` by one that returns given findings."""
    findings = [
        Finding("layer_norm", "torch", "ok", 0.5, "2 cases"),
        Finding("sample", "triton", "skipped", None, "no"),
    ]
    timing = Timing("layer_norm", "torch", "N=1", "float32", 2e-4, None, 3.0, 0.5, "F.layer_norm", 4e-4)
    monkeypatch.setattr(run, "check_operators", lambda device: iter(findings))
    monkeypatch.setattr(run, "check_models", lambda device: iter(()))
    monkeypatch.setattr(run, "measured_limits", lambda device: {"bandwidth": 6e9, "float32": 1e12})
    monkeypatch.setattr(run, "time_operators", lambda device, limits: iter([timing]))
    return findings


def test_the_table(quick: list[Finding], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "layer_norm  torch    ok   50%    2 cases" in out
    assert "sample      triton   -" in out
    assert "layer_norm  torch    N=1   200 us           3     50%       2.00x F.layer_norm" in out
    assert "6 GB/s, 1.00 TFLOP/s in float32" in out
    assert out.splitlines()[-1].endswith("none failed")


def test_a_failure_is_exit_status_1(quick: list[Finding], capsys: pytest.CaptureFixture[str]) -> None:
    quick.append(Finding("sample", "torch", "failed", 3.0, "top_k=5, float32: result 0 is NaN"))
    assert main(["check", "--device", "cpu", "--no-speed"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "2 checks in 0 s, 1 failed: sample on torch" in out
    assert main(["check", "--device", "cpu", "--no-speed", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert report["findings"][2] == dataclasses.asdict(quick[2])
    assert report["versions"]["torch"] == torch.__version__
    assert report["timings"] == []


def test_check_from_python(quick: list[Finding]) -> None:
    seen: list[Any] = []
    report = fastgpt2.check("cpu", progress=seen.append)
    assert isinstance(report, Report)
    assert report.ok
    assert seen == [*report.findings, *report.timings]
    with pytest.raises(ValueError, match="device must be one that this machine has"):
        fastgpt2.check("cuda:99")


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"total_memory": 80 * 2**30})
    for name, value in {
        "is_available": True, "current_device": 0, "get_device_name": "H", "get_device_capability": (9, 0),
        "get_device_properties": properties,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    found = machine.describe()
    assert (found["gpu"], found["gpu_capability"], found["gpu_driver"]) == ("H", "9.0", "unknown")


def test_speed_is_of_the_dtype_of_the_device() -> None:
    assert speed._dtype(torch.device("cuda")) == torch.bfloat16
    assert Shapes.of(torch.device("cuda")).tokens == 1024
