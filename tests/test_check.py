"""`fastgpt2 check`: it passes for correct kernels, and fails and names a wrong one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastgpt2
import fastgpt2.decode
from fastgpt2 import GPT2, GPT2Config, machine, warmup
from fastgpt2.cli import main
from fastgpt2.selfcheck import ahead, models, operators, run, speed
from fastgpt2.selfcheck.models import check_models
from fastgpt2.selfcheck.operators import check_operators, run_case
from fastgpt2.selfcheck.report import Finding, Report, Timing
from fastgpt2.selfcheck.speed import Shapes, time_operators
from fastgpt2_kernels import backends, ops
from fastgpt2_kernels.checking.budget import error_budget, largest_error
from fastgpt2_kernels.checking.cases import CASES, GPT2_CASES, cases_of
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


def test_every_dtype_of_a_gpu_is_checked() -> None:
    cuda, three = torch.device("cuda"), (torch.float32, torch.bfloat16, torch.float16)
    assert [operators.dtypes_of(backend, cuda) for backend in ("triton", "torch")] == [three, three]
    assert operators.dtypes_of("triton", CPU) == (torch.float32, torch.float16)
    assert operators.dtypes_of("native", CPU) == (torch.float32, torch.bfloat16)
    tiny, block = models._CONFIG, models._GPT2_BLOCK
    assert set(models.decoded_models("triton", cuda)) == {
        (tiny, torch.float32), (tiny, torch.bfloat16), (block, torch.bfloat16)
    }  # fmt: skip
    assert set(models.trained_models(cuda)) == {
        (tiny, torch.float32), (block, torch.float32), (block, torch.bfloat16)
    }  # fmt: skip
    assert (block.hidden_size, block.num_heads, block.vocab_size) == (768, 12, 50257)


def test_a_gpu_is_checked_at_the_sizes_of_gpt2() -> None:
    cuda = torch.device("cuda")
    titles = {(case.operator, case.title) for case in cases_of(cuda)} - {(c.operator, c.title) for c in cases_of(CPU)}
    for rows in (1, 9, 32):
        for size in ("K=768 N=2304", "K=1600 N=1600"):
            assert ("linear_decode", f"{rows} rows {size}") in titles
    with_vocabulary = {operator for operator, title in titles if "V=50257" in title}
    assert with_vocabulary == {"cross_entropy", "linear_cross_entropy", "sample"}
    with_heads = {operator for operator, title in titles if "D=64" in title}
    assert with_heads == {"causal_attention", "causal_attention_packed", "cached_attention", "decode_attention"}
    assert cases_of(CPU) == CASES


@pytest.mark.parametrize("title", ["C=768", "9 rows K=768 N=2304", "mean, fused backward, V=50257", "H=12 D=64"])
def test_the_cases_of_a_gpu_pass(title: str) -> None:
    for case in (case for case in GPT2_CASES if case.title == title):
        assert run_case(case, "torch", CPU, torch.float32)[1] is None


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
        assert run_case(case._replace(run=broken), "torch", CPU, torch.float32) == (None, message)


def test_a_share_is_a_number_or_none() -> None:
    """JSON has neither NaN nor infinity."""
    exact = [torch.ones(2, dtype=torch.float64)]
    for value in (torch.nan, torch.inf):
        share, wrong = operators.compare([torch.full((2,), value)], [[torch.ones(2)]], exact, torch.float32)
        assert share is None
        assert wrong is not None
    nothing = torch.zeros(2, dtype=torch.float64)
    share, wrong = operators.compare([torch.ones(2)], [[torch.zeros(2)]], [nothing], torch.float32)
    assert (share, wrong) == (None, "result 0 is off by 1, the budget is 0")


def test_a_kernel_that_failed_before_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_why_never_triton", lambda device: None)
    monkeypatch.setitem(backends._FAILED, ("layer_norm", "cpu", None), {(96, torch.float32): "out of resource"})
    assert ops.why_not_triton("layer_norm", CPU) == "out of resource"
    assert operators.why_not("layer_norm", "triton", CPU) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda like: like.new_empty((3, 2)),
        lambda like: like.new_zeros(3, 2),
        lambda like: torch.empty(3, 2, dtype=like.dtype),
        lambda like: torch.empty((3, 2), dtype=like.dtype, device=like.device),
        lambda like: torch.empty_like(like),
        lambda like: torch.empty_strided((3, 2), (1, 3), dtype=like.dtype),
        lambda like: torch.empty_strided((3, 2), (8, 1), dtype=like.dtype),
        lambda like: torch.zeros(3, 2, dtype=like.dtype),
        lambda like: torch.zeros_like(like),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.int8])
def test_canaries(make: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
    """A write before or past the end of a new tensor is seen, and a tensor is what it would be without canaries."""
    like = torch.ones(3, 2, dtype=dtype)
    right = make(like)
    with canaries() as poison:
        for at in (-1, 0):
            made = make(like)
            assert (made.shape, made.stride(), made.dtype) == (right.shape, right.stride(), dtype)
            assert (made.storage_offset() * made.element_size()) % 16 == 0
            made.copy_(like)
            assert poison.is_intact()
            made = make(like)
            edge = made.storage_offset() + (
                -1 if at < 0 else 1 + sum((n - 1) * s for n, s in zip(made.shape, made.stride(), strict=True))
            )
            torch.as_strided(made, (1,), (1,), edge).fill_(5)
            assert not poison.is_intact()


def test_canaries_leave_the_rest_alone() -> None:
    like, empty = torch.ones(3, 2), torch.empty
    with canaries() as poison:
        assert like.new_empty((3, 2)).isnan().all()
        assert torch.empty(3, 2).isnan().all()
        assert torch.zeros(3, 2).eq(0).all()
        assert torch.zeros(3, dtype=torch.bool).eq(False).all()
        assert torch.zeros(2, requires_grad=True).is_leaf
        assert torch.empty(0).numel() == torch.empty(2, 0).numel() == 0
        assert torch.empty(()).shape == ()
        assert torch.empty(3, device="meta").device.type == "meta"
        with FakeTensorMode():
            assert isinstance(torch.empty(3), FakeTensor)
        assert poison.is_intact()
        double = torch.compile(lambda x: torch.empty_like(x).copy_(x) * 2, backend="eager", fullgraph=True)
        assert double(like).eq(2).all()
    assert torch.empty is empty


def test_poison() -> None:
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


class GraphSession:
    """Stands in for a session on a GPU. `fault` is called in a step with a CUDA graph."""

    fault: Callable[[Any], None]

    def __init__(self, *_: Any, use_graphs: bool, use_pdl: bool) -> None:
        self.use_graphs, self.use_pdl, self.logprob = use_graphs, use_pdl, 0.0

    def prefill(self, *_: Any) -> None:
        return None

    def begin(self, *_: Any) -> GraphSession:
        return self

    def step(self, _: Any) -> GraphSession:
        if self.use_graphs:
            type(self).fault(self)
        return self

    def read(self) -> tuple[list[int], list[float]]:
        return [0] * 4, [self.logprob] * 4


def no_fault(session: GraphSession) -> None:
    pass


def no_capture(session: GraphSession) -> None:
    session.use_graphs = False
    warnings.warn("DecodeSession: a CUDA graph cannot be used (no memory); kernels are launched", stacklevel=1)


def no_graph(session: GraphSession) -> None:
    session.use_graphs = False


def wrong_graph(session: GraphSession) -> None:
    session.logprob = 1.0


def wrong_pdl(session: GraphSession) -> None:
    session.logprob = 1.0 if session.use_pdl else 0.0


@pytest.mark.parametrize(
    ("fault", "with_graphs", "with_pdl", "why"),
    [
        (no_fault, "ok", "ok", ""),
        (no_capture, "failed", "failed", "no memory"),
        (no_graph, "failed", "failed", "stopped using CUDA graphs"),
        (wrong_graph, "failed", "failed", "row 0 has other tokens or log-probabilities"),
        (wrong_pdl, "ok", "failed", "row 0 has other tokens or log-probabilities"),
    ],
)
def test_graphs_and_pdl(fault: Any, with_graphs: str, with_pdl: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that gives other results fails, and so does a session that goes on without graphs."""
    model = models._model(CPU, torch.float32, "torch")
    monkeypatch.setattr(models, "why_not", lambda operator, backend, device: None if backend == "triton" else "no")
    monkeypatch.setattr(models, "_why_no_graphs", lambda device: None)
    monkeypatch.setattr(models, "_why_no_pdl", lambda device: None)
    monkeypatch.setattr(models, "_model", lambda *_: model)
    monkeypatch.setattr(models, "DecodeSession", GraphSession)
    monkeypatch.setattr(GraphSession, "fault", fault, raising=False)
    found = [
        models._run(check)
        for check in models._checks(torch.device("cuda"))
        if "graph" in check.name or "PDL" in check.name
    ]
    both = [("CUDA graph = launches", "triton", with_graphs), ("PDL = no PDL", "triton", with_pdl)]
    assert [(f.name, f.backend, f.status) for f in found] == both * 2  # of a tiny model and of GPT-2's sizes
    assert why in found[1].detail


