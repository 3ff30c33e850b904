"""Every kernel is launched on the device of its tensors: the operators with two simulated GPUs.

PyTorch's fake tensors claim to be on a GPU and have no data. A stand-in for the driver knows the current device.
Kernels compute nothing; their launches are recorded with the device.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastgpt2 import GPT2, GPT2Config, decode
from fastgpt2.cache import KVCache
from fastgpt2.config import SamplingConfig
from fastgpt2.decode import DecodeSession
from fastgpt2.loss import calculate_loss
from fastgpt2_kernels import backends, ops
from fastgpt2_kernels.triton import cross_entropy, devices, launch
from tests.kernels.test_decode_session import pair
from tests.kernels.test_proofs import CASES, KERNELS, KERNELS_ROOT, Inputs, decode_step

errors = pytest.importorskip("triton.runtime.errors")


def fake_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], amd: str | None = None, shared: int = 232_448
) -> None:
    """Simulate an NVIDIA GPU of this capability, with this much shared memory per program, or this AMD GPU."""
    backends._why_not_gpu.cache_clear()
    launch.architecture.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", "7.0" if amd else None)
    named = {"gcnArchName": f"{amd}:sramecc+:xnack-", "shared_memory_per_block_optin": shared}
    properties = type("Properties", (), {"multi_processor_count": 4, **named})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)


@pytest.fixture(autouse=True)
def real_gpus_afterwards() -> Iterator[None]:
    yield
    backends._why_not_gpu.cache_clear()
    launch.architecture.cache_clear()
    launch.multiprocessors.cache_clear()


class Driver:
    """Stands in for the driver that Triton asks at a launch. Knows the current one of two devices, records launches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.stream: Any = "the user's"
        self.launches: list[tuple[str, int, str]] = []  # kernel, device, stream
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "_exchange_device", self._exchange)
        monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", self._exchange)
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        fake_gpu(monkeypatch, (9, 0))
        # If PyTorch found a GPU, fake tensors would use the real one.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(backends, "_why_not_this_gpu", lambda device: None)
        monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 0)
        for name, module_name in KERNELS.items():
            monkeypatch.setattr(importlib.import_module(module_name), name, self._recorder(name))

    def _exchange(self, device: int) -> int:
        was, self.current = self.current, device if device >= 0 else self.current
        return was

    def _recorder(self, name: str) -> Any:
        def launch(**arguments: Any) -> None:
            self.launches.append((name, self.current, f"stream of {self.current}"))

        return type("Recorder", (), {"__getitem__": lambda self, grid: launch})()


def _part(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """tensor[index] for slices and ints, by operators, because PyTorch's own indexing needs a real GPU."""
    dim = 0
    for i in index if isinstance(index, tuple) else (index,):
        if isinstance(i, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, i.start, i.stop)
            dim += 1
        else:
            tensor = tensor.select(dim, i)
    return tensor


@pytest.fixture
def driver(interpreter: str, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


class Calls(TorchDispatchMode):
    """Records the operators of the package that a case calls, forward and backward, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastgpt2":
            self.made.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def on_device(device: str, func: Any, args: Any, kwargs: Any) -> None:
    """Call the GPU implementation of an operator with fake tensors on that device.

    Autograd needs a real GPU, so its calls are recorded on the CPU.
    """
    with FakeTensorMode():
        fake = tree_map_only(
            torch.Tensor,
            lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device),
            (args, kwargs),
        )
        func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *fake[0], **fake[1])


def run_step(device: str) -> None:
    with FakeTensorMode(), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__getitem__", _part)
        patch.setattr(torch.Tensor, "copy_", lambda to, of: to)  # needs a real GPU too
        decode_step(Inputs(0, device), "triton", torch.float32)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_launches_are_on_the_tensors_device(driver: Driver, name: str, index: int) -> None:
    case, kernels = CASES[name]
    device = f"cuda:{index}"
    if name == "decode_step":
        run_step(device)
    else:
        with Calls() as calls:
            case(Inputs(0, "cpu"), "triton", torch.float32)
        driver.launches.clear()
        for call in calls.made:
            on_device(device, *call)
    assert {kernel for kernel, _, _ in driver.launches} == kernels
    assert {(at, stream) for _, at, stream in driver.launches} == {(index, f"stream of {index}")}
    assert driver.current == 0


def test_a_current_device_is_not_set_again(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: int) -> int:
        raise AssertionError("the device was current")

    monkeypatch.setattr(torch.cuda, "_exchange_device", refuse)
    run_step("cuda:0")
    assert driver.launches


class Capture:
    """Stands in for `torch.cuda.graph` and records its arguments. It can fail at its end, like PyTorch's."""

    def __init__(self, driver: Driver, error: Exception | None = None) -> None:
        self.driver, self.error = driver, error
        self.asked: list[tuple[str, int, Any]] = []

    def __call__(self, graph: Any, *, stream: Any, capture_error_mode: str) -> Any:
        @contextlib.contextmanager
        def capturing() -> Iterator[None]:
            self.asked.append((capture_error_mode, self.driver.current, stream))
            before, self.driver.stream = self.driver.stream, stream
            yield
            if self.error is not None:
                raise self.error
            self.driver.stream = before

        return capturing()


@pytest.fixture
def on_second_gpu(
    driver: Driver, interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Exception | None], tuple[DecodeSession, Capture, list[int]]]:
    """A session that believes it is on cuda:1, its captures, and the devices of its graphs and events."""

    def make(error: Exception | None) -> tuple[DecodeSession, Capture, list[int]]:
        used: list[int] = []
        note = lambda self, *_: used.append(driver.current)  # noqa: E731
        stand_in = type("StandIn", (), {"replay": note, "record": note, "synchronize": lambda self: None})
        capture = Capture(driver, error)
        for name, stands_in in (("CUDAGraph", stand_in), ("Event", stand_in), ("graph", capture)):
            monkeypatch.setattr(torch.cuda, name, stands_in)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: driver.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(driver, "stream", stream))
        model, _ = pair(interpreter)
        session = DecodeSession(model, KVCache(model.config, 2, device="cpu"), SamplingConfig(temperature=0))
        session._gpu, session._is_asynchronous, session.use_graphs = torch.device("cuda:1"), True, True
        return session, capture, used

    return make


