"""Every instruction set is compiled if the compiler can, and tested if this processor has it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt2_kernels import native
from tests.native.building import COMPILER, ROOT, SOURCES, build, run_tests, setup_file

pytestmark = pytest.mark.skipif(
    native.why_not_native() is not None, reason=f"native backend: {native.why_not_native()}"
)

OPERATORS = [f"tests/native/test_{name}.py" for name in ("linear", "attention", "sampling", "step")]


def run(code: str, **environment: str) -> str:
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, **environment}, check=True,
        capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip


def test_all_that_setup_names_were_compiled():
    assert list(native.isas()) == list(setup_file().ISAS)


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in native.isas() or COMPILER is None, reason="needs x86 and a C++ compiler")
def test_the_code_for_aarch64_on_four_lanes_of_x86(tmp_path):
    """Without AVX2 the sources use their code for AArch64. A header replaces its few intrinsics."""
    shim = str(Path(__file__).parent / "neon_on_x86.h")
    extension = build(tmp_path, ["avx2"], ["-O2"], isa_flags=["-mfma", "-include", shim])
    result = run_tests(extension, OPERATORS, **{native.ISA_VARIABLE: "avx2", "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_variable_chooses_the_instruction_set(monkeypatch):
    usable = [name for name, is_usable in native.isas().items() if is_usable]
    choose = native._choice.__wrapped__
    for wanted, chosen in (("", usable[0]), (usable[-1], usable[-1])):
        monkeypatch.setenv(native.ISA_VARIABLE, wanted)
        assert choose() == (chosen, None)
    monkeypatch.setenv(native.ISA_VARIABLE, "sse9")
    assert "must be one of" in choose()[1]
    code = "from fastgpt2_kernels import native; print(native.isa())"
    assert run(code, **{native.ISA_VARIABLE: usable[-1]}) == usable[-1]


def test_without_the_extension_it_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastgpt2_kernels.native._native", None)
    assert "without a suitable C++ compiler" in native._extension.__wrapped__()[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_library_in_the_process():
    code = """
import torch
from fastgpt2_kernels.native import decode
from fastgpt2_kernels.types import LinearWeights
torch.set_num_threads(2)
torch.randn(400, 400) @ torch.randn(400, 400)
decode.linear(torch.randn(3, 60), decode.pack_linear(LinearWeights(torch.randn(200, 60))))
lines = [line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]]
print("\\n".join(sorted(set(lines))))
"""
    libraries = run(code).splitlines()
    assert len([name for name in libraries if "gomp" in name]) == 1, libraries
    assert len(libraries) == 1, libraries


@pytest.mark.skipif(platform.machine() not in ("aarch64", "arm64") and not shutil.which("aarch64-linux-gnu-g++"),
                    reason="needs a compiler for AArch64")  # fmt: skip
def test_aarch64_compiles(tmp_path):
    compiler = COMPILER if platform.machine() in ("aarch64", "arm64") else "aarch64-linux-gnu-g++"
    source = ["-DFASTGPT2_ISA=neon", "-c", str(SOURCES / "kernels.cpp"), "-o", str(tmp_path / "neon.o")]
    subprocess.run([str(compiler), *setup_file().FLAGS, *source], check=True)


def test_without_a_compiler_the_build_goes_through(tmp_path):
    build = ["build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    nowhere = {"CC": "/nonexistent", "CXX": "/nonexistent"}
    result = subprocess.run(
        [sys.executable, "setup.py", *build], cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_the_sources_are_short():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in Path(SOURCES).iterdir())
    assert lines < 1500, f"{lines} lines"
