"""Compile cases of the linear layers of a decoding step: every launch row for an architecture.

The compiled code depends on rows and outputs only through their tiles, and on inputs only through the number of steps.
So gpt2 and gpt2-xl represent gpt2-medium and gpt2-large, which have the same tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.arguments import Matrix
from fastgpt2_kernels.triton.decode import linear, step
from tests.kernels.compiling import Case, pointers_and_strides

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
_TF32 = {"PRECISION": "tf32"}
_TF32_STEP: list[tuple[str, str, int, int, int, dict[str, Any]]] = [
    ("layer_norm", "fp32", 1, 2304, 768, _TF32),
    ("none", "fp32", 16, 768, 3072, _TF32),
]


def linear_cases(arch: str) -> Iterator[Case]:
    yield _begin_case()
    for prologue, product, R, N, K, changes in _STEP + (_TF32_STEP if launch.has_tf32(arch) else []):
        yield _case(arch, prologue, product, R, N, K, changes)
    if (launch.ARCHITECTURES[arch].capability or (0, 0)) >= (9, 0):
        yield _case(arch, "combine", "bf16", 1, 768, 768, {"USE_PDL": True})


def _begin_case() -> Case:
    """The first kernel of a step."""
    kernel = step._begin_step_kernel
    table = Matrix("*bf16", "i32")
    signature = {
        "state": step._Slots(*["*i32"] * 5),
        **dict.fromkeys(("slots_ptr", "counts_ptr", "stop_ids_ptr"), "*i32"),
        "wte": table,
        "wpe": table,
        "x": Matrix("*fp32", "i32"),
        **dict.fromkeys(("C", "context", "num_stops"), "i32"),
        "META": "constexpr",
    }
    constants = {"META": step._BeginMeta(BLOCK_C=1024, BLOCK_STOPS=1)}
    aligned = ("wte.ptr", "wpe.ptr", "x.ptr", "C", "wte.stride", "wpe.stride", "x.stride")
    return Case("decode_begin bf16", kernel, signature, constants, 4, dict(launch.OPTIONS), aligned)


def _case(arch: str, prologue: str, product: str, R: int, N: int, K: int, changes: dict[str, Any]) -> Case:
    row = launch.linear_decode_row(R, N, K, 4 if product == "fp32" else 2, prologue, arch)
    types = {"weight": product, "x": product if prologue == "none" else "fp32", **changes}
    out = types.get("out", product if prologue == "layer_norm" else "fp32")
    meta = linear._Meta(
        PROLOGUE=prologue,
        ACTIVATION=changes.get("ACTIVATION", "linear"),
        USE_PDL=changes.get("USE_PDL", False),
        PRODUCT_TYPE=tl.float32 if product == "fp32" else tl.bfloat16,
        PRECISION=changes.get("PRECISION", "ieee"),
        D=64,
        GRAIN=math.gcd(16, 64),
        SPLIT_S=128,
        BLOCK_R=row.block_r,
        BLOCK_N=row.block_n,
        BLOCK_K=row.block_k,
        SHARES=launch.SPLIT_K,
        STEPS=triton.cdiv(launch.linear_decode_share(K), row.block_k),
    )
    norm = linear._Norm(weight_ptr="*" + product, bias_ptr="*" + product, eps="fp32")
    splits = linear._Splits(*["*fp32"] * 3, *["*i32"] * 3, H="i32", MAX_SPLITS="i32")
    signature = {
        "x": None if prologue == "combine" else Matrix("*" + types["x"], "i32"),
        "weight": Matrix("*" + types["weight"], "i32"),
        "out": Matrix("*" + out, "i32"),
        "residual": None if prologue == "layer_norm" else Matrix("*" + out, "i32"),
        "bias_ptr": "*" + product,
        "scale_ptr": "*fp32" if types["weight"] == "i8" else None,
        "norm": norm if prologue == "layer_norm" else None,
        "splits": splits if prologue == "combine" else None,
        "sizes": linear._Sizes(R="i32", N="i32", K="i32"),
        "META": "constexpr",
    }
    kinds = ["int8"] if types["weight"] == "i8" else ["tf32"] if meta.PRECISION == "tf32" else []
    kinds += [name for name in ("ACTIVATION", "USE_PDL") if name in changes]
    tile = f"{row.block_r}x{row.block_n}x{row.block_k}"
    label = " ".join([f"linear_decode {prologue} {product} {K} to {N}, {R} rows, {tile}", *kinds])
    # Weights as in nn.Linear, and the step's buffers. A head may have any number of outputs.
    aligned = (*pointers_and_strides(signature), "sizes.K")
    return Case(label, _KERNEL, signature, {"META": meta}, row.num_warps, {"num_stages": 1, **launch.OPTIONS}, aligned)
