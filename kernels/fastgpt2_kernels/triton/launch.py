"""Launch tables: tile sizes, warps and stages of every kernel. Plain data: no call ever tunes them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

# Compiler options of every launch. Fusing a * b + c is set explicitly, because its default changes after Triton 3.9.
OPTIONS: dict[str, bool | int] = {"enable_fp_fusion": True}


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv`, which kernels can call too, takes ten times as long on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1. `triton.next_power_of_2` takes ten times as long."""
    return 1 << (n - 1).bit_length()


# -- GPUs ---------------------------------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """A column of the tables.

    capability: the compute capability of an NVIDIA GPU, else None.
    shared: how many bytes of shared memory one program may have.
    like: the architecture whose rows are used where the tables have none for this one.
    """

    capability: tuple[int, int] | None
    shared: int
    like: str | None = None


ARCHITECTURES = {
    "sm_80": Architecture((8, 0), 166_912),  # A100
    "sm_86": Architecture((8, 6), 101_376, "sm_80"),  # A40, RTX 30
    "sm_89": Architecture((8, 9), 101_376, "sm_86"),  # L40, RTX 40
    "sm_90": Architecture((9, 0), 232_448),  # H100, H200
    "sm_100": Architecture((10, 0), 232_448),  # B200
    "sm_120": Architecture((12, 0), 101_376, "sm_89"),  # RTX 50: its tensor cores are programmed like Ampere's
    "gfx90a": Architecture(None, 65_536, "gfx942"),  # MI200
    "gfx942": Architecture(None, 65_536),  # MI300
    "gfx950": Architecture(None, 163_840, "gfx942"),  # MI350
}

MOST_SHARED = max(of.shared for of in ARCHITECTURES.values())


@functools.cache
def architecture(device: torch.device) -> str:
    """The column of the tables for a device: its own, or that of the nearest known architecture."""
    if device.type != "cuda":
        return "sm_80"  # for the interpreter
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return name if name in ARCHITECTURES else "gfx942"
    capability = torch.cuda.get_device_capability(device)
    return nearest_architecture(capability, properties.shared_memory_per_block_optin)


def nearest_architecture(capability: tuple[int, int], shared: int) -> str:
    """The newest NVIDIA architecture that is no newer than `capability` and whose rows fit into `shared` bytes."""
    known = [(of.capability, name) for name, of in ARCHITECTURES.items() if of.capability and of.shared <= shared]
    older = [found for found in known if found[0] <= capability]
    return max(older, default=("", "sm_86"))[1]


def has_tf32(arch: str) -> bool:
    """Whether its matrix units can multiply float32 rounded to tf32."""
    return arch not in ("gfx90a", "gfx950")


def is_amd(arch: str) -> bool:
    return arch.startswith("gfx")


# -- cross-entropy, sampling --------------------------------------------------------------------------------------


class CrossEntropyRow(NamedTuple):
    """block_v: logits per step of the main loop. mid_v: logits per step of the loop over the remainder."""

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
    """The row for one program per row of logits, which loops over blocks of at most 8192.

    `capability` is that of an NVIDIA GPU, else None. `has_extras`: smoothing, class weights or statistics.

    8192 logits over 8 warps are 32 per thread, or four 128-bit accesses in bf16. That is enough in flight, and takes
    few enough registers for 3 or 4 programs on a multiprocessor (with a block of 65536 only one fits). 2048 is the
    smallest block that 8 warps still move in 128-bit accesses. So at most 2047 logits of a row go through the masked,
    narrow tail.

    The number of registers is set where the compiler would otherwise take more (80 to 97, which leaves 2 or 3 programs;
    up to 240 with extras), or would spill a few bytes to take fewer (Blackwell). With the number set, nothing spills.
    """
    if vocab_size >= 8192:
        registers = None
        if capability is not None and has_extras:
            registers = 128 if element_size == 2 else None if capability[0] == 10 else 168
        elif capability is not None and capability < (9, 0):
            registers = 72 if element_size == 2 else 80
        elif capability is not None and (element_size == 2 or capability >= (10, 0)):
            registers = 80
        return CrossEntropyRow(8192, 2048, 8, registers)
    if vocab_size >= 2048:
        return CrossEntropyRow(2048, 1024, 4)
    return CrossEntropyRow(1024, 256, 1)


class SamplingRow(NamedTuple):
    """block_v: logits per step of a pass, a multiple of 4, and the number of lanes into which top-k splits a row."""

    block_v: int
    num_warps: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, bool | int]:
        return OPTIONS if self.max_registers is None else {**OPTIONS, "maxnreg": self.max_registers}


def sampling_row(vocab_size: int, arch: str, *, has_filters: bool = False) -> SamplingRow:
    """The row for one program, and so one multiprocessor, per row of logits, with as many threads as registers allow.

    With filters (top-k, top-p, min-p) and 4 lanes per thread, the state of the lanes and its copies in the loops take
    96 to 128 registers per thread. For the small blocks the compiler would by itself spill some to use only 80.
    """
    max_registers = 128 if has_filters and vocab_size <= 2048 and not is_amd(arch) else None
    if vocab_size > 2048 and has_filters:
        block_v, threads = 2048, 512
    elif vocab_size > 2048:
        block_v, threads = 4096, 1024
    else:
        block_v, threads = (1024, 256) if vocab_size > 256 else (256, 64)
    return SamplingRow(block_v, threads // (64 if is_amd(arch) else 32), max_registers)


# -- attention ----------------------------------------------------------------------------------------------------


class AttentionRow(NamedTuple):
    """block_t, block_s: queries and keys of a tile. use_tma: the tensor memory accelerator loads the loop's tiles."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int
    use_tma: bool = False

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **OPTIONS}


