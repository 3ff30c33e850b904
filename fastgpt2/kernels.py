"""The kernels' public operators under the product's name: `from fastgpt2.kernels import causal_attention`."""

from fastgpt2_kernels.ops import (
    CrossEntropyStats,
    TargetCheck,
    activation,
    bias_activation,
    cached_attention,
    causal_attention,
    causal_attention_packed,
    cross_entropy,
    layer_norm,
    linear,
    linear_cross_entropy,
    pack_linear,
    plan_documents,
    plan_rows,
    why_not_triton,
)

__all__ = [
    "CrossEntropyStats",
    "TargetCheck",
    "activation",
    "bias_activation",
    "cached_attention",
    "causal_attention",
    "causal_attention_packed",
    "cross_entropy",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "pack_linear",
    "plan_documents",
    "plan_rows",
    "why_not_triton",
]
