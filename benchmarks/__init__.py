"""Benchmarks of fastgpt2 and its peers; not installed. Start with `python -m benchmarks --help`.

Every file named in `MODULES` has `cases(settings)`, which yields `harness.Case`s: inputs, an exact result and the
contenders. To add an operator, add such a file, and its name to `MODULES`.
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
