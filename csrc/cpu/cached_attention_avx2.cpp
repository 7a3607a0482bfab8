// AVX2: three rows of queries by four keys, or by 32 numbers of a value.
#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cached_attention_loops.h"
#include "lanes_avx2.h"

namespace vpt {
namespace {

struct Vector : Lanes {
  static constexpr int kRows = 3;

  using Lanes::load;
  static Float load(const BFloat16* x) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
  static Float load(const Float16* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
  // Four vectors → the sums of each.
  static void sums(const Float* v, float* to) {
    const Float four = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
  }
};

}  // namespace

const AttentionKernels kAttentionAvx2 = attention_kernels<Vector>("avx2");

}  // namespace vpt

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif  // __x86_64__
