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
  for (int64_t i = 0; i < n; ++i)
    out[i] = from_float<T>(static_cast<float>(static_cast<int32_t>(pixels[i]) - 128) * 0x1p-8f);
}

template <typename S, typename T>
void add_bias(const S* x, const float* bias, int64_t n, T* row) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) row[i] = from_float<T>(to_float(x[i]) + bias[i]);
}

template <typename T>
void widen(const T* x, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
}

// Σ term(i), in float32 over short blocks and in double over the blocks: as accurate as a pairwise sum.
template <int64_t kBlock = 128, typename Term>
inline double sum(int64_t n, Term term) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    float part = 0.f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) part = term(i, part);
    total += part;
  }
  return total;
}

template <typename T>
float dot(const T* x, const float* y, int64_t n) {
  return static_cast<float>(
      sum<512>(n, [=](int64_t i, float part) { return VPT_FMA(to_float(x[i]), y[i], part); }));
}

template <typename T, typename U>
void layer_norm(const T* x, int64_t stride, const T* weight, const T* bias, int64_t n, U* out) {
  // Sums start from the first element and the mean is kept in two parts: rows far from zero lose nothing.
  const float origin = to_float(x[0]);
  const double mean =
      origin + sum(n, [=](int64_t i, float part) { return part + (to_float(x[i * stride]) - origin); }) / n;
  const float high = static_cast<float>(mean), low = static_cast<float>(mean - high);
  const double squares = sum(n, [=](int64_t i, float part) {
    const float d = to_float(x[i * stride]) - high - low;
    return VPT_FMA(d, d, part);
  });
  const float scale = static_cast<float>(1.0 / __builtin_sqrt(squares / n + kLayerNormEps));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float normed = (to_float(x[i * stride]) - high - low) * scale;
    out[i] = from_float<U>(VPT_FMA(normed, to_float(weight[i]), to_float(bias[i])));
  }
}

template <typename S, typename T>
void rank_one(const S* f, const float* k, int64_t n, T* out) {
  const float score = dot(f, k, n);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(VPT_FMA(score, k[i], to_float(f[i])));
}

template <typename T, typename U>
void rotate(
    const T* x, int64_t stride, const float* cos, const float* sin, int64_t half, int64_t heads, U* out,
    int64_t out_stride) {
  for (int64_t h = 0; h < heads; ++h, x += stride, out += out_stride) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = to_float(x[i]), b = to_float(x[i + half]);
      const float first = VPT_FMA(a, cos[i], -(b * sin[i])), second = VPT_FMA(b, cos[i], a * sin[i]);
      out[i] = from_float<U>(first);
      out[i + half] = from_float<U>(second);
    }
  }
}

void quantise(const float* x, float scale, int64_t n, Float8E4M3* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<Float8E4M3>(x[i] / scale);
}

template <typename T>
constexpr Loops<T> make_loops() {
  return {
      centre<T>,        add_bias<T, T>,       add_bias<float, T>, widen<T>,           dot<T>,
      layer_norm<T, T>, layer_norm<T, float>, rank_one<T, T>,     rank_one<float, T>, rotate<T, T>,
      rotate<T, float>,
  };
}

}  // namespace
}  // namespace vpt
