"""Arguments of kernels and their helpers: named tuples, such as a matrix.

Triton treats each member of a tuple like a separate argument. It specializes pointers and integers by alignment, and
the integer 1 and None by value. An integer that must not be specialized (`do_not_specialize`) has to be an argument of
its own, because that option does not reach members of tuples. So does a tensor descriptor.

What is known at compile time (tile sizes, flags) is one tuple in capitals, `META: tl.constexpr`. In Triton 3.6 a member
of it needs a name of its own, `BLOCK: tl.constexpr = META.BLOCK`, to serve as a tile's shape or an alignment, or as a
string that is passed to a helper.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Matrix(NamedTuple):
    """A matrix whose rows are `stride` elements apart. Each row is contiguous."""

    ptr: Any
    stride: Any

    @classmethod
    def of(cls, x: Tensor | None) -> Matrix | None:
        return None if x is None else cls(x, x.stride(0))


class Batch(NamedTuple):
    """A tensor (B, T, width). Row b T + t is at b stride_b + t stride_t, and each row is contiguous."""

    ptr: Any
    stride_b: Any
    stride_t: Any

    @classmethod
    def of(cls, x: Tensor | None) -> Batch | None:
        return None if x is None else cls(x, *x.stride()[:2])
