"""Backends: a table of what each operator runs on. This module chooses a backend, loads it, and explains a refusal.

"torch" runs on any device, and every operator but `decode_step` has it. An operator may also have a Triton kernel
("triton", for GPUs) and a C++ kernel ("native", for CPUs). "auto" takes Triton on a GPU and native on a CPU where the
operator has such a kernel and it can run, and "torch" otherwise.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from fastgpt2_kernels import native

BACKENDS = ("auto", "triton", "native", "torch")
# operator -> backend -> the function that `ops` calls with checked arguments. The functions of one operator take the
# same arguments. A module is imported when one of its functions is first called. `cached_attention` and
# `linear_cross_entropy` are built from other operators: the table names only the part that differs between backends.
_TABLE = {
    "causal_attention": {
        "triton": "triton.attention:attention",
        "torch": "torch.attention:attention",
    },
    "causal_attention_packed": {
        "triton": "triton.attention:attention_packed",
        "torch": "torch.attention:attention_packed",
    },
    "cached_attention": {
        "triton": "triton.decode.attention:append_and_attend",
        "torch": "torch.decode:append_and_attend",
    },
    "decode_attention": {
        "triton": "triton.decode.attention:append_and_attend",
        "torch": "torch.decode:append_and_attend",
    },
    "layer_norm": {
        "triton": "triton.layers.layer_norm:layer_norm",
        "torch": "torch.layers:layer_norm",
    },
    "activation": {
        "torch": "torch.layers:activation",
    },
    "bias_activation": {
        "triton": "triton.layers.activation:bias_activation",
        "torch": "torch.layers:bias_activation",
    },
    "linear": {
        "torch": "torch.layers:linear",
    },
    "linear_decode": {
        "triton": "triton.decode.linear:linear_decode",
        "torch": "torch.decode:linear_decode",
    },
    "decode_step": {
        "triton": "triton.decode.step:DecodeStep",
        "native": "native.decode:DecodeStep",
    },
    "cross_entropy": {
        "triton": "triton.cross_entropy:cross_entropy",
        "torch": "torch.cross_entropy:cross_entropy",
    },
    "linear_cross_entropy": {
        "triton": "triton.cross_entropy:chunk_loss",
        "torch": "torch.cross_entropy:chunk_loss",
    },
    "sample": {
        "triton": "triton.sampling:sample",
        "native": "native.decode:sample_rows",
        "torch": "torch.sampling:sample",
    },
}
OPERATORS = tuple(_TABLE)
# The numbers and the dtype that decide how a kernel is compiled and what resources it needs. Each operator has its own.
Size = tuple[int | torch.dtype, ...]
# (operator, device type, device index) -> size -> why the kernel failed. "auto" takes PyTorch's operators for these.
_FAILED: dict[tuple[str, str, int | None], dict[Size, str]] = {}
_takes_cpu_tensors = False
_fallback_size: ContextVar[Size | None] = ContextVar("fallback_size", default=None)
# (operator, backend) -> (module, name of the function)
_PLACES = {
    (operator, backend): (f"{__package__}.{function.split(':')[0]}", function.split(":")[1])
    for operator, row in _TABLE.items()
    for backend, function in row.items()
}
_MIN_CAPABILITY = (8, 0)
_AMD_GPUS = ("gfx90a", "gfx942", "gfx950")
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # searches the file system, so it is asked once


def backends_of(operator: str) -> dict[str, str]:
    """Say which backends have `operator`.

    Returns:
        The function that each of them runs, as "module:name", by backend.

    Raises:
        ValueError: There is no such operator.
    """
    if operator not in _TABLE:
        raise ValueError(f"backends_of: operator must be one of {', '.join(OPERATORS)}; got {operator!r}")
    return {backend: f"{__package__}.{function}" for backend, function in _TABLE[operator].items()}


def implementation(operator: str, backend: str) -> Callable[..., Any]:
    """The function that runs `operator` on `backend`. Its module is imported on first use."""
    module, function = _PLACES[operator, backend]
    return getattr(sys.modules[_load(module)], function)


def _load(module: str) -> str:
    if module not in sys.modules:
        importlib.import_module(module)
    return module


# torch.compile cannot trace an import by name. With this attribute it calls `_load` instead of tracing it.
# torch.compiler.assume_constant_result sets the same attribute, but it also loads the compiler, and with it Triton.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


class KernelFailedError(RuntimeError):
    """A Triton kernel did not compile, or could not be launched."""


def run_operator(operator: str, chosen: str, backend: str, device: torch.device, size: Size, *args: Any) -> Any:
    """Run `operator` on the chosen backend. If its kernel fails and the caller asked for "auto", fall back to PyTorch.

    The failure is remembered for `size` on this device. A compiled model keeps the kernels that were chosen when it
    was compiled, so there a failure raises.
    """
    if chosen != "triton" or backend != "auto" or torch.compiler.is_compiling():
        return implementation(operator, chosen)(*args)
    try:
        return call_allowing_fallback(size, implementation(operator, chosen), *args)
    except KernelFailedError as error:
        note_failure(operator, device, error, size)
    return implementation(operator, "torch")(*args)


def call_allowing_fallback(size: Size | None, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)`. Meanwhile `fallback_size()` returns `size`; None allows no fallback."""
    if torch.compiler.is_compiling():
        return function(*args)
    token = _fallback_size.set(size)
    try:
        return function(*args)
    finally:
        _fallback_size.reset(token)


def fallback_size() -> Size | None:
    """The size of the running operator if its backward pass may fall back to PyTorch (backend="auto"), else None."""
    return None if torch.compiler.is_compiling() else _fallback_size.get()


