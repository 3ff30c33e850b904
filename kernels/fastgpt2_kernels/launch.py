"""Launch tables: tile sizes, warps and stages of every kernel. Plain data, shipped, never searched at a first call."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

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


# -- attention ----------------------------------------------------------------------------------------------------


class AttentionRow(NamedTuple):
    """block_t, block_s: queries and keys of a tile."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int
    use_tma: bool = False

    def tiles(self) -> dict[str, Any]:
        """The launch's keywords."""
        return {
            "BLOCK_T": self.block_t, "BLOCK_S": self.block_s, "num_warps": self.num_warps, "num_stages": self.num_stages
        }  # fmt: skip


_ATTENTION: dict[tuple[str, str, str, int], AttentionRow] = {}


def attention_row(kernel: str, arch: str, kind: str, block_d: int) -> AttentionRow:
    """kernel "forward", "dq" or "dkdv"; kind "half", "tf32" or "ieee"; block_d: head size, a power of two from 16."""
    if kind == "half":
        if kernel == "forward":
            return AttentionRow(128, 64, 4, 2 if arch != "sm_80" else 3, arch in ("sm_90", "sm_100"))
        return AttentionRow(64, 64, 4, 2)
    return AttentionRow(32, 32, 4, 1)


@functools.cache
def architecture(device: torch.device) -> str:
    """The column of the tables for a device: "sm_80", "sm_90", "sm_100" or "gfx942"; the nearest one known."""
    if device.type != "cuda":
        return "sm_80"  # the interpreter
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"
