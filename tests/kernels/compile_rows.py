"""Compile every launch row for every target, without a GPU, and print what came out as JSON lines.

A program of its own (`python -m tests.kernels.compile_rows [TARGET ...]`), because Triton compiles nothing in a process
whose interpreter is on.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tests.kernels.attention_rows import attention_cases
from tests.kernels.compiling import TARGETS, Case, compile_case
from tests.kernels.cross_entropy_rows import cross_entropy_cases
from tests.kernels.decode_rows import decode_cases
from tests.kernels.layer_rows import layer_cases
from tests.kernels.linear_rows import linear_cases
from tests.kernels.sampling_rows import sampling_cases


@functools.cache
def cases(target: str) -> list[Case]:
    kernels = (attention_cases, cross_entropy_cases, decode_cases, layer_cases, linear_cases, sampling_cases)
    return [case for of_kernel in kernels for case in of_kernel(target)]


def compiled(job: tuple[str, int]) -> dict[str, Any]:
    target, index = job
    start = time.perf_counter()
    row = compile_case(cases(target)[index], TARGETS[target])
    return {"target": target, **row, "seconds": time.perf_counter() - start}


def main() -> None:
    jobs = [(target, index) for target in sys.argv[1:] or TARGETS for index in range(len(cases(target)))]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(compiled, jobs):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
