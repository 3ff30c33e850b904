// Sampling the next token of a row of logits: penalty, temperature, top-k, top-p, min-p, Gumbel noise from Philox 4x32-7.
//
// Let y be the penalised logits and T the temperature. The token is the argmax of y + T g over the tokens that the filters
// keep. The noise g of token v depends only on the row's key, its position and v (Salmon et al. 2011). Every filter keeps
// all y from some value up. top-p needs no threshold. If the argmax over a larger set lies in the set that top-p keeps, it is
// the right one. If not, it and all tokens with no larger y are dropped, and the argmax is taken again with the same noise.
#pragma once
#include <stdint.h>
#include "api.h"
#include "simd.h"

extern "C" double log(double);
extern "C" double log1p(double);

enum { TOP_LANES = 2048, MOST_CANDIDATES = 1024, LANES_64 = VL / 2 };

struct Noise { uint32_t key_0, key_1, position; };

// Philox for LANES_64 groups of four tokens, from group number `group` on: 4 LANES_64 words, in the order of the tokens.
INLINE void philox(Noise noise, uint32_t group, uint32_t* words) {
  const uint64_t low = 0xFFFFFFFFu;
  vu64 c0, c1 = vu64{} + noise.position, c2 = {}, c3 = {};
  for (int i = 0; i < LANES_64; ++i) c0[i] = group + i;
  uint32_t k0 = noise.key_0, k1 = noise.key_1;
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
#if defined(__AVX512F__)
    const vu64 p0 = (vu64)_mm512_mul_epu32((__m512i)c0, _mm512_set1_epi64(0xD2511F53));
    const vu64 p2 = (vu64)_mm512_mul_epu32((__m512i)c2, _mm512_set1_epi64(0xCD9E8D57));
#elif defined(__AVX2__)
    const vu64 p0 = (vu64)_mm256_mul_epu32((__m256i)c0, _mm256_set1_epi64x(0xD2511F53));
    const vu64 p2 = (vu64)_mm256_mul_epu32((__m256i)c2, _mm256_set1_epi64x(0xCD9E8D57));
#else
    const vu64 p0 = c0 * (uint64_t)0xD2511F53, p2 = c2 * (uint64_t)0xCD9E8D57;
#endif
    c0 = (p2 >> 32) ^ c1 ^ (uint64_t)k0;
    c1 = p2 & low;
    c2 = (p0 >> 32) ^ c3 ^ (uint64_t)k1;
    c3 = p0 & low;
  }
  const vu64 first = c0 | (c1 << 32), second = c2 | (c3 << 32);
  for (int i = 0; i < LANES_64; ++i) {
    const uint64_t pair[2] = {first[i], second[i]};
    memcpy(words + 4 * i, pair, sizeof pair);
  }
}

// -log(-log u) of a random word, where 1 - u = (word + 1/2) / 2^32.
static float gumbel(uint32_t word) {
  const bool is_low = word < 0x80000000u;
  const double v = ((is_low ? word : ~word) + 0.5) * 0x1p-32;
  return (float)-log(is_low ? -log1p(-v) : -log(v));
}

// The index of the first largest of x[0 .. n); writes its value to `value`.
static int64_t first_largest(const float* x, int64_t n, float* value) {
  const float none = -__builtin_inff();
  vf top = splat(none);
  for (int64_t i = 0; i < n; i += VL) top = larger(load_n(x + i, n - i, none), top);
  *value = hmax(top);
  for (int64_t i = 0; i < n; i += VL) {
    const vf v = load_n(x + i, n - i, none);
    if (!any(v == splat(*value))) continue;
    for (int64_t j = i; j < n; ++j)
      if (x[j] == *value) return j;
  }
  return 0;
}

// The sum of exp(scale (x - max)) over the x > above.
static float mass_above(const float* x, int64_t n, float above, float max, float scale) {
  vf sum[2] = {};
  for (int64_t i = 0, j = 0; i < n; i += VL, j ^= 1) {
    const vf v = load_n(x + i, n - i, -__builtin_inff());
    const vf e = vexp((v - splat(max)) * scale);
    sum[j] += v > splat(above) ? e : (v == v ? (vf){} : v);
  }
  return hsum(sum[0] + sum[1]);
}

