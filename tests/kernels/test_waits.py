"""Nothing in a prefill, a decoding step, a loss or a training step makes the host wait for a GPU.

Tensors on the device "meta" have no values and are not on the host, so the code treats them like tensors on a GPU.
Kernels are not launched. `test_devices.py` also runs the code around them on tensors without values.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt2 import GPT2, GPT2Config, scoring
from fastgpt2.cache import KVCache
from fastgpt2.config import SamplingConfig
from fastgpt2.decode import DecodeSession, NewRow
from fastgpt2.loss import calculate_loss, train_step
from fastgpt2_kernels import host, ops
from tests.kernels.test_proofs import KERNELS

aten = torch.ops.aten
# Operators whose result, or its size, the host must know. They also raise for tensors on "meta".
READS = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten.is_nonzero, aten._unique2)
CONFIG = GPT2Config(vocab_size=61, context_length=64, hidden_size=32, num_layers=2, num_heads=2, attention_dropout=0.1)


class _Notes:
    """A PyTorch mode that records where the host waits."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits


class _Operators(_Notes, TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in READS and args[0].device.type != "cpu":
            self.waits.append(str(func))
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.waits.append(f"{func} by a mask")
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.device.type == "cpu" and args[0].device.type != "cpu" for index in args[1]
        ):
            self.waits.append(f"{func} by numbers of the host")
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            to = args[0].device if func.overloadpacket is aten.copy_ else kwargs.get("device") or args[0].device
            of = args[1] if func.overloadpacket is aten.copy_ else args[0]
            is_blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
            if {torch.device(to).type, of.device.type} == {"cpu", "meta"} and is_blocking:
                self.waits.append(f"{func} from {of.device} to {to}")
            if func.overloadpacket is aten._to_copy and of.device.type == "meta" and torch.device(to).type == "cpu":
                return torch.zeros_like(of, device="cpu")  # there is nothing to copy
        return func(*args, **kwargs)


class _Constructors(_Notes, TorchFunctionMode):
    """Catches `torch.tensor(numbers, device=...)`, which copies from pageable memory without calling an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            self.waits.append(f"{func.__name__} on {kwargs['device']}")
        return func(*args, **kwargs)


@contextlib.contextmanager
def noted_waits() -> Iterator[list[str]]:
    waits: list[str] = []
    with _Operators(waits), _Constructors(waits):
        yield waits


@pytest.fixture(autouse=True)
def without_launches(interpreter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Launched:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda **arguments: None

    for name, module in KERNELS.items():
        monkeypatch.setattr(importlib.import_module(module), name, Launched())
    # Autocast does not know this device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def model_on_meta(training: bool = False) -> GPT2:
    with torch.device("meta"):
        return GPT2(CONFIG, backend="triton").train(training)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_prefill_and_steps(penalty: float) -> None:
    """Rows come and go, and the cache grows. Numbers go to the device through pinned memory."""
    model = model_on_meta()
    cache = KVCache(model.config, 5, 8, device="meta")
    sampling = SamplingConfig(temperature=0.8, top_k=5, top_p=0.9, repetition_penalty=penalty)
    with noted_waits() as waits:
        session = DecodeSession(model, cache, sampling, stop_ids=[3])
        for slots in ([0, 2], [1], [3, 4, 0]):
            prompts = [[5, 6, 7], [8] * 11, [9]][: len(slots)]
            logits = session.prefill(slots, prompts)
            rows = [NewRow(slot, ids, (1, slot), 20) for slot, ids in zip(slots, prompts, strict=True)]
            session.begin(rows, logits)
            cache.reserve(40)
            session.step(slots)
            session.step(slots[:1])
        if penalty == 1.0:
            session.replace_tokens([0], torch.zeros(1, dtype=torch.int64, device="meta"))
    assert waits == []


def test_cached_attention_of_all_kinds_of_rows() -> None:
    """The plan has separated rows without cached tokens, and rows with one, a few and many new tokens."""
    model = model_on_meta()
    cache = KVCache(model.config, 5, 64, device="meta")
    with noted_waits() as waits:
        plan = ops.plan_rows(range(5), [3, 1, 4, 12, 6], [0, 4, 5, 6, 0], "meta")
        model.logits(model.extend(ops.to_device([1] * 26, "meta"), plan, cache))
    assert waits == []


@pytest.mark.parametrize("kind", ["loss", "step", "accumulated", "documents"])
def test_a_training_step(kind: str) -> None:
    model = model_on_meta(training=True)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    tokens = torch.zeros(2, 17, dtype=torch.int64, device="meta")
    with noted_waits() as waits:
        if kind == "documents":
            ends = ops.to_device([0, 5, 16], "meta", torch.int32)
            model.hidden_states(tokens[:1, :-1], cu_seqlens=ends).sum().backward()
        elif kind == "loss":
            calculate_loss(model, tokens[:, :-1], tokens[:, 1:], label_smoothing=0.1, z_loss=1e-3).backward()
        elif kind == "step":
            train_step(model, tokens, optimizer, max_grad_norm=1.0, pad_token_id=0)
        else:
            for num_items in (40, torch.tensor(40)):
                train_step(model, tokens, optimizer, pad_token_id=0, num_items_in_batch=num_items)
    assert waits == []


def test_scores_wait_once_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits only where it reads the scores."""
    read: list[int] = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self.numel()) or [0.0] * self.numel())
    batch = [scoring.Score(i, (1, 2, 3, 4), 2, []) for i in range(3)]
    with noted_waits() as waits:
        scoring._score_batch(model_on_meta(), batch)
    assert (waits, len(read)) == ([], 1)


def test_numbers_go_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from pageable memory makes the host wait, even with `non_blocking`."""
    copied = []
    monkeypatch.setattr(host, "_HAS_PINNED_MEMORY", True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.as_subclass(Pinned))
    monkeypatch.setattr(Pinned, "to", lambda self, *args, **kwargs: copied.append((args, kwargs)))
    ops.to_device([1, 2], "cuda:1", torch.int32)
    ops.to_device(torch.ones(3), "cuda:1")
    assert copied == [((torch.device("cuda:1"),), {"non_blocking": True})] * 2


class Pinned(torch.Tensor):
    """Stands in for a tensor in pinned memory."""


def test_results_of_a_step_are_copied_without_waiting() -> None:
    """They become valid with the event that is recorded after the copies."""
    model = model_on_meta()
    session = DecodeSession(model, KVCache(model.config, 2, 8, device="meta"), SamplingConfig(temperature=0))
    session._is_asynchronous = True
    with pytest.MonkeyPatch.context() as patch, noted_waits() as waits:
        recorded = []
        event = type("Event", (), {"record": lambda self: recorded.append(1)})
        patch.setattr(torch.cuda, "Event", event)
        results = session._results()
    assert waits == []
    assert recorded == [1]
    assert (results.tokens.device.type, results.logprobs.device.type) == ("cpu", "cpu")


def test_waits_are_noticed() -> None:
    x = torch.zeros(4, device="meta")
    at = torch.tensor([0, 1])
    with noted_waits() as waits:
        torch.tensor([1.0], device="meta")
        torch.zeros(2).to("meta")
        x.copy_(torch.zeros(4))
        x[at]
        for wait in (lambda: x[x > 0], lambda: x.sum().item(), lambda: torch.nonzero(x)):
            with pytest.raises(RuntimeError):
                wait()
    assert len(waits) >= 7
