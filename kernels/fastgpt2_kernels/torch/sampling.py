"""Sampling: the next token of every row of logits, on PyTorch's own operators.

Let y be the penalised logits, T the temperature, g the Gumbel noise and e the exponential noise. The token is the
argmax of y + T g = y - T log e, which is the argmin of e / w, where w = exp((y - max y) / T).

On a CPU nothing is sorted. The argmin is found roughly in float32, and then in float64 among the tokens close to it, so
only those need an exact logarithm. top-p needs no threshold. If the argmin over a larger set lies in the set that top-p
keeps, it is the right one. If not, it and all tokens with no larger logit are dropped, and the argmin is taken again
with the same noise.

Dimension key: R rows, V vocabulary, B rows of a block, K tokens that top-k may keep, G groups of four tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt2_kernels import reference

_WORD = 0xFFFFFFFF
# Rows are sampled in blocks. The noise of a block fits in the processor's cache, yet keeps several threads busy.
_BLOCK_TOKENS = 2**18
# If top-k keeps at most this many tokens per row, they are gathered, and only they get noise.
_MOST_GATHERED = 2048
# By which factor the rough e / w of the right token may exceed the smallest one. In float32, 1 - u may round to 1. Then
# e is cut off at 24 log 2, though it may be as large as 33 log 2: a factor of 1.375.
_MARGIN = 1.5


@torch.no_grad()
def sample(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    slots: Tensor | None,
    settings: dict[str, Tensor | None],
    seen: Tensor | None,
    mark_seen: bool,
) -> None:
    """Choose a token for every row of logits (R, V), and write it to ids and logprobs (S,) at `slots`."""
    at = torch.arange(len(logits), device=logits.device) if slots is None else slots.long()
    rows = {name: None if t is None else t[at] for name, t in settings.items()}
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # `_choose` looks at values. That would make the host wait for a GPU, and torch.compile cannot trace it.
    is_plain = logits.device.type != "cpu" or torch.compiler.is_compiling()
    choose = reference.sample if is_plain else _choose
    chosen, row_logprobs = choose(wide, seen=None if seen is None or rows["penalty"] is None else seen[at], **rows)
    ids[at], logprobs[at] = chosen.to(ids.dtype), row_logprobs.float()
    if mark_seen and seen is not None:
        seen[at, chosen] |= ~row_logprobs.isnan()


def _choose(
    logits: Tensor,
    *,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    penalty: Tensor | None,
    seen: Tensor | None,
    keys: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`reference.sample` for a CPU."""
    R, V = logits.shape
    is_good = logits.amax(-1).isfinite()  # amax propagates NaN
    y = logits
    if penalty is not None and seen is not None:
        y = reference.penalized_logits(logits, seen, penalty.to(logits.dtype))
    ids = y.argmax(-1)
    if temperature is not None and keys is not None and positions is not None:
        largest = y.gather(-1, ids[:, None])[:, 0]
        # Noise is below 23. If it would be rounded away from the largest logit, the row is greedy.
        noise = 23 * temperature.double()
        is_drawn = is_good & largest.isfinite() & (noise > largest.abs() * (torch.finfo(y.dtype).eps / 4))
        if top_k is not None:
            is_drawn &= top_k != 1
        settings = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        for rows in is_drawn.nonzero()[:, 0].split(max(1, _BLOCK_TOKENS // V)):
            some = {name: None if t is None else t[rows] for name, t in settings.items()}
            whole = slice(None) if len(rows) == R else rows
            ids[rows] = _draw(y[whole], temperature[rows], keys[rows], positions[rows], **some)
    ids = ids.where(is_good, 0)
    row_logprobs = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    return ids, row_logprobs.masked_fill(~is_good, math.nan)


class _Rows(NamedTuple):
    """The rows of a block that have no token yet.

    y, weights, ratio: (B, V) or (B, K), the module docstring's y, w and e / w. The ratio of a dropped token is
        infinite.
    ids: (B, K), the tokens of the columns, or None for all tokens.
    words: the random words, four tensors (B, G) or one (B, K).
    temperature: (B, 1). limit: (B, 1), the mass that top-p keeps.
    """

    y: Tensor
    weights: Tensor
    ratio: Tensor
    ids: Tensor | None
    words: tuple[Tensor, ...]
    temperature: Tensor
    limit: Tensor

    def select(self, rows: Tensor) -> _Rows:
        parts = (None if t is None else tuple(w[rows] for w in t) if isinstance(t, tuple) else t[rows] for t in self)
        return _Rows._make(parts)


def _draw(
    y: Tensor,
    temperature: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> Tensor:
    """The tokens (B,) of rows of penalised logits y (B, V), with temperatures above 0."""
    V = y.shape[-1]
    y, ids, low = _top_k(y, top_k)
    T = temperature.to(y.dtype).clamp_max(1e30)[:, None]
    largest = y.amax(-1, keepdim=True)
    weights = y.sub(largest).mul_((1 / T).clamp_max(1e30)).exp_()
    limit = torch.full_like(T, math.inf)
    if top_p is not None:
        mass = weights.masked_fill(y < low, 0.0).sum(-1, keepdim=True)
        limit = (top_p.to(y.dtype)[:, None] * mass).where(top_p[:, None] < 1, math.inf)
    if min_p is not None:
        floor = largest + T * min_p.to(y.dtype).log()[:, None]
        low = torch.maximum(low, floor.where(min_p[:, None] > 0, -math.inf))
    words, waits = _noise(keys, positions, V, ids)
    ratio = waits.to(y.dtype).div_(weights).masked_fill_(y < low, math.inf)
    rows = _Rows(y, weights, ratio, ids, words, T, limit)

    chosen = torch.empty(len(y), dtype=torch.int64)
    pending = torch.arange(len(y))
    while True:
        columns = _least(rows)
        chosen[pending] = columns if rows.ids is None else rows.ids.gather(-1, columns[:, None])[:, 0]
        if top_p is None:
            return chosen
        is_below = rows.y <= rows.y.gather(-1, columns[:, None])
        above = rows.weights.masked_fill(is_below, 0.0).sum(-1, keepdim=True)
        out = ((above >= rows.limit) & (above > 0)).squeeze(-1).nonzero()[:, 0]
        if not len(out):
            return chosen
        pending, rows = pending[out], rows.select(out)
        rows.ratio.masked_fill_(is_below[out], math.inf)


def _top_k(y: Tensor, top_k: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """y (B, V), None, and the smallest value (B, 1) that top-k keeps.

    If top-k keeps few tokens, only their y (B, K), and their ids (B, K) in place of None.
    """
    V = y.shape[-1]
    everything = torch.full_like(y[:, :1], -math.inf)
    if top_k is None:
        return y, None, everything
    is_on = (top_k > 0) & (top_k < V)
    if not is_on.any():
        return y, None, everything
    most = int(top_k[is_on].max())
    top = y.topk(most)
    last = top_k.long().clamp(1, most)[:, None] - 1
    low = top.values.gather(-1, last).where(is_on[:, None], -math.inf)
    if is_on.all() and most <= _MOST_GATHERED:
        kept = int(((y >= low) & (y > -math.inf)).sum(-1).max())  # more than `most` where values tie
        if kept <= _MOST_GATHERED:
            ids = (top if kept <= most else y.topk(kept)).indices.sort(-1).values
            return y.gather(-1, ids), ids, low
    return y, None, low


def _least(rows: _Rows) -> Tensor:
    """The columns (B,) of the largest y + T g. Among equals the first counts."""
    bound = rows.ratio.amin(-1, keepdim=True) * _MARGIN
    at, columns = (rows.ratio <= bound).nonzero().unbind(1)
    if rows.ids is None:
        words = torch.stack([word[at, columns // 4] for word in rows.words], 1).gather(-1, columns[:, None] % 4)[:, 0]
    else:
        words = rows.words[0][at, columns]
    scores = rows.y[at, columns].double() + rows.temperature[at, 0].double() * reference.gumbel_of_words(words)
    best = torch.full((len(rows.y),), -math.inf, dtype=torch.float64).scatter_reduce_(0, at, scores, "amax")
    is_best = scores == best[at]
    first = torch.full((len(rows.y),), rows.y.shape[-1])
    return first.scatter_reduce_(0, at[is_best], columns[is_best], "amin")


def _noise(keys: Tensor, positions: Tensor, V: int, ids: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
    """The random words of all tokens or of `ids` (B, K), and the exponential noise -log u, roughly, in float32."""
    k0, k1 = (keys.long() & _WORD)[:, :, None].unbind(1)
    position = (positions.long() & _WORD)[:, None]
    if ids is None:
        words = _philox(torch.arange(-(-V // 4)).expand(len(keys), -1), position, k0, k1)
        return words, torch.stack([_rough_wait(word) for word in words], -1).flatten(-2)[:, :V]
    groups = torch.stack(_philox(ids // 4, position, k0, k1), -1)
    word = groups.gather(-1, (ids % 4)[..., None])[..., 0]
    return (word,), _rough_wait(word)


def _rough_wait(word: Tensor) -> Tensor:
    """-log u in float32, where 1 - u = (word + 1/2) / 2^32."""
    v = word.float().mul_(2.0**-32).add_(2.0**-33).clamp_max_(1 - 2.0**-24)
    return v.neg_().log1p_().neg_()


def _philox(c0: Tensor, c1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """`reference.philox` for the counters (c0, c1, 0, 0), which broadcast, in fewer operations."""
    c2 = c3 = torch.zeros_like(c1)
    for _ in range(7):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high2, low2 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = (high2 ^ c1).bitwise_xor_(k0), low2, (high0 ^ c3).bitwise_xor_(k1), low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a b. Here a (b - 2^32) fits into int64, and is smaller than a b by 2^32 a."""
    product = a * (b - 2**32)
    return (product >> 32).add_(a), product.bitwise_and_(_WORD)
