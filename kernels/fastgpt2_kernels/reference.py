"""Every operator as a plain PyTorch expression of its maths, for any dtype and device.

In float64 these are the oracle that every backend is checked against. None is meant to be fast.

Dimension key: B batch, T query tokens, S key tokens, H heads, D head size, C width, N rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels.types import LayerNormWeights

_WORD = 0xFFFFFFFF


def causal_mask(num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
    """(T, S) bool, True where query t may see key s. The last query sees every key."""
    full = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return full.tril(num_keys - num_queries)


def document_mask(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(T, T) bool, True where both tokens belong to one document. `cu_seqlens`: see `ops.plan_documents`."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].to(tokens.dtype), tokens, right=True)
    return document[:, None] == document[None, :]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    upcast: bool = False,
) -> Tensor:
    """softmax(scale q k^T + causal mask) v, for q (B, H, T, D) and k, v (B, H, S, D).

    A query sees a key if the causal mask and `mask` both allow it. A query that may see no key gives 0.
    `keep` (B, H, T, S) bool marks the weights that dropout keeps. These are divided by 1 - dropout_p, the others are 0.
    `upcast=True` computes q k^T and the softmax of half-precision inputs in float32, as Hugging Face's
    `reorder_and_upcast_attn` does (from Megatron-LM).
    """
    scores_BHTS = _scores(q, k, scale, mask, upcast)
    probs_BHTS = F.softmax(scores_BHTS, dim=-1).masked_fill(scores_BHTS == -math.inf, 0.0).to(v.dtype)
    if keep is not None:
        probs_BHTS = probs_BHTS.masked_fill(~keep, 0.0) / (1 - dropout_p)
    return torch.matmul(probs_BHTS, v)


def attention_lse(
    q: Tensor, k: Tensor, *, scale: float | None = None, mask: Tensor | None = None, upcast: bool = False
) -> Tensor:
    """The log-sum-exp (B, H, T) of the scores in `causal_attention`, -inf where a query may see no key."""
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


def decode_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    counts: Tensor | None = None,
    slots: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`ops.decode_attention`, one row after another. Writes to the caches and returns (N, C) in qkv's dtype."""
    H, D = k_cache.shape[1], k_cache.shape[3]
    rows = torch.arange(qkv.shape[0] if starts is None else starts.shape[0]).tolist()
    firsts = rows if starts is None else starts.tolist()
    numbers = [1] * len(rows) if counts is None else counts.tolist()
    out = qkv.new_zeros((qkv.shape[0], H * D))
    for slot, first, count in zip(rows if slots is None else slots.tolist(), firsts, numbers, strict=True):
        past = int(lengths[slot])
        seen = slice(past + count)
        q, k, v = qkv[first : first + count].to(k_cache.dtype).view(count, 3, H, D).permute(1, 2, 0, 3)
        k_cache[slot, :, past : past + count], v_cache[slot, :, past : past + count] = k, v
        y = causal_attention(q[None], k_cache[slot, None, :, seen], v_cache[slot, None, :, seen], scale=scale)
        out[first : first + count] = y[0].transpose(0, 1).flatten(1).to(qkv.dtype)
    return out


