"""Every Triton kernel has its three proofs: interpreted, sanitized, compiled. A kernel without one fails here.

The first two are the cases below. They launch every kernel through its public operator and compare with float64.
They run under Triton's interpreter (`make test`), under the sanitizer (`make sanitize`) and on a GPU. The third is the
table of launch rows, which test_compile.py compiles for every target. Each kernel's own file tests it thoroughly.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import ops
from tests.helpers import assert_within_budget

ROOT = Path(__file__).parents[2]
KERNELS_ROOT = ROOT / "kernels"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Results = Sequence[Tensor]
# Takes inputs of a dtype and a backend; returns an operator's results and gradients.
Operator = Callable[[str, torch.dtype], Results]


def kernels() -> dict[str, str]:
    """The names of all kernels that are launched, and the modules that define them."""
    found = {}
    for path in sorted((KERNELS_ROOT / "fastgpt2_kernels").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_jitted = isinstance(node, ast.FunctionDef) and any("jit" in ast.dump(d) for d in node.decorator_list)
            if is_jitted and node.name.endswith("_kernel"):
                found[node.name] = ".".join(path.relative_to(KERNELS_ROOT).with_suffix("").parts)
    return found


KERNELS = kernels()


class Inputs:
    """Random tensors. Their values are the same in every requested dtype."""

    def __init__(self, seed: int, device: str) -> None:
        self.seed, self.device = seed, device

    def __call__(self, index: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + index)
        return torch.randn(shape, generator=generator).to(self.device, dtype).requires_grad_(dtype.is_floating_point)


def gradients(out: Tensor, inputs: Inputs, *leaves: Tensor) -> Results:
    weights = inputs(99, *out.shape, dtype=out.dtype).detach()
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def causal_attention(inputs: Inputs, backend: str, dtype: torch.dtype) -> Results:
    q, k, v = (inputs(i, 2, 2, 37, 16, dtype=dtype) for i in range(3))
    return gradients(ops.causal_attention(q, k, v, backend=backend), inputs, q, k, v)


def cross_entropy(inputs: Inputs, backend: str, dtype: torch.dtype) -> Results:
    logits = inputs(0, 5, 301, dtype=dtype)
    targets = torch.tensor([3, -100, 300, 0, 17], device=inputs.device)
    loss = ops.cross_entropy(logits, targets, fuse_backward=True, backend=backend)
    assert isinstance(loss, Tensor)
    return gradients(loss, inputs, logits)


def layer_norm(inputs: Inputs, backend: str, dtype: torch.dtype, width: int = 96) -> Results:
    x, weight, bias = inputs(0, 5, width, dtype=dtype), inputs(1, width, dtype=dtype), inputs(2, width, dtype=dtype)
    return gradients(ops.layer_norm(x, weight, bias, 1e-5, backend=backend), inputs, x, weight, bias)


def bias_activation(inputs: Inputs, backend: str, dtype: torch.dtype) -> Results:
    x, bias = inputs(0, 7, 80, dtype=dtype), inputs(1, 80, dtype=dtype)
    return gradients(ops.bias_activation(x, bias, "gelu_new", backend=backend), inputs, x, bias)


def decode_attention(inputs: Inputs, backend: str, dtype: torch.dtype) -> Results:
    qkv, keys, values = (
        inputs(i, *shape).to(dtype).detach() for i, shape in enumerate([(3, 96), *[(3, 2, 200, 16)] * 2])
    )
    lengths = torch.tensor([0, 199, 130], dtype=torch.int32, device=inputs.device)
    out = ops.decode_attention(qkv, keys, values, lengths, backend=backend)
    return [out, keys, values]


def linear_decode(inputs: Inputs, backend: str, dtype: torch.dtype) -> Results:
    x, weight, bias = (inputs(i, *shape).to(dtype).detach() for i, shape in enumerate([(3, 130), (50, 130), (50,)]))
    if backend != "triton":
        return [F.gelu(F.linear(x, weight, bias), approximate="tanh")]
    return [ops.linear_decode(x, weight, bias, activation="gelu_new", backend=backend)]


def sample(inputs: Inputs, backend: str, dtype: torch.dtype) -> Results:
    logits = inputs(0, 3, 301).to(dtype).detach()
    keys = ops.row_keys(7, [0, 1, 2], [0, 0, 0]).to(inputs.device)
    positions = torch.tensor([0, 5, 9], dtype=torch.int32, device=inputs.device)
    ids, logprobs = ops.sample(logits, top_k=5, keys=keys, positions=positions, backend=backend)
    return [ids.to(dtype), logprobs]


def decode_step(inputs: Inputs, backend: str, dtype: torch.dtype) -> Results:
    """The logits after one token at position 0, where attention returns its value. LayerNorm is the reference's."""
    C, V, inner = 32, 61, 64

    def draw(index: int, *shape: int) -> Tensor:
        return (inputs(index, *shape) * 0.3).to(dtype).detach()

    def norm(index: int) -> ops.LayerNormWeights:
        return ops.LayerNormWeights(draw(index, C), draw(index + 1, C), 1e-5)

    def linear(index: int, rows: int, columns: int) -> ops.LinearWeights:
        return ops.LinearWeights(draw(index, rows, columns), draw(index + 1, rows))

    layer = ops.LayerWeights(
        norm(10), linear(12, 3 * C, C), linear(14, C, C), norm(16), linear(18, inner, C), linear(20, C, inner), 0.25
    )
    weights = ops.StepWeights(
        draw(1, V, C), draw(2, 8, C), (layer,), norm(30), ops.LinearWeights(draw(3, V, C)), 2, "gelu_tanh"
    )
    token, device = 5, torch.device(inputs.device)
    if backend != "triton":
        return [_first_token_logits(weights, token)]
    slots = ops.SlotState.idle(1, device)
    slots.tokens.fill_(token)
    slots.status.fill_(ops.FRESH)
    slots.limits.fill_(4)
    stops = torch.tensor([V - 1], dtype=torch.int32, device=device)
    step = ops.decode_step(weights, slots, ops.SlotSampling(), stops, 1, dtype, backend=backend)
    cache = torch.full((2, 1, 1, 2, 8, C // 2), float("nan"), dtype=dtype, device=device)
    step.use_cache(*cache)
    step.run(torch.zeros(1, dtype=torch.int32, device=device))
    return [step.buffers.logits.clone()]


def _first_token_logits(weights: ops.StepWeights, token: int) -> Tensor:
    def linear(x: Tensor, of: ops.LinearWeights) -> Tensor:
        return F.linear(x, of.weight, of.bias)

    def norm(x: Tensor, of: ops.LayerNormWeights) -> Tensor:
        return F.layer_norm(x, of.weight.shape, of.weight, of.bias, of.eps)

    x = (weights.wte[token] + weights.wpe[0])[None]
    for layer in weights.layers:
        x = x + linear(linear(norm(x, layer.ln_1), layer.qkv)[:, -x.shape[1] :], layer.projection)
        hidden = F.gelu(linear(norm(x, layer.ln_2), layer.up), approximate="tanh")
        x = x + linear(hidden, layer.down)
    return linear(norm(x, weights.ln_f), weights.head)


# The kernels that each case launches. The case's results check them all.
CASES: dict[str, tuple[Callable[[Inputs, str, torch.dtype], Results], set[str]]] = {
    "causal_attention": (
        causal_attention,
        {"_attention_fwd_kernel", "_attention_bwd_dq_kernel", "_attention_bwd_dkdv_kernel"},
    ),
    "cross_entropy": (cross_entropy, {"_cross_entropy_kernel", "_scale_rows_kernel"}),
    "layer_norm": (layer_norm, {"_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel", "_sum_partials_kernel"}),
    "layer_norm of long rows": (
        functools.partial(layer_norm, width=17_000),
        {"_layer_norm_wide_fwd_kernel", "_layer_norm_wide_bwd_kernel", "_sum_partials_kernel"},
    ),
    "bias_activation": (
        bias_activation,
        {"_bias_activation_fwd_kernel", "_bias_activation_bwd_kernel", "_sum_partials_kernel"},
    ),
    "decode_attention": (decode_attention, {"_decode_attention_kernel", "_combine_kernel"}),
    "linear_decode": (linear_decode, {"_linear_decode_kernel"}),
    "sample": (sample, {"_sample_kernel"}),
    "decode_step": (
        decode_step,
        {"_begin_step_kernel", "_linear_decode_kernel", "_decode_attention_kernel", "_sample_kernel"},
    ),
}


class Recorder:
    """A kernel that records its launches."""

    def __init__(self, kernel: Any, name: str, launched: set[str]) -> None:
        self._kernel, self._name, self._launched = kernel, name, launched

    def __getitem__(self, grid: Any) -> Any:
        self._launched.add(self._name)
        return self._kernel[grid]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


@pytest.fixture
def launched(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the kernels that a test launches."""
    names: set[str] = set()
    for name, module_name in KERNELS.items():
        module = importlib.import_module(module_name)
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), name, names))
    return names


def test_every_kernel_has_a_case() -> None:
    assert set().union(*(names for _, names in CASES.values())) == KERNELS.keys()


@pytest.mark.parametrize("name", CASES)
def test_kernels_against_float64(name: str, launched: set[str], triton_device: str, seed: int) -> None:
    case, expected = CASES[name]
    inputs = Inputs(seed, triton_device)
    got = case(inputs, "triton", torch.float32)
    assert launched == expected
    plain, exact = case(inputs, "torch", torch.float32), case(inputs, "torch", torch.float64)
    for index, (mine, theirs, right) in enumerate(zip(got, plain, exact, strict=True)):
        assert_within_budget(mine, theirs, right.double(), f"{name}, result {index}")


def test_the_sanitizer_runs_the_cases() -> None:
    """`make sanitize` deselects some tests by name and mark. These cases must not be among them."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    expression = re.search(r"^SANITIZED := (.*(?:\\\n.*)*)", makefile, re.MULTILINE)
    assert expression is not None
    left_out = re.findall(r"not (\w+)", expression[1])
    assert len(left_out) == expression[1].replace("\\", "").split().count("not")
    names = [f"{Path(__file__).name}::test_kernels_against_float64[{name}]" for name in CASES]
    assert not [name for name in names if any(word in name for word in left_out)]
    marks = getattr(test_kernels_against_float64, "pytestmark", [])
    assert not [mark for mark in marks if mark.name in ("unsanitized", "skip", "skipif")]


def test_every_kernel_has_launch_rows_for_every_target() -> None:
    """They are listed in another process, because kernels are other objects while the interpreter is on."""
    pytest.importorskip("triton")
    code = (
        "import json; from tests.kernels.compile_rows import cases, TARGETS; "
        "print(json.dumps({t: sorted({case.kernel.__name__ for case in cases(t)}) for t in TARGETS}))"
    )
    path = os.pathsep.join([str(ROOT), str(KERNELS_ROOT)])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout)
    assert {target: sorted(KERNELS.keys() - set(names)) for target, names in compiled.items()} == {
        target: [] for target in compiled
    }
