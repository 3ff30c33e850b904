"""The README's Python snippets run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastgpt2_kernels import ops

README = Path(__file__).resolve().parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


def test_the_table_of_backends_is_the_real_one():
    header, *rows = re.findall(r"^\| (operator|`\w+`) \| ?(.*) \| ?(.*) \| ?(.*) \|$", TEXT, re.MULTILINE)
    names = header[1:]
    table = {row[0].strip("`"): {name for name, has in zip(names, row[1:], strict=True) if has} for row in rows}
    assert table == {operator: set(ops.backends_of(operator)) for operator in ops.OPERATORS}