# (kind of product, largest padded head size) -> rows for forward, dq and dkdv. The kinds are "half" (16 bits), "tf32"
# and "ieee" (exact float32). Registers decide nearly everywhere: a tile's accumulators must fit beside its scores
# without spilling.
# - half, 64: in the forward, 32 rows per warp keep the exponentials and the tensor cores equally busy, with two
#   programs on a multiprocessor. Pointers instead of descriptors cost a third more instructions. The backward is
#   limited by shared memory: the program's own tile is as large as two score tiles and one or two accumulators allow.
# - half, wider heads: the tile of the loop shrinks as the accumulators grow.
# - dropout: drawing the mask takes as many registers as half a tile of scores.
# - ieee: these products run outside the tensor cores, unrolled. With more warps, each thread needs fewer registers.
_ATTENTION: dict[tuple[str, int], tuple[AttentionRow, AttentionRow, AttentionRow]] = {
    ("half", 64): (AttentionRow(128, 64, 4, 2, True), AttentionRow(128, 64, 4, 2), AttentionRow(32, 128, 4, 2)),
    ("half", 128): (AttentionRow(128, 32, 4, 2, True), AttentionRow(64, 64, 4, 2), AttentionRow(32, 64, 4, 2)),
    ("half", 256): (AttentionRow(64, 32, 4, 2, True), AttentionRow(32, 32, 4, 2), AttentionRow(32, 32, 8, 2)),
    ("half dropout", 64): (AttentionRow(128, 32, 4, 2, True), AttentionRow(64, 64, 4, 2), AttentionRow(64, 64, 4, 2)),
    ("half dropout", 128): (AttentionRow(128, 32, 4, 2, True), AttentionRow(64, 64, 4, 2), AttentionRow(32, 64, 4, 2)),
    ("half dropout", 256): (AttentionRow(64, 32, 4, 2, True), AttentionRow(32, 32, 8, 2), AttentionRow(32, 32, 8, 2)),
    ("tf32", 64): (AttentionRow(64, 32, 4, 2), AttentionRow(64, 32, 4, 2), AttentionRow(32, 64, 4, 2)),
    ("tf32 dropout", 64): (AttentionRow(64, 32, 4, 2), AttentionRow(64, 32, 4, 2), AttentionRow(16, 64, 4, 2)),
    ("tf32", 128): (AttentionRow(32, 32, 4, 1), AttentionRow(32, 32, 4, 1), AttentionRow(32, 32, 4, 1)),
    ("tf32", 256): (AttentionRow(32, 32, 8, 1), AttentionRow(32, 32, 8, 1), AttentionRow(32, 32, 8, 1)),
    ("ieee", 32): (AttentionRow(32, 32, 4, 1), AttentionRow(32, 32, 4, 1), AttentionRow(32, 32, 4, 1)),
    ("ieee", 64): (AttentionRow(32, 32, 8, 1), AttentionRow(32, 32, 8, 1), AttentionRow(32, 32, 4, 1)),
    ("ieee", 128): (AttentionRow(32, 32, 8, 1), AttentionRow(16, 16, 8, 1), AttentionRow(32, 32, 8, 1)),
}
# Replacements where the row above would spill registers in a loop on an architecture.
_ATTENTION_ON: dict[tuple[str, str, int, str], AttentionRow] = {
    ("sm_80", "half", 64, "dq"): AttentionRow(128, 32, 4, 2),
    ("sm_80", "half", 64, "dkdv"): AttentionRow(64, 64, 4, 2),
    ("sm_80", "half", 128, "forward"): AttentionRow(128, 64, 8, 2),
    ("sm_80", "half", 256, "forward"): AttentionRow(64, 32, 8, 2),
    ("sm_80", "half dropout", 64, "dkdv"): AttentionRow(64, 32, 4, 2),
    ("sm_80", "half dropout", 128, "forward"): AttentionRow(128, 32, 8, 2),
    ("sm_80", "half dropout", 128, "dq"): AttentionRow(32, 64, 4, 2),
    ("sm_80", "half dropout", 128, "dkdv"): AttentionRow(32, 64, 8, 2),
    ("sm_80", "half dropout", 256, "forward"): AttentionRow(64, 32, 8, 2),
    ("sm_80", "ieee", 32, "dq"): AttentionRow(32, 32, 4, 2),
    ("sm_80", "ieee", 64, "dkdv"): AttentionRow(32, 32, 8, 1),
    ("sm_80", "ieee", 128, "dkdv"): AttentionRow(16, 16, 8, 1),
    ("sm_86", "half", 64, "forward"): AttentionRow(128, 32, 4, 2),
    ("sm_86", "half", 128, "dq"): AttentionRow(32, 64, 4, 2),
    ("sm_86", "tf32", 256, "dq"): AttentionRow(16, 16, 4, 1),
    ("sm_86", "tf32", 256, "dkdv"): AttentionRow(16, 16, 4, 1),
    ("sm_90", "half", 64, "dkdv"): AttentionRow(64, 64, 4, 2),
    ("sm_90", "half", 128, "forward"): AttentionRow(64, 64, 4, 2, True),
    ("sm_90", "half dropout", 128, "forward"): AttentionRow(64, 64, 4, 2, True),
    ("sm_90", "half dropout", 128, "dq"): AttentionRow(64, 32, 4, 2),
    ("sm_90", "half dropout", 128, "dkdv"): AttentionRow(32, 64, 8, 2),
    ("sm_100", "half", 64, "dq"): AttentionRow(64, 64, 4, 2),
    ("sm_100", "half", 128, "dq"): AttentionRow(64, 32, 4, 2),
    ("sm_100", "half dropout", 128, "forward"): AttentionRow(64, 64, 4, 2, True),
    ("sm_100", "half dropout", 128, "dq"): AttentionRow(64, 32, 4, 2),
    ("sm_100", "tf32", 64, "dkdv"): AttentionRow(16, 64, 4, 2),
    ("sm_100", "ieee", 32, "dq"): AttentionRow(32, 32, 4, 2),
    ("sm_100", "ieee", 32, "dkdv"): AttentionRow(32, 32, 4, 2),
    ("sm_120", "half", 64, "forward"): AttentionRow(64, 64, 4, 2),
    ("sm_120", "half", 64, "dq"): AttentionRow(64, 64, 4, 2),
    ("sm_120", "half dropout", 64, "forward"): AttentionRow(64, 32, 4, 2),
    ("sm_120", "half dropout", 64, "dq"): AttentionRow(64, 32, 4, 2),
    ("sm_120", "tf32", 64, "dkdv"): AttentionRow(16, 64, 4, 2),
    ("sm_120", "tf32 dropout", 64, "dq"): AttentionRow(64, 32, 8, 2),
    ("sm_120", "ieee", 32, "forward"): AttentionRow(32, 32, 4, 2),
    ("gfx942", "half", 128, "dkdv"): AttentionRow(32, 64, 4, 1),
    ("gfx90a", "half", 256, "dq"): AttentionRow(32, 16, 4, 2),
    ("gfx942", "half", 64, "dq"): AttentionRow(64, 64, 4, 2),
    ("gfx942", "half", 64, "dkdv"): AttentionRow(64, 64, 4, 1),
    ("gfx942", "half", 256, "dkdv"): AttentionRow(16, 32, 4, 1),
    ("gfx942", "half dropout", 64, "dkdv"): AttentionRow(32, 64, 4, 1),
    ("gfx942", "half dropout", 128, "dkdv"): AttentionRow(32, 64, 4, 1),
    ("gfx942", "half dropout", 256, "dq"): AttentionRow(32, 16, 4, 2),
    ("gfx942", "half dropout", 256, "dkdv"): AttentionRow(16, 32, 4, 1),
    ("gfx950", "half", 128, "dq"): AttentionRow(64, 32, 4, 2),
    ("gfx942", "tf32", 256, "forward"): AttentionRow(16, 16, 4, 1),
    ("gfx942", "tf32", 256, "dq"): AttentionRow(16, 16, 4, 1),
    ("gfx942", "tf32", 256, "dkdv"): AttentionRow(16, 16, 4, 1),
    ("gfx942", "ieee", 128, "dkdv"): AttentionRow(16, 16, 4, 1),
}
_KERNELS = ("forward", "dq", "dkdv")


