// The functions of arm_neon.h that kernels/native uses, written in SSE, so that the code for AArch64 runs on x86.
#include <immintrin.h>
typedef __m128 float32x4_t;
typedef unsigned uint32x4_t __attribute__((vector_size(16)));
static inline float32x4_t vfmaq_f32(float32x4_t c, float32x4_t a, float32x4_t b) { return _mm_fmadd_ps(a, b, c); }
static inline float vaddvq_f32(float32x4_t v) { return (v[0] + v[1]) + (v[2] + v[3]); }
static inline unsigned vmaxvq_u32(uint32x4_t v) {
  unsigned m = v[0];
  for (int i = 1; i < 4; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
