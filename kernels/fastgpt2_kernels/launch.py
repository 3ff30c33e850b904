"""Launch tables: tile sizes, warps and stages of every kernel. Plain data, shipped, never searched at a first call."""

from __future__ import annotations

from typing import NamedTuple

# Compiler options of every launch. Contracting a * b + c is said out loud: its default changes after Triton 3.9.
OPTIONS = {"enable_fp_fusion": True}


class CrossEntropyRow(NamedTuple):
    """block_v: logits that a step of the main loop takes; mid_v: a step of the loop over what it leaves."""

    block_v: int
    mid_v: int
    num_warps: int


def cross_entropy_row(vocab_size: int) -> CrossEntropyRow:
    """One program a row of logits, looping over blocks of at most 8192.

    8192 logits over 8 warps are 32 a thread, 4 accesses of 128 bits in bf16: enough in flight, and few enough registers
    for 4 programs on a multiprocessor (one block of 65536 leaves room for one). 2048 is the smallest block that 8 warps
    still move in 128-bit accesses, so at most 2047 logits of a row go through the masked, narrow tail.
    """
    if vocab_size >= 8192:
        return CrossEntropyRow(8192, 2048, 8)
    if vocab_size >= 2048:
        return CrossEntropyRow(2048, 1024, 4)
    return CrossEntropyRow(1024, 256, 1)