def test_graphs_and_events_are_on_the_sessions_device(driver: Driver, on_second_gpu: Any) -> None:
    session, capture, used = on_second_gpu(None)
    session.step([0])
    session.step([0, 1])
    assert used == [1] * 4  # a replay and an event for each
    assert capture.asked == [("thread_local", 1, "a stream of cuda:1")] * 2
    assert (driver.current, driver.stream) == (0, "the user's")


@pytest.mark.parametrize(
    "error", [RuntimeError("capture failed"), errors.OutOfResources(2, 1, "shared memory")], ids=repr
)
def test_a_capture_that_fails_leaves_the_users_stream(driver: Driver, on_second_gpu: Any, error: Exception) -> None:
    session, _, _ = on_second_gpu(error)
    with pytest.warns(UserWarning, match="a CUDA graph cannot be used"):
        session.step([0])
    assert not session.use_graphs
    assert (driver.current, driver.stream) == (0, "the user's")
    session.step([0])


@pytest.mark.parametrize(
    ("capability", "amd", "reason"),
    [
        ((7, 5), None, "needs compute capability 8.0; this GPU has 7.5"),
        ((6, 0), None, "needs compute capability 8.0; this GPU has 6.0"),
        ((8, 0), None, None),
        ((12, 0), None, None),
        ((9, 4), "gfx942", None),
        ((9, 0), "gfx90a", None),
        ((9, 5), "gfx950", None),
        ((11, 0), "gfx1100", "needs one of the GPUs gfx90a, gfx942, gfx950; this GPU is gfx1100"),
        ((12, 0), "gfx1201", "needs one of the GPUs gfx90a, gfx942, gfx950; this GPU is gfx1201"),
    ],
    ids=str,
)
def test_gpus_that_cannot(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], amd: str | None, reason: str | None
) -> None:
    """On such a GPU "auto" runs on PyTorch, and an explicit "triton" raises an error that says why."""
    fake_gpu(monkeypatch, capability, amd)
    device = torch.device("cuda:1")
    for operator in ops.OPERATORS:
        has_triton = "triton" in ops.backends_of(operator)
        assert ops.why_not_triton(operator, device) == (reason if has_triton else ops.why_not_triton(operator, "cpu"))
        if "torch" in ops.backends_of(operator):
            chosen = backends.choose_backend(operator, device, "auto")
            assert chosen == ("triton" if has_triton and reason is None else "torch")
        if has_triton and reason is not None:
            with pytest.raises(ValueError, match=f"{operator}: backend='triton' cannot be used: {reason}"):
                backends.choose_backend(operator, device, "triton")


@pytest.mark.parametrize(
    ("capability", "shared", "arch"),
    [
        ((8, 0), 166_912, "sm_80"),
        ((8, 6), 101_376, "sm_86"),
        ((8, 7), 166_912, "sm_86"),
        ((8, 9), 101_376, "sm_89"),
        ((9, 0), 232_448, "sm_90"),
        ((10, 0), 232_448, "sm_100"),
        ((10, 3), 232_448, "sm_100"),
        ((12, 0), 101_376, "sm_120"),
        ((12, 1), 101_376, "sm_120"),
        # An unknown architecture takes the newest earlier one whose rows fit.
        ((9, 5), 166_912, "sm_89"),
        ((10, 9), 101_376, "sm_89"),
        ((13, 0), 232_448, "sm_120"),
    ],
    ids=str,
)
def test_a_gpu_takes_the_rows_of_the_nearest_one(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], shared: int, arch: str
) -> None:
    fake_gpu(monkeypatch, capability, shared=shared)
    assert launch.architecture(torch.device("cuda:0")) == arch
    assert launch.ARCHITECTURES[arch].shared <= shared


