"""Launch tables: tile sizes, warps and stages of every kernel. Plain data, shipped, never searched at a first call."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

# Compiler options of every launch. Contracting a * b + c is said out loud: its default changes after Triton 3.9.
OPTIONS: dict[str, bool | int] = {"enable_fp_fusion": True}


# -- GPUs ---------------------------------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """A column of the tables. like: the architecture whose rows it takes where the tables have none for itself.

    capability: of NVIDIA's GPUs, else None. shared: bytes of shared memory that one program may have.
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
    "sm_120": Architecture((12, 0), 101_376, "sm_89"),  # RTX 50: the tensor cores are programmed as Ampere's are
    "gfx90a": Architecture(None, 65_536, "gfx942"),  # MI200
    "gfx942": Architecture(None, 65_536),  # MI300
    "gfx950": Architecture(None, 163_840, "gfx942"),  # MI350
}

MOST_SHARED = max(of.shared for of in ARCHITECTURES.values())


@functools.cache
def architecture(device: torch.device) -> str:
    """The column of the tables for a device: its own, or the nearest one known."""
    if device.type != "cuda":
        return "sm_80"  # the interpreter
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return name if name in ARCHITECTURES else "gfx942"
    capability = torch.cuda.get_device_capability(device)
    return nearest_architecture(capability, properties.shared_memory_per_block_optin)


def nearest_architecture(capability: tuple[int, int], shared: int) -> str:
    """The newest one of NVIDIA's that is no newer than `capability` and whose rows fit into `shared` bytes."""
    known = [(of.capability, name) for name, of in ARCHITECTURES.items() if of.capability and of.shared <= shared]
    older = [found for found in known if found[0] <= capability]
    return max(older, default=("", "sm_86"))[1]


def has_tf32(arch: str) -> bool:
    """Whether its matrix units multiply float32 rounded to tf32."""
    return arch not in ("gfx90a", "gfx950")


def is_amd(arch: str) -> bool:
    return arch.startswith("gfx")


# -- cross-entropy, sampling --------------------------------------------------------------------------------------


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
    """block_v: logits that a step of a pass takes, a multiple of 4, and the lanes that top-k deals the row out to."""

    block_v: int
    num_warps: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, bool | int]:
        return OPTIONS if self.max_registers is None else {**OPTIONS, "maxnreg": self.max_registers}


def sampling_row(vocab_size: int, arch: str, *, has_filters: bool = False) -> SamplingRow:
    """One program, and so one multiprocessor, a row of logits: as many threads as the registers allow.

    With filters (top-k, top-p, min-p) the lanes' state and its copies in the loops take 96 to 128 registers a thread at
    4 lanes a thread. For the small blocks the compiler by itself spills some to get along with 80.
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
    """block_t, block_s: queries and keys of a tile. use_tma: load the tiles walked over by the memory accelerator."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int
    use_tma: bool = False

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **OPTIONS}


