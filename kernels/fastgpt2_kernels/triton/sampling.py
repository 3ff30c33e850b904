"""The next token of every row of logits, in one launch: penalty, temperature, top-k, top-p, min-p, Gumbel noise.

With y the penalised logits, T the temperature and K the tokens that the filters keep, the token is

    argmax over K of y_v + T g_v,    g_v = -log(-log u_v),

which is distributed as softmax(y / T) over K (Gumbel 1954; "Gumbel-max"), and greedy at T = 0. u_v comes from Philox
(Salmon et al. 2011) with the row's own key and the counter (v // 4, position, 0, 0), word v % 4: a draw depends on
(key, position, v) alone. Every filter keeps the tokens from some value of y on, ties together:

    top-k  y >= the k-th largest        min-p  y >= max y + T log(min_p)
    top-p  the mass of softmax(y / T), over what top-k keeps, strictly above y is less than p

So nothing needs sorting, and top-p needs no threshold at all: the argmax over a larger set is the argmax over K if it
lies in K, and if it does not, neither does anything that is not above it: those are left out and the argmax is taken
again, with the same noise. That is exact, and for p = 0.95 the first try stands 19 times in 20. (FlashInfer's rejection
sampling, Ye et al. 2025, draws anew instead.)

Top-k: each of the BLOCK lanes that the row is dealt out to keeps its two largest logits and the value of its third.
The k-th largest t of those kept is a lower bound; if no lane's third reaches t, everything top-k keeps is at hand and
the row is not read again (for k = 50 and 2048 lanes, in all but one case of 200). Else t is where a search
through the row begins. Passes over the row: greedy, temperature and (nearly always) top-k with or without top-p 1;
top-p alone 2, and 2 more for every rejection.

Dimension key: R rows, S slots that the rows' state lies in, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.cross_entropy import _log1p_below_half

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass every statistical test (Salmon et al. 2011, table 2)
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Beyond these no logit matters to y + T g, or only ties with the largest do; they keep both finite.
MAX_TEMPERATURE = tl.constexpr(1e30)
MAX_INVERSE = tl.constexpr(1e30)


# -- noise --------------------------------------------------------------------------------------------------------


@triton.jit
def _gumbel(word):
    """-log(-log u) of a random 32-bit word: 1 - u = (word + 1/2) / 2^32.

    e = -log u is taken from v = 1 - u below one half, where large draws come from and float32 has no 1 - v worth the
    name, and from u itself above: both ends are as fine as 2^-32, and never 0.
    """
    signed = word.to(tl.int32, bitcast=True)
    is_low = signed >= 0  # word < 2^31
    v = tl.where(is_low, signed, ~signed).to(tl.float32) * 2.0**-32 + 2.0**-33  # in (0, 1/2]: 1 - u, or u
    # -log(1 - v) / v on [0, 1/2]: Chebyshev interpolation, 3 units in the last place.
    q = 1.4079567 * v - 1.6302117
    q = ((((q * v + 1.2050139) * v - 0.18157165) * v + 0.2645476) * v + 0.24343744) * v + 0.333662
    q = (q * v + 0.49999374) * v + 1.0
    e = tl.where(is_low, v * q, tl.log2(v) * -LN_2)
    return tl.log2(e) * -LN_2


@triton.jit
def _words(key, position, start, BLOCK: tl.constexpr):
    """The random words of the tokens start .. start + BLOCK, start a multiple of 4: one call of Philox for four."""
    groups = start // 4 + tl.arange(0, BLOCK // 4)
    zero = groups * 0
    w0, w1, w2, w3 = tl.philox(key, groups, zero + position, zero, zero, n_rounds=PHILOX_ROUNDS)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))  # the words in their order


@triton.jit
def _scores(y, bar, temperature, scale_log2, key, position, start, BLOCK: tl.constexpr):
    """y + T g of the tokens start .. start + BLOCK, and the new bar; -inf if none of them can beat `bar`, a score.

    The logarithms are most of what noise costs. y + T g > bar means -log u < exp((y - bar) / T), and -log u >= 1 - u:
    one exponential tells, and says yes to a block about as often as the maximum moves, 3 times in 12 blocks.
    """
    words = _words(key, position, start, BLOCK)
    may_win = words.to(tl.float32) * 2.0**-32 <= tl.exp2((y - bar) * scale_log2 + 1e-4)  # with room for rounding
    scores = tl.full((BLOCK,), float("-inf"), tl.float32)
    if tl.max(may_win.to(tl.int32), 0) > 0:
        scores = y + temperature * _gumbel(words)
        bar = tl.maximum(bar, tl.max(scores, 0))
    return scores, bar


@triton.jit
def _gumbel_at(key, position, ids):
    """The noise of the tokens `ids`, whichever they are."""
    zero = ids * 0
    w0, w1, w2, w3 = tl.philox(key, ids // 4, zero + position, zero, zero, n_rounds=PHILOX_ROUNDS)
    return _gumbel(tl.where(ids % 4 < 2, tl.where(ids % 4 == 0, w0, w1), tl.where(ids % 4 == 2, w2, w3)))


# -- pieces -------------------------------------------------------------------------------------------------------


@triton.jit
def _to_key(y):
    """float32 -> int64 in the same order; both zeros are 0."""
    bits = y.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, -(bits & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _from_key(key):
    magnitude = tl.where(key >= 0, key, -key).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(key >= 0, magnitude, -magnitude)


@triton.jit
def _penalized(x, seen, penalty):
    return tl.where(seen != 0, tl.where(x < 0, x * penalty, x / penalty), x)


@triton.jit
def _load(x_ptr, seen_ptr, offs, end, penalty, HAS_PENALTY: tl.constexpr, HAS_MASK: tl.constexpr):
    """The logits as they are and penalised, float32; -inf from `end` on (HAS_MASK)."""
    if HAS_MASK:
        x = tl.load(x_ptr + offs, mask=offs < end, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(x_ptr + offs).to(tl.float32)
    y = x
    if HAS_PENALTY:
        if HAS_MASK:
            y = _penalized(x, tl.load(seen_ptr + offs, mask=offs < end, other=0), penalty)
        else:
            y = _penalized(x, tl.load(seen_ptr + offs), penalty)
    return x, y


@triton.jit
def _online_softmax_step(m, rest, x, scale_log2):
    """Take x into every lane's maximum m and the sum of exp(scale (x - m)) over all but that maximum, a 1 left out.

    At first LOWEST and -1. One exponential each, of whichever is the smaller.
    """
    d = x - m
    e = tl.exp2(-tl.abs(d) * scale_log2)
    return tl.maximum(m, x), tl.where(d > 0, rest * e + e, rest + e)


@triton.jit
def _first_step(
    x_ptr, seen_ptr, start, V, penalty, temperature, scale_log2, key, position,
    m, rest, y_max, y_rest, bar, best, best_id, second, second_id, third,
    HAS_PENALTY: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
    IS_GREEDY: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the tokens start .. start + BLOCK into every lane's state.

    Without top-k `best` is the best of y + T g so far. With it, `best`, `second` and `third` are the largest y.
    """
    offs = start + tl.arange(0, BLOCK)
    x, y = _load(x_ptr, seen_ptr, offs, V, penalty, HAS_PENALTY, HAS_MASK)
    m, rest = _online_softmax_step(m, rest, x, LOG2_E)
    if HAS_TOP_K:
        is_best, is_second = y > best, y > second
        third = tl.maximum(third, tl.minimum(y, second))
        second_id = tl.where(is_best, best_id, tl.where(is_second, offs, second_id))
        second = tl.where(is_best, best, tl.maximum(second, y))
    else:
        if HAS_TOP_P:
            y_max, y_rest = _online_softmax_step(y_max, y_rest, y, scale_log2)
        elif HAS_MIN_P:
            y_max = tl.maximum(y_max, y)
        if not IS_GREEDY:
            y, bar = _scores(y, bar, temperature, scale_log2, key, position, start, BLOCK)
        is_best = y > best
    best_id = tl.where(is_best, offs, best_id)
    best = tl.where(is_best, y, best)
    return m, rest, y_max, y_rest, bar, best, best_id, second, second_id, third


