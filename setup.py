"""The optional C++ extension of the native backend; everything else is in pyproject.toml.

One source is compiled once for every instruction set, so each object has flags of its own. Without a C++ compiler, or
with one that does not know these flags, the package is installed without the extension and runs on PyTorch's operators.
"""

import os
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

X86 = {
    # Best first.
    "avx512_bf16": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx512vnni",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl",
    "avx2": "",
}
X86_BASE = "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mmovbe"  # x86-64-v3
ISAS = {}
if platform.machine() in ("x86_64", "AMD64", "amd64"):
    ISAS = {name: f"{X86_BASE} {flags}".split() for name, flags in X86.items()}
elif platform.machine() in ("aarch64", "arm64"):
    ISAS = {"neon": []}
# Multiply and add are fused only where the source says so. So inlining a function never changes the bits of its result.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
# GCC 12 warns about its own headers for AVX-512.
FLAGS += ["-fno-exceptions", "-fno-rtti", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
FLAGS += [*os.environ.get("FASTGPT2_NATIVE_FLAGS", "").split()]
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []
SOURCES = "kernels/native/"
HEADERS = [SOURCES + name for name in ("api.h", "attention.h", "linear.h", "sampling.h", "simd.h", "team.h")]


class BuildNative(build_ext):
    def build_extension(self, extension):
        target = self.get_ext_fullpath(extension.name)
        if os.path.exists(target):
            os.remove(target)  # if this build fails, an older extension must not be used instead
        isas = " ".join(f"apply({name})" for name in ISAS)
        compile_one = [(SOURCES + "kernels.cpp", [("FASTGPT2_ISA", name)], flags) for name, flags in ISAS.items()]
        compile_one += [
            (SOURCES + "module.cpp", [("FASTGPT2_ISAS(apply)", isas), ("Py_LIMITED_API", "0x030A0000")], [])
        ]
        objects = []
        for source, macros, flags in compile_one:
            objects += self.compiler.compile(
                [source],
                # One folder per instruction set, because all are compiled from one source.
                output_dir=os.path.join(self.build_temp, macros[0][1] if len(macros) == 1 else "module"),
                macros=macros,
                include_dirs=extension.include_dirs,
                extra_postargs=[*FLAGS, *OPENMP, *flags],
                depends=extension.depends,
            )
        self.compiler.link_shared_object(
            objects,
            target,
            extra_postargs=[*OPENMP, *os.environ.get("FASTGPT2_NATIVE_FLAGS", "").split()],
            target_lang="c++",
        )


class Wheel(bdist_wheel):
    def get_tag(self):
        python, abi, system = super().get_tag()
        return ("cp310", "abi3", system) if python.startswith("cp") else (python, abi, system)


native = Extension(
    "fastgpt2_kernels.native._native",
    [SOURCES + "module.cpp", SOURCES + "kernels.cpp"],
    depends=HEADERS,
    py_limited_api=True,
    optional=True,
)

if __name__ == "__main__":  # a test reads the flags
    setup(
        ext_modules=[native] if ISAS and os.name == "posix" else [],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    )
