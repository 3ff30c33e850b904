"""Parts of `make gpu` at toy size, with the real kernels; without a GPU they run under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_parts import PARTS, Place, without_fallbacks

QUICK = ("attention",)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PARTS]
)
def test_a_part(name: str, triton_device: str) -> None:
    device = torch.device(triton_device, 0) if triton_device == "cuda" else torch.device(triton_device)
    place = Place(device, is_toy=True)
    assert place.backend == "triton"
    precision, found = torch.get_float32_matmul_precision(), {}
    try:
        with without_fallbacks():
            PARTS[name].run(place, found)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert found