@triton.jit
def _counts(y, f1, f2, f3):
    """How many are >= f1, f2, f3 (any of V < 2^21): three counts in one number."""
    return (y >= f1).to(tl.int64) + ((y >= f2).to(tl.int64) << 21) + ((y >= f3).to(tl.int64) << 42)


@triton.jit
def _pivots(lo, hi):
    """Three keys that quarter lo .. hi."""
    step = (hi - lo + 3) // 4
    return tl.minimum(lo + step, hi), tl.minimum(lo + 2 * step, hi), tl.minimum(lo + 3 * step, hi)


@triton.jit
def _narrow(counts, k, p1, p2, p3, lo, hi, n):
    """The quarter whose lower end has >= k tokens from it on, and their number n, and whose upper end has fewer."""
    c1, c2, c3 = counts & 0x1FFFFF, (counts >> 21) & 0x1FFFFF, counts >> 42
    hi = tl.where(c1 < k, p1, tl.where(c2 < k, p2, tl.where(c3 < k, p3, hi)))
    lo = tl.where(c3 >= k, p3, tl.where(c2 >= k, p2, tl.where(c1 >= k, p1, lo)))
    n = tl.where(c3 >= k, c3, tl.where(c2 >= k, c2, tl.where(c1 >= k, c1, n)))
    return lo, hi, n


