"""Softmax cross-entropy over rows of logits: loss, log-sum-exp and gradient in one kernel.

For a row x of V logits with target t, class weights w, smoothing e and z-loss z (Szegedy et al. 2016; PaLM,
Chowdhery et al. 2022), with lse = log sum_j exp(x_j) and W = sum_j w_j:

    loss   = (1 - e) w_t (lse - x_t) + e/V (W lse - sum_j w_j x_j) + z lse^2
    grad_j = dloss * ((1 - e) w_t (p_j - [j = t]) + e/V (W p_j - w_j) + 2 z lse p_j),  p = softmax(x)

The log-sum-exp is computed online (Milakov and Gimelshein 2018), in float32. If the target holds all but 1/32 of a
row's softmax, the rest is summed again on its own. So loss = log(1 + rest) and p - 1 = -rest / (1 + rest) stay
accurate.

Saved for backward are the logits and, for each row, the maximum, the log-sum-exp minus the maximum, and the target's
log-probability. From these the gradient takes one more pass. The fused form is a single launch: the program makes the
gradient's pass right after the forward's, last block first, while the row is still in the L2 cache.

Rows need no alignment. A row is split into a short masked head up to the first 16-byte boundary, whole blocks without a
mask (128-bit accesses), and a masked tail. A target that is neither ignored nor in [0, V) is never used as an index.
Its row's loss and gradient are NaN.

Dimension key: N = B * T rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2_kernels import reference
from fastgpt2_kernels.backends import KernelFailedError, fallback_size, implementation, note_failure
from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.arguments import Batch, Matrix
from fastgpt2_kernels.triton.devices import launch_kernel
from fastgpt2_kernels.triton.fallback import gradients
from fastgpt2_kernels.types import CrossEntropyOptions, LossOptions

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# A row may begin anywhere, so up to 15 bytes come before the first 16-byte boundary.
HEAD = tl.constexpr(16)
# If the target holds all but this much of a row's softmax, the rest is summed again on its own.
CONFIDENT = tl.constexpr(2.0**-5)


class _ClassWeight(NamedTuple):
    """The class weights (V,), and their sum for smoothing (V if there are no weights). None where not needed."""

    ptr: Any
    sum_ptr: Any


class _RowPointers(NamedTuple):
    """Where the results of every row are written or, in backward, read."""

    loss_ptr: Any
    max_ptr: Any
    log_sum_ptr: Any
    logprob_ptr: Any
    entropy_ptr: Any
    correct_ptr: Any


class _Settings(NamedTuple):
    ignore_index: Any
    smoothing: Any
    z_loss: Any


class _Meta(NamedTuple):
    SHIFT: bool
    HAS_WEIGHT: bool
    HAS_SMOOTHING: bool
    HAS_STATS: bool
    HAS_Z: bool
    IS_FORWARD: bool
    HAS_GRAD: bool
    ALIGN: int
    GRAD_ALIGN: int
    BLOCK_V: int
    MID_V: int


class _Sums(NamedTuple):
    """The running maximum m, and the running sums of exp(x - m), of x (or w x), and of exp(x - m) (x - m)."""

    m: Any
    p: Any
    x: Any
    px: Any


class _Factors(NamedTuple):
    """The factors of a row's gradient; see `_gradient_step`."""

    target_grad: Any
    m: Any
    inv_sum: Any
    weight_sum: Any
    target: Any
    smooth: Any
    z: Any


@triton.jit
def _log1p_below_half(y):
    """log(1 + y) for 0 <= y < 1/2, as 2 artanh(y / (2 + y)), because the hardware's log2 is inaccurate close to 1."""
    s = y / (2.0 + y)
    s2 = s * s
    return 2.0 * s * (1.0 + s2 * (1.0 / 3.0 + s2 * (1.0 / 5.0 + s2 * (1.0 / 7.0 + s2 * (1.0 / 9.0)))))


