"""Measurements of fastgpt2 beside its peers; not installed. `python -m benchmarks --help` is the front.

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
