"""Compile cases of the sampling kernel: every launch row and filter, with an odd vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt2_kernels.triton import launch, sampling
from fastgpt2_kernels.triton.arguments import Matrix
from tests.kernels.compiling import Case, pointers_and_strides

FLAGS = ("HAS_PENALTY", "HAS_TOP_K", "HAS_TOP_P", "HAS_MIN_P", "IS_GREEDY")
FILTERS = {"HAS_TOP_K", "HAS_TOP_P", "HAS_MIN_P"}
VARIANTS = [
    ("IS_GREEDY",),
    (),
    ("HAS_TOP_K",),
    ("HAS_TOP_P",),
    ("HAS_TOP_K", "HAS_TOP_P"),
    ("HAS_PENALTY", "HAS_MIN_P"),
    ("HAS_PENALTY", "HAS_TOP_P", "HAS_MIN_P"),
    FLAGS[:4],
]


def sampling_cases(arch: str) -> Iterator[Case]:
    """Rows of logits are padded to a multiple of 64, so their stride is a multiple of 16."""
    kernel = sampling._sample_kernel
    cases = [(50257, "fp32", flags) for flags in VARIANTS]
    cases += [(50257, "bf16", VARIANTS[-1]), (2000, "fp32", VARIANTS[-1]), (200, "fp32", VARIANTS[-1])]
    for vocab_size, dtype, flags in cases:
        row = launch.sampling_row(vocab_size, arch, has_filters=bool(FILTERS & set(flags)))
        has = dict(zip(FLAGS, (flag in flags for flag in FLAGS), strict=True))
        meta = sampling._Meta(**has, MARK_SEEN=has["HAS_PENALTY"], BLOCK=row.block_v)
        settings = sampling._Settings(
            keys_ptr=None if has["IS_GREEDY"] else "*i64",
            positions_ptr=None if has["IS_GREEDY"] else "*i32",
            temperature_ptr=None if has["IS_GREEDY"] else "*fp32",
            top_k_ptr="*i32" if has["HAS_TOP_K"] else None,
            top_p_ptr="*fp32" if has["HAS_TOP_P"] else None,
            min_p_ptr="*fp32" if has["HAS_MIN_P"] else None,
            penalty_ptr="*fp32" if has["HAS_PENALTY"] else None,
        )
        signature = {
            "logits": Matrix("*" + dtype, "i32"),
            "ids_ptr": "*i32",
            "logprobs_ptr": "*fp32",
            "slots_ptr": "*i32",
            "settings": settings,
            "seen": Matrix("*u8", "i32") if has["HAS_PENALTY"] else None,
            "V": "i32",
            "META": "constexpr",
        }
        aligned = pointers_and_strides(signature)
        options = dict(launch.OPTIONS)
        title = " ".join(["sample", dtype, f"block {row.block_v}", *flags])
        yield Case(title, kernel, signature, {"META": meta}, row.num_warps, options, aligned)
