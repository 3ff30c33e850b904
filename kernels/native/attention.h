// Attention of new tokens over their rows' cached keys and values.
//
// A row with one new token is split into tasks of one head and KEY_SPLIT keys. The thread that ends the last part of a head
// sums the parts in order. A row with several new tokens is split into tasks of one head and NR queries, which fill the
// lanes of vectors: scores^T = K q^T and out^T = V^T p^T read keys and values in place. The tasks of a row and the order of
// every sum depend only on the row's own length.
//
// T is the cache's dtype: float, or uint16_t for bfloat16. Scores and sums are float32 in both cases.
#pragma once
#include "linear.h"

enum { KEY_SPLIT = 256, MAX_HEAD = 256 };

INLINE int64_t key_parts(int64_t keys) { return (keys + KEY_SPLIT - 1) / KEY_SPLIT; }

INLINE bool row_fits(const Cache* cache, const Rows* rows, int64_t r) {
  const int64_t slot = rows->slots[r], past = rows->pasts[r];
  return slot >= 0 && slot < cache->slots && past >= 0 && past + rows->counts[r] <= cache->capacity;
}

// Computes running sums of the tasks per row. A row that does not fit has one per head. True if a row has several tokens.
static bool plan_tasks(const Cache* cache, const Rows* rows, int64_t heads) {
  bool has_several = false;
  rows->tasks[0] = 0;
  for (int64_t r = 0; r < rows->num_rows; ++r) {
    const int64_t count = rows->counts[r];
    int64_t tasks = count == 1 ? key_parts(rows->pasts[r] + 1) : (count + NR - 1) / NR;
    if (!row_fits(cache, rows, r)) tasks = 1;
    rows->tasks[r + 1] = rows->tasks[r] + (int32_t)(tasks * heads);
    has_several = has_several || count > 1;
  }
  return has_several;
}

template <class T> INLINE T* cache_at(void* base, const Cache* cache, int64_t layer, int64_t slot, int64_t head) {
  return (T*)base + layer * cache->layer_stride + slot * cache->slot_stride + head * cache->head_stride;
}

INLINE void put_head(const Attention* a, int64_t token, int64_t head, const float* values) {
  const int64_t D = a->head_size;
  if (!a->out) return put(a->operand_type, a->operand + token * a->operand_stride, head * D, values, D);
  for (int64_t d = 0; d < D; d += VL) store_n(a->out + token * a->out_stride + head * D + d, load(values + d), D - d);
}

// Writes the key and the value of one new token and head to the cache.
template <class T> INLINE void append(const Attention* a, int64_t token, int64_t slot, int64_t head, int64_t position) {
  const int64_t D = a->head_size, C = D * a->heads;
  const float* from = a->qkv + token * a->qkv_stride + C + head * D;
  T* key = cache_at<T>(a->cache->keys, a->cache, a->layer, slot, head) + position * D;
  T* value = cache_at<T>(a->cache->values, a->cache, a->layer, slot, head) + position * D;
  for (int64_t d = 0; d < D; d += VL) {
    store_n(key + d, load_n(from + d, D - d), D - d);
    store_n(value + d, load_n(from + C + d, D - d), D - d);
  }
}

// out = sum of p_s v_s over the keys 0 .. n, for `lanes` numbers from v on. Meanwhile prefetches as much from `ahead` on.
template <class T>
INLINE void weigh(const float* p, const T* v, int64_t n, int64_t D, int64_t lanes, const T* ahead, float* out) {
  enum { LINE = 64 / sizeof(T) };
  vf acc[4] = {};
  if (lanes >= 4 * VL) {
    for (int64_t s = 0; s < n; ++s, v += D, ahead += D) {
      for (int64_t d = 0; d < 4 * VL; d += LINE) __builtin_prefetch(ahead + d, 0, 2);
      for (int j = 0; j < 4; ++j) acc[j] = fma(splat(p[s]), load(v + j * VL), acc[j]);
    }
  } else {
    const int64_t vectors = (lanes + VL - 1) / VL;
    for (int64_t s = 0; s < n; ++s, v += D)
      for (int64_t j = 0; j < vectors; ++j) acc[j] = fma(splat(p[s]), load_n(v + j * VL, lanes - j * VL), acc[j]);
  }
  for (int64_t j = 0; j < 4 && j * VL < lanes; ++j) store(out + j * VL, acc[j]);
}

