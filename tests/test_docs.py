"""The snippets in README, docs/ and examples/ run as they are. The files, tests and errors that they name exist."""

from __future__ import annotations

import ast
import doctest
import importlib
import io
import re
import runpy
import secrets
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SNIPPETS = [
    (f"{page.relative_to(ROOT).as_posix()}:{number}", text)
    for page in PAGES
    for number, text in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SLOW_EXAMPLES = {"ray_generate"}  # starting Ray takes ten seconds
# Arguments and stdin that make an example quick. Without them it does more of the same.
ARGUMENTS = {"generate_batch": ["--num-samples", "2", "--max-new-tokens", "4"], "train_from_scratch": ["--steps", "2"]}
ARGUMENTS |= {
    "stream_chat": ["--max-new-tokens", "4"],
    "finetune_hf_trainer": ["--steps", "2"],
    "lora": ["--steps", "2"],
}
ARGUMENTS |= {"ray_generate": ["--num-samples", "1", "--max-new-tokens", "4"]}
ARGUMENTS |= {"score_and_rank": ["--num-samples", "4", "--max-new-tokens", "4"]}
STDIN = {"stream_chat": "class Queue:\n\n"}
MAX_LINES = 60


@pytest.mark.parametrize(("name", "snippet"), SNIPPETS, ids=[name for name, _ in SNIPPETS])
def test_snippets_run(name: str, snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, name, "exec"), {})


def test_pages_have_snippets() -> None:
    pages = {name.split(":")[0] for name, _ in SNIPPETS}
    assert {"README.md", "docs/quickstart.md", "docs/training.md"} <= pages


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if path.stem in SLOW_EXAMPLES else []) for path in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    if path.stem == "ray_generate":
        pytest.importorskip("ray", reason="Ray Data is not installed: pip install 'fastgpt2[ray]'")
        monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # without it Ray writes one into the home folder
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS.get(path.stem, [])])
    monkeypatch.setattr(sys, "stdin", io.StringIO(STDIN.get(path.stem, "")))
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_say_how_to_run_them(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAX_LINES
    said, how_to_run = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")
    assert len(said.splitlines()) <= 2
    assert f"python examples/{path.name}" in how_to_run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_pages_name_exist(page: Path) -> None:
    """Links to files of the repository, and tests in code spans, name existing files."""
    text = page.read_text(encoding="utf-8")
    named = {ROOT / test for test in re.findall(r"`(tests/[\w/]+\.py)`", text)}
    named |= {page.parent / link for link in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", text)}
    missing = sorted(str(path) for path in named if not path.exists())
    assert not missing


def test_every_promise_names_a_test() -> None:
    promised = (ROOT / "docs/reliability.md").read_text(encoding="utf-8").split("## What is not promised")[0]
    rows = [line for line in promised.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 10
    assert all("`tests/" in row.rsplit("|", 2)[1] for row in rows)


def test_the_errors_that_the_faq_explains_exist() -> None:
    quoted = re.findall(r'^\*\*"(.+)"\.\*\*', (ROOT / "docs/faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    sources = [*(ROOT / "fastgpt2").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    # Join the string literals that are split over several lines.
    text = "".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in sources)
    assert len(quoted) > 5
    assert not [error for error in quoted if error not in text]


DOCUMENTED = (
    "fastgpt2.cache",
    "fastgpt2.config.model",
    "fastgpt2.gpt2",
    "fastgpt2_kernels.ops.attention",
    "fastgpt2_kernels.ops.layers",
    "fastgpt2_kernels.ops.loss",
)


@pytest.mark.parametrize("module", DOCUMENTED)
def test_examples_in_docstrings_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted
    assert not result.failed


def test_the_figures_are_what_their_script_draws(tmp_path: Path) -> None:
    """Each figure is on the kernels' page, and has the words that its script writes.

    Only words are compared, because fonts differ between versions of matplotlib.
    """
    docs = ROOT / "docs"
    runpy.run_path(str(docs / "figures.py"))["main"](tmp_path)
    page = (docs / "kernels.md").read_text(encoding="utf-8")
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (docs / "img").glob("*.svg") if not path.is_symlink()}
    for name in drawn:
        assert f"(img/{name})" in page
        new, kept = (
            re.findall(r"<text[^>]*>([^<]*)", (folder / name).read_text()) for folder in (tmp_path, docs / "img")
        )
        assert new == kept, f"{name}: draw it again with python docs/figures.py"