def note_failure(operator: str, device: torch.device, error: KernelFailedError, size: Size) -> None:
    """Make "auto" take PyTorch's operators for `operator` of this `size` on `device` from now on.

    Warns when an operator fails on a device for the first time.
    """
    failed = _FAILED.setdefault((operator, device.type, device.index), {})
    if not failed:
        warnings.warn(f"fastgpt2: {operator} runs on PyTorch's operators from now on: {error}", stacklevel=4)
    failed.setdefault(size, str(error))


def _why_failed(operator: str, device: torch.device, size: Size | None) -> str | None:
    """Why the kernel failed at `size`, or with None at any size; None if it did not fail."""
    failed = _FAILED.get((operator, device.type, device.index))
    if not failed:
        return None
    return next(iter(failed.values())) if size is None else failed.get(size)


def why_not_triton(operator: str, device: torch.device | str, size: Size | None = None) -> str | None:
    """Say why `operator` cannot run on Triton for tensors on `device`.

    Args:
        operator: a name of `OPERATORS`.
        device: where the tensors are.
        size: counts only a kernel failure at this size. None counts a failure at any size.

    Returns:
        The reason in one sentence, or None if the operator can run.

    Raises:
        ValueError: There is no such operator.
    """
    if operator not in _TABLE:
        raise ValueError(f"why_not_triton: operator must be one of {', '.join(OPERATORS)}; got {operator!r}")
    if "triton" not in _TABLE[operator]:
        return f"{operator} has no Triton kernel in this version"
    if not TRITON_IS_INSTALLED:
        return "the package triton is not installed"
    device = torch.device(device)
    return _why_never_triton(device) or _why_failed(operator, device, size)


def _why_never_triton(device: torch.device) -> str | None:
    if device.type == "cuda":
        return _why_not_this_gpu(device)
    if interpreter_is_on():
        return None
    return f"Triton kernels need a GPU or Triton's interpreter; the tensors are on {device.type}"


def _why_not_this_gpu(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    return _why_not_gpu(torch.cuda.current_device() if device.index is None else device.index)


# torch.compile calls it instead of tracing it; see `_load`.
_why_not_this_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _why_not_gpu(index: int) -> str | None:
    """Why this GPU is not supported, or None.

    Older NVIDIA GPUs have too little shared memory and cannot multiply bfloat16. On other AMD GPUs the compiled kernels
    would not use the matrix cores.
    """
    if torch.version.hip:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        return None if name in _AMD_GPUS else f"needs one of the GPUs {', '.join(_AMD_GPUS)}; this GPU is {name}"
    capability = torch.cuda.get_device_capability(index)
    if capability >= _MIN_CAPABILITY:
        return None
    needed, got = (".".join(map(str, c)) for c in (_MIN_CAPABILITY, capability))
    return f"needs compute capability {needed}; this GPU has {got}"


def why_not_native(operator: str, device: torch.device | str) -> str | None:
    """Say why `operator` cannot run on the native backend for tensors on `device`.

    Returns:
        The reason in one sentence, or None if the operator can run.

    Raises:
        ValueError: There is no such operator.
    """
    if operator not in _TABLE:
        raise ValueError(f"why_not_native: operator must be one of {', '.join(OPERATORS)}; got {operator!r}")
    if "native" not in _TABLE[operator]:
        return f"{operator} has no native kernel in this version"
    if torch.device(device).type != "cpu":
        return f"native kernels run on a CPU; the tensors are on {torch.device(device).type}"
    return native.why_not_native()


def interpreter_is_on() -> bool:
    """Whether kernels accept CPU tensors: Triton's interpreter is on, or `triton.ahead` is recording launches."""
    return _takes_cpu_tensors or os.environ.get("TRITON_INTERPRET") == "1"


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is a name of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")


def choose_backend(
    operator: str,
    device: torch.device,
    backend: str,
    limit: Callable[[], str | None] | None = None,
    size: Size | None = None,
) -> str:
    """Choose the backend that `operator` runs on.

    Args:
        operator: a name of `OPERATORS`.
        device: where the tensors are.
        backend: what the caller asked for, a name of `BACKENDS`.
        limit: returns why our kernels cannot take these tensors, or None if they can. Called only when it matters.
        size: counts only a kernel failure at this size. None counts a failure at any size.

    Returns:
        "triton", "native" or "torch".

    Raises:
        ValueError: The backend asked for cannot be used, or no backend has the operator on this device.
    """
    check_backend(backend)
    # On a CPU "auto" never means Triton: its interpreter only checks kernels, so the caller must ask for it.
    wanted = backend if backend != "auto" else "native" if device.type == "cpu" else "triton"
    if wanted == "torch" or (backend == "auto" and wanted not in _TABLE[operator] and "torch" in _TABLE[operator]):
        reason = None if "torch" in _TABLE[operator] else f"{operator} has no PyTorch version"
        wanted = "torch"
    elif wanted == "native":
        reason = why_not_native(operator, device)
    else:
        reason = why_not_triton(operator, device, None if torch.compiler.is_compiling() else size)
        if backend == "triton" and _why_failed(operator, device, None) is not None:
            reason = None  # an explicit "triton" gets the kernel's own error
    if reason is None and limit is not None and wanted != "torch":
        reason = limit()
    if reason is None:
        return wanted
    if backend != "auto" or "torch" not in _TABLE[operator]:
        raise ValueError(f"{operator}: backend={wanted!r} cannot be used: {reason}")
    return "torch"
