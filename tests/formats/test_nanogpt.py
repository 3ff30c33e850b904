"""nanoGPT checkpoints compute the same when loaded or saved. A model that nanoGPT cannot run is not saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2.checkpoint import load_pretrained, save_nanogpt
from tests.formats.helpers import assert_same
from tests.formats.nano import NanoGPT, nano_checkpoint
from tests.helpers import TINY, assert_close, random_ids, random_model


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoints_compute_the_same(tmp_path: Path, seed: int, bias: bool, prefix: str) -> None:
    nano = nano_checkpoint(tmp_path / "ckpt.pt", seed, bias=bias, prefix=prefix).double()
    ids = random_ids(seed, 2, 24)
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        model = load_pretrained(source, dtype=torch.float64)
        assert model.config.residual_dropout == model.config.attention_dropout == 0.1
        assert_close(model(ids), nano(ids), "logits")


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_round_trip(tmp_path: Path, seed: int, bias: bool) -> None:
    nano = nano_checkpoint(tmp_path / "in" / "ckpt.pt", seed, bias=bias)
    save_nanogpt(load_pretrained(tmp_path / "in"), tmp_path / "out")
    back = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    again = NanoGPT(back["model_args"])
    again.load_state_dict(back["model"])  # strict
    for name, tensor in nano.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    zero = [name for name in again.state_dict() if name not in nano.state_dict()]
    assert bool(zero) == (not bias)
    assert all(not again.state_dict()[name].any() for name in zero)


def test_hugging_face_to_nanogpt_and_back(tmp_path: Path, seed: int) -> None:
    model = random_model(seed, activation_function="gelu", eos_token_id=2)
    save_nanogpt(model, tmp_path / "nano")
    loaded = load_pretrained(tmp_path / "nano")
    assert_same(loaded, model)
    assert loaded.config == model.config
    with pytest.warns(UserWarning, match="exact GELU"):
        save_nanogpt(random_model(seed), tmp_path / "tanh")
    assert load_pretrained(tmp_path / "tanh").config == TINY


def test_padded_vocabulary(tmp_path: Path, seed: int) -> None:
    nano = nano_checkpoint(tmp_path / "ckpt.pt", seed, vocab_size=64)
    ids = random_ids(seed, 1, 9)
    whole, cut = load_pretrained(tmp_path), load_pretrained(tmp_path, vocab_size=61, context_length=9)
    assert whole.config.vocab_size == 64
    torch.testing.assert_close(whole(ids), nano(ids))
    torch.testing.assert_close(cut(ids), nano(ids)[..., :61])
    assert cut.transformer.wpe.weight.shape == (9, 32)
    with pytest.raises(ValueError, match=r"wte.weight is \(64, 32\) in the file and \(65, 32\)"):
        load_pretrained(tmp_path, vocab_size=65)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"feedforward_dim": 40}, "feedforward_dim=40"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"scale_attn_weights": False, "tie_word_embeddings": False}, "scale_attn_weights=False, tie_word_embeddings"),
        ({"attention_dropout": 0.5}, "attention_dropout=0.5"),
        ({"embedding_dropout": 0.5}, "embedding_dropout=0.5"),
    ],
)
def test_nanogpt_has_no_setting_for(tmp_path: Path, seed: int, changes: dict[str, Any], named: str) -> None:
    model = random_model(seed, **{"activation_function": "gelu", **changes})
    with pytest.raises(ValueError, match=f"nanoGPT cannot run this model.*{named}"):
        save_nanogpt(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
