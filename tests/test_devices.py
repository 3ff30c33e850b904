"""GPUs without bfloat16: training refuses it, generation warns. The tests fake the capability, and need no GPU."""

from __future__ import annotations

import pytest
import torch

from fastgpt2 import GPT2, devices
from fastgpt2.train import resolve_dtype


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> dict[int | None, tuple[int, int]]:
    """Fake each device's capability, given by its index."""
    of = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of[torch.device(device).index or 0])
    return of


def test_training_in_bfloat16_where_there_is_none(capability) -> None:
    """Each of two GPUs is judged by its own capability."""
    new, old = torch.device("cuda:0"), torch.device("cuda:1")
    assert [resolve_dtype("auto", device) for device in (new, old)] == ["bf16", "fp16"]
    assert resolve_dtype("bf16", new) == "bf16"
    assert [resolve_dtype(name, old) for name in ("fp16", "fp32")] == ["fp16", "fp32"]
    with pytest.raises(ValueError, match=r"^training: dtype 'bf16' .* needs compute capability 8.0; this GPU has 7.5;"):
        resolve_dtype("bf16", old)
    assert resolve_dtype("bf16", torch.device("cpu")) == "bf16"


def test_amd_has_bfloat16(capability, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert resolve_dtype("auto", torch.device("cuda:1")) == "bf16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generation_in_bfloat16_where_there_is_none(dtype, monkeypatch, recwarn) -> None:
    model = GPT2(vocab_size=13, hidden_size=16, num_layers=1, num_heads=1, context_length=8, backend="torch")
    model = model.to(dtype).eval()
    reason = devices.why_not_bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("fastgpt2.generate.why_not_bfloat16", lambda device: reason(torch.device("cuda:0")))
    model.generate([[1]], max_new_tokens=1)
    said = [str(warning.message) for warning in recwarn]
    if dtype == torch.bfloat16:
        assert said == [
            "generate: bfloat16 needs compute capability 8.0; this GPU has 7.5: PyTorch emulates it, slowly; load the "
            "model in float16"
        ]
    else:
        assert said == []
