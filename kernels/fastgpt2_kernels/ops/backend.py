"""Which backend an operator runs on, and the checks that several operators share."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
OPERATORS = (
    "causal_attention",
    "cached_attention",
    "decode_attention",
    "layer_norm",
    "activation",
    "bias_activation",
    "linear",
    "linear_decode",
    "decode_step",
    "cross_entropy",
    "linear_cross_entropy",
    "sample",
)
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # a look at the file system, so only once
_TRITON_OPERATORS = frozenset(
    {
        "causal_attention",
        "cached_attention",
        "decode_attention",
        "linear_decode",
        "decode_step",
        "cross_entropy",
        "linear_cross_entropy",
        "sample",
        "layer_norm",
        "bias_activation",
    }
)


def why_not_triton(operator: str, device: torch.device | str) -> str | None:
    """Why `operator` would not run on Triton for tensors on `device`, in one sentence; None if it would."""
    if operator not in OPERATORS:
        raise ValueError(f"why_not_triton: operator must be one of {', '.join(OPERATORS)}; got {operator!r}")
    if operator not in _TRITON_OPERATORS:
        return f"{operator} has no Triton kernel in this version"
    if not TRITON_IS_INSTALLED:
        return "the package triton is not installed"
    if torch.device(device).type != "cuda" and not interpreter_is_on():
        return f"Triton kernels need a GPU or Triton's interpreter; the tensors are on {torch.device(device).type}"
    return None


def interpreter_is_on() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_float32_exact() -> bool:
    """Whether products of float32 must not be rounded to tf32, by PyTorch's own switch."""
    return torch.get_float32_matmul_precision() == "highest"


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")


def use_triton(operator: str, device: torch.device, backend: str, dtype: torch.dtype | None = None) -> bool:
    """`dtype`, where it is given, is that of an operator whose kernels compute in float32: not for float64."""
    check_backend(backend)
    if backend == "torch":
        return False
    # The interpreter is for checking kernels: it has to be asked for.
    if backend == "auto" and device.type == "cpu":
        return False
    reason = why_not_triton(operator, device)
    if reason is None and dtype == torch.float64:
        reason = "it computes in float32; got float64"
    if reason is not None and backend == "triton":
        raise ValueError(f"{operator}: backend='triton' cannot be used: {reason}")
    return reason is None


def check_same(operator: str, *, check_dtype: bool = True, **tensors: Tensor) -> None:
    if len({t.device for t in tensors.values()}) > 1:
        got = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"{operator}: all tensors must be on one device; got {got}")
    if check_dtype and len({t.dtype for t in tensors.values()}) > 1:
        got = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise ValueError(f"{operator}: all tensors must have one dtype; got {got}")


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
