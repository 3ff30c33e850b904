"""How kernels and their helpers are called: with tuples whose members have names, such as a matrix.

Triton passes each member of a tuple as if it were an argument of its own: a pointer or an integer is compiled for its
alignment, an integer of 1 and None for that value. An integer that nothing may be compiled for (`do_not_specialize`)
has to be an argument by itself, for Triton does not look for members of tuples there; and so has a tensor descriptor.
What is known when a kernel is compiled (tiles, flags) is one tuple in capitals, `META: tl.constexpr`. Triton 3.6 takes
what is in it as a tile's shape or an alignment, and a string as a helper's argument, only by a name of its own:
`BLOCK: tl.constexpr = META.BLOCK`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Matrix(NamedTuple):
    """A matrix whose rows lie `stride` elements apart; the numbers of a row lie side by side."""

    ptr: Any
    stride: Any

    @classmethod
    def of(cls, x: Tensor | None) -> Matrix | None:
        return None if x is None else cls(x, x.stride(0))


class Batch(NamedTuple):
    """(B, T, width), row b T + t at b stride_b + t stride_t; the numbers of a row lie side by side."""

    ptr: Any
    stride_b: Any
    stride_t: Any

    @classmethod
    def of(cls, x: Tensor | None) -> Batch | None:
        return None if x is None else cls(x, *x.stride()[:2])