# By what is multiplied ("half" 16 bits, "tf32", "ieee" float32) and the largest padded head size: forward, dq, dkdv.
# Registers decide nearly everywhere: a tile's accumulators have to fit beside its scores without spilling.
# - half, 64: 32 rows a warp in the forward keep the exponentials and the tensor cores equally busy, two programs on a
#   multiprocessor; pointers in place of descriptors cost a third more instructions. The backward is bound by shared
#   memory: the owned tile as large as two score tiles and one or two accumulators leave room for.
# - half, wider heads: the walked tile shrinks as the accumulators grow.
# - dropout: drawing the mask takes the registers of half a tile of scores.
# - ieee: these products run outside the tensor cores, unrolled; more warps mean fewer registers each.
_ATTENTION: dict[tuple[str, int], tuple[AttentionRow, AttentionRow, AttentionRow]] = {
    ("half", 64): (AttentionRow(128, 64, 4, 2, True), AttentionRow(128, 64, 4, 2), AttentionRow(32, 128, 4, 2)),
    ("half", 128): (AttentionRow(128, 32, 4, 2, True), AttentionRow(64, 64, 4, 2), AttentionRow(32, 64, 4, 2)),
    ("half", 256): (AttentionRow(64, 32, 4, 2, True), AttentionRow(32, 32, 4, 2), AttentionRow(32, 32, 8, 2)),
    ("half dropout", 64): (AttentionRow(128, 32, 4, 2, True), AttentionRow(64, 64, 4, 2), AttentionRow(64, 64, 4, 2)),
    ("tf32", 64): (AttentionRow(64, 32, 4, 2), AttentionRow(64, 32, 4, 2), AttentionRow(32, 64, 4, 2)),
    ("tf32", 128): (AttentionRow(32, 32, 4, 1), AttentionRow(32, 32, 4, 1), AttentionRow(32, 32, 4, 1)),
    ("tf32", 256): (AttentionRow(32, 32, 8, 1), AttentionRow(32, 32, 8, 1), AttentionRow(32, 32, 8, 1)),
    ("ieee", 32): (AttentionRow(32, 32, 4, 1), AttentionRow(32, 32, 4, 1), AttentionRow(32, 32, 4, 1)),
    ("ieee", 64): (AttentionRow(32, 32, 8, 1), AttentionRow(32, 32, 8, 1), AttentionRow(32, 32, 4, 1)),
    ("ieee", 128): (AttentionRow(32, 32, 8, 1), AttentionRow(16, 16, 8, 1), AttentionRow(32, 32, 8, 1)),
}
# Where the row above would spill in a loop on an architecture.
_ATTENTION_ON: dict[tuple[str, str, int, str], AttentionRow] = {
    ("sm_80", "half", 64, "dq"): AttentionRow(128, 32, 4, 2),
    ("sm_80", "half", 64, "dkdv"): AttentionRow(64, 64, 4, 2),
    ("sm_80", "half", 128, "forward"): AttentionRow(128, 64, 8, 2),
    ("sm_80", "half", 256, "forward"): AttentionRow(64, 32, 8, 2),
    ("sm_80", "half dropout", 64, "dkdv"): AttentionRow(64, 32, 4, 2),
    ("sm_80", "ieee", 32, "dq"): AttentionRow(32, 32, 4, 2),
    ("sm_80", "ieee", 64, "dkdv"): AttentionRow(32, 32, 8, 1),
    ("sm_80", "ieee", 128, "dkdv"): AttentionRow(16, 16, 8, 1),
    ("sm_86", "half", 64, "forward"): AttentionRow(128, 32, 4, 2),
    ("sm_86", "half", 128, "dq"): AttentionRow(32, 64, 4, 2),
    ("sm_86", "tf32", 256, "dq"): AttentionRow(16, 16, 4, 1),
    ("sm_86", "tf32", 256, "dkdv"): AttentionRow(16, 16, 4, 1),
    ("sm_90", "half", 64, "dkdv"): AttentionRow(64, 64, 4, 2),
    ("sm_90", "half", 128, "forward"): AttentionRow(64, 64, 4, 2, True),
    ("sm_100", "half", 64, "dq"): AttentionRow(64, 64, 4, 2),
    ("sm_100", "half", 128, "dq"): AttentionRow(64, 32, 4, 2),
    ("sm_100", "tf32", 64, "dkdv"): AttentionRow(16, 64, 4, 2),
    ("sm_100", "ieee", 32, "dq"): AttentionRow(32, 32, 4, 2),
    ("sm_100", "ieee", 32, "dkdv"): AttentionRow(32, 32, 4, 2),
    ("sm_120", "half", 64, "forward"): AttentionRow(64, 64, 4, 2),
    ("sm_120", "half", 64, "dq"): AttentionRow(64, 64, 4, 2),
    ("sm_120", "half dropout", 64, "forward"): AttentionRow(64, 32, 4, 2),
    ("sm_120", "half dropout", 64, "dq"): AttentionRow(64, 32, 4, 2),
    ("sm_120", "tf32", 64, "dkdv"): AttentionRow(16, 64, 4, 2),
    ("sm_120", "ieee", 32, "forward"): AttentionRow(32, 32, 4, 2),
    ("gfx942", "half", 128, "dkdv"): AttentionRow(32, 64, 4, 1),
    ("gfx90a", "half", 256, "dq"): AttentionRow(32, 16, 4, 2),
    ("gfx942", "half", 64, "dq"): AttentionRow(64, 64, 4, 2),
    ("gfx942", "half", 64, "dkdv"): AttentionRow(64, 64, 4, 1),
    ("gfx942", "half", 256, "dkdv"): AttentionRow(16, 32, 4, 1),
    ("gfx942", "half dropout", 64, "dkdv"): AttentionRow(32, 64, 4, 1),
    ("gfx942", "tf32", 256, "forward"): AttentionRow(16, 16, 4, 1),
    ("gfx942", "tf32", 256, "dq"): AttentionRow(16, 16, 4, 1),
    ("gfx942", "tf32", 256, "dkdv"): AttentionRow(16, 16, 4, 1),
    ("gfx942", "ieee", 128, "dkdv"): AttentionRow(16, 16, 4, 1),
}
_KERNELS = ("forward", "dq", "dkdv")


