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


# What the cross-entropy kernel can be asked for besides; each compiled once, fused, at an odd vocabulary.
FLAGS = ("SHIFT", "HAS_WEIGHT", "HAS_SMOOTHING", "HAS_STATS", "HAS_Z")
VARIANTS = [
    ("SHIFT",),
    ("HAS_SMOOTHING",),
    ("HAS_Z",),
    ("HAS_WEIGHT", "HAS_SMOOTHING"),
    ("HAS_STATS",),
    FLAGS,
]


def cross_entropy_cases(capability: tuple[int, int] | None) -> Iterator[tuple[str, Any, dict, dict, int, dict]]:
    """(name, kernel, signature, constants, warps, options): every row of the table, every mode, an odd vocabulary."""
    kernel = cross_entropy._cross_entropy_kernel
    modes = ("forward", "backward", "fused")
    cases = [(V, dtype, mode, ()) for V in (50257, 4096, 512) for dtype in ("bf16", "fp32") for mode in modes]
    cases += [(50257, dtype, "fused", flags) for dtype in ("bf16", "fp32") for flags in VARIANTS]
    cases += [
        (50257, "fp16", "fused", ()),
        (50257, "bf16", "backward", ("SHIFT", "HAS_WEIGHT", "HAS_SMOOTHING", "HAS_Z")),
    ]
    for vocab_size, dtype, mode, flags in cases:
        element_size = 4 if dtype == "fp32" else 2
        has_extras = bool({"HAS_WEIGHT", "HAS_SMOOTHING", "HAS_STATS"} & set(flags))
        row = launch.cross_entropy_row(vocab_size, capability, element_size=element_size, has_extras=has_extras)
        align = 16 // element_size
        constants = {
            **{flag: flag in flags for flag in FLAGS},
            "IS_FORWARD": mode != "backward",
            "HAS_GRAD": mode != "forward",
            "ALIGN": align,
            "GRAD_ALIGN": align,
            "BLOCK_V": row.block_v,
            "MID_V": row.mid_v,
        }
        types = {"logits_ptr": dtype, "weight_ptr": dtype, "grad_ptr": dtype}
        types |= {"targets_ptr": "i32" if "SHIFT" in flags else "i64", "correct_ptr": "i32"}
        signature = {}
        for name in kernel.arg_names:
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                signature[name] = "*" + types.get(name, "fp32")
            else:
                signature[name] = "fp32" if name in ("smoothing", "z_loss") else "i32"
        name = " ".join(["cross_entropy", mode, dtype, f"block {row.block_v}", *flags])
        yield name, kernel, signature, constants, row.num_warps, row.options


def compile_case(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    options: dict[str, Any],
    target: GPUTarget,
) -> dict[str, Any]:
    pointers = [i for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps, **options})
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
    for target_name, target in TARGETS.items():
        capability = divmod(int(target.arch), 10) if target.backend == "cuda" else None
        for name, *case in cross_entropy_cases(capability):
            print(json.dumps({"case": name, "target": target_name, **compile_case(*case, target)}), flush=True)


if __name__ == "__main__":
    main()
