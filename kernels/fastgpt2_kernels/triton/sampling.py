"""Sampling the next token of every row of logits, in one kernel launch: penalty, filters, temperature, Gumbel noise.

Let y be the penalised logits, T the temperature and K the tokens that the filters keep. The token is

    argmax over K of y_v + T g_v,    g_v = -log(-log u_v),

which is distributed as softmax(y / T) over K (Gumbel 1954, the "Gumbel-max" trick), and is greedy at T = 0. u_v comes
from word v % 4 of Philox (Salmon et al. 2011) with the row's own key and the counter (v // 4, position, 0, 0). So the
noise depends only on (key, position, v). Every filter keeps all y from some value up, so equal logits stay or go
together:

    top-k  y >= the k-th largest        min-p  y >= max y + T log(min_p)
    top-p  the mass of softmax(y / T), over what top-k keeps, strictly above y is less than p

So nothing needs sorting, and top-p needs no threshold. If the argmax over a larger set lies in K, it is the argmax over
K. If it does not, then no token with a y at most as large lies in K either. All of these are dropped, and the argmax is
taken again with the same noise. This is exact. For p = 0.95 the first try is accepted 19 times in 20. (FlashInfer's
rejection sampling, Ye et al. 2025, draws new noise instead.)

Top-k: the row is split into BLOCK lanes. Each lane keeps its two largest logits and the value of its third. The k-th
largest t of the logits kept is a lower bound. If no lane's third reaches t, the lanes hold everything that top-k keeps,
and the row is not read again. (For k = 50 and 2048 lanes this fails once in 200 cases.) Otherwise a search through the
row begins at t.

Passes over the row: 1 for greedy, for temperature alone, and nearly always for top-k with or without top-p. top-p alone
takes 2, and 2 more for every rejection.

Dimension key: R rows, S slots that hold the rows' state, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2_kernels.triton import launch
from fastgpt2_kernels.triton.arguments import Matrix
from fastgpt2_kernels.triton.cross_entropy import _log1p_below_half
from fastgpt2_kernels.triton.devices import launch_kernel

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass every statistical test (Salmon et al. 2011, table 2)
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Beyond the first, logits do not matter in y + T g. Beyond the second, only ties with the largest logit matter. These
# bounds keep T and 1 / T finite.
MAX_TEMPERATURE = tl.constexpr(1e30)
MAX_INVERSE = tl.constexpr(1e30)


# -- arguments ----------------------------------------------------------------------------------------------------


class _Settings(NamedTuple):
    """Pointers to the settings of the slots; each may be None."""

    keys_ptr: Any
    positions_ptr: Any
    temperature_ptr: Any
    top_k_ptr: Any
    top_p_ptr: Any
    min_p_ptr: Any
    penalty_ptr: Any


class _Meta(NamedTuple):
    HAS_PENALTY: bool
    HAS_TOP_K: bool
    HAS_TOP_P: bool
    HAS_MIN_P: bool
    IS_GREEDY: bool
    MARK_SEEN: bool
    BLOCK: int


class _Row(NamedTuple):
    """A row's logits, which of its tokens were seen (None if not needed), and their repetition penalty."""

    x_ptr: Any
    seen_ptr: Any
    penalty: Any
    V: Any


class _Draw(NamedTuple):
    """What a row's noise is drawn with. scale_log2 is log2(e) / T."""

    key: Any
    position: Any
    temperature: Any
    scale_log2: Any


class _Lanes(NamedTuple):
    """What every lane holds after the first pass; see `_first_step`."""

    m: Any
    rest: Any
    y_max: Any
    y_rest: Any
    bar: Any
    best: Any
    best_id: Any
    second: Any
    second_id: Any
    third: Any


class _Held(NamedTuple):
    """With top-k, the two largest logits of every lane, their scores y + T g, and their tokens."""

    first: Any
    first_score: Any
    first_id: Any
    second: Any
    second_score: Any
    second_id: Any


# -- noise --------------------------------------------------------------------------------------------------------


