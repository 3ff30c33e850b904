"""The second stage of a sum over rows: it adds the partial rows of the programs of a backward kernel.

The gradient of a parameter that all rows share (a bias, LayerNorm's weight) is a sum over rows. Each program of a
backward kernel sums its own rows in float32 and writes one partial row. The kernel here adds the partial rows. There
are no atomics. The order of every addition is fixed, so the sum is bitwise the same in every run.

Dimension key: P partial rows, K sums side by side, C width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.devices import launch_kernel


@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(
    partials_ptr, first_ptr, second_ptr, P, C, NUM_SUMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Compute BLOCK_C columns of one of the sums."""
    k = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        at = (offs_p[:, None].to(tl.int64) * NUM_SUMS + k) * C + offs_c[None, :]
        total += tl.load(partials_ptr + at, mask=(offs_p < P)[:, None] & mask_c[None, :], other=0.0)
    total_C = tl.sum(total, 0)
    if k == 0:
        tl.store(first_ptr + offs_c, total_C.to(first_ptr.dtype.element_ty), mask=mask_c)
    else:
        tl.store(second_ptr + offs_c, total_C.to(second_ptr.dtype.element_ty), mask=mask_c)


def sum_partials(partials: Tensor, out: Sequence[Tensor]) -> None:
    """Sum partials (P, K, C) float32 over P, and write the K = 1 or 2 sums to `out` (C,), of any float dtype."""
    P, K, C = partials.shape
    row = launch.partial_sums_row(C)
    launch_kernel(
        partials.device,
        _sum_partials_kernel,
        (launch.ceil_div(C, row.block_c), K),
        partials_ptr=partials,
        first_ptr=out[0],
        second_ptr=out[-1],
        P=P,
        C=C,
        NUM_SUMS=K,
        BLOCK_P=row.block_p,
        BLOCK_C=row.block_c,
        num_warps=row.num_warps,
        **launch.OPTIONS,
    )


def row_alignment(*tensors: Tensor | None) -> int:
    """8 if every row of these tensors (B, T, C) or (N, C) starts a multiple of 8 elements after the first, else 1."""
    strides = [
        stride
        for x in tensors
        if x is not None
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
        if size > 1
    ]
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def empty_unless(needed: bool, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new tensor of `shape`, or an empty one if it is not needed, because operators have no optional results."""
    return like.new_empty(shape if needed else (0,), dtype=dtype)
