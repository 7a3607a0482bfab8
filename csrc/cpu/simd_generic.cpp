// Plain C++: any processor, and the fallback on x86-64 without AVX2.
#include "simd_loops.h"

#include "../math/resample.h"

namespace vpt {
namespace {

constexpr int kWords = kTapGroup;

uint8_t clip8(int32_t sum) {
  const int32_t value = sum >> kPrecisionBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

void pack(const int32_t* weights, int32_t* words) {
  for (int t = 0; t < kTapGroup; ++t) words[t] = weights[t];
}

void horizontal(const uint8_t* row, const int32_t* first, const int32_t* packed, int groups, int64_t n, uint8_t* out) {
  const int taps = groups * kTapGroup;
  for (int64_t x = 0; x < n; ++x) {
    const uint8_t* source = row + 3 * static_cast<int64_t>(first[x]);
    const int32_t* weights = packed + x * taps;
    int32_t r = 1 << (kPrecisionBits - 1), g = r, b = r;
    for (int t = 0; t < taps; ++t) {
      r += weights[t] * source[3 * t];
      g += weights[t] * source[3 * t + 1];
      b += weights[t] * source[3 * t + 2];
    }
    out[3 * x] = clip8(r);
    out[3 * x + 1] = clip8(g);
    out[3 * x + 2] = clip8(b);
  }
}

void vertical(const uint8_t* const* rows, const int32_t* packed, int groups, int64_t n, uint8_t* out) {
  constexpr int64_t kBlock = 64;
  for (int64_t x = 0; x < n; x += kBlock) {
    int32_t sums[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) sums[i] = 1 << (kPrecisionBits - 1);
    for (int t = 0; t < groups * kTapGroup; ++t) {
      const int32_t weight = packed[t];
      const uint8_t* source = rows[t] + x;
#pragma omp simd
      for (int64_t i = 0; i < kBlock; ++i) sums[i] += weight * source[i];
    }
    for (int64_t i = 0; i < kBlock; ++i) out[x + i] = clip8(sums[i]);
  }
}

}  // namespace

const Simd kGeneric = {
    "generic",
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

#ifdef __x86_64__
const Simd& simd() {
  static const Simd& best = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma")
      ? kAvx512
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? kAvx2
                                                                        : kGeneric;
  return best;
}

bool has_bfloat16_matmul() { return __builtin_cpu_supports("avx512bf16"); }
bool has_int8_matmul() { return __builtin_cpu_supports("avx512vnni"); }
#else
const Simd& simd() { return kGeneric; }
bool has_bfloat16_matmul() { return false; }
bool has_int8_matmul() { return false; }
#endif

}  // namespace vpt