def attention_row(
    kernel: str, arch: str, kind: str, block_d: int, *, has_dropout: bool = False, has_documents: bool = False
) -> AttentionRow:
    """The row for kernel "forward", "dq" or "dkdv", kind "half", "tf32" or "ieee".

    `block_d` is the padded head size, a power of two from 16.
    """
    # Documents take as many registers as dropout in the backward of heads up to 64. On Blackwell, where scores are not
    # computed in registers but moved there, they do in the forward of all heads.
    documents_as_dropout = has_documents and (arch == "sm_100" if kernel == "forward" else block_d <= 64)
    kinds = [f"{kind} dropout", kind] if has_dropout or (kind == "half" and documents_as_dropout) else [kind]
    kind, widest = next(key for one in kinds for key in _ATTENTION if key[0] == one and block_d <= key[1])
    of: str | None = arch
    row = _ATTENTION[kind, widest][_KERNELS.index(kernel)]
    while of is not None:
        if (of, kind, widest, kernel) in _ATTENTION_ON:
            row = _ATTENTION_ON[of, kind, widest, kernel]
            break
        of = ARCHITECTURES[of].like
    return row if arch in ("sm_90", "sm_100") else row._replace(use_tma=False)


def attention_rows() -> Iterator[tuple[str, str, int]]:
    """The key of every row: (kernel, kind, largest padded head size)."""
    yield from ((kernel, kind, width) for kind, width in _ATTENTION for kernel in _KERNELS)


