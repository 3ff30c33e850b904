"""`fastgpt2 convert` and `fastgpt2 info`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastgpt2.checkpoint import load_pretrained, save_pretrained
from fastgpt2.cli import main
from fastgpt2_kernels import ops
from tests.helpers import random_model


def test_convert_there_and_back(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(seed, activation_function="gelu", eos_token_id=7)
    save_pretrained(model, tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "nano"), "--to", "nanogpt"]) == 0
    assert main(["convert", str(tmp_path / "nano" / "ckpt.pt"), str(tmp_path / "back")]) == 0
    assert f"{model.num_parameters():,} parameters, float32" in capsys.readouterr().out
    back = load_pretrained(tmp_path / "back")
    assert back.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_convert_changes_dtype_and_vocabulary(tmp_path: Path, seed: int) -> None:
    model = random_model(seed)
    save_pretrained(model, tmp_path / "in")
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "in"), str(out), "--dtype", "bfloat16", "--vocab-size", "50"]) == 0
    loaded = load_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight[:50].bfloat16())


def test_convert_does_not_overwrite(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(random_model(seed), tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    command = ["convert", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()
    assert main([*command, "--force"]) == 0
    assert (tmp_path / "out" / "precious").exists()
    load_pretrained(tmp_path / "out")


def test_info(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(seed, eos_token_id=(3, 4))
    save_pretrained(model, tmp_path)
    assert main(["info", "--model", str(tmp_path), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["model"]["parameters"] == model.num_parameters()
    assert info["model"]["eos_token_id"] == [3, 4]
    assert info["versions"]["torch"] == torch.__version__
    assert set(info["operators"]) == set(ops.OPERATORS)
    for operator, chosen in info["operators"].items():
        why = ops.why_not_triton(operator, "cuda" if torch.cuda.is_available() else "cpu")
        assert chosen.get("why_not_triton") == (why if "triton" in chosen["backends"] else None)
        why_native = ops.why_not_native(operator, "cpu")
        if why is None:
            assert chosen["backend"] == "triton"
        elif why_native is None:
            assert chosen["backend"] == "native"
        else:
            assert chosen["backend"] == ("torch" if "torch" in chosen["backends"] else None)
        assert chosen["backends"] == ops.backends_of(operator)
    assert main(["info", "--model", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"{model.num_parameters():,}" in text
    assert all(operator in text for operator in ops.OPERATORS)
    reasons = {why for chosen in info["operators"].values() for name, why in chosen.items() if "why_not" in name}
    assert all(text.count(f" is not used: {reason}\n") == 1 for reason in reasons)