INLINE int64_t to_key(float y) {
  const int32_t bits = load_as<int32_t>(&y);
  return bits >= 0 ? bits : -(int64_t)(bits & 0x7FFFFFFF);
}
INLINE float from_key(int64_t key) {
  const int32_t bits = (int32_t)(key < 0 ? -key : key);
  const float magnitude = load_as<float>(&bits);
  return key < 0 ? -magnitude : magnitude;
}

static int64_t count_from(const float* x, int64_t n, float low) {
  vi count = {};
  for (int64_t i = 0; i < n; i += VL) count -= load_n(x + i, n - i, -__builtin_inff()) >= splat(low);
  int64_t sum = 0;
  for (int i = 0; i < VL; ++i) sum += count[i];
  return sum;
}

// The k-th largest of x[0 .. n), 1 <= k <= n, by bisection over the ordered floats. None may be -inf.
static float kth_largest(const float* x, int64_t n, int64_t k) {
  float max;
  first_largest(x, n, &max);
  int64_t low = to_key(-__builtin_inff()), high = to_key(max) + 1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (count_from(x, n, from_key(middle)) >= k) low = middle;
    else high = middle;
  }
  return from_key(low);
}

// A lower bound of the k-th largest: the k-th largest among the maxima of TOP_LANES groups.
static float bound_of_kth(const float* y, int64_t V, int64_t k) {
  if (k > TOP_LANES || V < 2 * TOP_LANES) return -__builtin_inff();
  float tops[TOP_LANES];
  memcpy(tops, y, sizeof tops);
  for (int64_t i = TOP_LANES; i < V; i += VL) {
    const int64_t lane = i % TOP_LANES;
    store(tops + lane, larger(load_n(y + i, V - i, -__builtin_inff()), load(tops + lane)));
  }
  return kth_largest(tops, TOP_LANES, k);
}

// The candidates: all tokens of the row (ids null), or those that top-k may keep, with their scores y + T g.
struct Candidates { const float* y; const int32_t* ids; float* scores; int64_t n; };

// The argmax of y + T g over the tokens with y >= low. Among equals the lowest id counts.
static int64_t draw(Candidates c, float low, float temperature, float scale, Noise noise) {
  float best = -__builtin_inff();
  int64_t best_id = -1;
  if (c.ids) {
    for (int64_t i = 0; i < c.n; ++i)
      if (c.y[i] >= low && (best_id < 0 || c.scores[i] > best)) best = c.scores[i], best_id = i;
    return best_id < 0 ? 0 : best_id;
  }
  // Logarithms are most of the cost of noise. They can often be skipped: y + T g > best means -log u < exp((y - best) / T),
  // and -log u >= 1 - u.
  for (int64_t i = 0; i < c.n; i += 4 * LANES_64) {
    uint32_t words[4 * LANES_64];
    philox(noise, (uint32_t)(i / 4), words);
    for (int64_t j = 0; j < 4 * LANES_64 && i + j < c.n; j += VL) {
      const vf y = load_n(c.y + i + j, c.n - i - j, -__builtin_inff());
      const vf u = __builtin_convertvector(load_as<vu>(words + j), vf) * 0x1p-32f;
      const vf bar = vexp((y - splat(best)) * scale + splat(1e-4f));
      const vi may_win = (u <= bar) & (y >= splat(low)) & (y > splat(-__builtin_inff()));
      if (!any(may_win)) continue;
      for (int lane = 0; lane < VL; ++lane) {
        if (!may_win[lane]) continue;
        const float score = y[lane] + temperature * gumbel(words[j + lane]);
        if (best_id < 0 || score > best) best = score, best_id = i + j + lane;
      }
    }
  }
  return best_id < 0 ? 0 : best_id;
}

INLINE int64_t sampling_scratch(int64_t vocab) { return 4 * round_up(vocab + 64, 16) * (int64_t)sizeof(float); }