# -- decoding -----------------------------------------------------------------------------------------------------


class DecodeRow(NamedTuple):
    """split_s: keys in a split, which is one tile. block_c: columns that a program (one warp) combines.

    one_warps, few_warps: warps for rows with one new token, and for rows with several.
    """

    split_s: int
    one_warps: int
    few_warps: int
    block_c: int = 128


def decode_row(element_size: int, block_d: int) -> DecodeRow:
    """The row for cached numbers of `element_size` bytes and the padded head size `block_d`, a power of two from 16.

    It must not depend on anything else, because the position of the splits shows in the last bits of a row's result.
    2 warps hold 16 KB of keys and 16 KB of values in registers beside the float32 products. More warps add more partial
    sums for the same bytes, but rows with several new tokens need their registers.
    """
    row_bytes = block_d * element_size
    if row_bytes <= 128:
        return DecodeRow(128, 2, 4)
    if row_bytes <= 256:
        return DecodeRow(64, 2, 8)
    return DecodeRow(64 if row_bytes <= 512 else 32, 4, 8)


# -- linear layers for a few rows ----------------------------------------------------------------------------------


SPLIT_K = 8  # how many shares K is split into; each has one warp


class LinearDecodeRow(NamedTuple):
    """block_r, block_n: rows and outputs of a program. block_k: inputs per step of each share of K."""

    block_r: int
    block_n: int
    block_k: int
    num_warps: int = SPLIT_K


def linear_decode_share(num_inputs: int) -> int:
    """The number of inputs in a share, a multiple of 16 even where K is not."""
    return max(1, ceil_div(num_inputs, 16 * SPLIT_K)) * 16


