"""Compile cases of the decode attention kernels: every kind of launch row for an architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.arguments import Matrix
from fastgpt2_kernels.triton.decode import attention
from tests.kernels.compiling import Case, pointers_and_strides

FLAGS = ("HAS_STARTS", "HAS_SLOTS", "INDIRECT")
_UNSPECIALISED = ("layer", "N", "num_slots", "S", "max_new", "H", "MAX_SPLITS")


def decode_cases(arch: str) -> Iterator[Case]:
    """One and several new tokens per row, for every launch row; at GPT-2's head size also with a cache table."""
    for dtype, width in (("bf16", 16), ("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 256)):
        yield _attention(width, dtype, 1, ("HAS_SLOTS",))
        yield _attention(width, dtype, 8, ("HAS_STARTS", "HAS_SLOTS"))
    yield _attention(64, "bf16", 1, FLAGS)
    yield _attention(64, "bf16", 8, FLAGS)
    yield _attention(80, "bf16", 1, FLAGS)
    yield _combine(64, "bf16", ("HAS_SLOTS",))
    yield _combine(64, "fp32", FLAGS)


def _attention(width: int, dtype: str, max_new: int, flags: tuple[str, ...]) -> Case:
    block_d = attention._block_d(width)
    row = launch.decode_row(4 if dtype == "fp32" else 2, block_d)
    use_dot = max_new > 1 and dtype != "fp32"
    meta = attention._SplitMeta(width, block_d, 16 if use_dot else max_new, row.split_s, use_dot)
    label = f"decode_attention {'dot' if use_dot else 'cores'} {max_new} new {dtype} head {width}"
    arguments = {
        "qkv": Matrix(f"*{dtype}", "i32"),
        "cache": attention._Cache(f"*{dtype}", f"*{dtype}", "i32", "i32", "i32", "i32"),
    }
    num_warps = row.one_warps if max_new == 1 else row.few_warps
    return _case(label, attention._decode_attention_kernel, arguments, meta, num_warps, flags)


def _combine(width: int, dtype: str, flags: tuple[str, ...]) -> Case:
    row = launch.decode_row(4 if dtype == "fp32" else 2, width)
    meta = attention._CombineMeta(width, row.block_c, row.split_s)
    arguments = {"out": Matrix(f"*{dtype}", "i32")}
    return _case(f"decode_combine {dtype} head {width}", attention._combine_kernel, arguments, meta, 1, flags)


def _case(
    label: str, kernel: Any, arguments: dict[str, Any], meta: Any, num_warps: int, flags: tuple[str, ...]
) -> Case:
    known = {
        **arguments,
        "parts": attention._Parts("*fp32", "*fp32", "*fp32"),
        "table_ptr": "*i64" if "INDIRECT" in flags else None,
        "lengths_ptr": "*i32",
        "slots_ptr": "*i32" if "HAS_SLOTS" in flags else None,
        "starts_ptr": "*i32" if "HAS_STARTS" in flags else None,
        "counts_ptr": "*i32" if "HAS_STARTS" in flags else None,
        **dict.fromkeys(_UNSPECIALISED, "i32"),
        "scale": "fp32",
        "META": "constexpr",
    }
    signature = {name: known[name] for name in kernel.arg_names}
    unaligned = ("lengths_ptr", "slots_ptr", "starts_ptr", "counts_ptr")
    aligned = tuple(name for name in pointers_and_strides(signature) if name not in unaligned)
    return Case(" ".join([label, *flags]), kernel, signature, {"META": meta}, num_warps, dict(launch.OPTIONS), aligned)
