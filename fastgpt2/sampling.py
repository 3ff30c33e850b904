"""From logits to the next token, as pure functions.

Randomness is counter-based: Philox4x32-10 (Salmon et al. 2011; the generator of `tl.rand`), keyed by the seed and
counted by (position, sample, prompt). A draw is a function of those numbers alone, so what a sample becomes does not
depend on its neighbours, on the batch size, or on what ran before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.config import SamplingConfig

_PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_PHILOX_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HIGH_SHIFT = np.uint64(32)


def philox4x32(counters: np.ndarray, key: tuple[int, int], rounds: int = 10) -> np.ndarray:
    """Philox4x32: counters (N, 4) uint64 holding 32-bit words, key two 32-bit words -> (N, 4) random 32-bit words."""
    c0, c1, c2, c3 = counters.T
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(rounds):
        product0, product1 = _PHILOX_MULTIPLIERS[0] * c0, _PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HIGH_SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _HIGH_SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _LOW, (k1 + _PHILOX_WEYL[1]) & _LOW
    return np.stack((c0, c1, c2, c3), axis=1)


def uniforms(seed: int, prompts: Sequence[int], samples: Sequence[int], positions: Sequence[int]) -> Tensor:
    """One number in [0, 1) with 53 random bits for each (prompt, sample, position), float64 (N,)."""
    counters = np.empty((len(positions), 4), dtype=np.uint64)
    counters[:, 0] = positions
    counters[:, 1] = samples
    counters[:, 2] = [prompt & 0xFFFFFFFF for prompt in prompts]
    counters[:, 3] = [(prompt >> 32) & 0xFFFFFFFF for prompt in prompts]
    words = philox4x32(counters, (seed & 0xFFFFFFFF, seed >> 32))
    bits = ((words[:, 0] << _HIGH_SHIFT) | words[:, 1]) >> np.uint64(11)
    return torch.from_numpy(bits.astype(np.float64) * 2.0**-53)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's repetition penalty (Keskar et al. 2019): logits (R, V) of tokens `seen` (R, V) bool become less likely."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample(logits: Tensor, config: SamplingConfig, uniform: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """Choose a token for every row: logits (R, V) any float dtype -> ids (R,) int64.

    uniform (R,) float64 in [0, 1) decides by inverse CDF; greedy configurations need none. `seen` (R, V) bool are the
    tokens that the repetition penalty is for. Every row is computed by itself.
    """
    logits = logits.float()
    if seen is not None and config.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen, config.repetition_penalty)
    if config.is_greedy:
        return logits.argmax(-1)
    if uniform is None:
        raise ValueError("sample: a temperature above 0 needs one uniform number a row; got none")
    if config.temperature != 1.0:
        logits = logits / config.temperature
    top_k = None if config.top_k is None or config.top_k >= logits.shape[-1] else config.top_k
    top_p = None if config.top_p is None or config.top_p >= 1.0 else config.top_p
    ids = None
    if top_k is not None:
        logits, ids = logits.topk(top_k, dim=-1)
        if top_p is not None:
            logits = _keep_top_p(logits, top_p)
    elif top_p is not None:
        logits = _keep_top_p_unsorted(logits, top_p)
    if config.min_p:
        threshold = logits.amax(-1, keepdim=True) + math.log(config.min_p)
        logits = logits.masked_fill(logits < threshold, -math.inf)
    choice = _inverse_cdf(logits, uniform)
    return choice if ids is None else ids.gather(-1, choice[:, None]).squeeze(-1)


def _keep_top_p(sorted_logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest leading tokens that hold `top_p` of the probability: those preceded by less than `top_p`."""
    probs = sorted_logits.softmax(-1)
    dropped = probs.cumsum(-1) - probs >= top_p
    dropped[:, 0] = False  # the likeliest token always stays, also where float32 holds top_p as 0
    return sorted_logits.masked_fill(dropped, -math.inf)


def _keep_top_p_unsorted(logits: Tensor, top_p: float) -> Tensor:
    """`_keep_top_p` for logits (R, V) in any order, without sorting the vocabulary.

    A histogram over the leading 16 bits of the probabilities (positive floats order as their bits do) finds the bin
    that the boundary falls in; only that bin's few tokens are sorted.
    """
    probs = logits.softmax(-1)
    keys = (probs.view(torch.int32) >> 16).long()
    mass = torch.zeros(len(probs), 0x3F81, device=probs.device).scatter_add_(-1, keys, probs)
    mass_from_top = mass.flip(-1).cumsum(-1)
    # Rounding may leave the whole sum below top_p: then the boundary is in the lowest bin that holds anything.
    # And a top_p that float32 holds as 0 is reached where something is held, not before.
    reached = ((mass_from_top >= top_p) & (mass_from_top > 0)) | (mass_from_top == mass_from_top[:, -1:])
    step = reached.int().argmax(-1, keepdim=True)
    boundary = mass.shape[-1] - 1 - step
    above = mass_from_top.gather(-1, step) - mass.gather(-1, boundary)
    keep = keys > boundary
    for row, (key, held) in enumerate(zip(boundary.squeeze(-1).tolist(), above.squeeze(-1).tolist(), strict=True)):
        members = (keys[row] == key).nonzero().squeeze(-1)
        order = probs[row, members].argsort(descending=True, stable=True)
        ranked = probs[row, members[order]]
        before = held + ranked.cumsum(-1) - ranked
        kept = before < top_p
        kept[0] = True
        keep[row, members[order[kept]]] = True
    return logits.masked_fill(~keep, -math.inf)


def _inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """The index that `uniform` (R,) falls on when the rows' probabilities are laid end to end, in vocabulary order.

    First among blocks of tokens, then inside the block: one pass over the vocabulary instead of a running sum.
    """
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    block = 256 if weights.shape[-1] > 256 else weights.shape[-1]
    blocks = F.pad(weights, (0, -weights.shape[-1] % block)).unflatten(-1, (-1, block))
    cdf = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = uniform.to(cdf.device)[:, None] * cdf[:, -1:]
    chosen = _first_above(cdf, target)
    inside = blocks.gather(1, chosen[..., None].expand(-1, -1, block)).squeeze(1).cumsum(-1, dtype=torch.float64)
    before = (cdf - blocks.sum(-1)).gather(-1, chosen)
    return (chosen * block + _first_above(inside, target - before)).squeeze(-1)


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """The first index where `cdf` exceeds `target`; the last one that adds anything, where rounding says none does."""
    below_total = torch.minimum(target, cdf[:, -1:].nextafter(torch.zeros_like(target)))
    return torch.searchsorted(cdf, below_total.clamp_min(0.0), right=True)
