"""Compile cases of LayerNorm and activations: GPT-2's widths, and a row too long for registers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.arguments import Batch, Matrix
from fastgpt2_kernels.triton.layers import activation, layer_norm, partial_sums
from tests.kernels.compiling import Case, members

WIDTHS = (768, 1024, 1280, 1600)
LONGEST = 8192  # the longest row that the backward holds in registers
WIDE = 20000
# A multiple of 8 but not of 16, so the compiler knows the alignment only from the launcher.
ODD_BLOCKS = 776


def layer_cases(arch: str) -> Iterator[Case]:
    for C, dtype in [(C, dtype) for C in WIDTHS for dtype in ("bf16", "fp32")] + [
        (C, "bf16") for C in (ODD_BLOCKS, LONGEST, WIDE)
    ]:
        more = dtype == "bf16"  # bf16 has the residual, which makes the kernel larger; fp32 has none
        row = launch.layer_norm_row("forward", C, arch)
        kernel = layer_norm._layer_norm_wide_fwd_kernel if row.block_c < C else layer_norm._layer_norm_fwd_kernel
        rows = Batch("*" + dtype, "i32", "i32")
        known = {
            **dict.fromkeys(("x", "dy", "s"), rows),
            **dict.fromkeys(("residual", "ds_after"), rows if more else None),
            "s_ptr": "*" + dtype if more else None,
            "stats": layer_norm._Statistics("*fp32", "*fp32", "*fp32"),
        }
        meta: Any = layer_norm._ForwardMeta(C=C, ALIGN=8, BLOCK_C=row.block_c)
        yield case(f"layer_norm forward {dtype} {C}", kernel, dtype, known, meta, row)
        row = launch.layer_norm_row("backward", C, arch)
        kernel = layer_norm._layer_norm_wide_bwd_kernel if row.block_c < C else layer_norm._layer_norm_bwd_kernel
        meta = layer_norm._BackwardMeta(C, NEEDS_DS=True, NEEDS_DW=True, NEEDS_DB=True, ALIGN=8, BLOCK_C=row.block_c)
        yield case(f"layer_norm backward {dtype} {C}", kernel, dtype, known, meta, row)
    for C, dtype, name in (
        (3072, "bf16", "gelu_tanh"), (3072, "fp32", "gelu_tanh"), (6400, "bf16", "gelu_tanh"), (6400, "fp32", "gelu"),
    ):  # fmt: skip
        row = launch.ACTIVATION
        known = dict.fromkeys(("x", "dy"), Matrix("*" + dtype, "i32"))
        meta = activation._ForwardMeta(C, name, ALIGN=8, BLOCK_N=row.block_n, BLOCK_C=row.block_c)
        kernel = activation._bias_activation_fwd_kernel
        yield case(f"bias_activation {name} forward {dtype} {C}", kernel, dtype, known, meta, row)
        meta = activation._BackwardMeta(
            C, name, NEEDS_DX=True, NEEDS_DB=True, ALIGN=8, BLOCK_N=row.bwd_block_n, BLOCK_C=row.block_c
        )
        kernel = activation._bias_activation_bwd_kernel
        yield case(f"bias_activation {name} backward {dtype} {C}", kernel, dtype, known, meta, row)
    sums = launch.partial_sums_row(768)
    constants = {"NUM_SUMS": 2, "BLOCK_P": sums.block_p, "BLOCK_C": sums.block_c}
    kernel = partial_sums._sum_partials_kernel
    yield case("partial_sums 768", kernel, "fp32", dict.fromkeys(constants, "constexpr"), constants, sums)


def case(name: str, kernel: Any, dtype: str, known: dict[str, Any], meta: Any, row: Any) -> Case:
    """All tensors have `dtype`, except statistics and partial sums. Only the launcher's ALIGN describes strides."""
    known = {"META": "constexpr", "partials_ptr": "*fp32", "eps": "fp32", **known}
    other = {argument: "*" + dtype if argument.endswith("_ptr") else "i32" for argument in kernel.arg_names}
    signature = {argument: known.get(argument, kind) for argument, kind in other.items()}
    pointers = [name for name, _, kind in members(signature) if kind is not None and kind.startswith("*")]
    aligned = (*pointers, *(("C",) if "sums" in name else ()))
    constants = meta if isinstance(meta, dict) else {"META": meta}
    options = getattr(row, "options", launch.OPTIONS)
    return Case(name, kernel, signature, constants, row.num_warps, options, aligned)
