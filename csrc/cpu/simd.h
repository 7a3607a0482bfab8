// The inner loops, compiled once per instruction set and chosen once at run time. The translation units that
// define them include neither torch nor the standard library: an inline function of those, compiled for a newer
// processor, could be the copy that the linker keeps for everyone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../math/rounding.h"

namespace vpt {

// Bytes that a padded row has beyond its last pixel, so that whole vectors may be loaded and stored.
constexpr int64_t kRowSlack = 64;
constexpr int kTapGroup = 4;

// Loops over one row of n elements of type T; sums and products are float32.
template <typename T>
struct Loops {
  // out = (pixel − 128)/256, exact in every T
  void (*centre)(const uint8_t* pixels, int64_t n, T* out);
  // row = round(x + bias); x may be row
  void (*add_bias)(const T* x, const float* bias, int64_t n, T* row);
  void (*add_bias_wide)(const float* x, const float* bias, int64_t n, T* row);
  void (*widen)(const T* x, int64_t n, float* out);
  float (*dot)(const T* x, const float* y, int64_t n);
  // out = round((x − mean)/√(var + eps)·weight + bias), x with stride; out float32 or T
  void (*layer_norm)(const T* x, int64_t stride, const T* weight, const T* bias, int64_t n, T* out);
  void (*layer_norm_wide)(const T* x, int64_t stride, const T* weight, const T* bias, int64_t n, float* out);
  // out = round(weight·round(x/√(mean x² + eps))), as transformers' RMSNorm rounds
  void (*rms_norm)(const T* x, const T* weight, int64_t n, double eps, T* out);
  // out = round(f + (f·k)k); f may be out
  void (*rank_one)(const T* f, const float* k, int64_t n, T* out);
  void (*rank_one_wide)(const float* f, const float* k, int64_t n, T* out);
  // Rotate-half of the pairs (x[i], x[i + half]) of every head, heads `stride` apart; x may be out
  void (*rotate)(
      const T* x, int64_t stride, const float* cos, const float* sin, int64_t half, int64_t heads, T* out,
      int64_t out_stride);
  void (*rotate_wide)(
      const T* x, int64_t stride, const float* cos, const float* sin, int64_t half, int64_t heads, float* out,
      int64_t out_stride);
};

struct Simd {
  const char* name;
  // Packed weights: int32 words per group of four taps.
  int words;
  void (*pack)(const int32_t* weights, int32_t* words);
  // One row of n RGB pixels; output x reads input pixels first[x] … first[x] + 4·groups − 1.
  void (*horizontal)(
      const uint8_t* row, const int32_t* first, const int32_t* packed, int groups, int64_t n, uint8_t* out);
  // One row of n bytes from 4·groups input rows.
  void (*vertical)(const uint8_t* const* rows, const int32_t* packed, int groups, int64_t n, uint8_t* out);
  // out = pixel − 128
  void (*centre)(const uint8_t* pixels, int64_t n, int8_t* out);
  float (*largest)(const float* x, int64_t n);
  // The signed bytes of round(x·inverse) in base 256, the highest first and `stride` apart
  void (*int8_slices)(const float* x, int64_t n, double inverse, int count, int8_t* out, int64_t stride);
  // out = scale·(slices' products, n apart) + bias
  void (*combine)(const int32_t* products, int64_t n, int slices, const float* scale, const float* bias, float* out);
  // out = saturate(x / scale)
  void (*quantise)(const float* x, float scale, int64_t n, Float8E4M3* out);
  Loops<float> f32;
  Loops<BFloat16> bf16;
  Loops<Float16> f16;
};

template <typename T>
const Loops<T>& loops(const Simd& simd);
template <>
inline const Loops<float>& loops<float>(const Simd& simd) {
  return simd.f32;
}
template <>
inline const Loops<BFloat16>& loops<BFloat16>(const Simd& simd) {
  return simd.bf16;
}

template <>
inline const Loops<Float16>& loops<Float16>(const Simd& simd) {
  return simd.f16;
}

extern const Simd kGeneric;
#ifdef __x86_64__
extern const Simd kAvx2;
extern const Simd kAvx512;
#endif

// The widest instruction set that this processor has.
const Simd& simd();
bool has_bfloat16_matmul();
// Whether byte products run in a four-way dot-product instruction.
bool has_int8_matmul();

// Whether the library's matrix product in T is at least as fast as in float32 here; else T is widened first.
template <typename T>
bool has_matmul() {
  return false;
}
template <>
inline bool has_matmul<float>() {
  return true;
}
template <>
inline bool has_matmul<BFloat16>() {
  return has_bfloat16_matmul();
}

}  // namespace vpt
