"""Compile the launch rows for every target, without a GPU, and print the results as JSON lines.

Run it as `python -m tests.kernels.compile_rows [--representative] [TARGET ...]`. It is a separate program because
Triton compiles nothing in a process whose interpreter is on. With `--representative` fewer rows are compiled; of the
others only the names are printed.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import triton

from tests.kernels.attention_rows import attention_cases
from tests.kernels.compiling import TARGETS, Case, compile_case, members
from tests.kernels.cross_entropy_rows import cross_entropy_cases
from tests.kernels.decode_rows import decode_cases
from tests.kernels.layer_rows import layer_cases
from tests.kernels.linear_rows import linear_cases
from tests.kernels.sampling_rows import sampling_cases

# With `--representative`, this row represents each kernel and dtype: the sizes of GPT-2 124M, which are used most.
REPRESENTATIVE = re.compile(
    "|".join(
        (
            r"attention (forward|dq|dkdv) (half|ieee) head 64 \d+x\d+",
            r"bias_activation gelu_tanh (forward|backward) (bf16|fp32) 3072",
            r"cross_entropy fused (bf16|fp16|fp32) block 8192",
            r"cross_entropy (forward|backward) bf16 block 8192",
            r"decode_attention cores 1 new bf16 head 64 HAS_STARTS HAS_SLOTS INDIRECT",
            r"decode_attention (dot 8 new bf16|cores 8 new fp32) head 64 HAS_STARTS HAS_SLOTS",
            r"decode_begin .*",
            r"decode_combine .*",
            r"layer_norm (forward|backward) (bf16|fp32) 768",
            r"layer_norm (forward|backward) bf16 20000",
            r"linear_decode layer_norm bf16 768 to (2304, 1 rows|3072, 16 rows), \S+( ACTIVATION)?",
            r"linear_decode layer_norm (fp32 768 to 2304|bf16 128 to 384), 1 rows, \S+",
            r"linear_decode (combine bf16 768|none (bf16|fp32) 3072) to 768, 1 rows, \S+",
            r"linear_decode none bf16 6400 to 1600, 16 rows, \S+ int8",
            r"partial_sums .*",
            r"scale_rows .*",
            r"sample fp32 block \d+ (IS_GREEDY|HAS_PENALTY HAS_MIN_P)",
            r"sample bf16 block \d+ HAS_PENALTY HAS_TOP_K HAS_TOP_P HAS_MIN_P",
        )
    )
)

# Targets that are close to another target: each kernel is compiled once for one of them.
FEWER = {
    "sm_86": r"attention (forward|dq|dkdv) half head 64 \d+x\d+",
    "sm_89": r"(linear_decode layer_norm bf16 768 to 2304, 1 rows,|sample fp32 block \d+ IS_GREEDY|decode_begin).*",
    "sm_120": r"(cross_entropy fused bf16 block 8192|layer_norm (forward|backward) bf16 (768|20000)|scale_rows bf16.*)",
    "gfx90a": r"(decode_attention cores 1 new bf16 head 64 HAS_STARTS HAS_SLOTS INDIRECT|decode_combine bf16.*)",
    "gfx950": r"(bias_activation gelu_tanh (forward|backward) bf16 3072|partial_sums.*)",
}


@functools.cache
def cases(target: str) -> list[Case]:
    kernels = (attention_cases, cross_entropy_cases, decode_cases, layer_cases, linear_cases, sampling_cases)
    return [case for of_kernel in kernels for case in of_kernel(target)]


def described(target: str, case: Case) -> dict[str, Any]:
    pointers = (kind for _, _, kind in members(case.signature) if kind is not None)
    floats = {kind.removeprefix("*") for kind in pointers if re.fullmatch(r"\*(bf|fp)\d+", kind)}
    names = {"target": target, "case": case.name, "kernel": case.kernel.__name__}
    return {**names, "dtypes": sorted(floats), "triton": triton.__version__}


def compiled(job: tuple[str, int]) -> dict[str, Any]:
    target, index = job
    case = cases(target)[index]
    start = time.perf_counter()
    row = compile_case(case, TARGETS[target])
    return {**described(target, case), **row, "seconds": time.perf_counter() - start}


def main() -> None:
    arguments = sys.argv[1:]
    is_some = "--representative" in arguments
    targets = [argument for argument in arguments if argument != "--representative"] or list(TARGETS)
    jobs = []
    for target in targets:
        for index, case in enumerate(cases(target)):
            if is_some and not re.fullmatch(FEWER.get(target, REPRESENTATIVE), case.name):
                print(json.dumps(described(target, case)))
            else:
                jobs.append((target, index))
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(compiled, jobs):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
