// Linear layers y = epilogue(x W^T) with packed weights, LayerNorm, and the rows of operands that the products read.
//
// W (n, k) is packed into panels of NR outputs: [n / NR][k / group][NR][group]. A step of `group` numbers of K fills one
// vector lane. K is summed in blocks of BLOCK_STEPS steps. Each block is summed from zero, and the blocks are added in
// order. So an output's bits do not depend on the number of rows or threads, and a block of the panel stays in the L1 cache
// for all rows of a chunk.
#pragma once
#include "api.h"
#include "team.h"

enum { BLOCK_STEPS = 128, CHUNK_ROWS = MR * 8, PRIVATE_ROWS = MR, FEW_ROWS = 5, ROW_PADDING = 64, STEP_BYTES = NR * 4 };

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
enum { BF16_OPERAND = 2, I8_OPERAND = 1, I8_OFFSET = 128 };  // int8 operands must be unsigned here, hence the offset
#else
// bfloat16 operands are held as float32. int8 operands are held in 16 bits, each group in the order 0, 2, 1, 3.
enum { BF16_OPERAND = 4, I8_OPERAND = 2, I8_OFFSET = 0 };
#endif

INLINE int64_t group_of(int64_t type) { return type == F32 ? 1 : type == BF16 ? 2 : 4; }
INLINE int64_t operand_bytes(int64_t type) { return type == F32 ? 4 : type == BF16 ? (int64_t)BF16_OPERAND : (int64_t)I8_OPERAND; }
INLINE int64_t operand_stride(int64_t type, int64_t k) {
  return round_up(round_up(k, group_of(type)) * operand_bytes(type), 64) + ROW_PADDING;
}
INLINE int64_t steps_of(int64_t type, int64_t k) { return (k + group_of(type) - 1) / group_of(type); }
INLINE int64_t panels_of(int64_t n) { return (n + NR - 1) / NR; }

template <int TYPE> struct Dot;

template <> struct Dot<F32> {
  typedef vf Sum;
  enum { X_BYTES = 4 };
  static inline __attribute__((always_inline)) void add(vf& sum, const char* x, vi w) { sum = fma(splat(load_as<float>(x)), (vf)w, sum); }
};

template <> struct Dot<BF16> {
  typedef vf Sum;
  enum { X_BYTES = 2 * BF16_OPERAND };
  static inline __attribute__((always_inline)) void add(vf& sum, const char* x, vi w) {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)splat_i(load_as<int32_t>(x)), (__m512bh)w);
#else
    sum = fma(splat(load_as<float>(x)), (vf)(w << 16), sum);
    sum = fma(splat(load_as<float>(x + 4)), (vf)(w & (int32_t)0xFFFF0000), sum);
#endif
  }
};

template <> struct Dot<I8> {
  typedef vi Sum;
  enum { X_BYTES = 4 * I8_OPERAND };
  static inline __attribute__((always_inline)) void add(vi& sum, const char* x, vi w) {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)splat_i(load_as<int32_t>(x)), (__m512i)w);
#elif defined(__AVX512BW__)
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)w, 8), 8), odd = _mm512_srai_epi16((__m512i)w, 8);
    sum += (vi)_mm512_madd_epi16((__m512i)splat_i(load_as<int32_t>(x)), even);
    sum += (vi)_mm512_madd_epi16((__m512i)splat_i(load_as<int32_t>(x + 4)), odd);
#elif defined(__AVX2__)
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)w, 8), 8), odd = _mm256_srai_epi16((__m256i)w, 8);
    sum += (vi)_mm256_madd_epi16((__m256i)splat_i(load_as<int32_t>(x)), even);
    sum += (vi)_mm256_madd_epi16((__m256i)splat_i(load_as<int32_t>(x + 4)), odd);
#else
    const int32_t a = load_as<int32_t>(x), b = load_as<int32_t>(x + 4);
    sum += ((w << 24) >> 24) * (int32_t)(int16_t)a + ((w << 8) >> 24) * (a >> 16);
    sum += ((w << 16) >> 24) * (int32_t)(int16_t)b + (w >> 24) * (b >> 16);
#endif
  }
};

// Multiplies ROWS rows by one panel over `steps` steps. Writes the result to `sums` (ROWS, NR), or adds it. Prefetches a step
// of the next block where (i & every) == turn. With few rows nothing is prefetched: the hardware prefetcher suffices there.
template <int TYPE, int ROWS>
static void tile(const char* x, int64_t x_stride, const char* w, int64_t steps, char* sums, bool is_first,
                 int64_t every, int64_t turn) {
  typedef typename Dot<TYPE>::Sum Sum;
  const int64_t soon = 8 * STEP_BYTES, later = BLOCK_STEPS * STEP_BYTES;
  Sum acc[ROWS][NV] = {};
  for (int64_t i = 0; i < steps; ++i) {
    vi b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) b[v] = load_as<vi>(w + v * sizeof(vi));
    if (ROWS > FEW_ROWS)
      for (int64_t line = 0; line < STEP_BYTES; line += 64) __builtin_prefetch(w + soon + line, 0, 3);
    if ((i & every) == turn)
      for (int64_t line = 0; line < STEP_BYTES; line += 64) __builtin_prefetch(w + later + line, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) Dot<TYPE>::add(acc[r][v], x + r * x_stride, b[v]);
    w += STEP_BYTES;
    x += Dot<TYPE>::X_BYTES;
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < NV; ++v) {
      char* at = sums + (r * NR + v * VL) * 4;
      const Sum sum = is_first ? acc[r][v] : load_as<Sum>(at) + acc[r][v];
      memcpy(at, &sum, sizeof sum);
    }
}

