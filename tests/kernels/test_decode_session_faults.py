"""The checks of the decoding step catch each of these deliberate mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.faults import load
from tests.kernels.test_decode_session import check_rows_that_end, pytestmark  # noqa: F401

SOURCE = Path(__file__).parents[2] / "kernels/fastgpt2_kernels/triton/decode/step.py"
MUTATIONS = {
    "a stop token goes on": ("(not is_stop) & ", ""),
    "the first stop token only": ("offs_stop < num_stops", "offs_stop < 1"),
    "a token past the limit": ("produced < tl.load(state.limits_ptr", "produced <= tl.load(state.limits_ptr"),
    "a token past the context": ("(past < context)", "(past <= context)"),
    "a token over the last one": (
        "past = tl.load(state.lengths_ptr + slot) + went_on",
        "past = tl.load(state.lengths_ptr + slot)",
    ),
    "slot 0's token": ("tl.load(state.tokens_ptr + slot)", "tl.load(state.tokens_ptr)"),
    "no positions": ("embedded += tl.load(wpe.ptr", "embedded += 0 * tl.load(wpe.ptr"),
    "the first layer's cache": ("self.keys[i], self.values[i]", "self.keys[0], self.values[0]"),
    "no residual": ("self._linear(hidden, layer.down, x, residual=x,", "self._linear(hidden, layer.down, x,"),
    "a row that has ended goes on": ("tl.where(goes_on, _RUNNING, _IDLE)", "_RUNNING"),
}


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_interpreted_mistake_is_caught(interpreter, monkeypatch, tmp_path, mistake):
    step = load(SOURCE, tmp_path, *MUTATIONS[mistake])
    monkeypatch.setattr("fastgpt2_kernels.triton.decode.step.DecodeStep", step.DecodeStep)
    with pytest.raises(AssertionError):
        check_rows_that_end(interpreter)
