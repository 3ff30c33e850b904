"""The public names of the package are loaded when they are first used, and otherwise behave like any module's names."""

from __future__ import annotations

import ast
import importlib
import pickle
import pkgutil
import pydoc
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fastgpt2

SOURCE = ast.parse(Path(fastgpt2.__file__).read_text(encoding="utf-8"))
NAMES = [name for name in fastgpt2.__all__ if name != "__version__"]
MODULES = {module.name for module in pkgutil.iter_modules(fastgpt2.__path__)} - {"__main__"}


def test_type_checkers_see_the_names_that_are_loaded() -> None:
    """The imports under TYPE_CHECKING are the same as `_MODULES`."""
    imports = [node for node in ast.walk(SOURCE) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == {name: f"fastgpt2.{module}" for name, module in fastgpt2._MODULES.items()}
    assert sorted(seen) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_its_module_has(name: str) -> None:
    value = getattr(fastgpt2, name)
    assert value is getattr(importlib.import_module(value.__module__), name)
    assert pickle.loads(pickle.dumps(value)) is value
    assert name in dir(fastgpt2)


def test_no_name_is_also_a_module() -> None:
    """If there were a module `fastgpt2.score`, importing it would replace the function `fastgpt2.score`."""
    assert MODULES
    assert not MODULES & set(NAMES)


# Each runs in a new process, because what is loaded first could affect what a name is later.
PROGRAMS = {
    "names first": """
        import fastgpt2, sys
        assert set(fastgpt2.__all__) <= set(dir(fastgpt2))
        assert not hasattr(fastgpt2, "nothing") and not hasattr(fastgpt2, "__wrapped__")
        assert "torch" not in sys.modules
        from fastgpt2 import *
        assert GPT2.__name__ == "GPT2" and score.__name__ == "score" and __version__
        import fastgpt2.scoring, fastgpt2.selfcheck.run
        assert fastgpt2.score is score is fastgpt2.scoring.score and fastgpt2.check is check
    """,
    "modules first": """
        import fastgpt2.scoring, fastgpt2.selfcheck.run, pickle
        assert callable(fastgpt2.score) and callable(fastgpt2.check)
        assert pickle.loads(pickle.dumps(fastgpt2.GPT2Config())) == fastgpt2.GPT2Config()
    """,
    "modules without an import": """
        import fastgpt2, pkgutil
        assert callable(fastgpt2.generate.generate)
        for module in pkgutil.iter_modules(fastgpt2.__path__):
            if module.name not in ("__main__", "transformers"):
                assert getattr(fastgpt2, module.name).__name__ == "fastgpt2." + module.name
    """,
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_names_in_a_new_process(program: str) -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}\n{textwrap.dedent(PROGRAMS[program])}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'fastgpt2' has no attribute 'generator'"):
        fastgpt2.generator  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'generator'"):
        from fastgpt2 import generator  # noqa: F401


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that exists but cannot be loaded is not reported as a missing name."""
    monkeypatch.setitem(sys.modules, "fastgpt2.plans", None)  # makes the import fail as if the module did not exist
    with pytest.raises(AttributeError):
        fastgpt2.plans  # noqa: B018

    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="No module named 'torch'"):
        fastgpt2.plans  # noqa: B018


def test_help_shows_every_name() -> None:
    text = pydoc.plain(pydoc.render_doc(fastgpt2))
    assert all(name in text for name in NAMES)
