// AVX-512: tiles of 14 rows and 32 columns, two panels side by side.
#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif

#include <immintrin.h>

#include "packed_linear_loops.h"

namespace vpt {
namespace {

struct Vector {
  using Float = __m512;
  static constexpr int kLanes = 16, kTileRows = 14, kTilePanels = 2, kFewRows = 28;

  static Float zero() { return _mm512_setzero_ps(); }
  static Float broadcast(float x) { return _mm512_set1_ps(x); }
  static Float load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* x, Float v) { _mm512_storeu_ps(x, v); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

  static void load_pair(const float* from, Float* even, Float* odd) {
    *even = load(from);
    *odd = load(from + 16);
  }
  static void load_pair(const BFloat16* from, Float* even, Float* odd) {
    const __m512i words = _mm512_loadu_si512(from);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
  static void load_pair(const Float16* from, Float* even, Float* odd) {
    *even = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    *odd = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 16)));
  }
  static void load_pair(const Int8* from, Float* even, Float* odd) {
    const __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    *even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16));
    *odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(words, 16));
  }
};

}  // namespace

const PackedKernels kPackedAvx512 = packed_kernels<Vector>("avx512");

}  // namespace vpt

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif  // __x86_64__