static void sample_row(const SampleArgs* a, int64_t row, float* scratch) {
  const Sampling* s = &a->sampling;
  const int64_t V = a->vocab, slot = a->slots[row], room = round_up(V + 64, 16);
  const float *x = a->logits + row * a->logits_stride, none = -__builtin_inff();
  float max;
  const int64_t first = first_largest(x, V, &max);
  // The mass of all tokens but the first largest. In a confident row the 1 of that one would round the others away.
  const float rest = mass_above(x, first, none, max, 1.0f) + mass_above(x + first + 1, V - first - 1, none, max, 1.0f);
  const bool is_good = rest >= 0.0f && max < __builtin_inff() && max > none;
  int64_t chosen = 0;
  if (is_good) {
    const float* y = x;
    if (s->penalty) {
      const float penalty = s->penalty[slot];
      const uint8_t* seen = s->seen + slot * s->seen_stride;
      for (int64_t i = 0; i < V; ++i) scratch[i] = !seen[i] ? x[i] : x[i] < 0 ? x[i] * penalty : x[i] / penalty;
      y = scratch;
    }
    float y_max = max;
    chosen = y == x ? first : first_largest(y, V, &y_max);
    float temperature = s->temperature ? s->temperature[slot] : 0.0f;
    temperature = temperature > 0.0f ? (temperature < 1e30f ? temperature : 1e30f) : 0.0f;
    int64_t k = s->temperature && s->top_k ? s->top_k[slot] : V;
    if (k <= 0 || k > V) k = V;
    if (temperature > 0.0f && k > 1) {
      float scale = 1.0f / temperature;
      scale = scale < 1e30f ? scale : 1e30f;
      const Noise noise = {(uint32_t)a->state.keys[2 * slot], (uint32_t)a->state.keys[2 * slot + 1],
                           (uint32_t)a->state.produced[slot]};
      Candidates at_hand = {y, nullptr, nullptr, V};
      float low = none;
      if (k < V) {
        const float bound = bound_of_kth(y, V, k);
        float *kept = scratch + room, *scores = kept + room;
        int32_t* ids = (int32_t*)(scores + room);
        int64_t n = 0;
        for (int64_t i = 0; i < V; i += VL) {
          const vf v = load_n(y + i, V - i, none);
          const vi is_kept = (v >= splat(bound)) & (v > splat(none));
          if (!any(is_kept)) continue;
          for (int lane = 0; lane < VL; ++lane)
            if (is_kept[lane]) kept[n] = v[lane], ids[n++] = (int32_t)(i + lane);
        }
        if (n > k) low = kth_largest(kept, n, k);
        if (n <= MOST_CANDIDATES) {
          for (int64_t i = 0; i < n; ++i) {
            uint32_t words[4 * LANES_64];
            philox(noise, (uint32_t)ids[i] / 4, words);
            scores[i] = kept[i] + temperature * gumbel(words[ids[i] % 4]);
          }
          at_hand = {kept, ids, scores, n};
        }
      }
      const float top_p = s->top_p ? s->top_p[slot] : 1.0f;
      float limit = __builtin_inff();
      // y >= low means y > before: mass_above wants a bound that is not included.
      const float before = low > none ? from_key(to_key(low) - 1) : none;
      if (top_p < 1.0f) limit = top_p * mass_above(at_hand.y, at_hand.n, before, y_max, scale);
      if (s->min_p && s->min_p[slot] > 0.0f) {
        const float from = y_max + temperature * (float)log(s->min_p[slot]);
        low = from > low ? from : low;
      }
      for (;;) {
        const int64_t i = draw(at_hand, low, temperature, scale, noise);
        chosen = at_hand.ids ? at_hand.ids[i] : i;
        if (top_p >= 1.0f) break;
        const float above = mass_above(at_hand.y, at_hand.n, y[chosen], y_max, scale);
        if (!(above >= limit && above > 0.0f)) break;
        const float next = from_key(to_key(y[chosen]) + 1);
        low = next > low ? next : low;
      }
    }
  }
  const float logprob = x[chosen] - max - (float)log1p(rest);
  a->state.tokens[slot] = (int32_t)chosen;
  a->state.logprobs[slot] = is_good ? logprob : __builtin_nanf("");
  if (is_good && s->seen) s->seen[slot * s->seen_stride + chosen] = 1;
}
