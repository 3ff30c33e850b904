"""Kernels that do not compile or launch are reported once, by name. "auto" then falls back to PyTorch's operators."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2 import GPT2, decode
from fastgpt2.cache import KVCache
from fastgpt2.config import SamplingConfig
from fastgpt2.decode import DecodeSession, NewRow
from fastgpt2.layers import Linear
from fastgpt2.selfcheck.operators import run_case
from fastgpt2_kernels import backends, ops
from fastgpt2_kernels.checking.cases import CASES, Inputs
from tests.kernels.test_decode_session import TINIEST, pair
from tests.kernels.test_proofs import KERNELS, KERNELS_ROOT, ROOT

devices = pytest.importorskip("fastgpt2_kernels.triton.devices")
errors = pytest.importorskip("triton.runtime.errors")

CPU = torch.device("cpu")
OUT_OF_MEMORY = errors.OutOfResources(131072, 101376, "shared memory")


class Failing:
    """A kernel whose launches fail from launch number `first` on."""

    def __init__(self, kernel: Any, error: Exception, first: int) -> None:
        self._kernel, self._error, self._left = kernel, error, first
        self.__name__ = kernel.__name__

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        if self._left <= 0:
            raise self._error
        self._left -= 1
        return self._kernel[grid]


@pytest.fixture
def fail(interpreter: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def break_kernel(name: str, error: Exception = OUT_OF_MEMORY, first: int = 0) -> None:
        module = importlib.import_module(KERNELS[name])
        monkeypatch.setattr(module, name, Failing(getattr(module, name), error, first))

    return break_kernel


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make "auto" choose Triton under the interpreter, as on a GPU."""
    choose = backends.choose_backend

    def chosen(operator: str, device: Any, backend: str, limit: Any = None, size: Any = None) -> str:
        can = ops.why_not_triton(operator, device, size) is None and (limit is None or limit() is None)
        return choose(operator, device, "triton" if backend == "auto" and can else backend, limit, size)

    for name in ("attention", "decode", "layers", "loss", "sampling"):
        monkeypatch.setattr(f"fastgpt2_kernels.ops.{name}.choose_backend", chosen)
    monkeypatch.setattr(decode, "decode_backend", lambda model: "triton")
    yield
    backends._FAILED.clear()


# Kernel, number of its first launch that fails, operator, case.
FAILURES = [
    ("_attention_fwd_kernel", 0, "causal_attention", "T=5 S=41 D=24"),
    ("_attention_bwd_dq_kernel", 0, "causal_attention", "T=5 S=41 D=24"),
    ("_attention_bwd_dkdv_kernel", 0, "causal_attention_packed", "documents"),
    ("_attention_bwd_dkdv_kernel", 0, "causal_attention_packed", "lengths"),
    ("_attention_bwd_dq_kernel", 0, "causal_attention_packed", "dropout"),
    ("_attention_fwd_kernel", 0, "causal_attention_packed", "dropout"),
    ("_decode_attention_kernel", 0, "decode_attention", "several tokens per row"),
    ("_combine_kernel", 0, "decode_attention", "one token per row"),
    ("_decode_attention_kernel", 1, "cached_attention", "rows with and without cached tokens"),
    ("_layer_norm_fwd_kernel", 0, "layer_norm", "residual, C=96"),
    ("_layer_norm_bwd_kernel", 0, "layer_norm", "residual, C=96"),
    ("_layer_norm_wide_bwd_kernel", 0, "layer_norm", "C=17000"),
    ("_sum_partials_kernel", 0, "layer_norm", "C=96"),
    ("_bias_activation_fwd_kernel", 0, "bias_activation", "gelu_new"),
    ("_bias_activation_bwd_kernel", 0, "bias_activation", "silu"),
    ("_linear_decode_kernel", 0, "linear_decode", "3 rows"),
    ("_sample_kernel", 0, "sample", "top_p, min_p, penalty"),
    ("_cross_entropy_kernel", 0, "cross_entropy", "mean, fused backward"),
    ("_cross_entropy_kernel", 1, "cross_entropy", "a loss per row"),
    ("_scale_rows_kernel", 0, "cross_entropy", "mean, fused backward"),
    ("_cross_entropy_kernel", 0, "linear_cross_entropy", "chunks of 4 rows"),
    ("_scale_rows_kernel", 0, "linear_cross_entropy", "chunks of 4 rows"),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("kernel", "first", "operator", "title"), FAILURES, ids=lambda x: str(x).replace(" ", "_"))
