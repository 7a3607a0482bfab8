// Loops that the compiler vectorises; included once by each simd_*.cpp inside its instruction-set region.
#pragma once

#include "fma.h"
#include "simd.h"

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

// Σ term(i), in float32 over short blocks and in double over the blocks: as accurate as a pairwise sum. The partial sums
// are written out, because a compiler that does not vectorise (under a sanitizer, say) would add a block one by one.
template <int64_t kBlock = 128, typename Term>
inline double sum(int64_t n, Term term) {
  constexpr int kLanes = 16;
  const int64_t whole = n / kLanes * kLanes;
  double total = 0.0;
  for (int64_t begin = 0; begin < whole; begin += kBlock) {
    const int64_t end = begin + kBlock < whole ? begin + kBlock : whole;
    float part[kLanes] = {};
    for (int64_t i = begin; i < end; i += kLanes)
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) part[lane] = term(i + lane, part[lane]);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
    total += part[0];
  }
  float rest = 0.f;
  for (int64_t i = whole; i < n; ++i) rest = term(i, rest);
  return total + rest;
}

template <typename T>
float dot(const T* x, const float* y, int64_t n) {
  return static_cast<float>(sum<512>(n, [=](int64_t i, float part) { return VPT_FMA(to_float(x[i]), y[i], part); }));
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

template <typename T>
void rms_norm(const T* x, const T* weight, int64_t n, double eps, T* out) {
  const double squares = sum(n, [=](int64_t i, float part) { return VPT_FMA(to_float(x[i]), to_float(x[i]), part); });
  const float scale = static_cast<float>(1.0 / __builtin_sqrt(squares / n + eps));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    out[i] = from_float<T>(to_float(weight[i]) * to_float(from_float<T>(to_float(x[i]) * scale)));
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
      // Not fused: the same bits on every backend and from every compiler.
      const float first = a * cos[i] - b * sin[i], second = b * cos[i] + a * sin[i];
      out[i] = from_float<U>(first);
      out[i + half] = from_float<U>(second);
    }
  }
}

void centre_bytes(const uint8_t* pixels, int64_t n, int8_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int8_t>(pixels[i] ^ 0x80);
}

float largest(const float* x, int64_t n) {
  float most = 0.f;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = __builtin_fabsf(x[i]);
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

void int8_slices(const float* x, int64_t n, double inverse, int count, int8_t* out, int64_t stride) {
  // Adding 1.5·2^52 leaves the rounded integer in the low bits of the double.
  constexpr double kRound = 6755399441055744.0;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double shifted = static_cast<double>(x[i]) * inverse + kRound;
    int64_t bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    int32_t rest = static_cast<int32_t>(bits);
    for (int d = 3; d >= 0; --d) {
      if (d >= count) continue;
      const int32_t slice = static_cast<int8_t>(rest & 0xFF);
      out[d * stride + i] = static_cast<int8_t>(slice);
      rest = (rest - slice) >> 8;
    }
  }
}

void combine(const int32_t* products, int64_t n, int slices, const float* scale, const float* bias, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float sum = static_cast<float>(products[i]);
    sum = VPT_FMA(sum, 256.f, static_cast<float>(products[n + i]));
    sum = VPT_FMA(sum, 256.f, static_cast<float>(products[2 * n + i]));
    if (slices == 4) sum = VPT_FMA(sum, 256.f, static_cast<float>(products[3 * n + i]));
    out[i] = VPT_FMA(sum, scale[i], bias[i]);
  }
}

void quantise(const float* x, float scale, int64_t n, Float8E4M3* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<Float8E4M3>(x[i] / scale);
}

template <typename T>
constexpr Loops<T> make_loops() {
  return {
      centre<T>,      add_bias<T, T>,     add_bias<float, T>,   widen<T>,
      dot<T>,         layer_norm<T, T>,   layer_norm<T, float>, rms_norm<T>,
      rank_one<T, T>, rank_one<float, T>, rotate<T, T>,         rotate<T, float>,
  };
}

}  // namespace
}  // namespace vpt
