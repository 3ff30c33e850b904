"""The decode attention kernels as they are compiled: every kind of launch row, for an architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.decode import attention
from tests.kernels.compiling import Case

_INDEX_TYPES = {"table_ptr": "*i64"} | {f"{name}_ptr": "*i32" for name in ("lengths", "slots", "starts", "counts")}
FLAGS = ("HAS_STARTS", "HAS_SLOTS", "INDIRECT")


def decode_cases(arch: str) -> Iterator[Case]:
    """One and several new tokens a row, for every launch row; direct and, at GPT-2's head size, indirect."""
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
    constants = {"D": width, "BLOCK_D": block_d, "BLOCK_T": 16 if use_dot else max_new, "SPLIT_S": row.split_s}
    label = f"decode_attention {'dot' if use_dot else 'cores'} {max_new} new {dtype} head {width}"
    kernel = attention._decode_attention_kernel
    num_warps = row.one_warps if max_new == 1 else row.few_warps
    return _case(label, kernel, dtype, {**constants, "USE_DOT": use_dot}, num_warps, flags)


def _combine(width: int, dtype: str, flags: tuple[str, ...]) -> Case:
    row = launch.decode_row(4 if dtype == "fp32" else 2, width)
    constants = {"D": width, "BLOCK_C": row.block_c, "SPLIT_S": row.split_s}
    label = f"decode_combine {dtype} head {width}"
    return _case(label, attention._combine_kernel, dtype, constants, 1, flags)


def _case(
    label: str, kernel: Any, dtype: str, constants: dict[str, Any], num_warps: int, flags: tuple[str, ...]
) -> Case:
    constants |= {flag: flag in flags for flag in FLAGS}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in _INDEX_TYPES:
            signature[name] = _INDEX_TYPES[name]
        elif name.startswith("part_"):
            signature[name] = "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    tables = set(_INDEX_TYPES) - {"table_ptr"}
    aligned = tuple(
        name
        for name in kernel.arg_names
        if name.startswith("stride_") or (name.endswith("_ptr") and name not in tables)
    )
    return Case(" ".join([label, *flags]), kernel, signature, constants, num_warps, dict(launch.OPTIONS), aligned)