// Attends to the keys 0 .. n of one part: sum of p v (whole vectors long), the largest score and the sum of p.
template <class T>
static void attend_part(const float* q, const T* k, const T* v, int64_t n, int64_t D, const T* ahead, float* out, float* max,
                        float* sum) {
  float p[KEY_SPLIT + VL];
  const int64_t vectors = (D + VL - 1) / VL;
  const bool is_whole = D % VL == 0;
  for (int64_t s = 0; s < n; s += 4) {  // past the end, the last key is used again
    vf dot[4] = {};
    const T* row[4];
    for (int i = 0; i < 4; ++i) row[i] = k + least(s + i, n - 1) * D;
    for (int64_t i = 0; i < 4 * D; i += 64 / sizeof(T)) __builtin_prefetch(v + s * D + i, 0, 2);
    for (int64_t j = 0; j < vectors; ++j) {
      const vf query = load(q + j * VL);
      for (int i = 0; i < 4; ++i) {
        const T* at = row[i] + j * VL;
        dot[i] = fma(is_whole ? load(at) : load_n(at, D - j * VL), query, dot[i]);
      }
    }
    for (int i = 0; i < 4; ++i) p[s + i] = hsum(dot[i]);
  }
  store(p + n, splat(-__builtin_inff()));
  vf top = load(p);
  for (int64_t s = VL; s < n; s += VL) top = larger(load(p + s), top);
  const float m = hmax(top);
  vf total = {};
  for (int64_t s = 0; s < n; s += VL) {
    const vf e = vexp(load(p + s) - splat(m));
    total += e;
    store(p + s, e);
  }
  *max = m;
  *sum = hsum(total);
  for (int64_t d = 0; d < D; d += 4 * VL) weigh(p, v + d, n, D, D - d, ahead + d, out + d);
}

INLINE int64_t part_floats(int64_t head_size) { return round_up(head_size, 16) + 16; }

template <class T>
static void attend_one(const Attention* a, int64_t r, int64_t head, int64_t part, const T* ahead) {
  const int64_t D = a->head_size, slot = a->rows->slots[r], past = a->rows->pasts[r], token = a->rows->starts[r];
  const int64_t first = part * KEY_SPLIT, last = least(past + 1, first + KEY_SPLIT), parts = key_parts(past + 1);
  const int64_t max_parts = key_parts(a->cache->capacity);
  float q[MAX_HEAD + VL], out[MAX_HEAD + 4 * VL];
  for (int64_t d = 0; d < D; d += VL)
    store(q + d, load_n(a->qkv + token * a->qkv_stride + head * D + d, D - d) * (float)a->scale);
  if (last == past + 1) append<T>(a, token, slot, head, past);
  const T* k = cache_at<T>(a->cache->keys, a->cache, a->layer, slot, head) + first * D;
  const T* v = cache_at<T>(a->cache->values, a->cache, a->layer, slot, head) + first * D;
  float max, sum;
  attend_part(q, k, v, last - first, D, ahead ? ahead : k, out, &max, &sum);
  if (parts > 1) {
    float* at = a->parts + (r * a->heads + head) * max_parts * part_floats(D);
    float* own = at + part * part_floats(D);
    memcpy(own + 16, out, D * sizeof(float));
    own[0] = max;
    own[1] = sum;
    int32_t* done = a->rows->done + r * a->heads + head;
    if (__atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) < parts) return;
    __atomic_store_n(done, 0, __ATOMIC_RELAXED);
    max = at[0];
    for (int64_t i = 1; i < parts; ++i) {
      const float m = at[i * part_floats(D)];
      max = m > max || m != m ? m : max;
    }
    sum = 0.0f;
    for (int64_t d = 0; d < D; d += VL) store(out + d, (vf){});
    for (int64_t i = 0; i < parts; ++i) {
      const float* other = at + i * part_floats(D);
      const float weight = vexp(splat(other[0] - max))[0];
      sum += weight * other[1];
      for (int64_t d = 0; d < D; d += VL) store(out + d, fma(splat(weight), load_n(other + 16 + d, D - d), load(out + d)));
    }
  }
  const float inverse = 1.0f / sum;
  for (int64_t d = 0; d < D; d += VL) store(out + d, load(out + d) * inverse);
  put_head(a, token, head, out);
}

enum { OUTER_STEPS = 64 };  // this many are summed from zero, then added to the rest: shorter sums round less

// out (rows, NR) = a times panel (steps, NR), where a[r, i] is at a + r row_stride + i step_stride.
template <int ROWS>
static void outer(const float* a, int64_t row_stride, int64_t step_stride, const float* panel, int64_t steps, float* out) {
  for (int64_t block = 0; block < steps; block += OUTER_STEPS) {
    vf acc[ROWS][NV] = {};
    const int64_t last = least(steps, block + OUTER_STEPS);
    for (int64_t i = block; i < last; ++i, panel += NR, a += step_stride) {
      vf b[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) b[v] = load(panel + v * VL);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = fma(splat(a[r * row_stride]), b[v], acc[r][v]);
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < NV; ++v) {
        float* at = out + r * NR + v * VL;
        store(at, block == 0 ? acc[r][v] : load(at) + acc[r][v]);
      }
  }
}

static void outer_rows(int64_t rows, const float* a, int64_t row_stride, int64_t step_stride, const float* panel,
                       int64_t steps, float* out) {
  int64_t r = 0;
  for (; r + MR <= rows; r += MR) outer<MR>(a + r * row_stride, row_stride, step_stride, panel, steps, out + r * NR);
  for (; r < rows; ++r) outer<1>(a + r * row_stride, row_stride, step_stride, panel, steps, out + r * NR);
}