@triton.jit
def _row_counts(
    x_ptr, seen_ptr, end, penalty, f1, f2, f3, HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`_counts` of the tokens 0 .. end."""
    offs = tl.arange(0, BLOCK)
    tail = end // BLOCK * BLOCK
    _, y = _load(x_ptr, seen_ptr, tail + offs, end, penalty, HAS_PENALTY, True)
    counts = _counts(y, f1, f2, f3)
    for start in range(0, tail, BLOCK):
        _, y = _load(x_ptr, seen_ptr, start + offs, end, penalty, HAS_PENALTY, False)
        counts += _counts(y, f1, f2, f3)
    return tl.sum(counts, 0)


@triton.jit
def _mass(y, low, y_max, scale_log2):
    return tl.where(y >= low, tl.exp2((y - y_max) * scale_log2), 0.0)


@triton.jit
def _mass_from(
    x_ptr, seen_ptr, end, penalty, low, y_max, scale_log2, top1, top2,
    HAS_PENALTY: tl.constexpr, HAS_TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum of exp((y - y_max) / T) where y >= low: over the tokens 0 .. end, or, if end is 0, over the lanes' two."""
    mass = tl.zeros((BLOCK,), tl.float32)
    if HAS_TOP_K:  # noqa: SIM102
        if end == 0:
            mass = _mass(top1, low, y_max, scale_log2) + _mass(top2, low, y_max, scale_log2)
    offs = tl.arange(0, BLOCK)
    tail = end // BLOCK * BLOCK
    for start in range(0, tail, BLOCK):
        _, y = _load(x_ptr, seen_ptr, start + offs, end, penalty, HAS_PENALTY, False)
        mass += _mass(y, low, y_max, scale_log2)
    if tail < end:
        _, y = _load(x_ptr, seen_ptr, tail + offs, end, penalty, HAS_PENALTY, True)
        mass += _mass(y, low, y_max, scale_log2)
    return tl.sum(mass, 0)


@triton.jit
def _draw_step(
    x_ptr, seen_ptr, start, end, penalty, temperature, scale_log2, key, position, low, bar, best, best_id,
    HAS_PENALTY: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = start + tl.arange(0, BLOCK)
    _, y = _load(x_ptr, seen_ptr, offs, end, penalty, HAS_PENALTY, HAS_MASK)
    y = tl.where(y >= low, y, float("-inf"))
    score, bar = _scores(y, bar, temperature, scale_log2, key, position, start, BLOCK)
    is_best = score > best
    return bar, tl.where(is_best, score, best), tl.where(is_best, offs, best_id)


@triton.jit
def _first_best(best, best_id):
    """The id of the best lane, the lowest of equals."""
    return tl.min(tl.where(best == tl.max(best, 0), best_id, 2147483647), 0)


@triton.jit
def _draw(
    x_ptr, seen_ptr, end, penalty, temperature, scale_log2, key, position, low, top1, top1_score, top1_id, top2,
    top2_score, top2_id, HAS_PENALTY: tl.constexpr, HAS_TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """argmax of y + T g where y >= low: over the tokens 0 .. end, or, if end is 0, over those that the lanes hold."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_id = tl.zeros((BLOCK,), tl.int32)
    if HAS_TOP_K:  # noqa: SIM102
        if end == 0:
            best = tl.where(top1 >= low, top1_score, float("-inf"))
            other = tl.where(top2 >= low, top2_score, float("-inf"))
            is_other = (other > best) | ((other == best) & (top2_id < top1_id))
            best_id = tl.where(is_other, top2_id, top1_id)
            best = tl.where(is_other, other, best)
    bar = tl.full((), float("-inf"), tl.float32)
    tail = end // BLOCK * BLOCK
    for start in range(0, tail, BLOCK):
        bar, best, best_id = _draw_step(
            x_ptr, seen_ptr, start, end, penalty, temperature, scale_log2, key, position, low, bar, best, best_id,
            HAS_PENALTY, False, BLOCK)  # fmt: skip
    if tail < end:
        bar, best, best_id = _draw_step(
            x_ptr, seen_ptr, tail, end, penalty, temperature, scale_log2, key, position, low, bar, best, best_id,
            HAS_PENALTY, True, BLOCK)  # fmt: skip
    return _first_best(best, best_id)


@triton.jit
def _sample_kernel(
    logits_ptr, ids_ptr, logprobs_ptr, slots_ptr, keys_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr,
    min_p_ptr, penalty_ptr, seen_ptr, stride_lr, stride_ss, V,
    HAS_SLOTS: tl.constexpr, HAS_PENALTY: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr, IS_GREEDY: tl.constexpr, MARK_SEEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the token, and the log-probability that the logits as they are give it."""
    row = tl.program_id(0).to(tl.int64)
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + row).to(tl.int64)
    x_ptr = logits_ptr + row * stride_lr
    s_ptr = seen_ptr
    if HAS_PENALTY or MARK_SEEN:
        s_ptr = seen_ptr + slot * stride_ss
    penalty, temperature, scale_log2 = 1.0, 0.0, 1.0
    key, position = row, 0
    if HAS_PENALTY:
        penalty = tl.load(penalty_ptr + slot)
    if not IS_GREEDY:
        low_word = tl.load(keys_ptr + 2 * slot).to(tl.int64) & 0xFFFFFFFF
        key = low_word | (tl.load(keys_ptr + 2 * slot + 1).to(tl.int64) << 32)
        position = tl.load(positions_ptr + slot).to(tl.int32)
        temperature = tl.minimum(tl.maximum(tl.load(temperature_ptr + slot), 0.0), MAX_TEMPERATURE)
    k = V
    if HAS_TOP_K:
        k = tl.load(top_k_ptr + slot).to(tl.int32)
        k = tl.where(k <= 0, V, k)
        temperature = tl.where(k == 1, 0.0, temperature)  # as greedy: the lowest index among equals
    if not IS_GREEDY:
        scale_log2 = tl.minimum(1.0 / temperature, MAX_INVERSE) * LOG2_E

    # The first pass.
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    rest = tl.full((BLOCK,), -1.0, tl.float32)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_id = tl.zeros((BLOCK,), tl.int32)
    lane_max, lane_rest, second, second_id, third = m, rest, best, best_id, best
    bar = tl.full((), float("-inf"), tl.float32)
    tail = V // BLOCK * BLOCK
    for start in range(0, tail, BLOCK):
        m, rest, lane_max, lane_rest, bar, best, best_id, second, second_id, third = _first_step(
            x_ptr, s_ptr, start, V, penalty, temperature, scale_log2, key, position,
            m, rest, lane_max, lane_rest, bar, best, best_id, second, second_id, third,
            HAS_PENALTY, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P, IS_GREEDY, False, BLOCK)  # fmt: skip
    if tail < V:
        m, rest, lane_max, lane_rest, bar, best, best_id, second, second_id, third = _first_step(
            x_ptr, s_ptr, tail, V, penalty, temperature, scale_log2, key, position,
            m, rest, lane_max, lane_rest, bar, best, best_id, second, second_id, third,
            HAS_PENALTY, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P, IS_GREEDY, True, BLOCK)  # fmt: skip
    row_max = tl.max(m, 0)
    # All but one largest logit, whose 1 would round the rest of a confident row away.
    lanes = tl.arange(0, BLOCK)
    first = tl.min(tl.where(m == row_max, lanes, BLOCK), 0)
    rest = tl.sum(tl.where(lanes == first, rest, (rest + 1.0) * tl.exp2((m - row_max) * LOG2_E)), 0)
    is_good = (rest > -1.0) & (row_max < float("inf"))  # not so if a logit is NaN or +inf, or all are -inf
    log_sum = tl.where(rest < 0.5, _log1p_below_half(rest), LN_2 * tl.log2(1.0 + rest))

    low, end = float("-inf"), V
    y_max, mass = row_max, 1.0
    if HAS_TOP_K:
        # The k-th largest of what the lanes hold, by bisection (into four) of the floats' order.
        y_max = tl.max(best, 0)
        lo = _to_key(float("-inf") + tl.zeros((), tl.float32))
        hi = _to_key(y_max) + 1
        n = tl.cast(1 << 30, tl.int64)
        if k <= BLOCK:
            lo = _to_key(tl.min(best, 0))
        is_searched = is_good & (k < V)
        if is_searched & (k <= 2 * BLOCK):
            while (hi - lo > 1) & (n != k):
                p1, p2, p3 = _pivots(lo, hi)
                f1, f2, f3 = _from_key(p1), _from_key(p2), _from_key(p3)
                counts = tl.sum(_counts(best, f1, f2, f3) + _counts(second, f1, f2, f3), 0)
                lo, hi, n = _narrow(counts, k, p1, p2, p3, lo, hi, n)
        low = tl.where(is_searched, _from_key(lo), float("-inf"))
        most_left_out = tl.max(third, 0)
        if (most_left_out < low) | (most_left_out == float("-inf")):
            end = tl.cast(0, tl.int32)
        elif is_searched:
            # Where a lane left out what may belong to the first k: on through the row, from this lower bound.
            hi = _to_key(y_max) + 1
            n = tl.cast(1 << 30, tl.int64)
            while (hi - lo > 1) & (n != k):
                p1, p2, p3 = _pivots(lo, hi)
                counts = _row_counts(
                    x_ptr, s_ptr, V, penalty, _from_key(p1), _from_key(p2), _from_key(p3), HAS_PENALTY,
                    BLOCK)  # fmt: skip
                lo, hi, n = _narrow(counts, k, p1, p2, p3, lo, hi, n)
            low = _from_key(lo)
        if HAS_TOP_P:
            mass = _mass_from(
                x_ptr, s_ptr, end, penalty, low, y_max, scale_log2, best, second, HAS_PENALTY, True, BLOCK)  # fmt: skip
        chosen = tl.zeros((), tl.int32)
        y = float("nan")  # nothing is chosen yet
    else:
        chosen = tl.minimum(_first_best(best, best_id), V - 1)
        if HAS_TOP_P or HAS_MIN_P:
            y_max = tl.max(lane_max, 0)
        if HAS_TOP_P:
            mass = tl.sum((lane_rest + 1.0) * tl.exp2((lane_max - y_max) * scale_log2), 0)
        y = 0.0
        if HAS_TOP_P or HAS_MIN_P:
            y = tl.load(x_ptr + chosen).to(tl.float32)
            if HAS_PENALTY:
                y = _penalized(y, tl.load(s_ptr + chosen), penalty)
    if HAS_MIN_P:
        min_p = tl.load(min_p_ptr + slot)
        low = tl.maximum(low, tl.where(min_p > 0, y_max + temperature * (LN_2 * tl.log2(min_p)), float("-inf")))

    if HAS_TOP_K or HAS_TOP_P or HAS_MIN_P:
        best_score, second_score = best, second
        if HAS_TOP_K:
            best_score += temperature * _gumbel_at(key, position, best_id)
            if tl.max(second, 0) >= low:
                second_score += temperature * _gumbel_at(key, position, second_id)
        limit = float("inf")
        if HAS_TOP_P:
            top_p = tl.load(top_p_ptr + slot)
            limit = tl.where(top_p < 1.0, top_p * mass, float("inf"))
        is_open = is_good
        while is_open:
            if not (y >= low):
                chosen = _draw(
                    x_ptr, s_ptr, end, penalty, temperature, scale_log2, key, position, low, best, best_score,
                    best_id, second, second_score, second_id, HAS_PENALTY, HAS_TOP_K, BLOCK)  # fmt: skip
                chosen = tl.minimum(chosen, V - 1)
                y = tl.load(x_ptr + chosen).to(tl.float32)
                if HAS_PENALTY:
                    y = _penalized(y, tl.load(s_ptr + chosen), penalty)
            is_open = is_open & False
            if HAS_TOP_P:
                above = _from_key(_to_key(y) + 1)
                mass_above = _mass_from(
                    x_ptr, s_ptr, end, penalty, above, y_max, scale_log2, best, second, HAS_PENALTY, HAS_TOP_K,
                    BLOCK)  # fmt: skip
                is_open = (mass_above >= limit) & (mass_above > 0)
                low = tl.where(is_open, tl.maximum(low, above), low)

    chosen = tl.where(is_good, chosen, 0)
    logprob = (tl.load(x_ptr + chosen).to(tl.float32) - row_max) - log_sum
    tl.store(ids_ptr + slot, chosen.to(ids_ptr.dtype.element_ty))
    tl.store(logprobs_ptr + slot, tl.where(is_good, logprob, float("nan")))
    if MARK_SEEN:
        tl.store(s_ptr + chosen, tl.full((), 1, s_ptr.dtype.element_ty), mask=is_good)


# -- launcher -----------------------------------------------------------------------------------------------------


def sample_rows(
    logits: Tensor, ids: Tensor, logprobs: Tensor, *, slots: Tensor | None = None, keys: Tensor | None = None,
    positions: Tensor | None = None, temperature: Tensor | None = None, top_k: Tensor | None = None,
    top_p: Tensor | None = None, min_p: Tensor | None = None, penalty: Tensor | None = None,
    seen: Tensor | None = None, mark_seen: bool = False,
) -> None:  # fmt: skip
    """Choose a token for every row of logits (R, V), last stride 1, into ids (S,) and logprobs (S,) float32.

    What is None is off (temperature None: greedy). The rest is as in `ops.sample`, every setting a tensor (S,); nothing
    is checked, allocated or waited for.
    """
    R, V = logits.shape
    if R == 0:
        return
    if temperature is None:
        top_k = top_p = min_p = None  # the largest logit stays, whatever the filters
    has_filters = top_k is not None or top_p is not None or min_p is not None
    row = launch.sampling_row(V, launch.architecture(logits.device), has_filters=has_filters)
    _sample_kernel[(R,)](
        logits, ids, logprobs, slots, keys, positions, temperature, top_k, top_p, min_p, penalty,
        None if seen is None else seen.view(torch.uint8),
        logits.stride(0), 0 if seen is None else seen.stride(0), V,
        HAS_SLOTS=slots is not None,
        HAS_PENALTY=penalty is not None,
        HAS_TOP_K=top_k is not None,
        HAS_TOP_P=top_p is not None,
        HAS_MIN_P=min_p is not None,
        IS_GREEDY=temperature is None,
        MARK_SEEN=mark_seen,
        BLOCK=row.block_v,
        num_warps=row.num_warps,
        **launch.OPTIONS,
    )  # fmt: skip


def sample(
    logits: Tensor, ids: Tensor, logprobs: Tensor, slots: Tensor | None, settings: dict[str, Tensor | None],
    seen: Tensor | None, mark_seen: bool,
) -> None:  # fmt: skip
    """Choose a token for every row of logits (R, V), into ids and logprobs (S,) at `slots`."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    sample_op(logits, ids, logprobs, slots, **settings, seen=seen, mark_seen=mark_seen)


@torch.library.custom_op("fastgpt2::sample_", mutates_args=("ids", "logprobs", "seen"))
def sample_op(
    logits: Tensor, ids: Tensor, logprobs: Tensor, slots: Tensor | None, keys: Tensor | None, positions: Tensor | None,
    temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
    penalty: Tensor | None, seen: Tensor | None, mark_seen: bool,
) -> None:  # fmt: skip
    """`sample_rows` as PyTorch's dispatcher and torch.compile see it."""
    sample_rows(
        logits, ids, logprobs, slots=slots, keys=keys, positions=positions, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, penalty=penalty, seen=seen, mark_seen=mark_seen,
    )  # fmt: skip