def attention_row(
    kernel: str, arch: str, kind: str, block_d: int, *, has_dropout: bool = False, has_documents: bool = False
) -> AttentionRow:
    """kernel "forward", "dq" or "dkdv"; kind "half", "tf32" or "ieee"; block_d: head size, a power of two from 16."""
    # Documents take as much in the backward, and on Blackwell, whose scores come to the registers from elsewhere.
    documents_as_dropout = has_documents and (kernel != "forward" or arch == "sm_100")
    if kind == "half" and block_d <= 64 and (has_dropout or documents_as_dropout):
        kind = "half dropout"
    widest = next(width for known, width in _ATTENTION if known == kind and block_d <= width)
    of: str | None = arch
    row = _ATTENTION[kind, widest][_KERNELS.index(kernel)]
    while of is not None:
        if (of, kind, widest, kernel) in _ATTENTION_ON:
            row = _ATTENTION_ON[of, kind, widest, kernel]
            break
        of = ARCHITECTURES[of].like
    return row if arch in ("sm_90", "sm_100") else row._replace(use_tma=False)


def attention_rows() -> Iterator[tuple[str, str, int]]:
    """(kernel, kind, widest padded head size) of every row."""
    yield from ((kernel, kind, width) for kind, width in _ATTENTION for kernel in _KERNELS)


# -- decoding -----------------------------------------------------------------------------------------------------


class DecodeRow(NamedTuple):
    """split_s: keys of a split, which is one tile; one_warps, few_warps: for one new token a row, for several.

    block_c: columns that a program combines, one warp.
    """

    split_s: int
    one_warps: int
    few_warps: int
    block_c: int = 128


def decode_row(element_size: int, block_d: int) -> DecodeRow:
    """element_size: bytes of a cached number; block_d: head size, a power of two from 16.

    Nothing else may decide: where splits begin shows in the last bits of a row's result. 2 warps hold 16 KB of keys and
    as much of values in their registers beside the float32 products; more warps add up more partial sums for the same
    bytes, and several new tokens need the room.
    """
    row_bytes = block_d * element_size
    if row_bytes <= 128:
        return DecodeRow(128, 2, 4)
    if row_bytes <= 256:
        return DecodeRow(64, 2, 8)
    return DecodeRow(64 if row_bytes <= 512 else 32, 4, 8)


# -- linear maps of a few rows -------------------------------------------------------------------------------------


SPLIT_K = 8  # shares of K, a warp each


class LinearDecodeRow(NamedTuple):
    """block_r rows and block_n outputs of a program, block_k inputs of a step of each of its shares of K."""

    block_r: int
    block_n: int
    block_k: int
    num_warps: int = SPLIT_K


