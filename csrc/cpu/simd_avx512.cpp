// AVX-512 with VNNI: a weight is split into three signed bytes, k = d2·2^16 + d1·2^8 + d0, and four taps go through
// one vpdpbusd. |k| < 1.2·2^22 (bicubic, normalised), so d2 fits.
#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,prefer-vector-width=512")
#endif

#include <immintrin.h>

#include "simd_loops.h"

#include "../math/resample.h"

namespace vpt {
namespace {

constexpr int kWords = 3;

void pack(const int32_t* weights, int32_t* words) {
  uint32_t limbs[kWords] = {0, 0, 0};
  for (int t = 0; t < kTapGroup; ++t) {
    int32_t k = weights[t];
    for (int limb = 0; limb < kWords; ++limb) {
      const int32_t digit = static_cast<int8_t>(k & 0xFF);
      limbs[limb] |= static_cast<uint32_t>(digit & 0xFF) << (8 * t);
      k = (k - digit) >> 8;
    }
  }
  for (int limb = 0; limb < kWords; ++limb) words[limb] = static_cast<int32_t>(limbs[limb]);
}

void horizontal(const uint8_t* row, const int32_t* first, const int32_t* packed, int groups, int64_t n, uint8_t* out) {
  // Four RGB pixels → four taps of each channel.
  const __m128i planes = _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1);
  const __m128i zero = _mm_setzero_si128(), half = _mm_set1_epi32(1 << (kPrecisionBits - 1));
  for (int64_t x = 0; x < n; ++x) {
    const uint8_t* source = row + 3 * static_cast<int64_t>(first[x]);
    __m128i d0 = half, d1 = zero, d2 = zero;
    for (int g = 0; g < groups; ++g, source += 12, packed += kWords) {
      const __m128i taps = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)), planes);
      d0 = _mm_dpbusd_epi32(d0, taps, _mm_set1_epi32(packed[0]));
      d1 = _mm_dpbusd_epi32(d1, taps, _mm_set1_epi32(packed[1]));
      d2 = _mm_dpbusd_epi32(d2, taps, _mm_set1_epi32(packed[2]));
    }
    __m128i sum = _mm_add_epi32(d0, _mm_add_epi32(_mm_slli_epi32(d1, 8), _mm_slli_epi32(d2, 16)));
    sum = _mm_srai_epi32(sum, kPrecisionBits);
    sum = _mm_packus_epi16(_mm_packs_epi32(sum, sum), sum);
    const int32_t rgb = _mm_cvtsi128_si32(sum);
    __builtin_memcpy(out + 3 * x, &rgb, 4);
  }
}

void vertical(const uint8_t* const* rows, const int32_t* packed, int groups, int64_t n, uint8_t* out) {
  const __m512i zero = _mm512_setzero_si512(), half = _mm512_set1_epi32(1 << (kPrecisionBits - 1));
  for (int64_t x = 0; x < n; x += 64) {
    __m512i d0[4] = {half, half, half, half}, d1[4] = {zero, zero, zero, zero}, d2[4] = {zero, zero, zero, zero};
    for (int g = 0; g < groups; ++g) {
      __m512i r[kTapGroup];
      for (int t = 0; t < kTapGroup; ++t) r[t] = _mm512_loadu_si512(rows[g * kTapGroup + t] + x);
      const __m512i low01 = _mm512_unpacklo_epi8(r[0], r[1]), high01 = _mm512_unpackhi_epi8(r[0], r[1]);
      const __m512i low23 = _mm512_unpacklo_epi8(r[2], r[3]), high23 = _mm512_unpackhi_epi8(r[2], r[3]);
      const __m512i taps[4] = {
          _mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
          _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
      const int32_t* words = packed + g * kWords;
      for (int i = 0; i < 4; ++i) {
        d0[i] = _mm512_dpbusd_epi32(d0[i], taps[i], _mm512_set1_epi32(words[0]));
        d1[i] = _mm512_dpbusd_epi32(d1[i], taps[i], _mm512_set1_epi32(words[1]));
        d2[i] = _mm512_dpbusd_epi32(d2[i], taps[i], _mm512_set1_epi32(words[2]));
      }
    }
    __m512i sum[4];
    for (int i = 0; i < 4; ++i) {
      sum[i] = _mm512_add_epi32(d0[i], _mm512_add_epi32(_mm512_slli_epi32(d1[i], 8), _mm512_slli_epi32(d2[i], 16)));
      sum[i] = _mm512_srai_epi32(sum[i], kPrecisionBits);
    }
    // The unpacks interleaved within 128-bit lanes; the packs undo exactly that.
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(sum[0], sum[1]), _mm512_packs_epi32(sum[2], sum[3]));
    _mm512_storeu_si512(out + x, bytes);
  }
}

}  // namespace

const Simd kAvx512 = {
    "avx512vnni",
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