def test_other_tokens_than_transformers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = GPT2.generate

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        (sample,) = generate(self, *args, **kwargs)
        return [dataclasses.replace(sample, token_ids=[*sample.token_ids[:-1], sample.token_ids[-1] ^ 1])]

    monkeypatch.setattr(GPT2, "generate", wrong)
    finding = models._beside_transformers(CPU)
    assert (finding.status, "transformers: [" in finding.detail) == ("failed", True)


def test_transformers_are_compared_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels can run, the model asks for them by name, so that PyTorch cannot take their place."""
    right, asked = models._model, []

    def model(
        device: torch.device, dtype: torch.dtype, backend: str, seed: int = 0, config: Any = models._CONFIG
    ) -> GPT2:
        asked.append(backend)
        return right(device, dtype, "torch", seed, config)

    monkeypatch.setattr(models, "why_not", lambda *_: None)
    monkeypatch.setattr(models, "_model", model)
    finding = models._beside_transformers(CPU)
    assert (finding.backend, finding.status, asked[-1]) == ("triton", "ok", "triton")


def test_a_wrong_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right, factor = models._model, 1.0

    def model(
        device: torch.device, dtype: torch.dtype, backend: str, seed: int = 0, config: Any = models._CONFIG
    ) -> GPT2:
        made = right(device, dtype, "torch", seed, config)
        if backend == "triton":
            made.transformer.h[1].mlp.c_fc.weight.register_hook(lambda grad: grad * factor)
        return made

    monkeypatch.setattr(models, "_model", model)
    assert models._training(CPU).status == "ok"
    factor = 1.01
    finding = models._training(CPU)
    assert (finding.name, finding.backend, finding.status) == ("training", "triton", "failed")


def test_a_lost_gpu_still_gives_a_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """After an invalid access to a GPU's memory every later call fails. Each is a finding, and the report comes out."""

    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for module, name in ((operators, "run_case"), (models, "_model"), (run, "measured_limits")):
        monkeypatch.setattr(module, name, lost)
    assert main(["check", "--device", "cpu", "--json"]) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    failed = {f["name"] for f in report["findings"] if f["status"] == "failed"}
    assert failed >= {name for name in ops.OPERATORS if "torch" in ops.backends_of(name)}
    assert failed >= {"greedy = transformers", "limits"}
    assert not [f for f in report["findings"] if f["status"] == "ok"]
    assert main(["check", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: CUDA error: an illegal memory access was encountered" in out


def test_what_cannot_be_timed_is_a_finding(monkeypatch: pytest.MonkeyPatch, broken: Callable[[str, str], None]) -> None:
    """A wrong result and an error fail, too little memory skips; what comes after them is timed."""
    broken("layer_norm", "torch")

    def fail(error: Exception) -> Callable[..., None]:
        def raising(*_: Any, **__: Any) -> None:
            raise error

        return raising

    monkeypatch.setattr("fastgpt2_kernels.torch.layers.bias_activation", fail(backends.KernelFailedError("no\n gcc")))
    monkeypatch.setattr(
        "fastgpt2_kernels.torch.cross_entropy.cross_entropy", fail(torch.OutOfMemoryError("CUDA out of memory"))
    )
    limits = {"bandwidth": 1e9, "float32": 1e9}
    results = [*time_operators(CPU, limits, TINY, seconds=0.0)]
    findings = [f for f in results if isinstance(f, Finding)]
    by_name = {f.name: (f.status, f.detail) for f in findings}
    # A step is compared with the model on PyTorch's operators, some of which are wrong here.
    assert set(by_name) - {"decode_step"} == {"layer_norm", "bias_activation", "cross_entropy"}
    assert by_name["layer_norm"][0] == "failed"
    assert "residual with backward: result 0 is off by" in by_name["layer_norm"][1]
    assert by_name["bias_activation"] == (
        "failed", "not timed, N=8 C=128 with backward: KernelFailedError: no gcc"
    )  # fmt: skip
    assert by_name["cross_entropy"][0] == "skipped"
    assert "CUDA out of memory" in by_name["cross_entropy"][1]
    assert {"linear_cross_entropy", "sample"} <= {t.name for t in results if isinstance(t, Timing)}


def test_every_operator_that_runs_here_is_timed() -> None:
    limits = {"bandwidth": 1e9, "float32": 1e9}
    timings = [t for t in time_operators(CPU, limits, TINY, seconds=0.0) if isinstance(t, Timing)]
    expected = {
        "causal_attention",
        "causal_attention_packed",
        "layer_norm",
        "bias_activation",
        "cross_entropy",
        "linear_cross_entropy",
    }
    expected |= {"linear_decode", "decode_attention", "sample"}
    if ops.why_not_native("decode_step", CPU) is None:
        expected.add("decode_step")
    assert {t.name for t in timings} == expected
    for t in timings:
        assert t.seconds > 0
        assert t.peer_seconds > 0
        rates = [value for value in (t.tflops and t.tflops * 1e3, t.gbps) if value is not None]
        assert t.limit_share == pytest.approx(max(rates))
    sizes = [f"{t.name} {t.size}" for t in timings]
    for part in ("causal_attention_packed .* backward$", "layer_norm .* backward$", "layer_norm .* residual",
                 "bias_activation .* backward$", "linear_decode .* 8-bit weights"):  # fmt: skip
        assert [size for size in sizes if re.search(part, size)], part


def test_kernels_are_compiled_before_the_checks_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """If that fails, the checks run all the same."""
    targets: list[str] = []
    reason: str | None = None

    def compiling(target: str) -> str | None:
        targets.append(target)
        return reason

    monkeypatch.setattr(run, "why_not", lambda *_: None)
    monkeypatch.setattr(run, "compile_ahead", compiling)
    monkeypatch.setattr(run.ops, "this_target", lambda: "sm_90")
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    assert [*run._compiled_ahead(CPU)] == []
    assert targets == []
    assert [*run._compiled_ahead(torch.device("cuda"))] == []
    assert targets == ["sm_90"]
    reason = "no\n compiler"
    (finding,) = run._compiled_ahead(torch.device("cuda"))
    assert (finding.status, finding.detail) == ("skipped", "kernels are compiled one after the other: no compiler")
    monkeypatch.setattr(run.ops, "this_target", lambda: 1 / 0)
    (finding,) = run._compiled_ahead(torch.device("cuda"))
    assert "ZeroDivisionError" in finding.detail


@pytest.mark.slow
def test_compiling_ahead_says_why_it_failed() -> None:
    pytest.importorskip("triton")
    assert "a target must be like sm_90" in str(ahead.compile_ahead("sm_1"))
    assert "TimeoutExpired" in str(ahead.compile_ahead("sm_90", timeout=0.01))


def variant(found: Any) -> tuple[str, ...]:
    source = found.source
    return found.kernel, *map(str, (source.signature, source.constants, source.attrs, found.options))


@pytest.mark.slow
def test_compiling_ahead_fills_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of an operator's checks are in the cache of another process, for a GPU that is not here."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ahead.compile_ahead("sm_90", ["cached_attention"]) is None
    kernels = {path.name for path in tmp_path.glob("*/*.cubin")}
    assert kernels >= {"_decode_attention_kernel.cubin", "_attention_fwd_kernel.cubin"}


@pytest.mark.slow
def test_the_checks_of_a_gpu_run_the_kernels_of_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding GPT-2 124M in bfloat16 compiles no variant of a decoding kernel that the checks have not run."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    decoding = functools.partial(models._decode_noted, CPU, torch.bfloat16, models._GPT2_BLOCK, True)
    monkeypatch.setattr(ahead, "_launches", lambda *_: [decoding])
    checked = set(map(variant, ahead.find_variants("sm_90")))
    model = GPT2(GPT2Config(num_layers=1), backend="triton").bfloat16().eval()

    def generate() -> None:
        for rows, temperature in itertools.product(warmup.ROWS, (0.0, 0.8)):
            model.generate([[0] * 4] * rows, max_new_tokens=2, temperature=temperature)

    needed = warmup.launched_on("sm_90", generate)
    missing = [found.kernel for found in needed if variant(found) not in checked]
    assert set(missing) <= {"_attention_fwd_kernel"}, missing  # has a variant for the alignment of a prompt's ends
    assert len(needed) > 30


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
