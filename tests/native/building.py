"""Compile the native sources apart from the package: for one instruction set, with other flags, or with a mistake."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "kernels/native"
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
# `python -c LOADER EXTENSION ARGUMENTS` runs pytest with another extension instead of the package's own.
LOADER = """
import importlib.util, sys
import torch
name = "fastgpt2_kernels.native._native"
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def setup_file() -> ModuleType:
    """Load setup.py as a module, without running the setup."""
    spec = importlib.util.spec_from_file_location("native_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(
    folder: Path, isas: Sequence[str], flags: Sequence[str] = ("-O1",), right: str = "", wrong: str = "",
    file: str = "", isa_flags: Sequence[str] | None = None,
) -> Path:  # fmt: skip
    """Compile the extension for some instruction sets in `folder`. In `file`, `wrong` replaces `right`.

    isa_flags: compiler flags that replace those of setup.py for an instruction set.
    """
    assert COMPILER is not None, "no C++ compiler"
    setup = setup_file()
    sources = folder / "sources"
    shutil.copytree(SOURCES, sources)
    if right:
        text = (sources / file).read_text(encoding="utf-8")
        assert text.count(right) == 1, f"{file} has changed: adapt this mistake to it"
        (sources / file).write_text(text.replace(right, wrong), encoding="utf-8")
    include = subprocess.run(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_paths()['include'])"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    common = [COMPILER, *setup.FLAGS, *flags, "-fPIC", *setup.OPENMP, f"-I{include}"]
    objects = []
    for isa in isas:
        objects.append(f"{folder}/{isa}.o")
        own = [
            *(setup.ISAS[isa] if isa_flags is None else isa_flags),
            f"-DFASTGPT2_ISA={isa}",
            "-c",
            str(sources / "kernels.cpp"),
            "-o",
            objects[-1],
        ]
        subprocess.run([*common, *own], check=True)
    names = " ".join(f"apply({isa})" for isa in isas)
    extension = folder / "_native.abi3.so"
    module = [f"-DFASTGPT2_ISAS(apply)={names}", "-DPy_LIMITED_API=0x030A0000", str(sources / "module.cpp"), *objects]
    subprocess.run([*common, *module, "-shared", "-o", str(extension)], check=True)
    return extension


def run_tests(extension: Path | None, arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a separate process with this extension. With None, use the package's own."""
    start = ["-m", "pytest"] if extension is None else ["-c", LOADER, str(extension)]
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    return subprocess.run(
        [sys.executable, *start, "-q", "-x", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True,
    )  # fmt: skip