def dropout_keep(seed: Tensor, B: int, H: int, T: int, S: int, dropout_p: float) -> Tensor:
    """The weights (B, H, T, S) bool that attention dropout keeps, drawn by Philox 4x32-7 (Salmon et al. 2011).

    `seed` is (2,) int64. Philox's key is seed[0] and its counter (s // 8, t, b H + h, seed[1]). It returns 4 words, or
    8 halves, the lower half of each word first. Weight s is kept if half s % 8 is at least dropout_p * 2^16.
    """
    key, offset = (int(n) for n in seed.tolist())
    g, t, bh = (torch.arange(n, dtype=torch.int64, device=seed.device) for n in (-(-S // 8), T, B * H))
    c0, c1, c2 = torch.broadcast_tensors(g, t[:, None], bh[:, None, None])
    words = philox(c0, c1, c2, torch.full_like(c0, offset & _WORD), key & _WORD, key >> 32 & _WORD)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    return (halves.flatten(-2)[..., :S] >= round(dropout_p * 2**16)).view(B, H, T, S)


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int | Tensor, k1: int | Tensor) -> tuple[Tensor, ...]:
    """Philox 4x32-7: four random words for each counter (c0, c1, c2, c3). Words are 32-bit numbers held in int64."""
    for _ in range(7):
        low0, high0 = _multiply_words(0xD2511F53, c0)
        low2, high2 = _multiply_words(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _multiply_words(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high 32 bits of the product of two 32-bit numbers, without overflowing int64."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return (high & 0xFFFF) << 16 | low & 0xFFFF, high >> 16


def gumbel(keys: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The Gumbel noise -log(-log u) of every token, (R, V) float64, for keys (R, 2) and positions (R,).

    Token v of a row takes word v % 4 of Philox with the row's two 32-bit words as key and the counter
    (v // 4, position, 0, 0). u follows from 1 - u = (word + 1/2) / 2^32.
    """
    k0, k1 = (keys.long() & _WORD).unsqueeze(-1).unbind(1)
    groups = torch.arange(-(-vocab_size // 4), device=keys.device).expand(len(keys), -1)
    counts = (positions.long() & _WORD)[:, None].expand_as(groups)
    words = torch.stack(philox(groups, counts, groups * 0, groups * 0, k0, k1), -1).flatten(-2)[:, :vocab_size]
    return gumbel_of_words(words)


def gumbel_of_words(words: Tensor) -> Tensor:
    """-log(-log u) in float64, where 1 - u = (word + 1/2) / 2^32. Words are 32-bit numbers held in int64."""
    is_low = words < 2**31
    v = (words.where(is_low, _WORD - words).double() + 0.5) * 2.0**-32  # the smaller of u and 1 - u
    return -torch.log(torch.where(is_low, -torch.log1p(-v), -torch.log(v)))


def penalized_logits(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Apply CTRL's repetition penalty (Keskar et al. 2019), (R,): it makes the tokens marked in `seen` less likely."""
    penalty = penalty[:, None]
    return torch.where(seen.bool(), torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered_logits(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """logits (R, V) with -inf where a filter drops the token. Each setting is (R,); see `ops.sample`."""
    V = logits.shape[-1]
    descending = logits.sort(-1, descending=True).values
    low = torch.full_like(logits[:, :1], -math.inf)
    if top_k is not None:
        k = torch.where((top_k <= 0) | (top_k > V), V, top_k).long()
        low = descending.gather(-1, k[:, None] - 1)
    if top_p is not None:
        inverse = (1 / temperature).clamp_max(1e30)[:, None]
        mass = torch.exp((descending - descending[:, :1]) * inverse).masked_fill(descending < low, 0.0).cumsum(-1)
        # The threshold is the last value of the shortest prefix that holds top_p of the mass.
        is_short = (mass < top_p.to(mass.dtype)[:, None] * mass[:, -1:]).sum(-1, keepdim=True).clamp_max(V - 1)
        threshold = descending.gather(-1, is_short)
        low = torch.where(top_p[:, None] < 1, torch.maximum(low, threshold), low)
    if min_p is not None:
        low = torch.maximum(low, descending[:, :1] + (temperature * min_p.log()).where(min_p > 0, -math.inf)[:, None])
    return logits.masked_fill(logits < low, -math.inf)


def sampling_scores(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    penalty: Tensor | None = None,
    seen: Tensor | None = None,
    keys: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """The scores (R, V) whose argmax is the sample: y + T g where the filters keep y, -inf elsewhere.

    y are the penalised logits, T the temperature, g the Gumbel noise. Without noise the scores are y.
    """
    if penalty is not None and seen is not None:
        logits = penalized_logits(logits, seen, penalty.to(logits.dtype))
    if temperature is None or keys is None or positions is None:
        return logits
    temperature = temperature.to(logits.dtype).clamp(0.0, 1e30)
    if top_k is not None:
        temperature = temperature.masked_fill(top_k == 1, 0.0)
    kept = filtered_logits(logits, temperature, top_k, top_p, None if min_p is None else min_p.to(logits.dtype))
    return kept + temperature[:, None] * gumbel(keys, positions, logits.shape[-1]).to(logits.dtype)


def sample(logits: Tensor, **settings: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token of every row of logits (R, V), and its log-probability under softmax(logits).

    The token is the argmax of `sampling_scores`. A row with a NaN or +inf, or with nothing but -inf, gives (0, NaN).
    """
    is_good = logits.amax(-1).isfinite()  # amax propagates NaN
    ids = sampling_scores(logits, **settings).argmax(-1).where(is_good, 0)
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    return ids, logprobs.masked_fill(~is_good, math.nan)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016), with biased variance."""
    mean = x.mean(-1, keepdim=True)
    var = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(var + eps) * weight + bias


_layer_norm = layer_norm  # for use where an argument is named layer_norm


def linear_decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    layer_norm: LayerNormWeights | None = None,
    activation: str = "linear",
    residual: Tensor | None = None,
    product_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """activation(LN(x) weight^T + bias) + residual, for x (R, K) and weight (N, K).

    The operands of the product are rounded to `product_dtype`. All else is float32 or wider up to the result.
    """
    wide = torch.promote_types(product_dtype, torch.float32)
    if layer_norm is not None:
        x = _layer_norm(x.to(wide), layer_norm.weight.to(wide), layer_norm.bias.to(wide), layer_norm.eps)
    y = F.linear(x.to(product_dtype).to(wide), weight.to(product_dtype).to(wide))
    if weight_scale is not None:
        y = y * weight_scale.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    y = ACTIVATIONS[activation](y)
    return (y if residual is None else y + residual.to(wide)).to(out_dtype)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The pair (LayerNorm of s, s), where s = x + residual."""
    s = x + residual
    return layer_norm(s, weight, bias, eps), s


def bias_activation(x: Tensor, bias: Tensor, name: str) -> Tensor:
    """The activation `name` of x + bias."""
    return ACTIVATIONS[name](x + bias)


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
) -> Tensor:
    """-log softmax(logits)[target] for logits (N, V) and targets (N,). Ignored rows do not count."""
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


def reduce_loss(loss: Tensor, reduction: str, divisor: Tensor | None) -> Tensor:
    """The loss of every row for the reduction "none", else their sum, divided by `divisor` if there is one."""
    if reduction == "none":
        return loss
    return loss.sum() if divisor is None else loss.sum() / divisor


def shift_targets(targets: Tensor, ignore_index: int) -> Tensor:
    """targets (B, T) moved one position to the left. The last position of each row becomes `ignore_index`."""
    return torch.cat((targets[:, 1:], torch.full_like(targets[:, :1], ignore_index)), 1)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`cross_entropy(x @ weight.T + bias, targets)` for x (N, C) and weight (V, C)."""
    logits_NV = F.linear(x, weight, bias)
    return cross_entropy(
        logits_NV, targets, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# Every activation of transformers' ACT2FN that has no weights of its own, by its name there. Its tanh GELUs differ only
# in how they are written. Here they are one function, except gelu_fast, which keeps its rounded constant.
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