def linear_decode_share(num_inputs: int) -> int:
    """Inputs of a share: whole products of 16, also where K is not."""
    return max(1, -(-num_inputs // (16 * SPLIT_K))) * 16


def linear_decode_row(
    num_rows: int, num_outputs: int, num_inputs: int, element_size: int, prologue: str, arch: str
) -> LinearDecodeRow:
    """element_size: of what is multiplied. prologue "none", "layer_norm" or "combine".

    A number must not depend on how many rows are beside it. So LayerNorm's block_k, the tile that its sums run over,
    depends on the architecture, element_size and num_inputs alone, and on AMD so does block_r, which would choose the
    matrix instruction and which warp adds up what. All else changes no order of additions.

    - 8 rows or fewer are bound by the weight's bytes: the most of it under way, in the most programs.
    - more: twice the rows and outputs a program halve what is read of x and of the weight from the L2 cache.
    - LayerNorm in one step keeps x in registers, a whole share of it.
    - registers decide the rest.
    """
    share = 1 << (linear_decode_share(num_inputs) - 1).bit_length()
    is_few = num_rows <= 8
    if element_size == 4:  # outside the tensor cores, unrolled
        return LinearDecodeRow(16 if is_amd(arch) else 8, 16, min(share, 32))
    if is_amd(arch):
        return LinearDecodeRow(16, 16, 128)
    if prologue == "layer_norm":
        # Below 128, how many neighbours along K a thread holds would depend on block_r.
        block_k = max(128, min(share, 256))
        if is_few:
            # A vocabulary's many programs take turns on a multiprocessor; fewer outputs each would read x more often.
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
    """How many a GPU has; 1 for the interpreter, so that a program has several rows there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# -- layer norm, activations --------------------------------------------------------------------------------------


class LayerNormRow(NamedTuple):
    """block_c: a whole row in registers, or a block of a longer one. programs: of a multiprocessor."""

    block_c: int
    num_warps: int
    programs: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, bool | int]:
        return OPTIONS if self.max_registers is None else {**OPTIONS, "maxnreg": self.max_registers}


# Where a compiler by itself spills a few bytes to take fewer registers than there are: Triton 3.9 forward on sm_100,
# 3.7.1 forward on sm_90, 3.6.0 backward on sm_100.
_SPILLING_NORMS = (("forward", "sm_90"), ("forward", "sm_100"), ("backward", "sm_100"))


def layer_norm_row(kernel: str, width: int, arch: str) -> LayerNormRow:
    """kernel "forward" or "backward".

    A thread holds 16 or 8 numbers of a row: 16 bytes of half precision twice, or once where five such rows (weight, its
    gradient, ...) stay in registers. As many programs as are resident together, each with a row on its way: 18 KB, more
    than memory's latency needs. More would wait for the first, and in the backward each writes a partial row.
    The blocks of a longer row are 4096 in the backward: 8192 spill (Ampere).
    """
    block = max(256, 1 << (width - 1).bit_length())
    lanes = 64 if is_amd(arch) else 32
    held, widest = (16, 16384) if kernel == "forward" else (8, 8192)
    num_warps = min(16, max(1, block // (held * lanes)))
    registers = 80 if (kernel, arch) in _SPILLING_NORMS and block <= 4096 else None
    if kernel == "backward" and block > widest:
        return LayerNormRow(4096, 16 if lanes == 32 else 8, 2)
    return LayerNormRow(min(block, widest), num_warps, max(2, 24 // num_warps), registers)


# The activations that have a kernel by transformers' names, and the kernels' own names for them.
_SAME_NAME = ("gelu", "gelu_10", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "hardswish", "laplace", "mish")
_GELU_TANH = ("gelu_new", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh", "gelu_fast")
ACTIVATIONS = {
    **{name: name for name in (*_SAME_NAME, "sigmoid", "silu", "tanh")},
    **dict.fromkeys(_GELU_TANH, "gelu_tanh"),
    "gelu_python": "gelu",
    "swish": "silu",
}


class ActivationRow(NamedTuple):
    """block_n, block_c: rows and columns of a tile; bwd_block_n: rows in the backward, which holds more of each.
    programs: of a multiprocessor in the backward."""

    block_n: int
    bwd_block_n: int
    block_c: int
    num_warps: int
    programs: int


# 256 columns divide the inner widths of all GPT-2s, 6400 too, and are 512 bytes of half precision, one warp's access.
ACTIVATION = ActivationRow(16, 8, 256, 4, 8)


class PartialSumsRow(NamedTuple):
    """block_p, block_c: partial rows and columns of a tile."""

    block_p: int
    block_c: int
    num_warps: int


def partial_sums_row(width: int) -> PartialSumsRow:
    """16 columns, 64 bytes, and more where that made over 128 programs: a few hundred columns still spread widely."""
    block_c = max(16, (1 << (width - 1).bit_length()) // 128)
    return PartialSumsRow(max(1, 2048 // block_c), block_c, 4)