@triton.jit
def _exp_minus_one(y):
    """exp(y) - 1 for y <= 0; a series where exp(y) is close to 1."""
    series = 1.0 + y / 6.0 * (1.0 + y / 7.0 * (1.0 + y / 8.0))
    series = y * (1.0 + y / 2.0 * (1.0 + y / 3.0 * (1.0 + y / 4.0 * (1.0 + y / 5.0 * series))))
    return tl.where(y > -0.5, series, tl.exp2(y * LOG2_E) - 1.0)


@triton.jit
def _sum_of_others(x_ptr, V, target, m, BLOCK: tl.constexpr):
    """The sum of exp(x - m) over all but the target, with the bits that adding the target's 1 would round away."""
    total = 0.0
    for start in range(0, V, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=(offs < V) & (offs != target), other=float("-inf")).to(tl.float32)
        total += tl.sum(tl.exp2((x - m) * LOG2_E), 0)
    return total


@triton.jit
def _online_softmax_step(x_ptr, w_ptr, offs, mask, sums, HAS_MASK: tl.constexpr, META: tl.constexpr):
    """Add the logits at x_ptr + offs to the running maximum, the sum of exp(x - m), and the other sums asked for."""
    m, sum_p, sum_x, sum_px = sums
    if HAS_MASK:
        x = tl.load(x_ptr + offs, mask=mask, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
    else:
        x = tl.load(x_ptr + offs, eviction_policy="evict_last").to(tl.float32)
    m_new = tl.maximum(m, tl.max(x, 0))
    # A row may begin with blocks of -inf. Subtract 0 then, because -inf - (-inf) is NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2((m - m_safe) * LOG2_E)
    p = tl.exp2((x - m_safe) * LOG2_E)
    if META.HAS_STATS:
        # The sum of p (x - max), so that nothing large cancels. A new maximum shifts every x - max by the same amount.
        moved = tl.where(sum_p > 0, m - m_safe, 0.0)
        sum_px = alpha * (sum_px + moved * sum_p) + tl.sum(p * tl.where(p > 0, x - m_safe, 0.0), 0)
    sum_p = sum_p * alpha + tl.sum(p, 0)
    if META.HAS_SMOOTHING:
        if META.HAS_WEIGHT:
            x = x * (tl.load(w_ptr + offs, mask=mask, other=0.0) if HAS_MASK else tl.load(w_ptr + offs)).to(tl.float32)
        sum_x += tl.sum(tl.where(mask, x, 0.0) if HAS_MASK else x, 0)
    return _Sums(m_new, sum_p, sum_x, sum_px)


@triton.jit
def _gradient_step(x_ptr, grad_ptr, w_ptr, offs, mask, target, factors, HAS_MASK: tl.constexpr, META: tl.constexpr):
    """grad = target_factor (p - [target]) + smooth_factor (W p - w) + z_factor p, where differences come first.

    target_grad is the target's p - 1, computed from its log-probability: it would be lost if p were rounded first.
    """
    if HAS_MASK:
        x = tl.load(x_ptr + offs, mask=mask, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
    else:
        x = tl.load(x_ptr + offs, eviction_policy="evict_first").to(tl.float32)
    p = tl.exp2((x - factors.m) * LOG2_E) * factors.inv_sum
    grad = factors.target * tl.where(offs == target, factors.target_grad, p)
    if META.HAS_SMOOTHING:
        if META.HAS_WEIGHT:
            w = (tl.load(w_ptr + offs, mask=mask, other=0.0) if HAS_MASK else tl.load(w_ptr + offs)).to(tl.float32)
            grad += factors.smooth * (factors.weight_sum * p - w)
        else:
            grad += factors.smooth * (factors.weight_sum * p - 1.0)
    if META.HAS_Z:
        grad += factors.z * p
    grad = grad.to(grad_ptr.dtype.element_ty)
    if HAS_MASK:
        tl.store(grad_ptr + offs, grad, mask=mask)
    else:
        tl.store(grad_ptr + offs, grad)


@triton.jit(do_not_specialize=["T"])
def _cross_entropy_kernel(logits, targets, class_weight, dloss, grad, rows, T, V, settings, META: tl.constexpr):
    """Compute the loss and log-sum-exp of one row (IS_FORWARD), its gradient (HAS_GRAD), or both."""
    ALIGN: tl.constexpr = META.ALIGN
    GRAD_ALIGN: tl.constexpr = META.GRAD_ALIGN
    BLOCK_V: tl.constexpr = META.BLOCK_V
    MID_V: tl.constexpr = META.MID_V
    ignore_index, smoothing, z_loss = settings
    n = tl.program_id(0).to(tl.int64)
    b, t = n // T, n % T
    target_row = targets.ptr + b * targets.stride_b
    if META.SHIFT:
        target = tl.load(target_row + (t + 1) * targets.stride_t, mask=t + 1 < T, other=ignore_index)
    else:
        target = tl.load(target_row + t * targets.stride_t)
    target = target.to(tl.int64)
    counted = target != ignore_index
    is_valid = (target >= 0) & (target < V)
    row_start = b * logits.stride_b + t * logits.stride_t
    x_ptr = logits.ptr + row_start

    # The parts of the row, in elements from its start: [0, head) up to the first aligned address, [head, main_end)
    # whole blocks, [main_end, mid_end) whole small blocks, [mid_end, V) the tail.
    head = ((row_start + ALIGN - 1) // ALIGN * ALIGN - row_start).to(tl.int32)
    head = tl.minimum(head, V)
    main_blocks = (V - head) // BLOCK_V
    main_end = head + main_blocks * BLOCK_V
    mid_blocks = (V - main_end) // MID_V
    mid_end = main_end + mid_blocks * MID_V
    offs_head = tl.arange(0, HEAD)
    offs_main = tl.arange(0, BLOCK_V)
    offs_mid = tl.arange(0, MID_V)
    mask_head = offs_head < head
    mask_tail = mid_end + offs_mid < V
    # The same aligned address, written so that the compiler can see its alignment.
    body_ptr = logits.ptr + tl.multiple_of(row_start + head, ALIGN)
    w_ptr = class_weight.ptr
    wbody_ptr = w_ptr + head if META.HAS_WEIGHT else None

    if META.IS_FORWARD:
        m, log_sum, loss, logprob, entropy = 0.0, 0.0, 0.0, 0.0, 0.0
        correct = 0
        if counted:
            # Read x_t before the reductions, at which all warps synchronize: a gradient written in place comes later.
            x_t = tl.load(x_ptr + target, mask=is_valid, other=float("nan")).to(tl.float32)
            sums = _Sums(float("-inf"), 0.0, 0.0, 0.0)
            for i in range(main_blocks):
                offs = i * BLOCK_V + offs_main
                sums = _online_softmax_step(body_ptr, wbody_ptr, offs, None, sums, HAS_MASK=False, META=META)
            for i in range(mid_blocks):
                offs = main_blocks * BLOCK_V + i * MID_V + offs_mid
                sums = _online_softmax_step(body_ptr, wbody_ptr, offs, None, sums, HAS_MASK=False, META=META)
            sums = _online_softmax_step(x_ptr, w_ptr, mid_end + offs_mid, mask_tail, sums, HAS_MASK=True, META=META)
            if head > 0:
                sums = _online_softmax_step(x_ptr, w_ptr, offs_head, mask_head, sums, HAS_MASK=True, META=META)
            m, sum_p, sum_x, sum_px = sums
            above_one = sum_p - 1.0
            if (x_t == m) & (above_one < CONFIDENT):
                above_one = _sum_of_others(x_ptr, V, target, m, BLOCK=MID_V)
            log_sum = tl.where(sum_p < 1.5, _log1p_below_half(above_one), LN_2 * tl.log2(sum_p))
            lse = m + log_sum
            w_t = 1.0
            if META.HAS_WEIGHT:
                w_t = tl.load(w_ptr + target, mask=is_valid, other=float("nan")).to(tl.float32)
            logprob = (x_t - m) - log_sum
            loss = (smoothing - 1.0) * w_t * logprob
            if META.HAS_SMOOTHING:
                weight_sum = tl.load(class_weight.sum_ptr)
                loss += smoothing / V * (weight_sum * log_sum + (weight_sum * m - sum_x))
            loss += z_loss * lse * lse
            if META.HAS_STATS:
                entropy = log_sum - sum_px / sum_p
                correct = (x_t >= m).to(tl.int32)
        tl.store(rows.loss_ptr + n, loss)
        tl.store(rows.max_ptr + n, m)
        tl.store(rows.log_sum_ptr + n, log_sum)
        tl.store(rows.logprob_ptr + n, logprob)
        if META.HAS_STATS:
            tl.store(rows.entropy_ptr + n, entropy)
            tl.store(rows.correct_ptr + n, correct)
    else:
        m = tl.load(rows.max_ptr + n)
        log_sum = tl.load(rows.log_sum_ptr + n)
        logprob = tl.load(rows.logprob_ptr + n)

    if META.HAS_GRAD:
        grad_start = b * grad.stride_b + t * grad.stride_t
        g_ptr = grad.ptr + grad_start
        if counted:
            dloss_n = tl.load(dloss.ptr + n * dloss.stride).to(tl.float32)
            w_t = 1.0
            if META.HAS_WEIGHT:
                w_t = tl.load(w_ptr + target, mask=is_valid, other=0.0).to(tl.float32)
            grad_weight_sum = 0.0
            if META.HAS_SMOOTHING:
                grad_weight_sum = tl.load(class_weight.sum_ptr)
            factors = _Factors(
                target_grad=_exp_minus_one(logprob),
                m=m,
                inv_sum=tl.where(is_valid, tl.exp2(-log_sum * LOG2_E), float("nan")),
                weight_sum=grad_weight_sum,
                target=dloss_n * (1.0 - smoothing) * w_t,
                smooth=dloss_n * smoothing / V,
                z=dloss_n * 2.0 * z_loss * (m + log_sum),
            )
            gbody_ptr = grad.ptr + tl.multiple_of(grad_start + head, GRAD_ALIGN)
            if head > 0:
                _gradient_step(x_ptr, g_ptr, w_ptr, offs_head, mask_head, target, factors, HAS_MASK=True, META=META)
            tail = mid_end + offs_mid
            _gradient_step(x_ptr, g_ptr, w_ptr, tail, mask_tail, target, factors, HAS_MASK=True, META=META)
            at = target - head  # the target's index in the part after the head
            for i in range(mid_blocks):
                offs = main_blocks * BLOCK_V + i * MID_V + offs_mid
                _gradient_step(body_ptr, gbody_ptr, wbody_ptr, offs, None, at, factors, HAS_MASK=False, META=META)
            for i in range(main_blocks):
                offs = (main_blocks - 1 - i) * BLOCK_V + offs_main
                _gradient_step(body_ptr, gbody_ptr, wbody_ptr, offs, None, at, factors, HAS_MASK=False, META=META)
        else:
            # The logits of an ignored row are not read, so they may be NaN or inf.
            zeros = tl.zeros((MID_V,), grad.ptr.dtype.element_ty)
            for i in range(tl.cdiv(V, MID_V)):
                tl.store(g_ptr + i * MID_V + offs_mid, zeros, mask=i * MID_V + offs_mid < V)


@triton.jit(do_not_specialize=["T"])
def _scale_rows_kernel(grad, factor_ptr, T, V, BLOCK_V: tl.constexpr):
    """grad *= factor, a scalar on the device. Nothing is done if it is 1, as after `loss.backward()`."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        n = tl.program_id(0).to(tl.int64)
        g_ptr = grad.ptr + (n // T) * grad.stride_b + (n % T) * grad.stride_t
        for start in range(0, V, BLOCK_V):
            offs = start + tl.arange(0, BLOCK_V)
            scaled = tl.load(g_ptr + offs, mask=offs < V, other=0.0).to(tl.float32) * factor
            tl.store(g_ptr + offs, scaled.to(grad.ptr.dtype.element_ty), mask=offs < V)


# -- launchers ----------------------------------------------------------------------------------------------------


class RowOutputs(NamedTuple):
    """The results of every row, (B, T) float32 (`correct` int32), 0 for ignored targets. The last two may be empty."""

    loss: Tensor
    max: Tensor
    log_sum: Tensor  # log sum exp(x - max), kept apart from max, because adding them would round the smaller one away
    logprob: Tensor
    entropy: Tensor
    correct: Tensor


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shift: bool = False,
    with_stats: bool = False,
    dloss: Tensor | None = None,
    grad: Tensor | None = None,
) -> RowOutputs:
    """The loss and log-sum-exp of every row of logits (B, T, V), whose last stride is 1.

    With `grad` (B, T, V), also writes the gradient of sum(dloss * loss) to it, where dloss is (B, T) float32. `grad`
    may be `logits` itself.
    """
    out = _empty_rows(logits, with_stats)
    _launch(logits, targets, out, grad, dloss, ignore_index, class_weight, label_smoothing, z_loss, shift, True)
    return out


def _empty_rows(logits: Tensor, with_stats: bool) -> RowOutputs:
    rows = logits.shape[:2]
    stats = rows if with_stats else (0,)
    loss, row_max, log_sum, logprob, entropy = (
        logits.new_empty(shape, dtype=torch.float32) for shape in (rows, rows, rows, rows, stats)
    )
    return RowOutputs(loss, row_max, log_sum, logprob, entropy, logits.new_empty(stats, dtype=torch.int32))


def cross_entropy_rows_backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    logprob: Tensor,
    grad: Tensor,
    *,
    ignore_index: int,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shift: bool = False,
) -> None:
    """Write the gradient of sum(dloss * loss) to `grad` (B, T, V), which may be `logits` itself."""
    nothing = dloss.new_empty(0)
    out = RowOutputs(nothing, row_max, log_sum, logprob, nothing, nothing)
    _launch(logits, targets, out, grad, dloss, ignore_index, class_weight, label_smoothing, z_loss, shift, False)


def _launch(
    logits: Tensor,
    targets: Tensor,
    out: RowOutputs,
    grad: Tensor | None,
    dloss: Tensor | None,
    ignore_index: int,
    class_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    shift: bool,
    forward: bool,
) -> None:
    B, T, V = logits.shape
    if B * T == 0:
        return
    has_extras = class_weight is not None or label_smoothing != 0.0 or out.entropy.numel() > 0
    row = launch.cross_entropy_row(V, _capability(logits), element_size=logits.element_size(), has_extras=has_extras)
    align = _elements_in_16_bytes(logits)
    same_layout = grad is not None and grad.stride() == logits.stride() and _elements_in_16_bytes(grad) == align
    weight_sum = None
    if label_smoothing:
        weight_sum = (
            class_weight.sum(dtype=torch.float32)
            if class_weight is not None
            else torch.full((), V, dtype=torch.float32, device=logits.device)
        )
    launch_kernel(
        logits.device,
        _cross_entropy_kernel,
        (B * T,),
        logits=Batch.of(logits),
        # With B = 1 this stride is not used. Its value would differ between chunks, and compile the kernel again.
        targets=Batch(targets, targets.stride(0) if B > 1 else 0, targets.stride(1)),
        class_weight=_ClassWeight(class_weight, weight_sum),
        dloss=None if dloss is None else Matrix.of(dloss.reshape(-1)),
        grad=Batch.of(grad),
        rows=_RowPointers(*out),
        T=T,
        V=V,
        settings=_Settings(ignore_index, label_smoothing, z_loss),
        META=_Meta(
            SHIFT=shift,
            HAS_WEIGHT=class_weight is not None,
            HAS_SMOOTHING=label_smoothing != 0.0,
            HAS_STATS=out.entropy.numel() > 0,
            HAS_Z=z_loss != 0.0,
            IS_FORWARD=forward,
            HAS_GRAD=grad is not None,
            ALIGN=align,
            GRAD_ALIGN=align if same_layout else 1,
            BLOCK_V=row.block_v,
            MID_V=row.mid_v,
        ),
        num_warps=row.num_warps,
        **row.options,
    )


def _capability(x: Tensor) -> tuple[int, int] | None:
    """The compute capability of the NVIDIA GPU that x is on, or None."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda and torch.version.hip is None else None


def _elements_in_16_bytes(x: Tensor) -> int:
    """The number of elements to which the kernel rounds up a row's start; 1 if the tensor itself is not aligned."""
    return 16 // x.element_size() if x.data_ptr() % 16 == 0 else 1


def scale_rows(grad: Tensor, factor: Tensor) -> None:
    """grad (B, T, V) *= factor (), in place. The host does not wait to see the factor."""
    B, T, V = grad.shape
    if B * T:
        row = launch.cross_entropy_row(V)
        launch_kernel(
            grad.device,
            _scale_rows_kernel,
            (B * T,),
            grad=Batch.of(grad),
            factor_ptr=factor,
            T=T,
            V=V,
            BLOCK_V=row.mid_v,
            num_warps=row.num_warps,
            **launch.OPTIONS,
        )


# -- PyTorch operators --------------------------------------------------------------------------------------------
# They return the loss of every row, or take a factor for every row. PyTorch does the reductions outside.


@torch.library.custom_op("fastgpt2::cross_entropy", mutates_args=())
def cross_entropy_op(
    logits: Tensor,
    targets: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    shift: bool,
    with_stats: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, max, log_sum, logprob, entropy, correct) of every row of logits (B, T, V). Only loss has a gradient."""
    return cross_entropy_rows(
        logits,
        targets,
        ignore_index=ignore_index,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        shift=shift,
        with_stats=with_stats,
    )


@cross_entropy_op.register_fake
def _(logits, targets, class_weight, ignore_index, smoothing, z_loss, shift, with_stats, inplace):
    return tuple(_empty_rows(logits, with_stats))


@torch.library.custom_op("fastgpt2::cross_entropy_backward", mutates_args=())
def cross_entropy_backward_op(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    logprob: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    shift: bool,
) -> Tensor:
    grad = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    _backward_into(
        grad,
        dloss,
        logits,
        targets,
        row_max,
        log_sum,
        logprob,
        class_weight,
        ignore_index,
        label_smoothing,
        z_loss,
        shift,
    )
    return grad


@cross_entropy_backward_op.register_fake
def _(dloss, logits, *rest):
    return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("fastgpt2::cross_entropy_backward_", mutates_args=("logits",))
def cross_entropy_backward_inplace_op(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    logprob: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    shift: bool,
) -> None:
    """Overwrite the logits with their gradient. This changes their version, so autograd refuses to use them again."""
    _backward_into(
        logits,
        dloss,
        logits,
        targets,
        row_max,
        log_sum,
        logprob,
        class_weight,
        ignore_index,
        label_smoothing,
        z_loss,
        shift,
    )


@torch.library.custom_op("fastgpt2::cross_entropy_fused", mutates_args=())
def cross_entropy_fused_op(
    logits: Tensor,
    targets: Tensor,
    dloss: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    shift: bool,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum(dloss * loss), its gradient, max, log_sum, logprob, entropy, correct) in one kernel launch."""
    grad = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    rows = cross_entropy_rows(
        logits,
        targets,
        ignore_index=ignore_index,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        shift=shift,
        with_stats=with_stats,
        dloss=dloss,
        grad=grad,
    )
    return (rows.loss * dloss).sum(), grad, *rows[1:]


@cross_entropy_fused_op.register_fake
def _(logits, targets, dloss, class_weight, ignore_index, smoothing, z_loss, shift, with_stats):
    grad = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    return logits.new_empty((), dtype=torch.float32), grad, *_empty_rows(logits, with_stats)[1:]


@torch.library.custom_op("fastgpt2::scale_rows_", mutates_args=("grad",))
def scale_rows_op(grad: Tensor, factor: Tensor) -> None:
    scale_rows(grad, factor)


def _backward_into(
    grad: Tensor,
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    logprob: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    shift: bool,
) -> None:
    cross_entropy_rows_backward(
        dloss.contiguous(),
        logits,
        targets,
        row_max,
        log_sum,
        logprob,
        grad,
        ignore_index=ignore_index,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        shift=shift,
    )


def _save_rows(ctx, inputs, output):
    logits, targets, class_weight, *ctx.options, _with_stats, ctx.inplace = inputs
    ctx.fallback_size = fallback_size()
    ctx.save_for_backward(logits, targets, *output[1:4], class_weight)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _rows_backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 9
    logits, targets, row_max, log_sum, logprob, class_weight = ctx.saved_tensors
    arguments = (dloss, logits, targets, row_max, log_sum, logprob, class_weight, *ctx.options)
    try:
        if ctx.inplace:
            cross_entropy_backward_inplace_op(*arguments)
            return logits, *(None,) * 8
        return cross_entropy_backward_op(*arguments), *(None,) * 8
    except KernelFailedError as error:
        grad = _plain_gradient(ctx, error, dloss)
    return logits.copy_(grad) if ctx.inplace else grad, *(None,) * 8


def _plain_gradient(ctx, error, dloss):
    logits, targets, _, _, _, class_weight = ctx.saved_tensors
    ignore_index, label_smoothing, z_loss, shift = ctx.options
    options = CrossEntropyOptions(ignore_index, "none", label_smoothing, z_loss, shift, False, False, False)
    name = "cross_entropy"

    def loss(logits):
        return implementation(name, "torch")(logits, targets, class_weight, options, None, None)[0]

    return gradients(name, ctx.fallback_size, error, loss, [logits], [True], dloss)[0]


cross_entropy_op.register_autograd(_rows_backward, setup_context=_save_rows)


class FusedCrossEntropy(torch.autograd.Function):
    """`cross_entropy_fused_op` with autograd, for eager mode. Backward scales the gradient in place.

    Under torch.compile saved tensors may not be changed, so there the operator with two passes is used.
    """

    @staticmethod
    def forward(ctx, logits, targets, dloss, class_weight, *options):
        total, grad, *rows = cross_entropy_fused_op(logits, targets, dloss, class_weight, *options)
        ctx.fallback_size = fallback_size()
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(*rows)
        return total, *rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtotal, *_):
        (grad,) = ctx.saved_tensors  # raises in a second backward, because the scaling below changes the version
        try:
            scale_rows_op(grad, dtotal)
        except KernelFailedError as error:
            if ctx.fallback_size is None:
                raise
            note_failure("cross_entropy", grad.device, error, ctx.fallback_size)
            grad.mul_(dtotal)
        return grad, *(None,) * 8


# -- what `ops` calls ---------------------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    class_weight: Tensor | None,
    options: CrossEntropyOptions,
    counted: Tensor,
    divisor: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The reduced loss, and with `return_stats` (lse, logprob, entropy, correct) of every row."""
    shape = targets.shape
    if logits.dim() == 2:
        logits, targets, counted = logits[None], targets[None], counted[None]
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    given = (options.ignore_index, options.label_smoothing, options.z_loss, options.shift, options.return_stats)
    will_differentiate = logits.requires_grad and torch.is_grad_enabled()
    if options.fuse_backward and will_differentiate and not torch.compiler.is_compiling():
        dloss = counted.float() if divisor is None else counted / divisor
        loss, *rows = FusedCrossEntropy.apply(logits, targets, dloss, class_weight, *given)
    else:
        row_loss, *rows = cross_entropy_op(logits, targets, class_weight, *given, options.inplace_backward)
        loss = reference.reduce_loss(row_loss.view(shape), options.reduction, divisor)
    row_max, log_sum, logprob, entropy, correct = (r.detach() for r in rows)
    if not options.return_stats:
        return loss, ()
    return loss, ((row_max + log_sum).view(shape), logprob.view(shape), entropy.view(shape), correct.view(shape).bool())


def chunk_loss(
    logits_nV: Tensor, targets: Tensor, class_weight: Tensor | None, row_grad: Tensor | None, options: LossOptions
) -> Tensor:
    """The loss (n,) of logits (n, V), in one kernel launch. With `row_grad` (n,) the gradient overwrites the logits."""
    rows = cross_entropy_rows(
        logits_nV[None],
        targets[None],
        ignore_index=options.ignore_index,
        class_weight=class_weight,
        label_smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        dloss=None if row_grad is None else row_grad[None],
        grad=None if row_grad is None else logits_nV[None],
    )
    return rows.loss[0]