def test_auto_goes_on_and_triton_raises(
    fail: Callable[..., None], kernel: str, first: int, operator: str, title: str
) -> None:
    case = next(case for case in CASES if (case.operator, case.title) == (operator, title))
    fail(kernel, first=first)
    with pytest.warns(UserWarning, match=f"{operator} runs on PyTorch's operators from now on: .*{kernel}.*shared mem"):
        assert run_case(case, "auto", CPU, torch.float32)[1] is None
    with warnings.catch_warnings():  # reported once
        warnings.simplefilter("error", UserWarning)
        assert run_case(case, "auto", CPU, torch.float32)[1] is None
    assert kernel in str(ops.why_not_triton(operator, CPU))
    fail(kernel, first=first)
    with pytest.raises(backends.KernelFailedError, match=f"Triton cannot launch {kernel} .OutOfResources"):
        case.run(Inputs(1, CPU, torch.float32), "triton")


def test_a_failure_at_one_size_leaves_the_others(fail: Callable[..., None]) -> None:
    """In forward and backward, other widths and dtypes still run on the kernel. The warning is not repeated."""
    kernels = {}
    for name, first in (("_layer_norm_fwd_kernel", 0), ("_layer_norm_bwd_kernel", 1)):
        fail(name, first=first)
        module = importlib.import_module(KERNELS[name])
        kernels[name] = getattr(module, name)

    def norm(width: int) -> None:
        x = torch.randn(3, width, requires_grad=True)
        ops.layer_norm(x, torch.ones(width), torch.zeros(width), 1e-5).sum().backward()

    with pytest.warns(UserWarning, match="layer_norm runs on PyTorch's operators from now on"):
        norm(32)  # its forward kernel fails
    for kernel in kernels.values():
        kernel._left = 1
    norm(64)
    assert [kernel._left for kernel in kernels.values()] == [0, 0], "64 columns ran on the kernels"
    kernels["_layer_norm_fwd_kernel"]._left = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        norm(96)  # its backward kernel fails
        norm(32)
        norm(96)
    assert kernels["_layer_norm_fwd_kernel"]._left == 0
    failed = backends._FAILED["layer_norm", "cpu", None]
    assert [size[0] for size in failed] == [32, 96]
    assert ops.why_not_triton("layer_norm", CPU, (64, torch.float32)) is None
    assert "_layer_norm_bwd_kernel" in str(ops.why_not_triton("layer_norm", CPU, (96, torch.float32)))


def test_every_kernel_has_a_failure() -> None:
    of_the_step = {"_begin_step_kernel"}
    without = {"_layer_norm_wide_fwd_kernel"}  # like the forward kernel of shorter rows
    assert {failure[0] for failure in FAILURES} | of_the_step | without == KERNELS.keys()


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:fastgpt2. sample runs")
@pytest.mark.parametrize(
    ("kernel", "first"), [("_begin_step_kernel", 2), ("_linear_decode_kernel", 7), ("_sample_kernel", 1)]
)
def test_decoding_goes_on(fail: Callable[..., None], interpreter: str, kernel: str, first: int) -> None:
    """After a failure in the middle of a run and of a step, tokens, stop tokens and penalties are the same."""
    ours, plain = pair(interpreter, context_length=24, **TINIEST)
    ours.backend = "auto"
    prompts = [[1, 2, 3, 4], [8]]
    options = {"max_new_tokens": 6, "temperature": 0, "repetition_penalty": 1.3}
    stop = plain.generate(prompts, stop_token_ids=(), **options)[0].token_ids[3]
    want = plain.generate(prompts, stop_token_ids=(stop,), **options)
    fail(kernel, first=first)
    with pytest.warns(UserWarning, match=f"decode_step runs on PyTorch's operators from now on: .*{kernel}"):
        got = ours.generate(prompts, stop_token_ids=(stop,), **options)
    found, expected = ({s.prompt_index: (s.token_ids, s.finish_reason) for s in of} for of in (got, want))
    assert found == expected
    assert kernel in str(decode.why_not_decode(ours))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("is_tied", [False, True])