def test_two_kinds_of_gpus_each_take_their_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a device is asked of the tensors' device, not of the current one or the first."""
    fake_gpu(monkeypatch, (8, 6), shared=101_376)
    kinds = {0: ((8, 6), 101_376, 84), 1: ((9, 0), 232_448, 132)}
    current = 0

    def kind(device: Any) -> tuple[tuple[int, int], int, int]:
        index = getattr(device, "index", device)
        return kinds[current if index is None else index]

    def properties(device: Any = None) -> Any:
        _, shared, multiprocessors = kind(device)
        named = {"shared_memory_per_block_optin": shared, "multi_processor_count": multiprocessors}
        return type("Properties", (), named)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: kind(device)[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    launch.multiprocessors.cache_clear()
    first, second = (torch.device("cuda", index) for index in kinds)
    assert [launch.architecture(device) for device in (first, second)] == ["sm_86", "sm_90"]
    assert [launch.multiprocessors(device) for device in (first, second)] == [84, 132]
    tensors = [SimpleNamespace(device=device, is_cuda=True) for device in (first, second)]
    assert [cross_entropy._capability(x) for x in tensors] == [(8, 6), (9, 0)]
    sessions: list[Any] = [SimpleNamespace(use_graphs=True, _gpu=device) for device in (first, second)]
    assert [DecodeSession._may_have_pdl(session) for session in sessions] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_an_older_gpu_generates_and_trains_on_pytorchs_operators(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Every operator asks as if its tensors were on a GPU of capability 7.5."""
    fake_gpu(monkeypatch, (7, 5), shared=65_536)
    gpu, choose, why_not = torch.device("cuda:0"), backends.choose_backend, ops.why_not_triton
    chosen: set[str] = set()

    def choose_there(operator: str, device: torch.device, *rest: Any) -> str:
        found = choose(operator, gpu, *rest)
        chosen.add(found)
        return found

    for name in ("attention", "layers", "loss", "sampling", "decode"):
        monkeypatch.setattr(importlib.import_module(f"fastgpt2_kernels.ops.{name}"), "choose_backend", choose_there)
    monkeypatch.setattr(ops, "why_not_triton", lambda operator, device, *rest: why_not(operator, gpu, *rest))
    monkeypatch.setattr(decode, "decode_backend", lambda model: "triton")
    config = GPT2Config(vocab_size=31, hidden_size=32, num_layers=2, num_heads=2, context_length=16)
    model = GPT2(config).to(dtype).eval()
    reason = decode.why_not_decode(model)
    assert reason is not None
    assert "needs compute capability 8.0; this GPU has 7.5" in reason
    samples = model.generate([[1, 2], [3]], max_new_tokens=4, temperature=0.8, top_k=5, repetition_penalty=1.2)
    assert [len(sample.token_ids) for sample in samples] == [4, 4]
    if dtype == torch.float32:  # float16 is trained under autocast
        ids = torch.randint(31, (2, 9))
        calculate_loss(model.train(), ids[:, :-1], ids[:, 1:]).backward()
        assert all(p.grad is not None for p in model.parameters())
    assert chosen == {"torch"}


@pytest.mark.parametrize(("amd", "precision"), [("gfx90a", "ieee"), ("gfx942", "tf32"), ("gfx950", "ieee")])
def test_tf32_only_where_there_is_tf32(monkeypatch: pytest.MonkeyPatch, amd: str, precision: str) -> None:
    fake_gpu(monkeypatch, (9, 0), amd)
    device = torch.device("cuda:0")
    assert launch.architecture(device) == amd
    assert devices.float32_precision(device) == "ieee"
    monkeypatch.setattr(devices, "is_float32_exact", lambda: False)
    assert devices.float32_precision(device) == precision


def test_an_architecture_takes_anothers_rows_but_for_its_own() -> None:
    """sm_89 has no rows of its own, and sm_120 has some. Rows that neither has come from sm_86 or sm_80."""
    key = ("half", 128)
    assert launch.attention_row("dq", "sm_89", *key) == launch.attention_row("dq", "sm_86", *key)
    assert launch.attention_row("dq", "sm_86", *key) != launch.attention_row("dq", "sm_80", *key)
    assert launch.attention_row("forward", "sm_120", *key) == launch.attention_row("forward", "sm_80", *key)
    assert launch.attention_row("forward", "sm_120", "half", 64) != launch.attention_row("forward", "sm_89", "half", 64)


def test_the_choice_compiles_whole() -> None:
    def choose(x: torch.Tensor) -> torch.Tensor:
        chosen = backends.choose_backend("layer_norm", torch.device("cuda:0"), "auto")
        return x + (1 if chosen == "torch" else 2)

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == choose(torch.zeros(1)).item()


def test_every_launch_goes_through_launch_kernel() -> None:
    """Only `launch_kernel` launches a kernel, which the code writes as kernel[grid](...)."""
    found = []
    for path in sorted((KERNELS_ROOT / "fastgpt2_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = ast.unparse(node.func.value)
                if kernel.endswith("kernel"):
                    found.append(path.name)
    assert found == ["devices.py", "devices.py"]
