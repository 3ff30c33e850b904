"""The sampling kernel as it is compiled: every launch row and every filter, logits of an odd vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt2_kernels.triton import launch, sampling
from tests.kernels.compiling import Case

FLAGS = ("HAS_PENALTY", "HAS_TOP_K", "HAS_TOP_P", "HAS_MIN_P", "IS_GREEDY")
FILTERS = {"HAS_TOP_K", "HAS_TOP_P", "HAS_MIN_P"}
VARIANTS = [
    ("IS_GREEDY",),
    (),
    ("HAS_TOP_K",),
    ("HAS_TOP_P",),
    ("HAS_TOP_K", "HAS_TOP_P"),
    ("HAS_PENALTY", "HAS_TOP_P", "HAS_MIN_P"),
    FLAGS[:4],
]
OWNERS = {
    "keys_ptr": "!IS_GREEDY", "positions_ptr": "!IS_GREEDY", "temperature_ptr": "!IS_GREEDY", "top_k_ptr": "HAS_TOP_K",
    "top_p_ptr": "HAS_TOP_P", "min_p_ptr": "HAS_MIN_P", "penalty_ptr": "HAS_PENALTY", "seen_ptr": "HAS_PENALTY",
}  # fmt: skip
TYPES = {"ids_ptr": "i32", "slots_ptr": "i32", "keys_ptr": "i64", "positions_ptr": "i32", "top_k_ptr": "i32"}


def sampling_cases(arch: str) -> Iterator[Case]:
    """Rows of logits padded to a multiple of 64: their stride is one of 16."""
    kernel = sampling._sample_kernel
    cases = [(50257, "fp32", flags) for flags in VARIANTS]
    cases += [(50257, "bf16", VARIANTS[-1]), (2000, "fp32", VARIANTS[-1]), (200, "fp32", VARIANTS[-1])]
    for vocab_size, dtype, flags in cases:
        row = launch.sampling_row(vocab_size, arch, has_filters=bool(FILTERS & set(flags)))
        constants = {flag: flag in flags for flag in FLAGS}
        constants |= {"HAS_SLOTS": True, "MARK_SEEN": "HAS_PENALTY" in flags, "BLOCK": row.block_v}
        signature = {}
        for name in kernel.arg_names:
            owner = OWNERS.get(name, "")
            if owner and (owner.removeprefix("!") in flags) == owner.startswith("!"):
                constants[name] = None  # a tensor that is not given
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                signature[name] = "*" + {"logits_ptr": dtype, "seen_ptr": "u8", **TYPES}.get(name, "fp32")
            else:
                signature[name] = "i32"
        aligned = tuple(
            name for name in kernel.arg_names if name.endswith("_ptr") and constants.get(name, 0) is not None
        )
        options = dict(launch.OPTIONS)
        title = " ".join(["sample", dtype, f"block {row.block_v}", *flags])
        yield Case(title, kernel, signature, constants, row.num_warps, options, (*aligned, "stride_lr", "stride_ss"))
