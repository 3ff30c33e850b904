"""The attention kernels as they are compiled: every launch row, for an architecture."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt2_kernels.triton import attention, launch
from tests.kernels.compiling import Case

_KERNELS = {
    "forward": attention._attention_fwd_kernel,
    "dq": attention._attention_bwd_dq_kernel,
    "dkdv": attention._attention_bwd_dkdv_kernel,
}
_FLAGS = ("HAS_LENGTHS", "HAS_DOCS", "HAS_DROPOUT")
_DOCUMENTS = ("HAS_LENGTHS", "HAS_DOCS")
_INDEX_TYPES = {"lengths_ptr": "*i32", "doc_start_ptr": "*i32", "doc_end_ptr": "*i32", "seed_ptr": "*i64"}
_STATISTICS = ("max_ptr", "sum_ptr", "delta_ptr")


def attention_cases(arch: str) -> Iterator[Case]:
    """Every row, and those of head 64 with documents too. Strides are multiples of 16, as heads of 16 n make them."""
    for kernel, kind, width in launch.attention_rows():
        if kind == "half dropout":
            yield _case(arch, kernel, "half", width, ("HAS_DROPOUT",))
        else:
            yield _case(arch, kernel, kind, width, ())
        if (kind, width) == ("half", 64):
            yield _case(arch, kernel, kind, width, _DOCUMENTS)


def _case(arch: str, name: str, kind: str, width: int, flags: tuple[str, ...]) -> Case:
    kernel, dtype = _KERNELS[name], "bf16" if kind == "half" else "fp32"
    row = launch.attention_row(
        name, arch, kind, width, has_dropout="HAS_DROPOUT" in flags, has_documents="HAS_DOCS" in flags
    )
    if "HAS_LENGTHS" in flags:
        row = row._replace(use_tma=False)  # as the launcher does
    constants = {
        **{flag: flag in flags for flag in _FLAGS},
        "HAS_SUM": kind != "half", "HAS_DQ": True, "USE_TMA": row.use_tma,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "D": width, "BLOCK_D": width, "BLOCK_T": row.block_t, "BLOCK_S": row.block_s,
    }  # fmt: skip
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in _INDEX_TYPES:
            signature[argument] = _INDEX_TYPES[argument]
        elif argument in _STATISTICS:
            signature[argument] = "*fp32"
        elif argument in ("k_ptr", "v_ptr") and row.use_tma:
            signature[argument] = f"tensordesc<{dtype}[1, 1, {row.block_s}, {width}]>"
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{dtype}"
        else:
            signature[argument] = "fp32" if argument in ("scale", "keep_scale") else "i32"
    label = " ".join(["attention", name, kind, f"head {width}", f"{row.block_t}x{row.block_s}", *flags])
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*") or name.startswith("stride_"))
    options = {"num_stages": row.num_stages, **launch.OPTIONS}
    return Case(label, kernel, signature, constants, row.num_warps, options, aligned)
