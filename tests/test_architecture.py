"""The structure of the package: imports point down, only the command line prints, `import fastgpt2` loads little."""

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
PACKAGES = [*sorted((ROOT / "fastgpt2").rglob("*.py")), *sorted((ROOT / "kernels/fastgpt2_kernels").rglob("*.py"))]
LAZY = ("triton", "transformers", "tokenizers", "safetensors", "tqdm", "huggingface_hub", "pyarrow", "datasets")
LAZY += ("matplotlib", "peft", "tensorboard", "wandb", "lm_eval")
# Parts of PyTorch that need another library, or take seconds to load.
LAZY_TORCH = ("torch.distributed.checkpoint", "torch.distributed.device_mesh", "torch.distributed.fsdp")
LAZY_TORCH += ("torch.distributed.tensor", "torch.utils.tensorboard")


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts else ROOT)
    return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """The full name of every module that a file imports, including imports inside functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


MODULES = {module_name(path): path for path in PACKAGES}


def imports_within_functions(path: Path) -> Iterator[str]:
    """The top-level package of every import inside a function. For PyTorch's lazy parts, the full name."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                for name in names:
                    yield next((part for part in LAZY_TORCH if name.startswith(part)), name.split(".")[0])


def picture() -> list[list[str]]:
    """The names on each line of CONTRIBUTING's picture of the package, lowest line first.

    On a line, two spaces or more separate the names from their description.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.split("## The package\n")[1].split("```\n")[1]
    return [line.partition("  ")[0].replace("/", "").split() for line in reversed(block.splitlines())]


LAYERS = picture()


def layer_of(module: str) -> int:
    name = (module.split(".")[1:] or ["fastgpt2"])[0]
    layers = [number for number, names in enumerate(LAYERS) if name in names]
    assert len(layers) == 1, f"{module} must be in CONTRIBUTING's picture of the package exactly once"
    return layers[0]


def test_the_picture_shows_what_there_is():
    there = {(name.split(".")[1:] or ["fastgpt2"])[0] for name in MODULES if name.split(".")[0] == "fastgpt2"}
    assert {name for names in LAYERS for name in names} == there


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    for imported in imports(MODULES[name]):
        top = imported.split(".")[0]
        assert top not in ("benchmarks", "tests"), f"{name} imports {imported}"
        if name.startswith("fastgpt2_kernels"):
            assert top != "fastgpt2", f"{name} imports {imported}"
            if top == "triton":
                # Only kernel files import Triton, so that the operators load without it.
                assert name.startswith("fastgpt2_kernels.triton.")
                assert name != "fastgpt2_kernels.triton.launch"
            continue
        assert top != "triton", f"{name} imports triton"
        if top == "fastgpt2_kernels":
            public = ("fastgpt2_kernels.ops", "fastgpt2_kernels.checking")
            assert imported.startswith(public), f"{name} imports {imported}, not the public operators"
        if top == "fastgpt2":
            same_folder = name.split(".")[:2] == imported.split(".")[:2]
            own, other = layer_of(name), layer_of(imported)
            assert other < own or same_folder, f"{name} (layer {own}) imports {imported} (layer {other})"


def test_no_circles():
    """Following a module's imports never leads back to it. Imports inside functions and for type checking count."""
    remaining = {name: set(imports(path)) & MODULES.keys() - {name} for name, path in MODULES.items()}
    while free := [name for name, imported in remaining.items() if not imported & remaining.keys()]:
        for name in free:
            del remaining[name]
    assert not remaining, (
        f"these modules import each other in a circle, or import from such a circle: {', '.join(sorted(remaining))}"
    )


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] == "fastgpt2"])
def test_imports_within_functions_are_of_what_not_everybody_has_or_needs(name):
    # Only POSIX has fcntl.
    allowed = {*LAZY, *LAZY_TORCH, "fcntl"}
    assert set(imports_within_functions(MODULES[name])) <= allowed


def test_only_the_command_line_prints():
    for path in PACKAGES:
        if "cli" in path.parts:
            continue
        calls = (
            node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        )
        assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls), path


def test_no_bare_asserts_in_the_package():
    for path in PACKAGES:
        assert not any(
            isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        ), path


def test_the_folder_kernels_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists()


def test_every_package_is_installed():
    """A wheel holds what pyproject.toml lists. An editable install would hide a package that is missing there."""
    listed = re.search(
        r"^packages = (\[.*?\])$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert listed is not None
    folders = {module_name(path) for path in PACKAGES if path.name == "__init__.py"}
    assert set(ast.literal_eval(listed[1])) == folders


def python(code: str, *paths: Path) -> str:
    path = os.pathsep.join(map(str, (*paths, ROOT, ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = "print(*sorted({name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names - before))"


@pytest.mark.parametrize("what", ["import fastgpt2", "from fastgpt2.cli import main"])
def test_import_loads_nothing(what):
    before = "before = {name.split('.')[0] for name in sys.modules}"
    assert python(f"import sys; {before}; {what}; {LOADED}") == "fastgpt2"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_the_command_line_without_a_command_loads_nothing(arguments):
    code = f"import sys; before = {{name.split('.')[0] for name in sys.modules}}; import contextlib, os\n\
from fastgpt2.cli import main\n\
with contextlib.suppress(SystemExit), open(os.devnull, 'w') as out, contextlib.redirect_stdout(out), \
contextlib.redirect_stderr(out):\n    main({arguments})\n\
{LOADED}"
    assert python(code) == "fastgpt2"


def test_the_public_names_are_light():
    """Loading them loads torch and numpy, and nothing else that is heavy or optional."""
    code = f"import sys, torch; before = set(sys.modules); from fastgpt2 import *; GPT2; \
print(*[m for m in {(*LAZY, *LAZY_TORCH)!r} if m in set(sys.modules) - before])"
    assert python(code) == ""


@pytest.mark.parametrize("with_kernels", [False, True], ids=["without", "with"])
def test_transformers_imports_from_the_root(with_kernels, tmp_path):
    if with_kernels:  # a stand-in for Hugging Face's library `kernels`
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels/__init__.py").write_text("__version__ = '0.0.1'\n", encoding="utf-8")
    assert python("from transformers import GPT2Config; print(GPT2Config().n_embd)", tmp_path) == "768"