def test_decoding_goes_on_with_its_8_bit_weights(fail: Callable[..., None], interpreter: str, is_tied: bool) -> None:
    """After a failure the logits are still those of the rounded weights. The model's own weights are unchanged."""
    ours, plain = pair(interpreter, context_length=24, **{**TINIEST, "tie_word_embeddings": is_tied})
    ours.backend = "auto"
    before = {name: p.clone() for name, p in ours.named_parameters()}
    rounded = GPT2(plain.config.replace(tie_word_embeddings=False), backend="torch").eval()
    rounded.load_state_dict({**plain.state_dict(), "lm_head.weight": plain.lm_head.weight})
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, Linear):
                weight, scale = ops.quantize_rows(module.weight)
                module.weight.copy_(weight.float() * scale[:, None])
    fail("_linear_decode_kernel")
    cache = KVCache(ours.config, 1)
    session = DecodeSession(ours, cache, SamplingConfig(temperature=0), weight_dtype=torch.int8)
    logits = session.prefill([0], [[1, 2, 3]])
    token = session.begin([NewRow(0, [1, 2, 3], (0, 0), 10)], logits).read()[0][0]
    with pytest.warns(UserWarning, match="decode_step runs on PyTorch's operators"):
        session.step([0])
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, before[name]), name
    results = []
    for model in (rounded, plain):
        own = KVCache(model.config, 1)
        model.extend(torch.tensor([1, 2, 3]), ops.plan_rows([0], [3], [0]), own)
        own.keys, own.values = cache.keys.clone(), cache.values.clone()  # the prefill used the model's own weights
        hidden = model.extend(torch.tensor([token]), ops.plan_rows([0], [1], [3]), own)
        results.append(model.logits(hidden))
    got = session.step_logits(1)
    torch.testing.assert_close(got, results[0], rtol=1e-4, atol=1e-4)
    assert (got - results[1]).abs().max() > 10 * (got - results[0]).abs().max()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_decoding_on_triton_by_name_raises(fail: Callable[..., None], interpreter: str) -> None:
    ours, _ = pair(interpreter, context_length=24, **TINIEST)
    fail("_begin_step_kernel")
    with pytest.raises(backends.KernelFailedError, match="_begin_step_kernel"):
        ours.generate([[1]], max_new_tokens=3, temperature=0, stop_token_ids=())


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OUT_OF_MEMORY, "too few resources"),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "install gcc"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "install gcc"),
        (PermissionError(13, "Permission denied", "cache"), "TRITON_CACHE_DIR"),
        (OSError(30, "Read-only file system", "cache"), "TRITON_CACHE_DIR"),
        (RuntimeError("Could not create or locate cache dir"), "TRITON_CACHE_DIR"),
        (json.JSONDecodeError("Expecting value", "", 0), "a file in Triton's cache is damaged"),
        (AssertionError("libcuda.so cannot found!"), "update them"),
        (errors.PTXASError("Value 'sm_999' is not defined"), "update them"),
        (RuntimeError("PassManager::run failed"), "fastgpt2 check --json"),
    ],
    ids=str,
)
def test_what_to_do(fail: Callable[..., None], error: Exception, advice: str) -> None:
    fail("_layer_norm_fwd_kernel", error)
    x = torch.randn(2, 32)
    with pytest.raises(backends.KernelFailedError) as caught:
        ops.layer_norm(x, x[0], x[1], 1e-5, backend="triton")
    assert "_layer_norm_fwd_kernel" in str(caught.value)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_other_errors_are_not_taken_for_a_kernels(fail: Callable[..., None]) -> None:
    fail("_layer_norm_fwd_kernel", TypeError("an argument of ours"))
    x = torch.randn(2, 32)
    with pytest.raises(TypeError, match="an argument of ours"):
        ops.layer_norm(x, x[0], x[1], 1e-5, backend="auto")


def test_a_real_launch_without_a_driver_and_without_a_folder(tmp_path: Path) -> None:
    """Triton's own errors name the kernel: without a GPU driver, and with a fake one and an unusable cache folder."""
    (tmp_path / "file").touch()
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
from fastgpt2_kernels import backends
from fastgpt2_kernels.triton.layers.layer_norm import layer_norm
x = torch.randn(2, 32)
def attempt():
    try:
        layer_norm(x, x[0], x[1], 1e-5, None)
    except backends.KernelFailedError as error:
        print(error)
if not torch.cuda.is_available():
    attempt()
class Driver:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(Driver())
attempt()
"""
    environment = {
        **os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), str(KERNELS_ROOT)]),
        "TRITON_CACHE_DIR": str(tmp_path / "file" / "cache"),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    *without_driver, without_folder = done.stdout.splitlines()
    assert all("_layer_norm_fwd_kernel" in line and "driver" in line for line in without_driver)
    assert "_layer_norm_fwd_kernel" in without_folder, done.stderr
    assert without_folder.endswith("name one in TRITON_CACHE_DIR")


def test_a_model_trains_on(fail: Callable[..., None], interpreter: str) -> None:
    """Training continues after a backward kernel has failed in the middle of a step."""
    model = GPT2(pair(interpreter, **TINIEST)[0].config)
    fail("_layer_norm_bwd_kernel")
    tokens = torch.tensor([[1, 2, 3, 4]])
    with pytest.warns(UserWarning, match="layer_norm runs on PyTorch's operators"):
        model(tokens).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