INLINE int64_t attention_scratch(int64_t positions, int64_t head_size) {
  return ((2 * head_size + positions) * NR + positions * head_size) * 4;
}

// n numbers of the cache, converted to float32 if they are not.
INLINE const float* widened(const float* from, int64_t, float*) { return from; }
INLINE const float* widened(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += VL) store_n(to + i, load_n(from + i, n - i), n - i);
  return to;
}

template <class T>
static void attend_block(const Attention* a, int64_t r, int64_t head, int64_t block, float* scratch) {
  const int64_t D = a->head_size, past = a->rows->pasts[r], first = block * NR;
  const int64_t queries = least(NR, a->rows->counts[r] - first), keys = past + first + queries;
  const int64_t slot = a->rows->slots[r], token = a->rows->starts[r] + first;
  float *q = scratch, *out = q + D * NR, *p = out + D * NR, *wide = p + keys * NR;
  memset(q, 0, D * NR * sizeof(float));
  for (int64_t i = 0; i < queries; ++i)
    for (int64_t d = 0; d < D; ++d) q[d * NR + i] = a->qkv[(token + i) * a->qkv_stride + head * D + d] * (float)a->scale;
  outer_rows(keys, widened(cache_at<T>(a->cache->keys, a->cache, a->layer, slot, head), keys * D, wide), D, 1, q, D, p);
  // Query i sees the keys up to past + first + i.
  for (int64_t s = past + first + 1; s < keys; ++s)
    for (int64_t i = 0; i < s - past - first && i < NR; ++i) p[s * NR + i] = -__builtin_inff();
  for (int v = 0; v < NV; ++v) {
    vf top = load(p + v * VL), sum = {};
    for (int64_t s = 1; s < keys; ++s) top = larger(load(p + s * NR + v * VL), top);
    for (int64_t s = 0; s < keys; ++s) {
      const vf e = vexp(load(p + s * NR + v * VL) - top);
      sum += e;
      store(p + s * NR + v * VL, e);
    }
    store(q + v * VL, splat(1.0f) / sum);
  }
  outer_rows(D, widened(cache_at<T>(a->cache->values, a->cache, a->layer, slot, head), keys * D, wide), 1, D, p, keys, out);
  float line[MAX_HEAD + VL];
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t d = 0; d < D; ++d) line[d] = out[d * NR + i] * q[i];
    put_head(a, token + i, head, line);
  }
}

// Appends this thread's share of the new tokens of rows that have several.
template <class T> static void append_share(const Attention* a, int t, int threads) {
  for (int64_t r = 0; r < a->rows->num_rows; ++r) {
    const int64_t count = a->rows->counts[r];
    if (count == 1 || !row_fits(a->cache, a->rows, r)) continue;
    const Share tokens = share(count, t, threads);
    for (int64_t i = tokens.first; i < tokens.last; ++i)
      for (int64_t h = 0; h < a->heads; ++h) append<T>(a, a->rows->starts[r] + i, a->rows->slots[r], h, a->rows->pasts[r] + i);
  }
}

template <class T> static void attend_tasks(const Attention* a, bool has_blocks, float* scratch, Team us) {
  if (has_blocks) append_share<T>(a, us.thread, us.threads), barrier(us);
  struct Task { int64_t row, head, part, parts; };
  const Rows* rows = a->rows;
  const int32_t total = rows->tasks[rows->num_rows];
  int64_t r = 0;
  const auto take_task = [&]() -> Task {
    const int64_t task = take(us, total);
    if (task < 0) return {-1, 0, 0, 0};
    while (task < rows->tasks[r]) --r;
    while (task >= rows->tasks[r + 1]) ++r;
    const int64_t parts = (rows->tasks[r + 1] - rows->tasks[r]) / a->heads, i = task - rows->tasks[r];
    return {r, i / parts, i % parts, parts};
  };
  for (Task task = take_task(), then; task.row >= 0; task = then) {
    const int64_t row = task.row;
    then = take_task();
    if (!row_fits(a->cache, rows, row)) {
      float nan[MAX_HEAD + VL];
      for (int64_t d = 0; d < MAX_HEAD + VL; ++d) nan[d] = __builtin_nanf("");
      for (int64_t j = 0; j < rows->counts[row]; ++j) put_head(a, rows->starts[row] + j, task.head, nan);
    } else if (rows->counts[row] == 1) {
      // The keys of a task are too few for the hardware prefetcher to detect the stream, so the next task's are prefetched.
      const T* ahead = nullptr;
      if (then.row >= 0 && row_fits(a->cache, rows, then.row))
        ahead = cache_at<T>(a->cache->keys, a->cache, a->layer, rows->slots[then.row], then.head) + then.part * KEY_SPLIT * a->head_size;
      attend_one(a, row, task.head, task.part, ahead);
    } else {
      // Blocks with the most keys come first.
      attend_block<T>(a, row, task.head, task.parts - 1 - task.part, scratch);
    }
  }
}
