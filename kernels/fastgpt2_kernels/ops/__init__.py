"""The public operators: they check their arguments, choose a backend and call it.

Every operator takes `backend="auto" | "triton" | "native" | "torch"`. "auto" is Triton on a GPU and native on a CPU
where the operator has such a kernel, and PyTorch's own operators otherwise. `why_not_triton` and `why_not_native` say
in one sentence why a backend is not used.
Checks look at shapes, dtypes and devices. They look at values only on a CPU, where this needs no synchronisation.

Dimension key: B batch, T query tokens, S key tokens, H heads, D head size, C = H * D width, N rows, V vocabulary.
"""

from __future__ import annotations

from fastgpt2_kernels.backends import (
    BACKENDS,
    OPERATORS,
    KernelFailedError,
    backends_of,
    check_backend,
    note_failure,
    why_not_native,
    why_not_triton,
)
from fastgpt2_kernels.host import to_device
from fastgpt2_kernels.native import isa as native_isa
from fastgpt2_kernels.native import use_large_pages
from fastgpt2_kernels.native.decode import DecodeStep as NativeStep
from fastgpt2_kernels.native.decode import PackedWeights
from fastgpt2_kernels.ops.ahead import compile_variants, find_variants, this_target
from fastgpt2_kernels.ops.attention import (
    MAX_HEAD_SIZE,
    cached_attention,
    causal_attention,
    causal_attention_packed,
    decode_attention,
    plan_documents,
    plan_rows,
)
from fastgpt2_kernels.ops.decode import decode_step, linear_decode, pack_step_weights, quantize_rows
from fastgpt2_kernels.ops.layers import activation, bias_activation, layer_norm, linear
from fastgpt2_kernels.ops.loss import CrossEntropyStats, TargetCheck, cross_entropy, linear_cross_entropy
from fastgpt2_kernels.ops.sampling import in_range, row_keys, sample
from fastgpt2_kernels.precision import is_float32_exact
from fastgpt2_kernels.reference import ACTIVATIONS
from fastgpt2_kernels.triton.launch import ACTIVATIONS as TRITON_ACTIVATIONS
from fastgpt2_kernels.types import (
    FRESH,
    IDLE,
    RUNNING,
    Documents,
    LayerNormWeights,
    LayerWeights,
    LinearWeights,
    RowPlan,
    SlotSampling,
    SlotState,
    StepWeights,
)

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "FRESH",
    "IDLE",
    "MAX_HEAD_SIZE",
    "OPERATORS",
    "RUNNING",
    "TRITON_ACTIVATIONS",
    "CrossEntropyStats",
    "Documents",
    "KernelFailedError",
    "LayerNormWeights",
    "LayerWeights",
    "LinearWeights",
    "NativeStep",
    "PackedWeights",
    "RowPlan",
    "SlotSampling",
    "SlotState",
    "StepWeights",
    "TargetCheck",
    "activation",
    "backends_of",
    "bias_activation",
    "cached_attention",
    "causal_attention",
    "causal_attention_packed",
    "check_backend",
    "compile_variants",
    "cross_entropy",
    "decode_attention",
    "decode_step",
    "find_variants",
    "in_range",
    "is_float32_exact",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_decode",
    "native_isa",
    "note_failure",
    "pack_step_weights",
    "plan_documents",
    "plan_rows",
    "quantize_rows",
    "row_keys",
    "sample",
    "this_target",
    "to_device",
    "use_large_pages",
    "why_not_native",
    "why_not_triton",
]
