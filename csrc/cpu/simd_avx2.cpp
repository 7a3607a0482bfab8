// AVX2: a 22-bit weight is split into two 16-bit limbs, k = high·2^15 + low, and pairs of taps go through
// pmaddwd. The int32 sums wrap around where a limb's partial sum is large; the total fits, so the result is exact.
#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include <immintrin.h>

#include "simd_loops.h"

#include "../math/resample.h"

namespace vpt {
namespace {

constexpr int kLowBits = 15;
constexpr int kWords = 4;  // low(0,1), low(2,3), high(0,1), high(2,3)

int32_t pair(int32_t a, int32_t b) { return static_cast<int32_t>((static_cast<uint32_t>(b) << 16) | (a & 0xFFFF)); }

void pack(const int32_t* w, int32_t* words) {
  constexpr int32_t mask = (1 << kLowBits) - 1;
  for (int i = 0; i < 2; ++i) {
    words[i] = pair(w[2 * i] & mask, w[2 * i + 1] & mask);
    words[2 + i] = pair(w[2 * i] >> kLowBits, w[2 * i + 1] >> kLowBits);
  }
}

__m256i lanes(int32_t low, int32_t high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi32(low)), _mm_set1_epi32(high), 1);
}

void horizontal(const uint8_t* row, const int32_t* first, const int32_t* packed, int groups, int64_t n, uint8_t* out) {
  // Four RGB pixels → 16-bit pairs (tap 0, tap 1) per channel in the low lane, (tap 2, tap 3) in the high lane.
  const __m256i pairs = _mm256_setr_epi8(
      0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,  //
      6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  const __m128i half = _mm_set1_epi32(1 << (kPrecisionBits - 1));
  for (int64_t x = 0; x < n; ++x) {
    const uint8_t* source = row + 3 * static_cast<int64_t>(first[x]);
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int g = 0; g < groups; ++g, source += 12, packed += kWords) {
      const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
      const __m256i taps = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(pixels), pairs);
      low = _mm256_add_epi32(low, _mm256_madd_epi16(taps, lanes(packed[0], packed[1])));
      high = _mm256_add_epi32(high, _mm256_madd_epi16(taps, lanes(packed[2], packed[3])));
    }
    const __m256i both = _mm256_add_epi32(low, _mm256_slli_epi32(high, kLowBits));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    sum = _mm_srai_epi32(_mm_add_epi32(sum, half), kPrecisionBits);
    sum = _mm_packus_epi16(_mm_packs_epi32(sum, sum), sum);
    const int32_t rgb = _mm_cvtsi128_si32(sum);
    __builtin_memcpy(out + 3 * x, &rgb, 4);
  }
}

void vertical(const uint8_t* const* rows, const int32_t* packed, int groups, int64_t n, uint8_t* out) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i half = _mm256_set1_epi32(1 << (kPrecisionBits - 1));
  for (int64_t x = 0; x < n; x += 32) {
    __m256i low[4] = {half, half, half, half}, high[4] = {zero, zero, zero, zero};
    for (int g = 0; g < groups; ++g) {
      for (int p = 0; p < 2; ++p) {
        const uint8_t* const* source = rows + g * kTapGroup + 2 * p;
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source[0] + x));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source[1] + x));
        const __m256i ab[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
        const __m256i weight_low = _mm256_set1_epi32(packed[g * kWords + p]);
        const __m256i weight_high = _mm256_set1_epi32(packed[g * kWords + 2 + p]);
        for (int i = 0; i < 4; ++i) {
          const __m256i wide = i % 2 ? _mm256_unpackhi_epi8(ab[i / 2], zero) : _mm256_unpacklo_epi8(ab[i / 2], zero);
          low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(wide, weight_low));
          high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(wide, weight_high));
        }
      }
    }
    __m256i sum[4];
    for (int i = 0; i < 4; ++i)
      sum[i] = _mm256_srai_epi32(_mm256_add_epi32(low[i], _mm256_slli_epi32(high[i], kLowBits)), kPrecisionBits);
    // The unpacks interleaved within 128-bit lanes; the packs undo exactly that.
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(sum[0], sum[1]), _mm256_packs_epi32(sum[2], sum[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + x), bytes);
  }
}

}  // namespace

const Simd kAvx2 = {
    "avx2",
    kWords,
    pack,
    horizontal,
    vertical,
    centre_bytes,
    largest,
    int8_slices,
    combine,
    quantise,
    make_loops<float>(),
    make_loops<BFloat16>(),
    make_loops<Float16>(),
};

}  // namespace vpt

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif  // __x86_64__
