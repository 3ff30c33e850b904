"""The operators that a pass through the blocks uses. They are chosen once, before the first block.

Training, evaluation, prefill and decoding run the same blocks. They differ only in where attention finds its keys and
values: in the input (`CausalAttention`) or in a cache (`CachedAttention`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastgpt2.cache import KVCache
from fastgpt2.config import GPT2Config
from fastgpt2_kernels import ops

# (packed QKV (..., 3C), layer index, scale) -> attention output (..., C)
Attend = Callable[[Tensor, int, float], Tensor]


def operator_backend(backend: str) -> str:
    """The backend of a single operator in a model with this backend: "native" exists only for the decode step."""
    return "auto" if backend == "native" else backend


class Operators:
    """Linear layers, layer norms and residual dropout on one backend.

    Args:
        backend: The model's backend.
        may_drop: False turns dropout off, even for modules in training mode.
    """

    def __init__(self, backend: str = "auto", *, may_drop: bool = True) -> None:
        self.backend = operator_backend(backend)
        self.may_drop = may_drop

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str = "linear") -> Tensor:
        # An operator refuses backend="triton" for activations that have no Triton kernel. A model falls back instead.
        backend = self.backend if activation in ops.TRITON_ACTIVATIONS else "auto"
        return ops.linear(x, weight, bias, activation=activation, backend=backend)

    def dropout(self, x: Tensor, p: float, training: bool) -> Tensor:
        return F.dropout(x, p) if p and training and self.may_drop else x

    def activation(self, x: Tensor, name: str) -> Tensor:
        return ops.activation(x, name)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return LayerNorm(x); with `residual`, return (LayerNorm(x + residual), x + residual)."""
        if residual is None:
            return ops.layer_norm(x, weight, bias, eps, backend=self.backend)
        return ops.layer_norm(x, weight, bias, eps, residual=residual, backend=self.backend)


class CausalAttention:
    """Causal attention among the tokens of the input (B, T), without a cache.

    Args:
        config: The model's configuration.
        backend: The model's backend.
        dropout_p: The dropout probability of attention weights.
        documents: Set if the input is documents packed end to end; they do not attend to each other.
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
    """Causal attention of new tokens (N,) to their rows in a cache, to which their keys and values are appended.

    Args:
        cache: The cache.
        plan: Which tokens belong to which row.
        backend: The model's backend.
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
