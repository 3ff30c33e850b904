"""The time that `from fastgpt2 import GPT2` takes after `import torch`: `python benchmarks/import_time.py [RUNS]`."""

from __future__ import annotations

import statistics
import subprocess
import sys

_CODE = "import time, torch; t = time.perf_counter(); from fastgpt2 import GPT2; print((time.perf_counter() - t) * 1e3)"


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    times_ms = [float(subprocess.check_output([sys.executable, "-c", _CODE])) for _ in range(runs)]
    median_ms, best_ms = statistics.median(times_ms), min(times_ms)
    print(f"from fastgpt2 import GPT2: {median_ms:.1f} ms after import torch (median of {runs}, best {best_ms:.1f})")


if __name__ == "__main__":
    main()
