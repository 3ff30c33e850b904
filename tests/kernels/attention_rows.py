"""Compile cases of the attention kernels: every launch row for an architecture."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt2_kernels.triton import attention, launch
from tests.kernels.compiling import Case, pointers_and_strides

_KERNELS = {
    "forward": attention._attention_fwd_kernel,
    "dq": attention._attention_bwd_dq_kernel,
    "dkdv": attention._attention_bwd_dkdv_kernel,
}
_DOCUMENTS = ("HAS_LENGTHS", "HAS_DOCS")


def _blocks(block: int, width: int, flags: tuple[str, ...]) -> tuple[int, ...]:
    """The block shape of a tensor descriptor, for separate heads or for a packed projection."""
    return (1, block, 1, width) if "PACKED" in flags else (1, 1, block, width)


def attention_cases(arch: str) -> Iterator[Case]:
    """Every launch row; 16-bit heads of 64 and 128 also with documents, and float32 heads of 64 with dropout.

    Strides are multiples of 16, as usual.
    """
    for kernel, kind, width in launch.attention_rows():
        if kind.startswith("tf32") and not launch.has_tf32(arch):
            continue
        if launch.attention_row(kernel, arch, kind.removesuffix(" dropout"), width).use_tma and kind == "half":
            yield _case(arch, kernel, kind, width, ("PACKED",))
        if kind.endswith(" dropout"):
            yield _case(arch, kernel, kind.removesuffix(" dropout"), width, ("HAS_DROPOUT",))
        else:
            yield _case(arch, kernel, kind, width, ())
        if kind == "half" and width <= 128:
            yield _case(arch, kernel, kind, width, _DOCUMENTS)
        if (kind, width) == ("ieee", 64):
            yield _case(arch, kernel, kind, width, ("HAS_DROPOUT",))


def _case(arch: str, name: str, kind: str, width: int, flags: tuple[str, ...]) -> Case:
    kernel, dtype = _KERNELS[name], "bf16" if kind == "half" else "fp32"
    row = launch.attention_row(
        name, arch, kind, width, has_dropout="HAS_DROPOUT" in flags, has_documents="HAS_DOCS" in flags
    )
    if "HAS_LENGTHS" in flags:
        row = row._replace(use_tma=False)  # the launcher does this too
    heads = attention._Heads(f"*{dtype}", "i32", "i32", "i32")
    walked = f"tensordesc<{dtype}{list(_blocks(row.block_s, width, flags))}>" if row.use_tma else heads
    known = {
        "inputs": attention._Inputs(heads, heads, heads),
        "q": heads,
        "k": walked,
        "v": walked,
        **dict.fromkeys(("o", "do", "dq", "dk", "dv"), heads),
        "stats": attention._Statistics(
            "*fp32", None if kind == "half" else "*fp32", None if name == "forward" else "*fp32"
        ),
        "mask": attention._Mask(
            lengths_ptr="*i32" if "HAS_LENGTHS" in flags else None,
            doc_start_ptr="*i32" if "HAS_DOCS" in flags else None,
            doc_end_ptr="*i32" if "HAS_DOCS" in flags else None,
            seed_ptr="*i64" if "HAS_DROPOUT" in flags else None,
        ),
        **dict.fromkeys(("H", "T", "S", "threshold"), "i32"),
        "scales": attention._Scales("fp32", "fp32"),
        "META": "constexpr",
    }
    signature = {argument: known[argument] for argument in kernel.arg_names}
    precision = "tf32" if kind == "tf32" else "ieee"
    meta = attention._Meta(width, width, row.block_t, row.block_s, row.use_tma, precision)
    label = " ".join(["attention", name, kind, f"head {width}", f"{row.block_t}x{row.block_s}", *flags])
    options = {"num_stages": row.num_stages, **launch.OPTIONS}
    aligned = pointers_and_strides(signature)
    return Case(label, kernel, signature, {"META": meta}, row.num_warps, options, aligned)