template <int TYPE, int ROWS = MR>
static void tile_of(int64_t rows, const char* x, int64_t x_stride, const char* w, int64_t steps, char* sums, bool is_first,
                    int64_t every, int64_t turn) {
  if (rows == ROWS) tile<TYPE, ROWS>(x, x_stride, w, steps, sums, is_first, every, turn);
  else if constexpr (ROWS > 1) tile_of<TYPE, ROWS - 1>(rows, x, x_stride, w, steps, sums, is_first, every, turn);
}

// Writes n float32 numbers to a row of operands, F32 or BF16, from `column` on. `values` is whole vectors long.
INLINE void put(int64_t type, char* row, int64_t column, const float* values, int64_t n) {
  if (type == F32 || BF16_OPERAND == 4) {
    float* to = (float*)row + column;
    for (int64_t i = 0; i < n; i += VL) {
      const vf v = load(values + i);
      store_n(to + i, type == F32 ? v : (vf)round_bf16(v), n - i);
    }
    return;
  }
  uint16_t* to = (uint16_t*)row + column;
  for (int64_t i = 0; i < n; i += VL) store_n(to + i, load(values + i), n - i);
}

// Makes the operand of one row of k numbers, which is whole vectors long. The padding of K meets weights that are 0.
static void make_operand(int64_t type, const float* values, int64_t k, char* row, float* scale) {
  const int64_t padded = round_up(k, group_of(type));
  if (type != I8) {
    put(type, row, 0, values, k);
    if (padded > k) memset(row + k * operand_bytes(type), 0, (padded - k) * operand_bytes(type));
    return;
  }
  vf top = {}, sum = {};
  for (int64_t i = 0; i < k; i += VL) {
    const vf v = load_n(values + i, k - i);
    top = larger(vabs(v), top);
    sum = sum + v * 0.0f;  // NaN where a number is NaN or infinite
  }
  const float largest = hmax(top), nan = hsum(sum);
  *scale = largest / 127.0f + nan;
  const float inverse = largest > 0.0f && nan == 0.0f ? 127.0f / largest : 0.0f;
  for (int64_t i = 0; i < padded; i += VL) {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the lower bits.
    const vf v = i < k ? load_n(values + i, k - i) : (vf){};
    const vi q = nan == 0.0f ? (vi)fma(v, splat(inverse), splat(12582912.0f)) - 0x4B400000 : vi{};
    const int64_t n = least(VL, padded - i);
    if (I8_OPERAND == 1) {
      const vb bytes = __builtin_convertvector(q + splat_i(I8_OFFSET), vb);
      memcpy(row + i, &bytes, n);
      continue;
    }
    for (int64_t j = 0; j < n; ++j) ((int16_t*)row)[i + (j % 4 == 1 ? j + 1 : j % 4 == 2 ? j - 1 : j)] = (int16_t)q[j];
  }
}

// (x - mean) / sqrt(var + eps) * weight + bias of one row. A second pass finds the variance and the rounding error of the mean.
static void layer_norm_row(const LayerNorm* norm, const float* x, int64_t width, float* out) {
  vf s[4] = {};
  for (int64_t i = 0, j = 0; i < width; i += VL, j = (j + 1) & 3) s[j] += load_n(x + i, width - i);
  const float mean = hsum((s[0] + s[1]) + (s[2] + s[3])) / (float)width;
  vf q[4] = {}, e[4] = {};
  for (int64_t i = 0, j = 0; i < width; i += VL, j = (j + 1) & 3) {
    const vf d = load_n(x + i, width - i, mean) - splat(mean);
    q[j] = fma(d, d, q[j]);
    e[j] += d;
  }
  const float off = hsum((e[0] + e[1]) + (e[2] + e[3])) / (float)width;
  const float variance = hsum((q[0] + q[1]) + (q[2] + q[3])) / (float)width - off * off;
  const float scale = 1.0f / __builtin_sqrtf(variance + (float)norm->eps);
  for (int64_t i = 0; i < width; i += VL) {
    const vf y = ((load_n(x + i, width - i) - splat(mean)) - splat(off)) * scale;
    store_n(out + i, fma(y, load_n(norm->weight + i, width - i), load_n(norm->bias + i, width - i)), width - i);
  }
}

// Operands of the rows of x, after LayerNorm if norm is not null. `rows` selects rows of x; null means all, in order.
struct Operands { char* data; float* scale; };
struct Source { const float* x; int64_t stride; const int32_t* rows; };
INLINE const float* row_of(Source from, int64_t r) { return from.x + (from.rows ? from.rows[r] : r) * from.stride; }

