// AVX2: tiles of 6 rows and 16 columns, one panel.
#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "packed_linear_loops.h"
#include "lanes_avx2.h"

namespace vpt {
namespace {

struct Vector : Lanes {
  static constexpr int kTileRows = 6, kTilePanels = 1, kFewRows = 18;
  static constexpr int64_t kInt8Rows = kFewRows;
  static constexpr bool kQuads = false;

  static __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static __m128i load_half(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

  template <int odd>
  static void load_column(const float* pair, Float column[2]) {
    for (int w = 0; w < 2; ++w) column[w] = load(pair + 16 * odd + 8 * w);
  }
  template <int odd>
  static void load_column(const BFloat16* pair, Float column[2]) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    for (int w = 0; w < 2; ++w) {
      const __m256i words = load_bytes(pair + 16 * w);
      column[w] = _mm256_castsi256_ps(odd ? _mm256_and_si256(words, high) : _mm256_slli_epi32(words, 16));
    }
  }
  template <int odd>
  static void load_column(const Float16* pair, Float column[2]) {
    for (int w = 0; w < 2; ++w) column[w] = _mm256_cvtph_ps(load_half(pair + 16 * odd + 8 * w));
  }
  template <int odd>
  static void load_column(const Int8* pair, Float column[2]) {
    for (int w = 0; w < 2; ++w) {
      const __m256i words = _mm256_cvtepi8_epi16(load_half(pair + 16 * w));
      column[w] = _mm256_cvtepi32_ps(_mm256_srai_epi32(odd ? words : _mm256_slli_epi32(words, 16), 16));
    }
  }

  using Int = __m256i;
  static Int zero_int() { return _mm256_setzero_si256(); }
  static Int broadcast_int(int32_t x) { return _mm256_set1_epi32(x); }
  static Int add_int(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int dot(Int sum, Int a, Int b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  static Float to_floats(Int x) { return _mm256_cvtepi32_ps(x); }
  static void load_words(const Int8* pair, Int words[2]) {
    for (int w = 0; w < 2; ++w) words[w] = _mm256_cvtepi8_epi16(load_half(pair + 16 * w));
  }
  static Int load_int(const int32_t* x) { return load_bytes(x); }
  static void store_int(int32_t* x, Int v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), v); }
  static void load_raw(const Int4* from, Int raw[2]) {
    for (int w = 0; w < 2; ++w) raw[w] = load_bytes(from + 8 * w);
  }
  template <int shift, int mask>
  static Int bits(Int raw) {
    return _mm256_and_si256(_mm256_srli_epi32(raw, shift), _mm256_set1_epi32(mask));
  }
};

}  // namespace

const PackedKernels kPackedAvx2 = packed_kernels<Vector>("avx2");

}  // namespace vpt

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif  // __x86_64__
