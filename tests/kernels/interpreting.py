"""Triton's interpreter as the tests use it: products in one fixed order, and no needless work."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

# This many products are summed pairwise, and then added to the accumulator: a tensor core takes 16 of K at once.
DOT_STEP = 16


@contextmanager
def adjusted_interpreter() -> Iterator[None]:
    """Adjust Triton's interpreter while the context is open. It must be on (TRITON_INTERPRET=1).

    - `tl.dot` adds in one order. By itself the interpreter calls NumPy's matrix product, whose order depends on the
      shapes, the BLAS and the processor. A forward and its backward could then compute different bits for the same
      logit. On a GPU that cannot happen, because a tensor core sums every element independently of its neighbours.
    - Integer arithmetic is not checked for overflow. The interpreter computes that check and drops its result, unless
      its debug option is on. It takes almost half of a kernel's time.
    - The language is patched once per launch. By itself the interpreter patches it again for every call of a helper,
      which takes a fifth of a kernel's time.
    - Operands of equal shape are not broadcast. By itself the interpreter makes two new tensors of each pair.
    - What depends only on a type or a shape is computed once: NumPy's dtype, and a tensor's shape as Triton's objects.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _fixed_order_dot(interpreter.TensorHandle))
        patch.setattr(interpreter.interpreter_builder, "options", options)
        patch.setattr(interpreter, "_patch_lang", _patch_once(interpreter, tl))
        broadcast = type(interpreter.interpreter_semantic).broadcast_impl_value
        patch.setattr(type(interpreter.interpreter_semantic), "broadcast_impl_value", _broadcast_unequal(broadcast))
        patch.setattr(interpreter, "_get_np_dtype", _by_scalar(interpreter._get_np_dtype))
        patch.setattr(tl.tensor, "__init__", _make_tensor(tl))
        yield


def _fixed_order_dot(handle: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        total = d.data.copy()
        # K comes first, to pair the columns of a with the rows of b.
        a_K = np.ascontiguousarray(np.moveaxis(a.data.astype(total.dtype), -1, 0))[..., None]
        b_K = np.moveaxis(b.data.astype(total.dtype), -2, 0)[..., None, :]
        for start in range(0, len(a_K), DOT_STEP):
            products = a_K[start : start + DOT_STEP] * b_K[start : start + DOT_STEP]
            while (length := len(products)) > 1:
                half = (length + 1) // 2
                products[: length - half] += products[half:]
                products = products[:half]
            total += products[0]
        return handle(total, d.dtype.scalar)

    return create_dot


def _patch_once(interpreter: Any, tl: Any) -> Callable[[Any], Any]:
    patch_language = interpreter._patch_lang

    @functools.cache
    def languages(fn: Any) -> list[Any]:
        return [module for module in fn.__globals__.values() if module is tl or module is tl.core]

    def patch(fn: Any) -> Any:
        if any(tl.core.is_builtin(language.load) for language in languages(fn)):
            return patch_language(fn)
        return interpreter._LangPatchScope()

    return patch


def _broadcast_unequal(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape == rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return broadcast_impl_value


def _by_scalar(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`convert` of a scalar type, kept for each name. A block has the dtype of its elements."""
    known: dict[str, Any] = {}

    def np_dtype(type: Any) -> Any:
        scalar = type.scalar
        if scalar.name not in known:
            known[scalar.name] = convert(scalar)
        return known[scalar.name]

    return np_dtype


def _make_tensor(tl: Any) -> Callable[..., None]:
    @functools.cache
    def shape_and_size(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))

    def make(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_and_size(tuple(type.shape) if type.is_block() else ())

    return make