def linear_decode_row(
    num_rows: int, num_outputs: int, num_inputs: int, element_size: int, prologue: str, arch: str
) -> LinearDecodeRow:
    """The row for products of `element_size` bytes and the prologue "none", "layer_norm" or "combine".

    A row's result must not depend on the other rows. So LayerNorm's block_k, the tile of its sums, depends only on the
    architecture, element_size and num_inputs. On AMD the same holds for block_r, which would decide the matrix
    instruction and which warp sums what. Nothing else changes the order of additions.

    - Up to 8 rows: reading the weight is the limit. Many programs with large steps keep most of it in flight.
    - More rows: twice the rows and outputs per program halve the reads of x and of the weight from the L2 cache.
    - LayerNorm in one step keeps a whole share of x in registers.
    - Registers decide the rest.
    """
    share = 1 << (linear_decode_share(num_inputs) - 1).bit_length()
    is_few = num_rows <= 8
    if element_size == 4:  # outside the tensor cores, unrolled
        return LinearDecodeRow(16 if is_amd(arch) else 8, 16, min(share, 32))
    if is_amd(arch):
        return LinearDecodeRow(16, 16, 128)
    if prologue == "layer_norm":
        # Below 128, how many neighbours along K a thread holds would depend on block_r, and so would the sums' order.
        block_k = max(128, min(share, 256))
        if is_few:
            # A vocabulary has more programs than fit on the GPU at once. With fewer outputs each, x is read more often.
            return LinearDecodeRow(8, 32 if num_outputs >= 16384 and block_k <= 128 else 16, block_k)
        if block_k > 128 and ARCHITECTURES[arch].shared < 131_072:
            return LinearDecodeRow(8, 16, block_k)
        return LinearDecodeRow(16, 16 if arch != "sm_90" and block_k > 128 else 32, block_k)
    if prologue == "combine":
        return (
            LinearDecodeRow(8, 16, min(share, 128 if share <= 128 else 64)) if is_few else LinearDecodeRow(16, 32, 32)
        )
    if is_few:
        return LinearDecodeRow(8, 16, min(share, 128))
    if -(-num_rows // 16) * -(-num_outputs // 32) <= 128:
        return LinearDecodeRow(16, 32, min(share, 64))
    return LinearDecodeRow(32, 32, min(share, 32))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 1 for the interpreter, so that a program has several rows there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# -- layer norm, activations --------------------------------------------------------------------------------------


class LayerNormRow(NamedTuple):
    """block_c: a whole row in registers, or a block of a longer row. programs: how many run per multiprocessor."""

    block_c: int
    num_warps: int
    programs: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, bool | int]:
        return OPTIONS if self.max_registers is None else {**OPTIONS, "maxnreg": self.max_registers}


# Where a compiler would spill a few bytes, although more registers are available: the forward of Triton 3.9 on sm_100
# and of 3.7.1 on sm_90, and the backward of 3.6.0 on sm_100.
_SPILLING_NORMS = (("forward", "sm_90"), ("forward", "sm_100"), ("backward", "sm_100"))


def layer_norm_row(kernel: str, width: int, arch: str) -> LayerNormRow:
    """The row for kernel "forward" or "backward".

    In the forward a thread holds 16 numbers of a row, which are two 16-byte accesses in half precision. In the backward
    it holds 8, because five such rows (weight, its gradient, ...) stay in registers. There are as many programs as can
    be resident together. Each has a row in flight, in all 18 KB, which is more than memory latency needs. More programs
    would only wait, and in the backward each would write another partial row. In the backward, longer rows have blocks
    of 4096, because 8192 spill registers (Ampere).
    """
    block = max(256, next_power_of_2(width))
    lanes = 64 if is_amd(arch) else 32
    held, widest = (16, 16384) if kernel == "forward" else (8, 8192)
    num_warps = min(16, max(1, block // (held * lanes)))
    registers = 80 if (kernel, arch) in _SPILLING_NORMS and block <= 4096 else None
    if kernel == "backward" and block > widest:
        return LayerNormRow(4096, 16 if lanes == 32 else 8, 2)
    return LayerNormRow(min(block, widest), num_warps, max(2, 24 // num_warps), registers)


# The activations that have a kernel: their names in transformers, and their names in the kernels.
_SAME_NAME = ("gelu", "gelu_10", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "hardswish", "laplace", "mish")
_GELU_TANH = ("gelu_new", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh", "gelu_fast")
ACTIVATIONS = {
    **{name: name for name in (*_SAME_NAME, "sigmoid", "silu", "tanh")},
    **dict.fromkeys(_GELU_TANH, "gelu_tanh"),
    "gelu_python": "gelu",
    "swish": "silu",
}


class ActivationRow(NamedTuple):
    """block_n, block_c: rows and columns of a tile. bwd_block_n: rows in the backward, which needs more registers.

    programs: how many run per multiprocessor in the backward.
    """

    block_n: int
    bwd_block_n: int
    block_c: int
    num_warps: int
    programs: int


# 256 divides the inner width of every GPT-2, even 6400. In half precision 256 columns are 512 bytes: one warp's access.
ACTIVATION = ActivationRow(16, 8, 256, 4, 8)


class PartialSumsRow(NamedTuple):
    """block_p, block_c: partial rows and columns of a tile."""

    block_p: int
    block_c: int
    num_warps: int


def partial_sums_row(width: int) -> PartialSumsRow:
    """The row for sums of `width` columns.

    A program takes 16 columns (64 bytes), so that even a few hundred columns fill many programs, or more columns where
    that would make over 128 programs.
    """
    block_c = max(16, next_power_of_2(width) // 128)
    return PartialSumsRow(max(1, 2048 // block_c), block_c, 4)