@triton.jit
def _gumbel(word):
    """-log(-log u) of a random 32-bit word, where 1 - u = (word + 1/2) / 2^32.

    e = -log u is computed from v = 1 - u if v is below one half, because float32 cannot resolve 1 - v there, and large
    noise comes from there. Otherwise it is computed from u itself. So both ends are as fine as 2^-32, and never 0.
    """
    signed = word.to(tl.int32, bitcast=True)
    is_low = signed >= 0  # word < 2^31
    v = tl.where(is_low, signed, ~signed).to(tl.float32) * 2.0**-32 + 2.0**-33  # in (0, 1/2]: 1 - u, or u
    # -log(1 - v) / v on [0, 1/2] by Chebyshev interpolation, to 3 units in the last place.
    q = 1.4079567 * v - 1.6302117
    q = ((((q * v + 1.2050139) * v - 0.18157165) * v + 0.2645476) * v + 0.24343744) * v + 0.333662
    q = (q * v + 0.49999374) * v + 1.0
    e = tl.where(is_low, v * q, tl.log2(v) * -LN_2)
    return tl.log2(e) * -LN_2


@triton.jit
def _words(key, position, start, BLOCK: tl.constexpr):
    """The random words of the tokens start .. start + BLOCK. One call of Philox serves 4; start is a multiple of 4."""
    groups = start // 4 + tl.arange(0, BLOCK // 4)
    zero = groups * 0
    w0, w1, w2, w3 = tl.philox(key, groups, zero + position, zero, zero, n_rounds=PHILOX_ROUNDS)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))  # the words in order


@triton.jit
def _scores(y, bar, draw, start, BLOCK: tl.constexpr):
    """The scores y + T g of the tokens start .. start + BLOCK, and the new bar, which is the best score so far.

    The scores are -inf if none of the tokens can beat `bar`. Logarithms are most of the cost of noise. y + T g > bar
    means -log u < exp((y - bar) / T), and -log u >= 1 - u. So one exponential shows whether a block needs logarithms.
    It needs them about as often as the maximum moves, in 3 of 12 blocks.
    """
    words = _words(draw.key, draw.position, start, BLOCK=BLOCK)
    may_win = words.to(tl.float32) * 2.0**-32 <= tl.exp2((y - bar) * draw.scale_log2 + 1e-4)  # with room for rounding
    scores = tl.full((BLOCK,), float("-inf"), tl.float32)
    if tl.max(may_win.to(tl.int32), 0) > 0:
        scores = y + draw.temperature * _gumbel(words)
        bar = tl.maximum(bar, tl.max(scores, 0))
    return scores, bar


