"""The table of backends in docs/kernels.md agrees with the code."""

from __future__ import annotations

import re
from pathlib import Path

from fastgpt2_kernels import ops

PAGE = Path(__file__).resolve().parent.parent / "docs/kernels.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_table_of_backends_is_the_real_one():
    header, *rows = re.findall(r"^\| (operator|`\w+`) \| ?(.*) \| ?(.*) \| ?(.*) \|$", TEXT, re.MULTILINE)
    names = header[1:]
    table = {row[0].strip("`"): {name for name, has in zip(names, row[1:], strict=True) if has} for row in rows}
    assert table == {operator: set(ops.backends_of(operator)) for operator in ops.OPERATORS}
