// AVX-512: six rows of queries by four keys, or by 64 numbers of a value.
#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif

#include "cached_attention_loops.h"
#include "lanes_avx512.h"

namespace vpt {
namespace {

struct Vector : Lanes {
  static constexpr int kRows = 6;

  using Lanes::load;
  static Float load(const BFloat16* x) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  static Float load(const Float16* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  // Four vectors → the sums of each.
  static void sums(const Float* v, float* to) {
    const Float low = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const Float high = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const Float four = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xEE));
    const Float two = _mm512_add_ps(four, _mm512_shuffle_f32x4(four, four, 0x4E));
    const Float one = _mm512_add_ps(two, _mm512_shuffle_f32x4(two, two, 0xB1));
    _mm_storeu_ps(to, _mm512_castps512_ps128(one));
  }
};

}  // namespace

const AttentionKernels kAttentionAvx512 = attention_kernels<Vector>("avx512");

}  // namespace vpt

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif  // __x86_64__
