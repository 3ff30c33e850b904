"""Benchmarks of fastgpt2 and its peers; not installed. Start with `python -m benchmarks --help`.

Every file that the front names holds `cases(settings)`, which yields `harness.Case`s: inputs, an exact result, and the
contenders. Adding an operator is one such file and its name in `MODULES`.
"""

MODULES = (
    "attention",
    "cross_entropy",
    "layers",
    "decode",
    "decode_step",
    "train",
    "huggingface",
    "generate",
    "huggingface_generate",
    "score",
    "prefixes",
)
