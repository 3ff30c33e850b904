"""Causal attention on the packed projection, forward and backward, in GPT-2's shapes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Call, Case, Contender, Settings
from benchmarks.peers import compiled, hidden_sizes, need, need_gpu, need_triton
from benchmarks.tune import Tunable
from fastgpt2_kernels import ops, reference
from fastgpt2_kernels.triton import launch

Attend = Callable[[Tensor, int], Tensor]  # qkv (B, T, 3C), heads -> (B, T, C)


class Inputs(NamedTuple):
    qkv: Tensor
    dout: Tensor
    heads: int


def split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys, values (B, H, T, D), without a copy."""
    B, T, width = qkv.shape
    return qkv.view(B, T, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def merge(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)


def eager(qkv: Tensor, heads: int) -> Tensor:
    return merge(reference.causal_attention(*split(qkv, heads)))


def sdpa(qkv: Tensor, heads: int) -> Tensor:
    return merge(F.scaled_dot_product_attention(*split(qkv, heads), is_causal=True))


def cases(settings: Settings) -> Iterator[Case]:
    sizes = hidden_sizes()
    lengths = settings.pick((256, 512, 1024, 2048, 4096), (256, 512), (16,))
    for T in lengths:
        for backward in (False, True):
            for dtype in ("bfloat16", "float32") if settings.scale != "toy" else ("float32",):
                width, heads = sizes["gpt2"] if settings.scale != "toy" else (32, 2)
                yield _case(settings, T, width, heads, dtype, backward)
    if settings.scale == "full":
        for width, heads in list(sizes.values())[1:]:
            for backward in (False, True):
                yield _case(settings, 1024, width, heads, "bfloat16", backward)


def tunables(settings: Settings) -> Iterator[Tunable]:
    """The three launch rows for head size 64 in half precision."""
    arch = launch.architecture(torch.device(settings.device))
    T, width, heads, kind, dtype = settings.pick(
        (1024, 768, 12, "half", "bfloat16"), (1024, 768, 12, "half", "bfloat16"), (16, 32, 2, "ieee", "float32")
    )
    block_d = max(32, width // heads)
    for kernel in ("forward", "dq", "dkdv"):
        key = (arch, kind, block_d, kernel)
        memory_accelerator = (False, True) if kernel == "forward" and arch in ("sm_90", "sm_100") else (False,)
        candidates = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3), memory_accelerator)
        if settings.scale == "toy":
            candidates = itertools.product((16,), (16, 32), (4,), (1,), (False,))
        yield Tunable(
            key=str(key).replace("'", '"'),
            present=launch.attention_row(kernel, arch, kind, block_d),
            candidates=[launch.AttentionRow(*row) for row in candidates],
            using=lambda row, key=key: mock.patch.dict(launch._ATTENTION_ON, {key: row}),
            case=_case(settings, T, width, heads, dtype, backward=kernel != "forward"),
        )


def _case(settings: Settings, T: int, width: int, heads: int, dtype: str, backward: bool) -> Case:
    B = max(1, 16384 // T) if settings.on_gpu and settings.scale != "toy" else 1
    products = B * T * T * width  # FLOPs of one matrix product, half of which is masked
    element = getattr(torch, dtype).itemsize
    return Case(
        name=f"attention {'backward' if backward else 'forward'}",
        shape={"B": B, "H": heads, "T": T, "D": width // heads},
        dtype=dtype,
        contenders=[
            Contender(
                name, functools.partial(_build, settings, make, backward), name.startswith("ours"), name == "eager"
            )
            for name, make in CONTENDERS.items()
        ],
        inputs=functools.partial(_inputs, settings, B, T, width, heads, dtype),
        exact=functools.partial(_exact, backward),
        flops=products * (5 if backward else 2),
        bytes=B * T * width * element * (8 if backward else 4),  # qkv, out, and their gradients
        measures_memory=backward and settings.scale != "quick",
        # The float64 reference and the plain expression compute T x T scores per head, which takes minutes on a CPU.
        needs_gpu=T > 1024 or width > 768,
    )  # fmt: skip


def _inputs(settings: Settings, B: int, T: int, width: int, heads: int, dtype: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    qkv, dout = (torch.randn(B, T, n, generator=generator).to(settings.device) for n in (3 * width, width))
    return Inputs(qkv.to(getattr(torch, dtype)).requires_grad_(), dout.to(getattr(torch, dtype)), heads)


def _exact(backward: bool, inputs: Inputs) -> list[Tensor]:
    """The result in float64, one sequence at a time."""
    rows = []
    for qkv, dout in zip(inputs.qkv.detach().double(), inputs.dout.double(), strict=True):
        leaf = qkv[None].requires_grad_()
        out = eager(leaf, inputs.heads)
        rows.append(torch.autograd.grad(out, leaf, dout[None])[0] if backward else out.detach())
    return [torch.cat(rows)]


def _build(settings: Settings, make: Callable[[Settings], Attend], backward: bool, inputs: Inputs) -> Call:
    attend = make(settings)
    qkv, dout, heads = inputs
    if not backward:
        return torch.no_grad()(lambda: [attend(qkv, heads)])
    out = attend(qkv, heads)
    return lambda: list(torch.autograd.grad(out, qkv, dout, retain_graph=True))


def _ours(backend: str) -> Callable[[Settings], Attend]:
    def make(settings: Settings) -> Attend:
        if backend == "triton":
            need_triton(settings, "causal_attention")
        return functools.partial(ops.causal_attention_packed, backend=backend)

    return make


def _sdpa_backend(name: str) -> Callable[[Settings], Attend]:
    def make(settings: Settings) -> Attend:
        need_gpu(settings)
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attend(qkv: Tensor, heads: int) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, name)):
                return sdpa(qkv, heads)

        return attend

    return make


def _flex(settings: Settings) -> Attend:
    need_gpu(settings)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    masks: dict[int, Any] = {}
    attention = compiled(flex_attention, settings)

    def attend(qkv: Tensor, heads: int) -> Tensor:
        T = qkv.shape[1]
        if T not in masks:
            masks[T] = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device=settings.device)
        return merge(attention(*split(qkv, heads), block_mask=masks[T]))

    return attend


def _flash_attn(settings: Settings) -> Attend:
    need_gpu(settings)
    flash_attn = need("flash_attn", "flash-attn")
    return lambda qkv, heads: flash_attn.flash_attn_qkvpacked_func(
        qkv.unflatten(-1, (3, heads, -1)), causal=True
    ).flatten(2)


CONTENDERS: dict[str, Callable[[Settings], Attend]] = {
    "eager": lambda settings: eager,
    "ours triton": _ours("triton"),
    "ours torch": _ours("torch"),
    "sdpa": lambda settings: sdpa,
    "sdpa flash": _sdpa_backend("FLASH_ATTENTION"),
    "sdpa cudnn": _sdpa_backend("CUDNN_ATTENTION"),
    "sdpa efficient": _sdpa_backend("EFFICIENT_ATTENTION"),
    "flex": _flex,
    "torch.compile": lambda settings: compiled(eager, settings),
    "flash-attn": _flash_attn,
}