INLINE void prepare_row(const Linear* to, const LayerNorm* norm, Source from, int64_t r, Operands operands, float* line) {
  if (norm) layer_norm_row(norm, row_of(from, r), to->k, line);
  else memcpy(line, row_of(from, r), to->k * sizeof(float));
  make_operand(to->type, line, to->k, operands.data + r * operand_stride(to->type, to->k), operands.scale + r);
}

template <int TYPE>
static void finish(const Linear* linear, const Epilogue* to, const char* sums, int64_t row, int64_t rows, int64_t panel,
                   const float* scale) {
  const int64_t columns = least(NR, linear->n - panel * NR);
  for (int64_t r = 0; r < rows; ++r) {
    float line[NR];
    for (int v = 0; v < NV; ++v) {
      const int64_t column = panel * NR + v * VL, left = columns - v * VL;
      if (left <= 0) break;
      vf y;
      if (TYPE == I8) {
        const vi sum = load_as<vi>(sums + (r * NR + v * VL) * 4) - load_as<vi>(linear->sums + column);
        y = __builtin_convertvector(sum, vf) * load(linear->scale + column) * scale[row + r];
      } else {
        y = load_as<vf>(sums + (r * NR + v * VL) * 4);
      }
      if (linear->bias) y += load(linear->bias + column);
      if (to->activation != LINEAR) y = activate(to->activation, y);
      if (to->residual) y += load_n(to->residual + (row + r) * to->residual_stride + column, left);
      if (to->out) store_n(to->out + (row + r) * to->out_stride + column, y, left);
      else store(line + v * VL, y);
    }
    if (!to->out) put(to->operand_type, to->operand + (row + r) * to->operand_stride, panel * NR, line, columns);
  }
}

template <int TYPE>
static void multiply(const Linear* linear, Operands x, int64_t rows, const Epilogue* to, char* sums, Team us) {
  const int64_t steps = steps_of(TYPE, linear->k), stride = operand_stride(TYPE, linear->k);
  for (int64_t panel; (panel = take(us, panels_of(linear->n))) >= 0;) {
    const char* weight = (const char*)linear->weight + panel * steps * STEP_BYTES;
    for (int64_t chunk = 0; chunk < rows; chunk += CHUNK_ROWS) {
      const int64_t last = least(rows, chunk + CHUNK_ROWS), tiles = (last - chunk + MR - 1) / MR;
      if (to->out && rows > MR)  // prefetches the lines of the output
        for (int64_t i = 0; i < (last - chunk) * NV; ++i)
          __builtin_prefetch(to->out + (chunk + i / NV) * to->out_stride + panel * NR + i % NV * VL, 1, 2);
      // The next block of weights is prefetched too. Several tiles share this work.
      const int64_t every = tiles >= 8 ? 7 : tiles >= 4 ? 3 : tiles >= 2 ? 1 : 0;
      for (int64_t block = 0; block < steps; block += BLOCK_STEPS) {
        const char* w = weight + block * STEP_BYTES;
        int64_t turn = 0;
        for (int64_t row = chunk; row < last; row += MR, ++turn)
          tile_of<TYPE>(least(MR, last - row), x.data + row * stride + block * Dot<TYPE>::X_BYTES, stride, w,
                        least(BLOCK_STEPS, steps - block), sums + (row - chunk) * NR * 4, block == 0, every,
                        chunk == 0 && rows > FEW_ROWS ? turn : -1);
      }
      finish<TYPE>(linear, to, sums, chunk, last - chunk, panel, x.scale);
    }
  }
}

// This thread's share of the outputs.
static void linear_share(const Linear* linear, Operands x, int64_t rows, const Epilogue* to, char* scratch, Team us) {
  if (linear->type == F32) multiply<F32>(linear, x, rows, to, scratch, us);
  else if (linear->type == BF16) multiply<BF16>(linear, x, rows, to, scratch, us);
  else multiply<I8>(linear, x, rows, to, scratch, us);
}

static void pack_share(const PackArgs* a, Share panels) {
  const int64_t group = group_of(a->type), steps = steps_of(a->type, a->k), bytes = 4 / group;
  for (int64_t panel = panels.first; panel < panels.last; ++panel) {
    char* to = (char*)a->packed + panel * steps * STEP_BYTES;
    memset(to, 0, steps * STEP_BYTES);
    for (int64_t j = 0; j < NR; ++j) {
      const int64_t n = panel * NR + j;
      if (n >= a->n) continue;
      const char* from = (const char*)a->source + n * a->source_stride * bytes;
      for (int64_t i = 0; i < steps; ++i)
        memcpy(to + i * STEP_BYTES + j * 4, from + i * 4, least(group, a->k - i * group) * bytes);
      if (a->type != I8) continue;
      int32_t sum = 0;
      for (int64_t k = 0; k < a->k; ++k) sum += ((const int8_t*)from)[k];
      a->sums[n] = sum * I8_OFFSET;
    }
  }
}
