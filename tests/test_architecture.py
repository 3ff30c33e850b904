"""The house: imports point down only, only the command line prints, importing the package loads little."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A module imports only modules of lower layers at import time, or of its own layer in one direction (no circles).
LAYERS = {
    "fastgpt2.config": 0, "fastgpt2.files": 0,
    "fastgpt2.sampling": 1, "fastgpt2.cache": 1, "fastgpt2.accounting": 1, "fastgpt2.kernels": 1,
    "fastgpt2.tokenizer": 1,
    "fastgpt2.model": 2, "fastgpt2.data": 2,
    "fastgpt2.loss": 3, "fastgpt2.decode": 3, "fastgpt2.checkpoint": 3,
    "fastgpt2.generate": 4,
    "fastgpt2": 5, "fastgpt2.integrations": 5, "fastgpt2.records": 5,
    "fastgpt2.train": 6,
    "fastgpt2.cli": 7,
    "fastgpt2.__main__": 8,
}  # fmt: skip
PACKAGES = [*sorted((ROOT / "fastgpt2").rglob("*.py")), *sorted((ROOT / "kernels/fastgpt2_kernels").rglob("*.py"))]
LAZY = ("triton", "transformers", "tokenizers", "safetensors", "tqdm", "huggingface_hub")


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts else ROOT)
    return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(imported module, name or "", inside a function or for type checking only) of every import in a file."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, "", lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                yield from ((child.module or "", alias.name, lazy) for alias in child.names)
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from visit(child, lazy or typing_only or inside)

    return visit(ast.parse(path.read_text(encoding="utf-8")), False)


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    return LAYERS.get(".".join(parts[:2]))


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    name = module_name(path)
    for module, imported, lazy in imports(path):
        top = module.split(".")[0]
        full = f"{module}.{imported}".rstrip(".")
        assert top not in ("benchmarks", "tests"), f"{name} imports {module}"
        if name.startswith("fastgpt2_kernels"):
            assert top != "fastgpt2", f"{name} imports {module}"
            if top == "triton":
                # Kernel files only: the operators and what they are made of load without Triton.
                assert name.startswith("fastgpt2_kernels.triton.")
                assert name != "fastgpt2_kernels.triton.launch"
            continue
        assert top != "triton", f"{name} imports triton"
        if top == "fastgpt2_kernels":
            assert "fastgpt2_kernels.ops" in (module, full), f"{name} goes past the door: {full}"
        if lazy or top != "fastgpt2" or name == "fastgpt2":
            continue
        target = layer_of(full if module == "fastgpt2" else module)
        own = layer_of(name)
        assert own is not None, f"{name} has no layer; give it one in this test"
        assert target is not None, f"{name} imports {full}, which has no layer; give it one in this test"
        same_package = name.split(".")[:2] == full.split(".")[:2]
        assert target < own or same_package, f"{name} (layer {own}) imports {full} (layer {target})"


def test_only_the_command_line_prints():
    for path in PACKAGES:
        if "cli" in path.parts:
            continue
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls), path


def test_no_bare_asserts_in_the_package():
    for path in PACKAGES:
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text()))), path


def test_the_folder_kernels_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists()


def test_every_package_is_installed():
    """A wheel holds what pyproject.toml lists; an editable install would hide what is missing there."""
    listed = re.search(r"^packages = (\[.*?\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listed is not None
    folders = {module_name(path) for path in PACKAGES if path.name == "__init__.py"}
    assert set(ast.literal_eval(listed[1])) == folders


def python(code: str, *paths: Path) -> str:
    path = os.pathsep.join(map(str, (*paths, ROOT, ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    code = f"import sys, torch; before = set(sys.modules); import fastgpt2; \
print(*[m for m in {LAZY!r} if m in set(sys.modules) - before])"
    assert python(code) == ""


@pytest.mark.parametrize("with_kernels", [False, True], ids=["without", "with"])
def test_transformers_imports_from_the_root(with_kernels, tmp_path):
    if with_kernels:  # a stand-in for Hugging Face's library of that name
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels/__init__.py").write_text("__version__ = '0.0.1'\n")
    assert python("from transformers import GPT2Config; print(GPT2Config().n_embd)", tmp_path) == "768"
