"""The operators that a run through the blocks uses, chosen once before the first block.

Training, evaluation, prefill and decoding run the same blocks. They differ in how attention finds its keys and values
(`CausalAttention`, `CachedAttention`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastgpt2.cache import KVCache
from fastgpt2.config import GPT2Config
from fastgpt2_kernels import ops

# (q, k and v side by side (..., 3C), layer index, scale) -> attended values (..., C)
Attend = Callable[[Tensor, int, float], Tensor]


def operator_backend(backend: str) -> str:
    """What a model's backend is for a single operator: "native" names the decoding step alone."""
    return "auto" if backend == "native" else backend


class Operators:
    """Linear layers, layer norms and residual dropout on one backend.

    may_drop: False turns dropout off, whatever mode the modules are in.
    """

    def __init__(self, backend: str = "auto", *, may_drop: bool = True) -> None:
        self.backend = operator_backend(backend)
        self.may_drop = may_drop

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str = "linear") -> Tensor:
        # backend="triton" is an error where there is no such kernel; a model then computes this part with PyTorch.
        backend = self.backend if activation in ops.TRITON_ACTIVATIONS else "auto"
        return ops.linear(x, weight, bias, activation=activation, backend=backend)

    def dropout(self, x: Tensor, p: float, training: bool) -> Tensor:
        return F.dropout(x, p) if p and training and self.may_drop else x

    def activation(self, x: Tensor, name: str) -> Tensor:
        return ops.activation(x, name)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """LayerNorm of x; with `residual` the LayerNorm of their sum, and the sum."""
        if residual is None:
            return ops.layer_norm(x, weight, bias, eps, backend=self.backend)
        return ops.layer_norm(x, weight, bias, eps, residual=residual, backend=self.backend)


class CausalAttention:
    """Attention among the tokens of the input (B, T), with no cache.

    documents: the tokens are documents laid end to end, and none attends to another.
    """

    def __init__(
        self, config: GPT2Config, backend: str, *, dropout_p: float = 0.0, documents: ops.Documents | None = None
    ) -> None:
        self.config, self.backend = config, operator_backend(backend)
        self.dropout_p, self.documents = dropout_p, documents

    def __call__(self, qkv: Tensor, layer: int, scale: float) -> Tensor:
        return ops.causal_attention_packed(
            qkv,
            self.config.num_heads,
            scale=scale,
            dropout_p=self.dropout_p,
            cu_seqlens=self.documents,
            upcast=self.config.reorder_and_upcast_attn,
            backend=self.backend,
        )


class CachedAttention:
    """Attention of new tokens (N,) to what a cache holds of their rows; their keys and values are appended to it.

    plan: which of the tokens belongs to which row.
    """

    def __init__(self, cache: KVCache, plan: ops.RowPlan, backend: str) -> None:
        self.cache, self.plan, self.backend = cache, plan, operator_backend(backend)

    def __call__(self, qkv: Tensor, layer: int, scale: float) -> Tensor:
        return ops.cached_attention(
            qkv,
            self.cache.keys[layer],
            self.cache.values[layer],
            self.plan,
            scale=scale,
            upcast=self.cache.config.reorder_and_upcast_attn,
            backend=self.backend,
        )
