"""The operators as the plainest PyTorch expressions of their maths, for any dtype and device.

In float64 these are the oracle that every backend is held against; nothing here is meant to be fast.
Dimension key: B batch, T query tokens, S key tokens, H heads, D head size, C width, N rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 0xFFFFFFFF


def causal_mask(num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
    """(T, S) bool, True where query t may see key s: the diagonal ends in the last corner."""
    full = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return full.tril(num_keys - num_queries)


def document_mask(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(T, T) bool, True where both tokens are of one document (`cu_seqlens`: see `ops.causal_attention_packed`)."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].to(tokens.dtype), tokens, right=True)
    return document[:, None] == document[None, :]


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None,
    keep: Tensor | None = None, dropout_p: float = 0.0, upcast: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T + causal mask) v: q (B, H, T, D), k, v (B, H, S, D); `mask` is and-ed to the causal one.

    `keep` (B, H, T, S) bool: the weights that dropout keeps, the others are 0 and these are divided by 1 - dropout_p.
    `upcast=True` computes q k^T and the softmax in float32 for inputs of half precision (Hugging Face's
    `reorder_and_upcast_attn`, from Megatron-LM). A query that may see no key gives 0.
    """
    scores_BHTS = _scores(q, k, scale, mask, upcast)
    probs_BHTS = F.softmax(scores_BHTS, dim=-1).masked_fill(scores_BHTS == -math.inf, 0.0).to(v.dtype)
    if keep is not None:
        probs_BHTS = probs_BHTS.masked_fill(~keep, 0.0) / (1 - dropout_p)
    return torch.matmul(probs_BHTS, v)


def attention_lse(
    q: Tensor, k: Tensor, *, scale: float | None = None, mask: Tensor | None = None, upcast: bool = False
) -> Tensor:
    """Natural log of what `causal_attention`'s softmax divides by, (B, H, T); -inf where a query may see no key."""
    return _scores(q, k, scale, mask, upcast).logsumexp(-1)


def _scores(q: Tensor, k: Tensor, scale: float | None, mask: Tensor | None, upcast: bool) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    allowed = causal_mask(q.shape[-2], k.shape[-2], q.device)
    if mask is not None:
        allowed = allowed & mask
    if upcast:
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
    return (torch.matmul(q, k.transpose(-1, -2)) * scale).masked_fill(~allowed, -math.inf)


def dropout_keep(seed: Tensor, B: int, H: int, T: int, S: int, dropout_p: float) -> Tensor:
    """The weights (B, H, T, S) bool that attention dropout keeps: Philox 4x32-7 (Salmon et al. 2011).

    The key is seed[0], the counter (s // 8, t, b H + h, seed[1]), `seed` (2,) int64. Of the 8 halves of the result's
    4 words, lower half first, the (s % 8)-th is compared with dropout_p in units of 2^-16.
    """
    key, offset = (int(n) for n in seed.tolist())
    g, t, bh = (torch.arange(n, dtype=torch.int64, device=seed.device) for n in (-(-S // 8), T, B * H))
    c0, c1, c2 = torch.broadcast_tensors(g, t[:, None], bh[:, None, None])
    words = philox(c0, c1, c2, torch.full_like(c0, offset & _WORD), key & _WORD, key >> 32 & _WORD)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    return (halves.flatten(-2)[..., :S] >= round(dropout_p * 2**16)).view(B, H, T, S)


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int) -> tuple[Tensor, ...]:
    """Philox 4x32-7: four random words for each counter (c0, c1, c2, c3), int64 tensors of 32-bit numbers."""
    for _ in range(7):
        low0, high0 = _multiply_words(0xD2511F53, c0)
        low2, high2 = _multiply_words(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _multiply_words(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high 32 bits of a * b, both of 32 bits, without leaving int64's range."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return (high & 0xFFFF) << 16 | low & 0xFFFF, high >> 16


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016), biased variance."""
    mean = x.mean(-1, keepdim=True)
    var = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(var + eps) * weight + bias


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(LayerNorm of s, s) for s = x + residual."""
    s = x + residual
    return layer_norm(s, weight, bias, eps), s


def bias_activation(x: Tensor, bias: Tensor, name: str) -> Tensor:
    """The activation `name` of x + bias."""
    return ACTIVATIONS[name](x + bias)


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
) -> Tensor:
    """-log softmax(logits)[target] for logits (N, V), targets (N,); ignored rows count for nothing."""
    V = logits.shape[-1]
    log_probs_NV = logits - logits.logsumexp(-1, keepdim=True)
    counted_N = targets != ignore_index
    target_N = targets.masked_fill(~counted_N, 0).long()
    loss_N = -log_probs_NV.gather(-1, target_N[:, None]).squeeze(-1)
    if label_smoothing:
        loss_N = (1 - label_smoothing) * loss_N - label_smoothing * log_probs_NV.sum(-1) / V
    loss_N = loss_N.masked_fill(~counted_N, 0.0)
    if reduction == "none":
        return loss_N
    return loss_N.sum() if reduction == "sum" else loss_N.sum() / counted_N.sum()


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """`cross_entropy(x @ weight.T + bias, targets)` for x (N, C), weight (V, C)."""
    logits_NV = F.linear(x, weight, bias)
    return cross_entropy(
        logits_NV, targets, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# Every activation name of transformers' ACT2FN that has no weights of its own. The tanh GELUs differ there only in
# how they are written down; all of them are one function here.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clamp(-10.0, 10.0),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": lambda x: 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0)))),
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}
