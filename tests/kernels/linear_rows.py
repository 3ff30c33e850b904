"""The linear maps of a decoding step as they are compiled: every launch row, for an architecture.

Rows and outputs are in no compiled code but by their tiles, inputs only by the number of steps: the widths of gpt2 and
gpt2-xl stand for those of gpt2-medium and gpt2-large, which have the same tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.decode import linear, step
from tests.kernels.compiling import Case

_KERNEL = linear._linear_decode_kernel
_INT8 = {"weight": "i8"}
_GELU = {"ACTIVATION": "gelu_tanh"}
_STEP: list[tuple[str, str, int, int, int, dict[str, Any]]] = [
    # prologue, product, rows, outputs, inputs
    ("layer_norm", "bf16", 1, 2304, 768, {}),
    ("layer_norm", "bf16", 16, 3072, 768, _GELU),
    ("layer_norm", "bf16", 1, 50257, 768, {"out": "fp32"}),
    ("layer_norm", "bf16", 1, 3072, 768, _INT8 | _GELU),
    ("layer_norm", "bf16", 1, 6400, 1600, _GELU),
    ("layer_norm", "bf16", 16, 4800, 1600, {}),
    ("layer_norm", "bf16", 1, 384, 128, {"x": "bf16"}),
    ("layer_norm", "bf16", 64, 512, 128, _GELU | {"x": "bf16"}),
    ("layer_norm", "fp32", 1, 2304, 768, {"x": "bf16"}),
    ("combine", "bf16", 1, 768, 768, {}),
    ("combine", "bf16", 64, 1600, 1600, {}),
    ("combine", "bf16", 1, 1600, 1600, _INT8),
    ("combine", "fp32", 1, 768, 768, {}),
    ("none", "bf16", 1, 768, 3072, {}),
    ("none", "bf16", 16, 1600, 6400, _INT8),
    ("none", "bf16", 64, 1600, 6400, {}),
    ("none", "fp32", 1, 768, 3072, {}),
]


def linear_cases(arch: str) -> Iterator[Case]:
    yield _begin_case()
    for prologue, product, R, N, K, changes in _STEP:
        yield _case(arch, prologue, product, R, N, K, changes)
    if arch in ("sm_90", "sm_100"):
        yield _case(arch, "combine", "bf16", 1, 768, 768, {"USE_PDL": True})


def _begin_case() -> Case:
    """The kernel that a step begins with."""
    kernel = step._begin_step_kernel
    signature = {name: "*i32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    signature |= {"wte_ptr": "*bf16", "wpe_ptr": "*bf16", "x_ptr": "*fp32"}
    constants = {"BLOCK_C": 1024, "BLOCK_STOPS": 1}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = ("wte_ptr", "wpe_ptr", "x_ptr", "C", "stride_te", "stride_pe", "stride_xr")
    return Case("decode_begin bf16", kernel, signature, constants, 4, dict(launch.OPTIONS), aligned)


def _case(arch: str, prologue: str, product: str, R: int, N: int, K: int, changes: dict[str, Any]) -> Case:
    row = launch.linear_decode_row(R, N, K, 4 if product == "fp32" else 2, prologue, arch)
    types = {"weight": product, "x": product if prologue == "none" else "fp32", **changes}
    out = types.get("out", product if prologue == "layer_norm" else "fp32")
    constants = {
        "PROLOGUE": prologue, "ACTIVATION": "linear", "HAS_SCALE": types["weight"] == "i8", "HAS_BIAS": True,
        "HAS_RESIDUAL": prologue != "layer_norm", "HAS_SLOTS": True, "HAS_COUNTS": True, "USE_PDL": False,
        "PRODUCT_TYPE": tl.float32 if product == "fp32" else tl.bfloat16, "PRECISION": "ieee",
        "D": 64, "GRAIN": math.gcd(16, 64), "SPLIT_S": 128, "BLOCK_R": row.block_r, "BLOCK_N": row.block_n,
        "BLOCK_K": row.block_k, "SHARES": launch.SPLIT_K,
        "STEPS": triton.cdiv(launch.linear_decode_share(K), row.block_k),
        **{name: value for name, value in changes.items() if name.isupper()},
    }  # fmt: skip
    pointers = {
        "x_ptr": types["x"], "weight_ptr": types["weight"], "scale_ptr": "fp32", "residual_ptr": out, "out_ptr": out,
        "part_max_ptr": "fp32", "part_sum_ptr": "fp32", "lengths_ptr": "i32", "slots_ptr": "i32", "counts_ptr": "i32",
    }  # fmt: skip
    signature = {}
    for name in _KERNEL.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, product)
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
    kinds = [*(["int8"] if types["weight"] == "i8" else []), *(name for name in changes if name.isupper())]
    tile = f"{row.block_r}x{row.block_n}x{row.block_k}"
    label = " ".join([f"linear_decode {prologue} {product} {K} to {N}, {R} rows, {tile}", *kinds])
    # Weights of nn.Linear and the step's buffers; a head's outputs are any number.
    aligned = tuple(name for name in _KERNEL.arg_names if name.endswith("_ptr") or name == "K" or "stride" in name)
    return Case(label, _KERNEL, signature, constants, row.num_warps, {"num_stages": 1, **launch.OPTIONS}, aligned)