@triton.jit
def _gumbel_at(key, position, ids):
    """The noise of the tokens `ids`, in any order."""
    zero = ids * 0
    w0, w1, w2, w3 = tl.philox(key, ids // 4, zero + position, zero, zero, n_rounds=PHILOX_ROUNDS)
    return _gumbel(tl.where(ids % 4 < 2, tl.where(ids % 4 == 0, w0, w1), tl.where(ids % 4 == 2, w2, w3)))


# -- pieces -------------------------------------------------------------------------------------------------------


@triton.jit
def _to_key(y):
    """Map float32 to int64 with the same order. Both zeros become 0."""
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
def _load(row, offs, end, HAS_MASK: tl.constexpr, META: tl.constexpr):
    """Load the logits as they are and penalised, in float32, with -inf from `end` on (HAS_MASK)."""
    if HAS_MASK:
        x = tl.load(row.x_ptr + offs, mask=offs < end, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(row.x_ptr + offs).to(tl.float32)
    y = x
    if META.HAS_PENALTY:
        if HAS_MASK:
            y = _penalized(x, tl.load(row.seen_ptr + offs, mask=offs < end, other=0), row.penalty)
        else:
            y = _penalized(x, tl.load(row.seen_ptr + offs), row.penalty)
    return x, y


@triton.jit
def _online_softmax_step(m, rest, x, scale_log2):
    """Add x to each lane's maximum m and sum of exp(scale (x - m)), which leaves out the 1 of the maximum itself.

    They start at LOWEST and -1. Each step takes one exponential, that of the smaller of x and m.
    """
    d = x - m
    e = tl.exp2(-tl.abs(d) * scale_log2)
    return tl.maximum(m, x), tl.where(d > 0, rest * e + e, rest + e)


@triton.jit
def _first_step(lanes, row, draw, start, HAS_MASK: tl.constexpr, META: tl.constexpr):
    """Add the tokens start .. start + BLOCK to each lane's state.

    Without top-k, `best` is the largest y + T g so far. With top-k, `best`, `second` and `third` are the largest y.
    """
    m, rest, y_max, y_rest, bar, best, best_id, second, second_id, third = lanes
    offs = start + tl.arange(0, META.BLOCK)
    x, y = _load(row, offs, row.V, HAS_MASK=HAS_MASK, META=META)
    m, rest = _online_softmax_step(m, rest, x, LOG2_E)
    if META.HAS_TOP_K:
        is_best, is_second = y > best, y > second
        third = tl.maximum(third, tl.minimum(y, second))
        second_id = tl.where(is_best, best_id, tl.where(is_second, offs, second_id))
        second = tl.where(is_best, best, tl.maximum(second, y))
    else:
        if META.HAS_TOP_P:
            y_max, y_rest = _online_softmax_step(y_max, y_rest, y, draw.scale_log2)
        elif META.HAS_MIN_P:
            y_max = tl.maximum(y_max, y)
        if not META.IS_GREEDY:
            y, bar = _scores(y, bar, draw, start, BLOCK=META.BLOCK)
        is_best = y > best
    best_id = tl.where(is_best, offs, best_id)
    best = tl.where(is_best, y, best)
    return _Lanes(m, rest, y_max, y_rest, bar, best, best_id, second, second_id, third)


@triton.jit
def _counts(y, f1, f2, f3):
    """How many y are >= f1, f2 and f3: three counts in one number, 21 bits each, because V < 2^21."""
    return (y >= f1).to(tl.int64) + ((y >= f2).to(tl.int64) << 21) + ((y >= f3).to(tl.int64) << 42)


@triton.jit
def _pivots(lo, hi):
    """Three keys that divide lo .. hi into quarters."""
    step = (hi - lo + 3) // 4
    return tl.minimum(lo + step, hi), tl.minimum(lo + 2 * step, hi), tl.minimum(lo + 3 * step, hi)


@triton.jit
def _narrow(counts, k, p1, p2, p3, lo, hi, n):
    """The quarter that holds the k-th largest: at least k tokens (n) reach its lower end, and fewer its upper end."""
    c1, c2, c3 = counts & 0x1FFFFF, (counts >> 21) & 0x1FFFFF, counts >> 42
    hi = tl.where(c1 < k, p1, tl.where(c2 < k, p2, tl.where(c3 < k, p3, hi)))
    lo = tl.where(c3 >= k, p3, tl.where(c2 >= k, p2, tl.where(c1 >= k, p1, lo)))
    n = tl.where(c3 >= k, c3, tl.where(c2 >= k, c2, tl.where(c1 >= k, c1, n)))
    return lo, hi, n


@triton.jit
def _row_counts(row, f1, f2, f3, META: tl.constexpr):
    """`_counts` of the whole row."""
    offs = tl.arange(0, META.BLOCK)
    tail = row.V // META.BLOCK * META.BLOCK
    _, y = _load(row, tail + offs, row.V, HAS_MASK=True, META=META)
    counts = _counts(y, f1, f2, f3)
    for start in range(0, tail, META.BLOCK):
        _, y = _load(row, start + offs, row.V, HAS_MASK=False, META=META)
        counts += _counts(y, f1, f2, f3)
    return tl.sum(counts, 0)


@triton.jit
def _mass(y, low, y_max, scale_log2):
    return tl.where(y >= low, tl.exp2((y - y_max) * scale_log2), 0.0)


@triton.jit
def _mass_from(row, end, low, y_max, scale_log2, first, second, META: tl.constexpr):
    """The sum of exp((y - y_max) / T) over y >= low, of the tokens 0 .. end, or if end is 0 of the two of each lane."""
    BLOCK: tl.constexpr = META.BLOCK
    mass = tl.zeros((BLOCK,), tl.float32)
    if META.HAS_TOP_K:  # noqa: SIM102
        if end == 0:
            mass = _mass(first, low, y_max, scale_log2) + _mass(second, low, y_max, scale_log2)
    offs = tl.arange(0, BLOCK)
    tail = end // BLOCK * BLOCK
    for start in range(0, tail, BLOCK):
        _, y = _load(row, start + offs, end, HAS_MASK=False, META=META)
        mass += _mass(y, low, y_max, scale_log2)
    if tail < end:
        _, y = _load(row, tail + offs, end, HAS_MASK=True, META=META)
        mass += _mass(y, low, y_max, scale_log2)
    return tl.sum(mass, 0)


@triton.jit
def _draw_step(bar, best, best_id, row, draw, start, end, low, HAS_MASK: tl.constexpr, META: tl.constexpr):
    offs = start + tl.arange(0, META.BLOCK)
    _, y = _load(row, offs, end, HAS_MASK=HAS_MASK, META=META)
    y = tl.where(y >= low, y, float("-inf"))
    score, bar = _scores(y, bar, draw, start, BLOCK=META.BLOCK)
    is_best = score > best
    return bar, tl.where(is_best, score, best), tl.where(is_best, offs, best_id)


@triton.jit
def _first_best(best, best_id):
    """The id of the best lane. Among equals the lowest id counts."""
    return tl.min(tl.where(best == tl.max(best, 0), best_id, 2147483647), 0)


@triton.jit
def _draw(row, draw, end, low, held, META: tl.constexpr):
    """The argmax of y + T g over y >= low, of the tokens 0 .. end, or if end is 0 of those that the lanes hold."""
    BLOCK: tl.constexpr = META.BLOCK
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_id = tl.zeros((BLOCK,), tl.int32)
    if META.HAS_TOP_K:  # noqa: SIM102
        if end == 0:
            best = tl.where(held.first >= low, held.first_score, float("-inf"))
            other = tl.where(held.second >= low, held.second_score, float("-inf"))
            is_other = (other > best) | ((other == best) & (held.second_id < held.first_id))
            best_id = tl.where(is_other, held.second_id, held.first_id)
            best = tl.where(is_other, other, best)
    bar = tl.full((), float("-inf"), tl.float32)
    tail = end // BLOCK * BLOCK
    for start in range(0, tail, BLOCK):
        bar, best, best_id = _draw_step(bar, best, best_id, row, draw, start, end, low, HAS_MASK=False, META=META)
    if tail < end:
        bar, best, best_id = _draw_step(bar, best, best_id, row, draw, tail, end, low, HAS_MASK=True, META=META)
    return _first_best(best, best_id)


@triton.jit
def _sample_kernel(logits, ids_ptr, logprobs_ptr, slots_ptr, settings, seen, V, META: tl.constexpr):
    """Sample the token of one row, and compute its log-probability under the unchanged logits."""
    BLOCK: tl.constexpr = META.BLOCK
    r = tl.program_id(0).to(tl.int64)
    slot = r
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + r).to(tl.int64)
    x_ptr = logits.ptr + r * logits.stride
    s_ptr = None
    if META.HAS_PENALTY or META.MARK_SEEN:
        s_ptr = seen.ptr + slot * seen.stride
    penalty, temperature, scale_log2 = 1.0, 0.0, 1.0
    key, position = r, 0
    if META.HAS_PENALTY:
        penalty = tl.load(settings.penalty_ptr + slot)
    if not META.IS_GREEDY:
        low_word = tl.load(settings.keys_ptr + 2 * slot).to(tl.int64) & 0xFFFFFFFF
        key = low_word | (tl.load(settings.keys_ptr + 2 * slot + 1).to(tl.int64) << 32)
        position = tl.load(settings.positions_ptr + slot).to(tl.int32)
        temperature = tl.minimum(tl.maximum(tl.load(settings.temperature_ptr + slot), 0.0), MAX_TEMPERATURE)
    k = V
    if META.HAS_TOP_K:
        k = tl.load(settings.top_k_ptr + slot).to(tl.int32)
        k = tl.where(k <= 0, V, k)
        temperature = tl.where(k == 1, 0.0, temperature)  # like greedy: the lowest index among equals
    if not META.IS_GREEDY:
        scale_log2 = tl.minimum(1.0 / temperature, MAX_INVERSE) * LOG2_E
    row = _Row(x_ptr, s_ptr, penalty, V)
    draw = _Draw(key, position, temperature, scale_log2)

    # The first pass.
    lowest = tl.full((BLOCK,), LOWEST, tl.float32)
    nothing = tl.full((BLOCK,), -1.0, tl.float32)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_id = tl.zeros((BLOCK,), tl.int32)
    bar = tl.full((), float("-inf"), tl.float32)
    lanes = _Lanes(lowest, nothing, lowest, nothing, bar, best, best_id, best, best_id, best)
    tail = V // BLOCK * BLOCK
    for start in range(0, tail, BLOCK):
        lanes = _first_step(lanes, row, draw, start, HAS_MASK=False, META=META)
    if tail < V:
        lanes = _first_step(lanes, row, draw, tail, HAS_MASK=True, META=META)
    m, rest, lane_max, lane_rest, bar, best, best_id, second, second_id, third = lanes
    row_max = tl.max(m, 0)
    # The sum over all but one largest logit. In a confident row, the 1 of that logit would round the others away.
    lane = tl.arange(0, BLOCK)
    first = tl.min(tl.where(m == row_max, lane, BLOCK), 0)
    rest = tl.sum(tl.where(lane == first, rest, (rest + 1.0) * tl.exp2((m - row_max) * LOG2_E)), 0)
    is_good = (rest > -1.0) & (row_max < float("inf"))  # False if a logit is NaN or +inf, or if all are -inf
    log_sum = tl.where(rest < 0.5, _log1p_below_half(rest), LN_2 * tl.log2(1.0 + rest))

    low, end = float("-inf"), V
    y_max, mass = row_max, 1.0
    if META.HAS_TOP_K:
        # The k-th largest of what the lanes hold, by a search over the ordered floats that quarters the range.
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
            # A lane may have dropped a logit that is among the k largest: search the row, from this lower bound.
            hi = _to_key(y_max) + 1
            n = tl.cast(1 << 30, tl.int64)
            while (hi - lo > 1) & (n != k):
                p1, p2, p3 = _pivots(lo, hi)
                counts = _row_counts(row, _from_key(p1), _from_key(p2), _from_key(p3), META=META)
                lo, hi, n = _narrow(counts, k, p1, p2, p3, lo, hi, n)
            low = _from_key(lo)
        if META.HAS_TOP_P:
            mass = _mass_from(row, end, low, y_max, scale_log2, best, second, META=META)
        chosen = tl.zeros((), tl.int32)
        y = float("nan")  # nothing is chosen yet
    else:
        chosen = tl.minimum(_first_best(best, best_id), V - 1)
        if META.HAS_TOP_P or META.HAS_MIN_P:
            y_max = tl.max(lane_max, 0)
        if META.HAS_TOP_P:
            mass = tl.sum((lane_rest + 1.0) * tl.exp2((lane_max - y_max) * scale_log2), 0)
        y = 0.0
        if META.HAS_TOP_P or META.HAS_MIN_P:
            y = tl.load(x_ptr + chosen).to(tl.float32)
            if META.HAS_PENALTY:
                y = _penalized(y, tl.load(row.seen_ptr + chosen), penalty)
    if META.HAS_MIN_P:
        min_p = tl.load(settings.min_p_ptr + slot)
        low = tl.maximum(low, tl.where(min_p > 0, y_max + temperature * (LN_2 * tl.log2(min_p)), float("-inf")))

    if META.HAS_TOP_K or META.HAS_TOP_P or META.HAS_MIN_P:
        best_score, second_score = best, second
        if META.HAS_TOP_K:
            best_score += temperature * _gumbel_at(key, position, best_id)
            if tl.max(second, 0) >= low:
                second_score += temperature * _gumbel_at(key, position, second_id)
        limit = float("inf")
        if META.HAS_TOP_P:
            top_p = tl.load(settings.top_p_ptr + slot)
            limit = tl.where(top_p < 1.0, top_p * mass, float("inf"))
        is_open = is_good
        while is_open:
            if not (y >= low):
                held = _Held(best, best_score, best_id, second, second_score, second_id)
                chosen = _draw(row, draw, end, low, held, META=META)
                chosen = tl.minimum(chosen, V - 1)
                y = tl.load(x_ptr + chosen).to(tl.float32)
                if META.HAS_PENALTY:
                    y = _penalized(y, tl.load(row.seen_ptr + chosen), penalty)
            is_open = is_open & False
            if META.HAS_TOP_P:
                above = _from_key(_to_key(y) + 1)
                mass_above = _mass_from(row, end, above, y_max, scale_log2, best, second, META=META)
                is_open = (mass_above >= limit) & (mass_above > 0)
                low = tl.where(is_open, tl.maximum(low, above), low)

    chosen = tl.where(is_good, chosen, 0)
    logprob = (tl.load(x_ptr + chosen).to(tl.float32) - row_max) - log_sum
    tl.store(ids_ptr + slot, chosen.to(ids_ptr.dtype.element_ty))
    tl.store(logprobs_ptr + slot, tl.where(is_good, logprob, float("nan")))
    if META.MARK_SEEN:
        tl.debug_barrier()  # all warps must have read whether the token was seen before one of them marks it
        tl.store(row.seen_ptr + chosen, tl.full((), 1, row.seen_ptr.dtype.element_ty), mask=is_good)


# -- launcher -----------------------------------------------------------------------------------------------------


def sample_rows(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    slots: Tensor | None = None,
    keys: Tensor | None = None,
    positions: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    penalty: Tensor | None = None,
    seen: Tensor | None = None,
    mark_seen: bool = False,
) -> None:
    """Choose a token for every row of logits (R, V), whose last stride is 1. Write it to ids and logprobs (S,).

    The arguments are those of `ops.sample`, but every setting is a tensor (S,). None turns a setting off; temperature
    None means greedy. Nothing is checked, nothing is allocated, and the host does not wait.
    """
    R, V = logits.shape
    if R == 0:
        return
    if temperature is None:
        top_k = top_p = min_p = None  # every filter keeps the largest logit
    has_filters = top_k is not None or top_p is not None or min_p is not None
    row = launch.sampling_row(V, launch.architecture(logits.device), has_filters=has_filters)
    launch_kernel(
        logits.device,
        _sample_kernel,
        (R,),
        logits=Matrix.of(logits),
        ids_ptr=ids,
        logprobs_ptr=logprobs,
        slots_ptr=slots,
        settings=_Settings(keys, positions, temperature, top_k, top_p, min_p, penalty),
        seen=None if seen is None else Matrix.of(seen.view(torch.uint8)),
        V=V,
        META=_Meta(
            HAS_PENALTY=penalty is not None,
            HAS_TOP_K=top_k is not None,
            HAS_TOP_P=top_p is not None,
            HAS_MIN_P=min_p is not None,
            IS_GREEDY=temperature is None,
            MARK_SEEN=mark_seen,
            BLOCK=row.block_v,
        ),
        num_warps=row.num_warps,
        **launch.OPTIONS,
    )


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
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    sample_op(logits, ids, logprobs, slots, **settings, seen=seen, mark_seen=mark_seen)


@torch.library.custom_op("fastgpt2::sample_", mutates_args=("ids", "logprobs", "seen"))
def sample_op(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    slots: Tensor | None,
    keys: Tensor | None,
    positions: Tensor | None,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    penalty: Tensor | None,
    seen: Tensor | None,
    mark_seen: bool,
) -> None:
    """`sample_rows` as an operator of PyTorch's dispatcher, for torch.compile."""
    sample_rows(
        logits,
        ids,
        logprobs,
        slots=slots,
        keys=keys,
        positions=positions,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        penalty=penalty,
        seen=seen,
        mark_seen=mark_seen,
    )
