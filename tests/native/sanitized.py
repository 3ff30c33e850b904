"""Run the native tests on an extension compiled with AddressSanitizer and UndefinedBehaviorSanitizer.

Run it as `python -m tests.native.sanitized` from the root of the repository; see `make sanitize-native`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from fastgpt2_kernels import native
from tests.native.building import COMPILER, build, run_tests

FLAGS = [
    "-O1", "-g", "-Wall", "-Wextra", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]  # fmt: skip
TESTS = [f"tests/native/test_{name}.py" for name in ("linear", "attention", "sampling", "step")]


def main() -> int:
    if COMPILER is None:
        print("sanitize-native: there is no C++ compiler")
        return 1
    found = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    failed = 0
    for isa in [name for name, is_usable in native.isas().items() if is_usable]:
        with tempfile.TemporaryDirectory() as folder:
            extension = build(Path(folder), [isa], FLAGS)
            result = run_tests(
                extension, TESTS, LD_PRELOAD=" ".join(found), ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="1",
                UBSAN_OPTIONS="print_stacktrace=1", FASTGPT2_NATIVE_ISA=isa,
            )  # fmt: skip
        failed += result.returncode != 0
        print(f"{isa}: {'failed' if result.returncode else 'passed'}\n{result.stdout[-3000:]}{result.stderr[-6000:]}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
