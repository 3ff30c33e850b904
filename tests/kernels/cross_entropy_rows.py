"""Compile cases of the cross-entropy kernel: every launch row and mode, with an odd vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt2_kernels.triton import cross_entropy, launch
from fastgpt2_kernels.triton.arguments import Batch, Matrix
from tests.kernels.compiling import Case, members

# Further options of the cross-entropy kernel. Each is compiled once, fused, with an odd vocabulary.
FLAGS = ("SHIFT", "HAS_WEIGHT", "HAS_SMOOTHING", "HAS_STATS", "HAS_Z")
VARIANTS = [
    ("SHIFT",),
    ("HAS_SMOOTHING",),
    ("HAS_Z",),
    ("HAS_WEIGHT", "HAS_SMOOTHING"),
    ("HAS_STATS",),
    FLAGS,
]


def cross_entropy_cases(arch: str) -> Iterator[Case]:
    capability = divmod(int(arch[3:]), 10) if arch.startswith("sm_") else None
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
        has = dict(zip(FLAGS, (flag in flags for flag in FLAGS), strict=True))
        is_forward, has_grad = mode != "backward", mode != "forward"
        meta = cross_entropy._Meta(
            **has,
            IS_FORWARD=is_forward,
            HAS_GRAD=has_grad,
            ALIGN=align,
            GRAD_ALIGN=align,
            BLOCK_V=row.block_v,
            MID_V=row.mid_v,
        )
        rows = Batch("*" + dtype, "i32", "i32")
        signature = {
            "logits": rows,
            "targets": Batch("*i32" if has["SHIFT"] else "*i64", "i32", "i32"),
            "class_weight": cross_entropy._ClassWeight(
                "*" + dtype if has["HAS_WEIGHT"] else None, "*fp32" if has["HAS_SMOOTHING"] else None
            ),
            "dloss": Matrix("*fp32", "i32") if has_grad else None,
            "grad": rows if has_grad else None,
            "rows": cross_entropy._RowPointers(*["*fp32"] * 5, "*i32"),
            "T": "i32",
            "V": "i32",
            "settings": cross_entropy._Settings("i32", "fp32", "fp32"),
            "META": "constexpr",
        }
        title = " ".join(["cross_entropy", mode, dtype, f"block {row.block_v}", *flags])
        aligned = tuple(name for name, _, kind in members(signature) if kind is not None and kind.startswith("*"))
        yield Case(title, kernel, signature, {"META": meta}, row.num_warps, row.options, aligned)
    for dtype in ("bf16", "fp32"):
        yield _scale_rows_case(dtype)


def _scale_rows_case(dtype: str) -> Case:
    """Rows of an odd vocabulary can begin anywhere, so the compiler knows nothing about their strides."""
    kernel, row = cross_entropy._scale_rows_kernel, launch.cross_entropy_row(50257)
    signature = {
        "grad": Batch("*" + dtype, "i32", "i32"),
        "factor_ptr": "*fp32",
        "T": "i32",
        "V": "i32",
        "BLOCK_V": "constexpr",
    }
    aligned = tuple(name for name, _, kind in members(signature) if kind.startswith("*"))
    title = f"scale_rows {dtype} block {row.mid_v}"
    return Case(title, kernel, signature, {"BLOCK_V": row.mid_v}, row.num_warps, dict(launch.OPTIONS), aligned)
