// Loops that the compiler vectorises; included once by each simd_*.cpp inside its instruction-set region.
#pragma once

#include "simd.h"

// Contraction is off for the whole library (the resampling coefficients need it off): ask for it where it pays.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define VPT_FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define VPT_FMA(a, b, c) ((a) * (b) + (c))
#endif

namespace vpt {
namespace {

constexpr float kLayerNormEps = 1e-5f;

template <typename T>
void centre(const uint8_t* pixels, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(static_cast<float>(static_cast<int32_t>(pixels[i]) - 128));
}

template <typename T>
void add_bias(const float* wide, const float* bias, int64_t n, T* row) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) row[i] = from_float<T>(wide[i] + bias[i]);
}

template <typename T>
void add_bias_inplace(T* row, const float* bias, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) row[i] = from_float<T>(to_float(row[i]) + bias[i]);
}

template <typename T>
void widen(const T* x, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
}

template <typename T>
float dot(const T* x, const float* y, int64_t n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum = VPT_FMA(to_float(x[i]), y[i], sum);
  return sum;
}

template <typename T, typename U>
void layer_norm(const T* x, int64_t stride, const T* weight, const T* bias, int64_t n, U* out) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += to_float(x[i * stride]);
  const float mean = sum / static_cast<float>(n);
  float squares = 0.f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) {
    const float d = to_float(x[i * stride]) - mean;
    squares = VPT_FMA(d, d, squares);
  }
  const float scale = 1.f / __builtin_sqrtf(squares / static_cast<float>(n) + kLayerNormEps);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float normed = (to_float(x[i * stride]) - mean) * scale;
    out[i] = from_float<U>(VPT_FMA(normed, to_float(weight[i]), to_float(bias[i])));
  }
}

template <typename S, typename T>
void rank_one(const S* f, const float* k, int64_t n, T* out) {
  const float score = dot(f, k, n);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(VPT_FMA(score, k[i], to_float(f[i])));
}

template <typename T>
void rotate(const T* x, const float* cos, const float* sin, int64_t half, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = to_float(x[i]), b = to_float(x[i + half]);
    const float first = VPT_FMA(a, cos[i], -(b * sin[i])), second = VPT_FMA(b, cos[i], a * sin[i]);
    out[i] = from_float<T>(first);
    out[i + half] = from_float<T>(second);
  }
}

template <typename T>
constexpr Loops<T> make_loops() {
  return {centre<T>,        add_bias<T>,          add_bias_inplace<T>, widen<T>,           dot<T>,
          layer_norm<T, T>, layer_norm<T, float>, rank_one<T, T>,      rank_one<float, T>, rotate<T>};
}

}  // namespace
}  // namespace vpt
