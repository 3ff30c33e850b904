"""The versions in pyproject.toml can be installed together. PyTorch's GPU wheels each pin one version of Triton."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
# From the metadata of PyTorch's wheels for CUDA.
PINNED = {"2.9.1": "3.5.1", "2.10.0": "3.6.0", "2.11.0": "3.6.0", "2.12.1": "3.7.1", "2.13.0": "3.7.1"}


def test_every_torch_goes_with_its_triton() -> None:
    found = re.findall(r'^\s*(?:triton = \[)?"((?:torch|triton)>=[^"]*)"', PYPROJECT.read_text("utf-8"), re.MULTILINE)
    declared = [Requirement(text) for text in found]
    torch = [requirement for requirement in declared if requirement.name == "torch"]
    triton = [requirement for requirement in declared if requirement.name == "triton"]
    assert (len(torch), len(triton)) == (1, 2)
    for version, pinned in PINNED.items():
        if torch[0].specifier.contains(version):
            assert all(requirement.specifier.contains(pinned) for requirement in triton), version
    assert torch[0].specifier.contains("2.13.0")
