// Vectors of float32 and functions on them, for the instruction set that this translation unit is compiled for.
// Everything has internal linkage, because the same name is a different function for each instruction set. Nothing here
// may come from the C++ library: the linker would share its inline functions between the instruction sets.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

// A vector has VL lanes. A tile is up to MR rows by NV vectors of outputs, which fill the registers.
#if defined(__AVX512F__)
enum { VL = 16, NV = 3, MR = 8 };
#elif defined(__AVX2__)
enum { VL = 8, NV = 2, MR = 6 };
#else
enum { VL = 4, NV = 4, MR = 6 };
#endif
enum { NR = VL * NV };

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));  // bfloat16
typedef uint8_t vb __attribute__((vector_size(VL)));
typedef uint64_t vu64 __attribute__((vector_size(VL * 4)));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
template <class T> INLINE T load_as(const void* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE vf load(const float* p) { return load_as<vf>(p); }
INLINE vf load(const uint16_t* p) { return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16); }
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf splat(float x) { return x - (vf){}; }
INLINE vi splat_i(int32_t x) { return x - (vi){}; }

INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}

// Loads the first n numbers; the other lanes are `rest`.
INLINE vf load_n(const float* p, int64_t n, float rest = 0.0f) {
  if (n >= VL) return load(p);
#if defined(__AVX512F__)
  return (vf)_mm512_mask_loadu_ps((__m512)splat(rest), (__mmask16)((1u << n) - 1), p);
#else
  float lanes[VL];
  for (int i = 0; i < VL; ++i) lanes[i] = rest;
  memcpy(lanes, p, n * sizeof(float));
  return load(lanes);
#endif
}

INLINE vf load_n(const uint16_t* p, int64_t n) {
  if (n >= VL) return load(p);
  uint16_t lanes[VL] = {};
  memcpy(lanes, p, n * sizeof(uint16_t));
  return load(lanes);
}

INLINE void store_n(float* p, vf v, int64_t n) {
  if (n >= VL) return store(p, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  memcpy(p, &v, n * sizeof(float));
#endif
}

INLINE float hsum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  return vaddvq_f32((float32x4_t)v);
#endif
}

// A comparison with NaN is false, so `larger` propagates a NaN of its second argument.
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
INLINE float hmax(vf v) {
  float m = v[0];
  for (int i = 1; i < VL; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
INLINE bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#endif
}

// Horner's rule. The coefficient of the highest power comes first.
template <int N> INLINE vf polynomial(vf x, const float (&c)[N]) {
  vf p = splat(c[0]);
#pragma GCC unroll 16
  for (int i = 1; i < N; ++i) p = fma(p, x, splat(c[i]));
  return p;
}

// exp(x) to 2 units in the last place. Results below the smallest normal number are 0; the largest result is 2^127.
INLINE vf vexp(vf x) {
  const vf low = splat(-87.33654f), high = splat(88.02969f), magic = splat(12582912.0f);
  vf c = x < low ? low : x;
  c = c > high ? high : c;
  const vf n = fma(c, splat(1.44269504f), magic) - magic;  // x log2(e), rounded to an integer
  vf r = fma(n, splat(-0.693359375f), c);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = polynomial(r, {1.0f / 5040.0f, 1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f});
  p = fma(p, r * r, r) + splat(1.0f);
  // NaN cannot become an integer; p carries it on.
  const vi e = __builtin_convertvector(n == n ? n : (vf){}, vi);
  const vf y = p * (vf)((e + 127) << 23);
  return x < low ? (vf){} : y;
}

INLINE vf vabs(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }

INLINE vf sigmoid(vf w) {
  const vf e = vexp(-vabs(w)), one = splat(1.0f), rest = one / (one + e);
  return w < 0.0f ? e * rest : rest;
}

INLINE vf vtanh(vf z) {
  // Near 0 a series, because 1 - exp would be a difference of nearly equal numbers.
  const vf one = splat(1.0f), e = vexp(vabs(z) * -2.0f), t = (one - e) / (one + e), z2 = z * z;
  const vf s = fma(polynomial(z2, {62.0f / 2835.0f, -17.0f / 315.0f, 2.0f / 15.0f, -1.0f / 3.0f}), z * z2, z);
  return vabs(z) < 0.25f ? s : (z < 0.0f ? -t : t);
}

// 0.5 erfc(-u). erfc(u) exp(u^2) is approximated by a polynomial in 1 / (1 + 0.4 u) (Chebyshev, for 0 <= u <= 9.5).
INLINE vf half_erfc_of_minus(vf u) {
  const vf a = vabs(u), t = splat(1.0f) / fma(a, splat(0.4f), splat(1.0f));
  const vf p = polynomial(t, {0.0160496216f, -0.00744945742f, -0.21846275f, 0.477248371f, -0.231760338f, 0.35377261f,
                              0.148869827f, 0.237278163f, 0.224393278f, 6.06714711e-05f});
  const vf half = vexp(-a * a) * p * 0.5f;
  return u < 0.0f ? half : splat(1.0f) - half;
}

static vf activate(int64_t name, vf z) {
  const vf zero = {}, one = splat(1.0f);
  switch (name) {
    case GELU_TANH: return z * sigmoid(z * fma(z * z, splat(0.044715f), one) * 1.5957691216057308f);
    case SILU: return z * sigmoid(z);
    case QUICK_GELU: return z * sigmoid(z * 1.702f);
    case GELU: return z * half_erfc_of_minus(z * 0.7071067811865476f);
    case GELU_10: return activate(GELU, z) > 10.0f ? splat(10.0f) : activate(GELU, z);
    case LAPLACE: return half_erfc_of_minus((z - 0.707107f) / 0.3989425750415753f);
    case SIGMOID: return sigmoid(z);
    case TANH: return vtanh(z);
    case MISH: {
      const vf e = vexp(-vabs(z)), top = z < 0.0f ? e * (e + 2.0f) : e * 2.0f + 1.0f;
      return z * (top / ((z < 0.0f ? splat(2.0f) : e * e * 2.0f) + top));
    }
    case RELU: return z <= 0.0f ? zero : z;
    case RELU2: return z <= 0.0f ? zero : z * z;
    case RELU6: return z <= 0.0f ? zero : (z >= 6.0f ? splat(6.0f) : z);
    case LEAKY_RELU: return z > 0.0f ? z : z * 0.01f;
    case HARDSWISH: return z * (z <= -3.0f ? zero : (z >= 3.0f ? one : (z + 3.0f) * (1.0f / 6.0f)));
    default: return z;
  }
}

// Rounds float32 to bfloat16, to nearest even, in the upper half of each lane.
INLINE vu round_bf16(vf x) {
  const vu bits = (vu)x, rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  return x == x ? rounded : (bits | 0x00400000u) & 0xFFFF0000u;
}

INLINE void store_n(uint16_t* p, vf v, int64_t n) {
  const vh lanes = __builtin_convertvector(round_bf16(v) >> 16, vh);
  memcpy(p, &lanes, least(n, VL) * sizeof(uint16_t));
}

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The share of thread t in n things: from first up to, but not including, last.
struct Share { int64_t first, last; };
INLINE Share share(int64_t n, int t, int threads) { return {n * t / threads, n * (t + 1) / threads}; }
