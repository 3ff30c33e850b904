"""Which backend has an operator: one table, which chooses, explains and loads.

Beside "torch", which runs on any device, an operator may have kernels of its own: "triton" for GPUs, "native" (C++) for
CPUs. "auto" takes the one of the tensors' device where the operator has it, and "torch" otherwise.
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
# operator -> backend -> the function that `ops` calls with arguments it has checked. The functions of a row take the
# same arguments, and a module is imported when one of its functions is called for the first time. `cached_attention`
# and `linear_cross_entropy` are made of other operators and of PyTorch's: here stands the part that differs.
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
# What a kernel is compiled for, or how much it needs, depends on: the numbers that an operator says, and a dtype.
Size = tuple[int | torch.dtype, ...]
# (operator, device type, device index) -> size -> why its kernel failed: "auto" then takes PyTorch's operators.
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
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # a look at the file system, so only once


def backends_of(operator: str) -> dict[str, str]:
    """The backends that have `operator`, and the function that each runs, as module:name."""
    if operator not in _TABLE:
        raise ValueError(f"backends_of: operator must be one of {', '.join(OPERATORS)}; got {operator!r}")
    return {backend: f"{__package__}.{function}" for backend, function in _TABLE[operator].items()}


def implementation(operator: str, backend: str) -> Callable[..., Any]:
    """The function that runs `operator` on `backend`; the first call of a module loads it."""
    module, function = _PLACES[operator, backend]
    return getattr(sys.modules[_load(module)], function)


def _load(module: str) -> str:
    if module not in sys.modules:
        importlib.import_module(module)
    return module


# torch.compile calls `_load` and does not trace it, for it cannot trace an import by name. This is all that
# torch.compiler.assume_constant_result does, but that loads the compiler, and with it Triton.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


class KernelFailedError(RuntimeError):
    """A Triton kernel did not compile, or could not be launched."""


def run_operator(operator: str, chosen: str, backend: str, device: torch.device, size: Size, *args: Any) -> Any:
    """Call `operator` on the backend that was chosen; where its kernel fails and "auto" was asked for, on PyTorch.

    A failure is remembered for `size` on this device.

    Compiled models run the kernels that were chosen when they were compiled: there a failure raises.
    """
    if chosen != "triton" or backend != "auto" or torch.compiler.is_compiling():
        return implementation(operator, chosen)(*args)
    try:
        return call_allowing_fallback(size, implementation(operator, chosen), *args)
    except KernelFailedError as error:
        note_failure(operator, device, error, size)
    return implementation(operator, "torch")(*args)


def call_allowing_fallback(size: Size | None, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, within which `fallback_size` is `size`."""
    if torch.compiler.is_compiling():
        return function(*args)
    token = _fallback_size.set(size)
    try:
        return function(*args)
    finally:
        _fallback_size.reset(token)


def fallback_size() -> Size | None:
    """The size of the operator that runs now, if it was called with "auto": its backward pass may run on PyTorch."""
    return None if torch.compiler.is_compiling() else _fallback_size.get()


def note_failure(operator: str, device: torch.device, error: KernelFailedError, size: Size) -> None:
    """From now on "auto" takes PyTorch's operators for `operator` of `size` on `device`. Warns at the first size."""
    failed = _FAILED.setdefault((operator, device.type, device.index), {})
    if not failed:
        warnings.warn(f"fastgpt2: {operator} runs on PyTorch's operators from now on: {error}", stacklevel=4)
    failed.setdefault(size, str(error))


def _why_failed(operator: str, device: torch.device, size: Size | None) -> str | None:
    """What the kernel's failure at `size` was, or at any size for None."""
    failed = _FAILED.get((operator, device.type, device.index))
    if not failed:
        return None
    return next(iter(failed.values())) if size is None else failed.get(size)


def why_not_triton(operator: str, device: torch.device | str, size: Size | None = None) -> str | None:
    """Why `operator` would not run on Triton for tensors on `device`, in one sentence; None if it would.

    With `size` a failure counts only if it was at that size.
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


# torch.compile calls it and does not trace it, as `_load`.
_why_not_this_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _why_not_gpu(index: int) -> str | None:
    """Older GPUs of NVIDIA have too little shared memory and multiply no bfloat16; what AMD's others are compiled to
    multiplies outside their matrix cores."""
    if torch.version.hip:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        return None if name in _AMD_GPUS else f"needs one of the GPUs {', '.join(_AMD_GPUS)}; this GPU is {name}"
    capability = torch.cuda.get_device_capability(index)
    if capability >= _MIN_CAPABILITY:
        return None
    needed, got = (".".join(map(str, c)) for c in (_MIN_CAPABILITY, capability))
    return f"needs compute capability {needed}; this GPU has {got}"


def why_not_native(operator: str, device: torch.device | str) -> str | None:
    """Why `operator` would not run on the native backend for tensors on `device`, in one sentence; None if it would."""
    if operator not in _TABLE:
        raise ValueError(f"why_not_native: operator must be one of {', '.join(OPERATORS)}; got {operator!r}")
    if "native" not in _TABLE[operator]:
        return f"{operator} has no native kernel in this version"
    if torch.device(device).type != "cpu":
        return f"native kernels run on a CPU; the tensors are on {torch.device(device).type}"
    return native.why_not_native()


def interpreter_is_on() -> bool:
    """Whether kernels take tensors on the CPU: Triton's interpreter is on, or `triton.ahead` notes what is launched."""
    return _takes_cpu_tensors or os.environ.get("TRITON_INTERPRET") == "1"


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")


def choose_backend(
    operator: str,
    device: torch.device,
    backend: str,
    limit: Callable[[], str | None] | None = None,
    size: Size | None = None,
) -> str:
    """The backend that `operator` runs on: "triton", "native" or "torch".

    Args:
        operator: A name of the table.
        device: The tensors' device.
        backend: What the caller asked for, a name of `BACKENDS`.
        limit: Says, if it is called, why these tensors are none for a kernel of ours, or None if they are.
        size: What a failure of the kernel is remembered for; None: a failure at any size counts.

    Raises:
        ValueError: The backend that was asked for cannot be used, or no backend has the operator on this device.
    """
    check_backend(backend)
    # Triton's interpreter is for checking kernels: it has to be asked for.
    wanted = backend if backend != "auto" else "native" if device.type == "cpu" else "triton"
    if wanted == "torch" or (backend == "auto" and wanted not in _TABLE[operator] and "torch" in _TABLE[operator]):
        reason = None if "torch" in _TABLE[operator] else f"{operator} has no PyTorch version"
        wanted = "torch"
    elif wanted == "native":
        reason = why_not_native(operator, device)
    else:
        reason = why_not_triton(operator, device, None if torch.compiler.is_compiling() else size)
        if backend == "triton" and _why_failed(operator, device, None) is not None:
            reason = None  # who asks for it gets the kernel's own error
    if reason is None and limit is not None and wanted != "torch":
        reason = limit()
    if reason is None:
        return wanted
    if backend != "auto" or "torch" not in _TABLE[operator]:
        raise ValueError(f"{operator}: backend={wanted!r} cannot be used: {reason}")
    return "torch"
