// AVX-512: tiles of 14 rows and 32 columns, two panels side by side.
#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif

#include "packed_linear_loops.h"
#include "lanes_avx512.h"

namespace vpt {
namespace {

struct Vector : Lanes {
  static constexpr int kTileRows = 14, kTilePanels = 2, kFewRows = 28;
  // VNNI multiplies pairs of 16-bit integers at twice the rate of floats: int8 weights take that for any number of rows.
  static constexpr int64_t kInt8Rows = INT64_MAX;
  static constexpr bool kQuads = true;

  template <int odd>
  static void load_column(const float* pair, Float* column) {
    *column = load(pair + 16 * odd);
  }
  template <int odd>
  static void load_column(const BFloat16* pair, Float* column) {
    const __m512i words = _mm512_loadu_si512(pair), high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    *column = _mm512_castsi512_ps(odd ? _mm512_and_si512(words, high) : _mm512_slli_epi32(words, 16));
  }
  template <int odd>
  static void load_column(const Float16* pair, Float* column) {
    *column = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pair + 16 * odd)));
  }
  template <int odd>
  static void load_column(const Int8* pair, Float* column) {
    const __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pair)));
    *column = _mm512_cvtepi32_ps(_mm512_srai_epi32(odd ? words : _mm512_slli_epi32(words, 16), 16));
  }

  using Int = __m512i;
  static Int zero_int() { return _mm512_setzero_si512(); }
  static Int broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }
  static Int add_int(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int dot(Int sum, Int a, Int b) { return _mm512_dpwssd_epi32(sum, a, b); }
  static Int dot_bytes(Int sum, Int unsigned_bytes, Int bytes) {
    return _mm512_dpbusd_epi32(sum, unsigned_bytes, bytes);
  }
  // Two pairs of columns of 16 rows, as unsigned bytes that are 128 more.
  static Int load_quads(const Int8* pairs) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), _mm512_loadu_si512(pairs));
    return _mm512_xor_si512(both, _mm512_set1_epi8(-128));
  }
  static Float to_floats(Int x) { return _mm512_cvtepi32_ps(x); }
  static void load_words(const Int8* pair, Int* words) {
    *words = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pair)));
  }
  static Int load_int(const int32_t* x) { return _mm512_loadu_si512(x); }
  static void store_int(int32_t* x, Int v) { _mm512_storeu_si512(x, v); }
  static void load_raw(const Int4* from, Int* raw) { *raw = _mm512_loadu_si512(from); }
  template <int shift, int mask>
  static Int bits(Int raw) {
    return _mm512_and_si512(_mm512_srli_epi32(raw, shift), _mm512_set1_epi32(mask));
  }
};

}  // namespace

const PackedKernels kPackedAvx512 = packed_kernels<Vector>("avx512");

}  // namespace vpt

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif  // __x86_64__
