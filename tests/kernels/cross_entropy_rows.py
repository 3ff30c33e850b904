"""The cross-entropy kernel as it is compiled: every launch row, every mode, an odd vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt2_kernels.triton import cross_entropy, launch
from tests.kernels.compiling import Case

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
        aligned = tuple(argument for argument in kernel.arg_names if argument.endswith("_ptr"))
        yield Case(name, kernel, signature, constants, row.num_warps, row.options, aligned)
    for dtype in ("bf16", "fp32"):
        yield _scale_rows_case(dtype)


def _scale_rows_case(dtype: str) -> Case:
    """Rows of an odd vocabulary begin anywhere, so nothing is known of their strides."""
    kernel, row = cross_entropy._scale_rows_kernel, launch.cross_entropy_row(50257)
    constants = {"BLOCK_V": row.mid_v}
    signature = dict.fromkeys(kernel.arg_names, "i32") | {"grad_ptr": f"*{dtype}", "factor_ptr": "*fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    options = dict(launch.OPTIONS)
    name = f"scale_rows {dtype} block {row.mid_v}"
    return Case(name, kernel, signature, constants, row.num_warps, options, ("grad_ptr", "factor_ptr"))
