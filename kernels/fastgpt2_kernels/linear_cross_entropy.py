"""Linear cross-entropy: from hidden states and the head's weight to the loss, without ever storing the (N, V) logits.

The rows are processed in chunks of n. All chunks reuse one buffer (Hsu et al. 2024, Liger-Kernel):

    Z  = scale (X W^T + b)          one matrix product into the buffer
    G  = d(sum_n f_n loss_n) / dZ   overwrites Z; `triton/cross_entropy.py` derives it
    dX = scale G W,  dW += scale G^T X,  db += scale sum_n G

f is the factor of each row's loss. For a mean or a sum it is known before the backward pass, up to one scalar. So the
forward pass computes the gradients too, with three matrix products in all, and the backward pass multiplies them by
that scalar. If each row has its own factor (`reduction="none"`), or if dW is added straight into `weight.grad`, the
backward pass computes the logits of each chunk again. That is a fourth product, but nothing is kept between the passes.

dW and db are summed over the chunks in float32 (float64 for float64 inputs), whatever the dtype of the products, and
rounded once. In float16 the backward pass also does the division of a mean. In the forward pass 1 / N of a probability
would underflow, because the loss scale that prevents this arrives only with the backward pass.

A Triton kernel does the work on the logits between the products, or PyTorch's operators on any device.

Dimension key: N = B * T rows, n rows of a chunk, C width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt2_kernels.backends import (
    KernelFailedError,
    call_allowing_fallback,
    fallback_size,
    implementation,
    note_failure,
)
from fastgpt2_kernels.types import LossOptions


def chunk_rows(num_rows: int, vocab_size: int, device: torch.device) -> int:
    """How many rows of logits are held at a time.

    On a GPU a sixteenth of the rows, but at least 256, which fill the device, and at most 2048, beyond which the matrix
    products get no faster. On a CPU about 32 MB of float32, which may fit in the last-level cache, so that passes over
    the logits are cheap; but at least 128 rows, because with fewer the products read the weight too often, and at most
    512.
    """
    if device.type == "cpu":
        rows = min(512, max(128, (1 << 23) // max(vocab_size, 1)))
    else:
        rows = min(2048, max(256, num_rows // 16))
    return max(1, min(num_rows, rows))


class Gradients(NamedTuple):
    """Where the gradients go; None for an input that needs none.

    x's gradient is written, in x's dtype. Those of weight and bias are added to, in `LossOptions.wide_dtype`.
    """

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def loss_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weight: Tensor | None,
    row_grad: Tensor | None,
    grads: Gradients | None,
    options: LossOptions,
) -> Tensor:
    """The loss of every row, (N,). With `grads` also the gradients of sum(row_grad * loss), where row_grad is (N,)."""
    N, V = x.shape[0], weight.shape[0]
    compute, wide, scale = options.compute_dtype, options.wide_dtype, options.logit_scale
    chunk_loss = implementation("linear_cross_entropy", "triton" if options.use_triton else "torch")
    # For the kernel, rows begin at multiples of 64 elements, so that it can use 128-bit accesses whatever the
    # vocabulary. PyTorch's operators need rows without gaps.
    width = -(-V // 64) * 64 if options.use_triton else V
    with torch.autocast(x.device.type, enabled=False):
        loss_N = torch.empty(N, dtype=wide, device=x.device)
        weight_VC = weight.to(compute)
        bias_V = x.new_zeros((), dtype=compute) if bias is None else bias.to(compute)
        use_onednn = not options.use_triton and _use_onednn(x, weight_VC, bias)
        buffer = torch.empty(0 if use_onednn else min(options.chunk_rows, N), width, dtype=compute, device=x.device)
        for start in range(0, N, options.chunk_rows):
            rows = slice(start, min(start + options.chunk_rows, N))
            x_nC = x[rows].to(compute)
            if use_onednn:
                logits_nV = _onednn_product(x_nC, weight_VC, bias).mul_(scale)
            else:
                logits_nV = buffer[: x_nC.shape[0], :V]
                beta = 0.0 if bias is None else scale
                torch.addmm(bias_V, x_nC, weight_VC.t(), beta=beta, alpha=scale, out=logits_nV)
            # All three gradients have the factor `scale`, so it is multiplied into each row's factor.
            row_grad_n = None if row_grad is None or grads is None else row_grad[rows].to(wide) * scale
            try:
                loss_N[rows] = chunk_loss(logits_nV, targets[rows], class_weight, row_grad_n, options)
            except KernelFailedError as error:  # at the first chunk, so no gradient has been written yet
                if (size := fallback_size()) is None:
                    raise
                note_failure("linear_cross_entropy", x.device, error, size)
                plain = options._replace(use_triton=False)
                return loss_chunks(x, weight, bias, targets, class_weight, row_grad, grads, plain)
            if grads is None:
                continue
            grad_nV = logits_nV
            if grads.x is not None:
                _write_product(grads.x[rows], grad_nV, weight_VC)
            if grads.weight is not None:
                _add_product(grads.weight, grad_nV.t(), x_nC)
            if grads.bias is not None:
                grads.bias.add_(grad_nV.sum(0, dtype=wide))
    return loss_N


@functools.cache
def _has_wide_products(device_type: str) -> bool:
    # On ROCm these kernels are registered under CUDA's name, but they raise an error.
    key = {"cuda": "CUDA", "xpu": "XPU"}.get(device_type)
    if key is None or torch.version.hip is not None:
        return False
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}.dtype_out", key) for op in ("mm", "addmm"))


def _wide_products(a: Tensor, out: Tensor) -> bool:
    """Whether a product of half-precision matrices can return its float32 sums without rounding them."""
    return out.dtype == torch.float32 and _has_wide_products(a.device.type)


ONEDNN_NUMBERS = 1 << 20  # the fewest elements of a weight for which oneDNN is used


def _use_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN computes the logits, in float32, through the operator that torch.compile uses for it.

    With an odd vocabulary the rows of the logits are unaligned. PyTorch's own product (MKL) then takes twice as long on
    a CPU. Small products gain nothing.
    """
    return (
        x.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and weight.numel() >= ONEDNN_NUMBERS
        and (bias is None or bias.dtype == torch.float32)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias by oneDNN.

    oneDNN compiles a product for each number of rows and keeps 1,024 of them, which take hundreds of megabytes. Rows
    of zeros are therefore added, up to one of eight numbers between a power of two and the next.
    """
    rows = x.shape[0]
    step = 1 << max(0, rows.bit_length() - 4)
    x = torch.nn.functional.pad(x, (0, 0, 0, -rows % step))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")[:rows]


def _write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif _wide_products(a, out):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif _wide_products(a, total):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        # A few rows of the half-precision product at a time, so that they are still in the cache when they are added.
        for part, a_part in zip(total.split(4096), a.split(4096), strict=True):
            part += torch.mm(a_part, b)


# -- PyTorch operators --------------------------------------------------------------------------------------------


# The dtype of the gradients until backward has divided them. Until then they are sums over many rows, which float16
# might not hold.
def _kept_dtype(compute_dtype: torch.dtype) -> torch.dtype | None:
    return torch.float32 if compute_dtype == torch.float16 else None


@torch.library.custom_op("fastgpt2::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    divisor: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    chunk_rows: int,
    compute_dtype: torch.dtype,
    use_triton: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum(loss) / divisor for x (N, C), and its gradients in x, weight and bias. Gradients not needed are empty.

    In float16 the gradients are those of sum(loss); backward divides them.
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, logit_scale, chunk_rows, compute_dtype, use_triton)
    return _loss_and_gradients(
        x, weight, bias, targets, divisor, class_weight, options, (need_x, need_weight, need_bias)
    )


def _loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    divisor: Tensor,
    class_weight: Tensor | None,
    options: LossOptions,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads, row_grad = None, None
    if any(needs):
        grads = _new_gradients(x, weight, needs, options.wide_dtype)
        row_grad = torch.ones((), dtype=options.wide_dtype, device=x.device)
        if options.compute_dtype != torch.float16:
            row_grad = row_grad / divisor
        row_grad = row_grad.expand(x.shape[0])
    loss_N = loss_chunks(x, weight, bias, targets, class_weight, row_grad, grads, options)
    return loss_N.sum() / divisor, *_rounded(grads, x, weight, bias, _kept_dtype(options.compute_dtype))


@linear_cross_entropy_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    divisor: Tensor,
    class_weight: Tensor | None,
    i: int,
    s: float,
    z: float,
    scale: float,
    rows: int,
    compute_dtype: torch.dtype,
    triton: bool,
    *needs: bool,
) -> tuple[Tensor, ...]:
    wide = torch.float64 if compute_dtype == torch.float64 else torch.float32
    return x.new_empty((), dtype=wide), *_empty_gradients(x, weight, bias, needs, _kept_dtype(compute_dtype))


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    divisor = inputs[4] if inputs[11] == torch.float16 else None
    ctx.dtypes = [t.dtype if need else None for t, need in zip(inputs[:3], inputs[13:], strict=True)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(divisor, *output[1:])


def _scaled_gradients(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    divisor, *grads = ctx.saved_tensors
    factor = grad_output if divisor is None else _divided(grad_output, divisor)
    return *(g.mul(factor).to(d) if d else None for g, d in zip(grads, ctx.dtypes, strict=True)), *(None,) * 13


linear_cross_entropy_op.register_autograd(_scaled_gradients, setup_context=_save_gradients)


class LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy_op` for eager mode. Its backward scales the gradients in place and returns them.

    Under torch.compile saved tensors may not be changed, so there the operator itself is used.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        divisor: Tensor,
        class_weight: Tensor | None,
        options: LossOptions,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        loss, *grads = _loss_and_gradients(x, weight, bias, targets, divisor, class_weight, options, needs)
        ctx.grads, ctx.use_triton, ctx.fallback_size = grads, options.use_triton, fallback_size()
        ctx.divisor = divisor if options.compute_dtype == torch.float16 else None
        ctx.dtypes = [
            t.dtype if t is not None and need else None for t, need in zip((x, weight, bias), needs, strict=True)
        ]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "linear_cross_entropy: backward can run only once for each loss, because it gives its gradients away; "
                "compute the loss again"
            )
        grads, ctx.grads = ctx.grads, None
        factor = grad_output if ctx.divisor is None else _divided(grad_output, ctx.divisor)
        results = [
            call_allowing_fallback(ctx.fallback_size, scale_, g, factor, ctx.use_triton).to(d) if d else None
            for g, d in zip(grads, ctx.dtypes, strict=True)
        ]
        return *results, None, None, None, None


def _divided(grad_output: Tensor, divisor: Tensor) -> Tensor:
    """grad_output / divisor, but 0 where no row counts: the gradients are 0 then and must stay 0."""
    return torch.where(divisor != 0, grad_output / divisor, 0.0)


def scale_(grad: Tensor, factor: Tensor, use_triton: bool) -> Tensor:
    """grad *= factor. Where the factor is 1, no data moves on a CPU or in the Triton kernel.

    The kernel looks at the factor on the device, so the host does not wait.
    """
    if use_triton and grad.numel():
        from fastgpt2_kernels.triton import cross_entropy as kernel

        try:
            kernel.scale_rows(grad.view(1, -1, grad.shape[-1]), factor)
        except KernelFailedError as error:
            if (size := fallback_size()) is None:
                raise
            note_failure("linear_cross_entropy", grad.device, error, size)
            grad.mul_(factor)
    elif factor.device.type != "cpu" or factor != 1:
        grad.mul_(factor)
    return grad


@torch.library.custom_op("fastgpt2::linear_cross_entropy_rows", mutates_args=())
def linear_cross_entropy_rows_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    chunk_rows: int,
    compute_dtype: torch.dtype,
    use_triton: bool,
) -> Tensor:
    """The loss (N,) of every row of x (N, C). Backward can run any number of times over the same graph."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, logit_scale, chunk_rows, compute_dtype, use_triton)
    return loss_chunks(x, weight, bias, targets, class_weight, None, None, options)


@linear_cross_entropy_rows_op.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    compute_dtype = rest[-2]
    return x.new_empty(x.shape[:1], dtype=torch.float64 if compute_dtype == torch.float64 else torch.float32)


@torch.library.custom_op("fastgpt2::linear_cross_entropy_rows_backward", mutates_args=())
def linear_cross_entropy_rows_backward_op(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    chunk_rows: int,
    compute_dtype: torch.dtype,
    use_triton: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of sum(dloss * loss) in x, weight and bias. A gradient that is not needed is empty."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, logit_scale, chunk_rows, compute_dtype, use_triton)
    grads = _new_gradients(x, weight, (need_x, need_weight, need_bias), options.wide_dtype)
    loss_chunks(x, weight, bias, targets, class_weight, dloss, grads, options)
    return _rounded(grads, x, weight, bias)


@linear_cross_entropy_rows_backward_op.register_fake
def _(dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs = rest[-3:]
    return _empty_gradients(x, weight, bias, needs)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options, ctx.fallback_size = inputs[5:], fallback_size()


def _rows_backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    arguments = (dloss, *ctx.saved_tensors, *ctx.options, *needs)
    grads = call_allowing_fallback(ctx.fallback_size, linear_cross_entropy_rows_backward_op, *arguments)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 9


linear_cross_entropy_rows_op.register_autograd(_rows_backward, setup_context=_save_inputs)


class AccumulatingRows(torch.autograd.Function):
    """`linear_cross_entropy_rows_op`, but backward adds dW to an existing `weight.grad` and returns no dW.

    For eager mode only: backward looks up `.grad` when it runs. If there is none yet, or it is not a dense float32
    tensor without a graph (float64 for float64 inputs), dW is returned as usual.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        class_weight: Tensor | None,
        *options: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, targets, class_weight)
        ctx.weight, ctx.options, ctx.fallback_size = weight, LossOptions(*options), fallback_size()
        return loss_chunks(x, weight, bias, targets, class_weight, None, None, ctx.options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets, class_weight = ctx.saved_tensors
        wide, (need_x, need_weight, need_bias) = ctx.options.wide_dtype, ctx.needs_input_grad[:3]
        there = ctx.weight.grad if need_weight else None
        if there is not None and (there.dtype != wide or there.layout != torch.strided or there.requires_grad):
            there = None
        given = (need_x, need_weight and there is None, need_bias)
        grads = _new_gradients(x, weight, given, wide)
        into = grads if there is None else grads._replace(weight=there)
        arguments = (x, weight, bias, targets, class_weight, dloss, into, ctx.options)
        call_allowing_fallback(ctx.fallback_size, loss_chunks, *arguments)
        results = _rounded(grads, x, weight, bias)
        return *(grad if give else None for grad, give in zip(results, given, strict=True)), *(None,) * 9


def _new_gradients(x: Tensor, weight: Tensor, needs: Sequence[bool], wide: torch.dtype) -> Gradients:
    return Gradients(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None,
        torch.zeros(weight.shape, dtype=wide, device=x.device) if needs[1] else None,
        torch.zeros(weight.shape[:1], dtype=wide, device=x.device) if needs[2] else None,
    )


def _rounded(
    grads: Gradients | None, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in the dtypes of their inputs (those of weight and bias in `dtype`, if given); empty for None."""
    dx, dw, db = grads or (None, None, None)
    return (
        x.new_empty(0) if dx is None else dx,
        weight.new_empty(0) if dw is None else dw.to(dtype or weight.dtype),
        x.new_empty(0) if db is None or bias is None else db.to(dtype or bias.dtype),
    )


def _empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised tensors of the shapes and dtypes that `_rounded` returns."""
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape, dtype=dtype) if needs[1] else weight.new_empty(0),
        x.new_empty(0) if bias is None or not needs[2] else bias.new_empty(bias.shape, dtype=dtype),
    )
