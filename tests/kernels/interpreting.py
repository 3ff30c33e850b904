"""Triton's interpreter as the tests use it: products in one fixed order, and no needless work."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

# So many products are summed in pairs before the sum is added to the accumulator: a tensor core takes 16 of K at once.
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
    """
    import triton.language as tl
    from triton.runtime import interpreter

    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _fixed_order_dot(interpreter.TensorHandle))
        patch.setattr(interpreter.interpreter_builder, "options", options)
        patch.setattr(interpreter, "_patch_lang", _patch_once(interpreter, tl))
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
