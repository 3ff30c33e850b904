"""Compile every launch row for every target, without a GPU, and print what came out as JSON lines.

A program of its own (`python -m tests.kernels.compile_rows`), because Triton compiles nothing in a process whose
interpreter is on.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgpt2_kernels import cross_entropy, launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def cross_entropy_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """(name, kernel, signature, constants, warps): every row of the table, every mode, an odd vocabulary."""
    kernel = cross_entropy._cross_entropy_kernel
    for vocab_size in (50257, 4096, 512):
        row = launch.cross_entropy_row(vocab_size)
        for dtype, align in (("bf16", 8), ("fp32", 4)):
            for mode in ("forward", "backward", "fused"):
                constants = {
                    "SHIFT": False,
                    "HAS_WEIGHT": False,
                    "HAS_SMOOTHING": False,
                    "HAS_Z": False,
                    "HAS_STATS": False,
                    "IS_FORWARD": mode != "backward",
                    "HAS_GRAD": mode != "forward",
                    "ALIGN": align,
                    "GRAD_ALIGN": align,
                    "BLOCK_V": row.block_v,
                    "MID_V": row.mid_v,
                }
                types = {"logits_ptr": dtype, "weight_ptr": dtype, "grad_ptr": dtype}
                types |= {"targets_ptr": "i64", "correct_ptr": "i32"}
                signature = {}
                for name in kernel.arg_names:
                    if name in constants:
                        signature[name] = "constexpr"
                    elif name.endswith("_ptr"):
                        signature[name] = "*" + types.get(name, "fp32")
                    else:
                        signature[name] = "fp32" if name in ("smoothing", "z_loss") else "i32"
                yield f"cross_entropy {mode} {dtype} block {row.block_v}", kernel, signature, constants, row.num_warps


def compile_case(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], num_warps: int, target: GPUTarget
) -> dict[str, Any]:
    pointers = [i for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps, **launch.OPTIONS})
    result = {"shared": compiled.metadata.shared}
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        spills = [int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)]
        result["spills"] = sum(spills)
        result["registers"] = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
        result["wide_loads"] = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
        result["wide_stores"] = len(re.findall(r"(?:global|buffer)_store_dwordx4", text))
        return result
    ptx = compiled.asm["ptx"]
    result["wide_loads"] = len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx))
    result["wide_stores"] = len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    result["registers"] = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    result["spills"] = int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
    return result


def main() -> None:
    for name, *case in cross_entropy_cases():
        for target_name, target in TARGETS.items():
            print(json.dumps({"case": name, "target": target_name, **compile_case(*case, target)}), flush=True)


if __name__ == "__main__":
    main()
