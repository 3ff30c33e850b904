"""The door to the kernels: documented operators that check their arguments, choose a backend and call it.

Every operator takes `backend="auto" | "triton" | "torch"`. "auto" is Triton on a GPU where the operator has a Triton
kernel, and PyTorch's own operators otherwise; `why_not_triton` says in one sentence why Triton is not used.
Checks look at shapes, dtypes and devices. Values are looked at on the CPU only, where that costs no synchronisation.

Dimension key: B batch, T query tokens, S key tokens, H heads, D head size, C = H * D width, N rows, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import torch_backend
from fastgpt2_kernels.reference import ACTIVATIONS
from fastgpt2_kernels.torch_backend import (
    MIN_PACKED_ROWS,
    PackedLinear,
    RowPlan,
    can_pack,
    fingerprint,
    pack_linear,
)

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "MIN_PACKED_ROWS",
    "OPERATORS",
    "CrossEntropyStats",
    "PackedLinear",
    "RowPlan",
    "TargetCheck",
    "activation",
    "cached_attention",
    "can_pack",
    "causal_attention",
    "causal_attention_packed",
    "check_backend",
    "cross_entropy",
    "fingerprint",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "pack_linear",
    "plan_rows",
    "why_not_triton",
]

BACKENDS = ("auto", "triton", "torch")
REDUCTIONS = ("mean", "sum", "none")
OPERATORS = (
    "causal_attention",
    "cached_attention",
    "layer_norm",
    "activation",
    "linear",
    "cross_entropy",
    "linear_cross_entropy",
)
_TRITON_OPERATORS = frozenset({"cross_entropy", "linear_cross_entropy"})


# -- backends -----------------------------------------------------------------------------------------------------


def why_not_triton(operator: str, device: torch.device | str) -> str | None:
    """Why `operator` would not run on Triton for tensors on `device`, in one sentence; None if it would."""
    if operator not in OPERATORS:
        raise ValueError(f"why_not_triton: operator must be one of {', '.join(OPERATORS)}; got {operator!r}")
    if operator not in _TRITON_OPERATORS:
        return f"{operator} has no Triton kernel in this version"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.device(device).type != "cuda" and not _interpreter_is_on():
        return f"Triton kernels need a GPU or Triton's interpreter; the tensors are on {torch.device(device).type}"
    return None


def _interpreter_is_on() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")


def _use_triton(operator: str, device: torch.device, backend: str) -> bool:
    check_backend(backend)
    if backend == "torch":
        return False
    # The interpreter is for checking kernels: it has to be asked for.
    if backend == "auto" and device.type == "cpu":
        return False
    reason = why_not_triton(operator, device)
    if reason is not None and backend == "triton":
        raise ValueError(f"{operator}: backend='triton' cannot be used: {reason}")
    return reason is None


# -- attention ----------------------------------------------------------------------------------------------------


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, dropout_p: float = 0.0, upcast: bool = False,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Causal softmax(scale q k^T) v: q (B, H, T, D), k and v (B, H, S, D) with S >= T -> (B, H, T, D).

    Query t sees keys 0 .. S - T + t: the last query sees every key (new tokens after a cache). `scale` defaults to
    1/sqrt(D). `upcast=True` computes scores and softmax in float32 at least (transformers' `reorder_and_upcast_attn`).
    `dropout_p` drops attention weights. Raises ValueError for shapes, dtypes or devices that do not go together.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "causal_attention: q must be (B, H, T, D) and k, v (B, H, S, D); "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if k.shape[2] < q.shape[2]:
        raise ValueError(f"causal_attention: needs at least as many keys as queries; got {k.shape[2]} < {q.shape[2]}")
    _check_same("causal_attention", q=q, k=k, v=v)
    _check_dropout("causal_attention", dropout_p)
    _use_triton("causal_attention", q.device, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch_backend.causal_attention(q, k, v, scale=scale, dropout_p=dropout_p, upcast=upcast)


def causal_attention_packed(
    qkv: Tensor, num_heads: int, *, scale: float | None = None, dropout_p: float = 0.0,
    cu_seqlens: Tensor | None = None, upcast: bool = False, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Causal self-attention on the packed projection: qkv (B, T, 3C), queries then keys then values -> (B, T, C).

    `cu_seqlens` (number of documents + 1,) int32 or int64: the T tokens of the one row (B = 1) are documents laid end
    to end, document i being tokens cu_seqlens[i] .. cu_seqlens[i + 1], and none sees another. The PyTorch backend reads
    it on the host. Otherwise as `causal_attention`.
    """
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            "causal_attention_packed: qkv must be (B, T, 3 * num_heads * D); "
            f"got {tuple(qkv.shape)} with num_heads={num_heads}"
        )
    if cu_seqlens is not None:
        _check_cu_seqlens("causal_attention_packed", cu_seqlens, qkv)
    _check_dropout("causal_attention_packed", dropout_p)
    _use_triton("causal_attention", qkv.device, backend)
    scale = (qkv.shape[2] // (3 * num_heads)) ** -0.5 if scale is None else scale
    return torch_backend.causal_attention_packed(
        qkv, num_heads, scale=scale, dropout_p=dropout_p, cu_seqlens=cu_seqlens, upcast=upcast
    )


def plan_rows(
    slots: Sequence[int], counts: Sequence[int], lengths: Sequence[int], device: torch.device | str = "cpu"
) -> RowPlan:
    """The plan of one step for `cached_attention`: row i adds `counts[i]` tokens to cache slot `slots[i]`.

    `lengths[i]` tokens are in that slot already. Made once a step and passed to every layer.
    """
    rows = tuple(zip(slots, counts, lengths, strict=True))
    if any(count < 1 or past < 0 for _, count, past in rows):
        raise ValueError(f"plan_rows: every row needs at least one new token and a length >= 0; got {rows}")
    if len(set(slots)) != len(rows):
        raise ValueError(f"plan_rows: a cache slot can be in one row only; got slots {list(slots)}")
    slot_N = torch.tensor([slot for slot, count, _ in rows for _ in range(count)], dtype=torch.int64)
    position_N = torch.tensor([past + i for _, count, past in rows for i in range(count)], dtype=torch.int64)
    return RowPlan(rows, slot_N.to(device), position_N.to(device))


def cached_attention(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, plan: RowPlan, *, scale: float | None = None, upcast: bool = False,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Append new tokens to a KV cache and attend: qkv (N, 3C) of N tokens, row after row of `plan` -> (N, C).

    k_cache, v_cache (R, H, S, D), in qkv's dtype or float32, written in place at the plan's slots and positions. Each
    new token sees its slot's earlier tokens and itself, nothing else. Not differentiable (the caches are overwritten).
    Raises ValueError when the cache is too short or the shapes do not go together.
    """
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            "cached_attention: k_cache and v_cache must share shape (R, H, S, D); "
            f"got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    R, H, S, D = k_cache.shape
    if qkv.shape != (plan.slots.shape[0], 3 * H * D):
        raise ValueError(
            f"cached_attention: qkv must be ({plan.slots.shape[0]}, {3 * H * D}) for this plan and cache; "
            f"got {tuple(qkv.shape)}"
        )
    for slot, count, past in plan.rows:
        if not 0 <= slot < R or past + count > S:
            raise ValueError(
                f"cached_attention: slot {slot} needs room for {past + count} tokens; the cache has {R} slots of {S}"
            )
    _check_same("cached_attention", k_cache=k_cache, v_cache=v_cache)
    if k_cache.dtype not in (qkv.dtype, torch.float32):
        raise ValueError(f"cached_attention: the caches must be {qkv.dtype} as qkv or float32; got {k_cache.dtype}")
    if k_cache.device != qkv.device:
        raise ValueError(f"cached_attention: qkv is on {qkv.device}, the caches are on {k_cache.device}")
    _use_triton("cached_attention", qkv.device, backend)
    scale = D**-0.5 if scale is None else scale
    return torch_backend.cached_attention(qkv, k_cache, v_cache, plan, scale=scale, upcast=upcast)


# -- layers -------------------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """LayerNorm with bias over the last dimension of x (..., C); weight, bias (C,) (Ba et al. 2016)."""
    _use_triton("layer_norm", x.device, backend)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def activation(x: Tensor, name: str, *, backend: str = "auto") -> Tensor:
    """The activation `name` (a key of `ACTIVATIONS`, transformers' names) of x, elementwise."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: name must be one of {sorted(ACTIVATIONS)}; got {name!r}")
    _use_triton("activation", x.device, backend)
    return torch_backend.activation(x, name)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "linear",
    residual: Tensor | None = None, packed: PackedLinear | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """activation(x weight^T + bias) or x weight^T + bias + residual: x (..., in), weight (out, in) -> (..., out).

    `packed` is `pack_linear(weight)`, used instead of `weight` when it is given, for x (N, in): the same product, 2 to
    4 times as fast for a few rows on a CPU, without gradients. Fewer than `MIN_PACKED_ROWS` rows are filled up.
    """
    if activation != "linear" and residual is not None:
        raise ValueError("linear: takes an activation or a residual, not both")
    _use_triton("linear", x.device, backend)
    if packed is not None:
        return torch_backend.packed_linear(x, packed, bias, activation, residual)
    y = F.linear(x, weight, bias)
    if residual is not None:
        return y + residual
    return torch_backend.activation(y, activation)


# -- loss ---------------------------------------------------------------------------------------------------------


class TargetCheck:
    """Collects, on the device, whether a target was neither ignored nor in the vocabulary; looks only when it is asked.

    Pass one as `check_targets` to any number of calls, and call `raise_if_bad` where waiting for the device is fine.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.flag = torch.zeros((), dtype=torch.int32, device=device)

    def raise_if_bad(self) -> None:
        """ValueError if a target was bad since the last look. Waits for the device."""
        if int(self.flag):
            self.flag.zero_()
            raise ValueError("cross_entropy: a target was neither ignore_index nor in [0, V); its row's loss is NaN")


class CrossEntropyStats(NamedTuple):
    """Of every row, in the shape of targets, without gradients, zeros where the target is ignored.

    lse: log sum exp of the logits. logprob: natural-log probability of the target. entropy: of the softmax, in nats.
    correct: whether no logit is above the target's.
    """

    lse: Tensor
    logprob: Tensor
    entropy: Tensor
    correct: Tensor


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    z_loss: float = 0.0, class_weight: Tensor | None = None, shift: bool = False, empty: str = "nan",
    check_targets: bool | TargetCheck = False, fuse_backward: bool = False, inplace_backward: bool = False,
    return_stats: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, CrossEntropyStats]:  # fmt: skip
    """Softmax cross-entropy of logits (N, V) or (B, T, V) against integer targets (N,) or (B, T), in float32.

    As `F.cross_entropy`, and: `z_loss` adds z_loss * lse^2 to every counted row (Chowdhery et al. 2022). `shift=True`
    takes a row's target from one position on, without a copy; the last position of each row of B counts for nothing.
    `empty="zero"` makes a mean over no rows 0 instead of NaN. With `class_weight` (V,) a mean divides by the sum of the
    counted targets' weights. A target that is neither `ignore_index` nor in [0, V) is never used as an index: its row's
    loss and gradient are NaN; `check_targets=True` raises ValueError instead, which waits for the device, and a
    `TargetCheck` waits where you choose.

    For the Triton backend: `fuse_backward=True` computes the gradient in the forward's launch, for when backward is
    sure to follow (not with reduction "none"); `inplace_backward=True` lets backward write the gradient over the
    logits. After either, a second backward raises. PyTorch's operators make no use of the two.

    Returns the loss, with `return_stats=True` also `CrossEntropyStats`. ValueError for arguments that do not fit.
    """
    name = "cross_entropy"
    if logits.dim() not in (2, 3) or not logits.is_floating_point():
        raise ValueError(f"{name}: logits must be floating-point (N, V) or (B, T, V); got {_describe(logits)}")
    if targets.shape != logits.shape[:-1] or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name}: targets must be int64 or int32 of shape {tuple(logits.shape[:-1])}; got {_describe(targets)}"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"{name}: the vocabulary must not be empty; got logits {tuple(logits.shape)}")
    if shift and logits.dim() != 3:
        raise ValueError(f"{name}: shift=True needs to know the rows: logits (B, T, V); got {tuple(logits.shape)}")
    _check_loss_options(name, reduction, label_smoothing)
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{name}: z_loss must be finite and >= 0; got {z_loss}")
    if empty not in ("nan", "zero"):
        raise ValueError(f"{name}: empty must be 'nan' or 'zero'; got {empty!r}")
    if class_weight is not None and (class_weight.shape != logits.shape[-1:] or not class_weight.is_floating_point()):
        raise ValueError(
            f"{name}: class_weight must be floating-point ({logits.shape[-1]},); got {_describe(class_weight)}"
        )
    if fuse_backward and reduction == "none":
        raise ValueError(
            f"{name}: fuse_backward needs reduction 'mean' or 'sum': with 'none' every row's factor is open"
        )
    if fuse_backward and inplace_backward:
        raise ValueError(f"{name}: choose fuse_backward or inplace_backward; both were given")
    given = {
        "logits": logits,
        "targets": targets,
        **({"class_weight": class_weight} if class_weight is not None else {}),
    }
    _check_same(name, check_dtype=False, **given)
    check = TargetCheck(logits.device) if check_targets is True else check_targets or None

    counted = _counted(targets, ignore_index, shift)
    counted_weight = None if reduction != "mean" else _counted_weight(targets, counted, class_weight, shift, empty)
    if _use_triton(name, logits.device, backend) and logits.dtype != torch.float64:
        loss, stats = _triton_cross_entropy(
            logits, targets, ignore_index, reduction, label_smoothing, z_loss, class_weight, shift, counted,
            counted_weight, fuse_backward, inplace_backward, return_stats,
        )  # fmt: skip
    else:
        own = torch.cat((targets[:, 1:], torch.full_like(targets[:, :1], ignore_index)), 1) if shift else targets
        rows = torch_backend.cross_entropy_rows(
            logits, own, ignore_index=ignore_index, class_weight=class_weight, label_smoothing=label_smoothing,
            z_loss=z_loss, with_stats=return_stats,
        )  # fmt: skip
        loss = _reduce(rows.loss, reduction, counted_weight)
        stats = tuple(t for t in rows[1:] if t is not None)
    if check is not None:
        check.flag |= _bad_targets(targets, logits.shape[-1], ignore_index, shift).int()
    if check_targets is True and check is not None:
        check.raise_if_bad()
    return (loss, CrossEntropyStats(*stats)) if return_stats else loss


def _triton_cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float,
    class_weight: Tensor | None, shift: bool, counted: Tensor,
    counted_weight: Tensor | None, fuse_backward: bool, inplace_backward: bool, return_stats: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    from fastgpt2_kernels import cross_entropy as kernel

    shape = targets.shape
    if logits.dim() == 2:
        logits, targets, counted = logits[None], targets[None], counted[None]
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    options = (ignore_index, label_smoothing, z_loss, shift, return_stats)
    will_differentiate = logits.requires_grad and torch.is_grad_enabled()
    if fuse_backward and will_differentiate and not torch.compiler.is_compiling():
        dloss = counted.float() if counted_weight is None else counted / counted_weight
        loss, *rows = kernel.FusedCrossEntropy.apply(logits, targets, dloss, class_weight, *options)
    else:
        row_loss, *rows = kernel.cross_entropy_op(logits, targets, class_weight, *options, inplace_backward)
        loss = _reduce(row_loss.view(shape), reduction, counted_weight)
    row_max, log_sum, logprob, entropy, correct = (r.detach() for r in rows)
    if not return_stats:
        return loss, ()
    return loss, ((row_max + log_sum).view(shape), logprob.view(shape), entropy.view(shape), correct.view(shape).bool())


def _counted(targets: Tensor, ignore_index: int, shift: bool) -> Tensor:
    """Which rows count, bool in the shape of targets."""
    counted = targets != ignore_index
    return F.pad(counted[:, 1:], (0, 1)) if shift else counted


def _bad_targets(targets: Tensor, vocab_size: int, ignore_index: int, shift: bool) -> Tensor:
    targets = targets[:, 1:] if shift else targets
    return ((targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))).any()


def _counted_weight(targets: Tensor, counted: Tensor, class_weight: Tensor | None, shift: bool, empty: str) -> Tensor:
    """What a mean divides by."""
    if class_weight is None:
        total = counted.sum().float()
    else:
        index = F.pad(targets[:, 1:], (0, 1)) if shift else targets
        index = index.long().clamp(0, class_weight.shape[0] - 1)
        total = class_weight.float()[index].where(counted, 0.0).sum()
    return total.where(total != 0, 1.0) if empty == "zero" else total


def _reduce(loss: Tensor, reduction: str, counted_weight: Tensor | None) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if counted_weight is None else loss.sum() / counted_weight


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0, chunk_rows: int | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """`F.cross_entropy(x @ weight.T + bias, targets)` without ever holding the (N, V) logits.

    x (N, C) or (B, T, C), weight (V, C), bias (V,), targets (N,) or (B, T) integers; rows whose target is
    `ignore_index` count for nothing. The softmax is computed in float32 (float64 for float64 inputs), the loss is
    returned in it. reduction "mean" (over counted rows; NaN when there are none, as `F.cross_entropy`), "sum", or
    "none" (shape of targets). At most `chunk_rows` rows of logits exist at a time. Differentiable once in x, weight,
    bias; frozen ones cost nothing. Under autocast the matrix products run in the autocast dtype.
    """
    if x.dim() not in (2, 3) or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "linear_cross_entropy: x must be (N, C) or (B, T, C) and weight (V, C); "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: targets must have shape {tuple(x.shape[:-1])} as x; got {tuple(targets.shape)}"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"linear_cross_entropy: targets must be int64 or int32; got {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_cross_entropy: bias must be ({weight.shape[0]},); got {tuple(bias.shape)}")
    _check_loss_options("linear_cross_entropy", reduction, label_smoothing)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"linear_cross_entropy: chunk_rows must be >= 1; got {chunk_rows}")
    tensors = {"x": x, "weight": weight, **({"bias": bias} if bias is not None else {})}
    _check_same("linear_cross_entropy", check_dtype=not torch.is_autocast_enabled(x.device.type), **tensors)
    if targets.device != x.device:
        raise ValueError(f"linear_cross_entropy: targets are on {targets.device}, x is on {x.device}")
    flat_x, flat_targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    _check_targets(flat_targets, weight.shape[0], ignore_index)
    use_triton = _use_triton("linear_cross_entropy", x.device, backend) and x.dtype != torch.float64
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    options = torch_backend.LossOptions(
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        chunk_rows=chunk_rows or torch_backend.loss_chunk_rows(flat_x.shape[0], weight.shape[0], x.device),
        compute_dtype=torch.get_autocast_dtype(x.device.type) if autocast else x.dtype,
        use_triton=use_triton,
    )
    with torch.autocast(x.device.type, enabled=False):
        loss = torch_backend.LinearCrossEntropy.apply(flat_x, weight, bias, flat_targets, options)
    return loss.view(targets.shape) if reduction == "none" else loss


# -- checks -------------------------------------------------------------------------------------------------------


def _check_same(operator: str, *, check_dtype: bool = True, **tensors: Tensor) -> None:
    if len({t.device for t in tensors.values()}) > 1:
        got = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"{operator}: all tensors must be on one device; got {got}")
    if check_dtype and len({t.dtype for t in tensors.values()}) > 1:
        got = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise ValueError(f"{operator}: all tensors must have one dtype; got {got}")


def _check_loss_options(operator: str, reduction: str, label_smoothing: float) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{operator}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{operator}: label_smoothing must be in [0, 1); got {label_smoothing}")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _check_dropout(operator: str, dropout_p: float) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{operator}: dropout_p must be in [0, 1); got {dropout_p}")


def _check_cu_seqlens(operator: str, cu_seqlens: Tensor, qkv: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{operator}: cu_seqlens must be a 1-D int32 or int64 tensor of document starts and the end; "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if qkv.shape[0] != 1:
        raise ValueError(f"{operator}: documents lie in one row, so B must be 1 with cu_seqlens; got {qkv.shape[0]}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != qkv.shape[1] or any(a > b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"{operator}: cu_seqlens must rise from 0 to T={qkv.shape[1]}; got {ends}")


def _check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or not targets.numel():
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"linear_cross_entropy: targets must be in [0, {vocab_size}) or ignore_index={ignore_index}; "
            f"got {int(targets[row])} in row {row}"
        )
