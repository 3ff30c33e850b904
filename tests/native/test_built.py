"""The other tests here are skipped if the extension is missing. This one fails if it could have been built."""

from __future__ import annotations

import pytest

from fastgpt2_kernels import native
from tests.native.building import COMPILER


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_the_extension_was_built():
    assert native.isas(), f"there is a C++ compiler but no extension: {native.why_not_native()}"
