"""Launch tables: tile sizes, warps and stages of every kernel. Plain data, shipped, never searched at a first call."""

from __future__ import annotations

from typing import NamedTuple

# Compiler options of every launch. Contracting a * b + c is said out loud: its default changes after Triton 3.9.
OPTIONS: dict[str, bool | int] = {"enable_fp_fusion": True}


class CrossEntropyRow(NamedTuple):
    """block_v: logits that a step of the main loop takes; mid_v: a step of the loop over what it leaves."""

    block_v: int
    mid_v: int
    num_warps: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, bool | int]:
        return OPTIONS if self.max_registers is None else {**OPTIONS, "maxnreg": self.max_registers}


def cross_entropy_row(
    vocab_size: int, capability: tuple[int, int] | None = None, *, element_size: int = 2, has_extras: bool = False
) -> CrossEntropyRow:
    """One program a row of logits, looping over blocks of at most 8192; `capability` of an NVIDIA GPU, else None.

    8192 logits over 8 warps are 32 a thread, 4 accesses of 128 bits in bf16: enough in flight, and few enough registers
    for 3 or 4 programs on a multiprocessor (one block of 65536 leaves room for one). 2048 is the smallest block that
    8 warps still move in 128-bit accesses, so at most 2047 logits of a row go through the masked, narrow tail.

    Registers are said where the compiler by itself takes more (80 to 97, for 2 or 3 programs; up to 240 with smoothing,
    class weights or statistics, `has_extras`) or spills a few bytes to take fewer (Blackwell). Said, it spills none.
    """
    if vocab_size >= 8192:
        registers = None
        if capability is not None and has_extras:
            registers = 128 if element_size == 2 else 168 if capability < (10, 0) else None
        elif capability is not None and capability < (9, 0):
            registers = 64 if element_size == 2 else 80
        elif capability is not None and (element_size == 2 or capability >= (10, 0)):
            registers = 80
        return CrossEntropyRow(8192, 2048, 8, registers)
    if vocab_size >= 2048:
        return CrossEntropyRow(2048, 1024, 4)
    return CrossEntropyRow(1024, 256, 1)
