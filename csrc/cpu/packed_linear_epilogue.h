// What happens to a finished tile of sums before it is stored: bias, activation or gate, residual, one rounding.
// Included once by each packed_linear_*.cpp inside its instruction-set region.
#pragma once

#include "exponential.h"
#include "packed_linear.h"

namespace vpt {
namespace {

// Weighted least-squares fits at Chebyshev nodes: x·(1 + q(x²)) up to 1, 1 − e^p(|x|) up to 4, where float32 reaches 1;
// both err by 1.2e-9.
inline float error_function(float x) {
  const float t = __builtin_fabsf(x) > 4.f ? 4.f : __builtin_fabsf(x), s = x * x;
  float near = 7.85385961e-5f;
  near = VPT_FMA(near, s, -8.01019310e-4f);
  near = VPT_FMA(near, s, 5.18832763e-3f);
  near = VPT_FMA(near, s, -2.68538119e-2f);
  near = VPT_FMA(near, s, 1.12835851e-1f);
  near = VPT_FMA(near, s, -3.76126258e-1f);
  near = VPT_FMA(near, s, 1.28379166e-1f);
  near = VPT_FMA(near, x, x);
  float far = 1.85574355e-4f;
  far = VPT_FMA(far, t, -2.93961061e-3f);
  far = VPT_FMA(far, t, 2.18053313e-2f);
  far = VPT_FMA(far, t, -1.03037395e-1f);
  far = VPT_FMA(far, t, -6.38225648e-1f);
  far = VPT_FMA(far, t, -1.12704005f);
  far = VPT_FMA(far, t, -3.53715267e-4f);
  far = __builtin_copysignf(1.f - exponential(far), x);
  return t <= 1.f ? near : far;
}

template <Activation kind>
inline float activate(float x) {
  if constexpr (kind == Activation::silu) return x / (1.f + exponential(-x));
  if constexpr (kind == Activation::quick_gelu) return x / (1.f + exponential(-1.702f * x));
  if constexpr (kind == Activation::gelu) return 0.5f * x * (1.f + error_function(x * 0.707106781f));
  // (1 + tanh y) / 2 = 1 / (1 + e^(−2y)), y = √(2/π)·(x + 0.044715·x³)
  if constexpr (kind == Activation::gelu_tanh)
    return x / (1.f + exponential(-1.59576912f * VPT_FMA(0.044715f * x * x, x, x)));
  return x;
}

template <Activation kind>
inline void activate_row(float* v, bool gated) {
  const int64_t n = gated ? kPanel / 2 : kPanel;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) v[i] = activate<kind>(v[i]);
  if (!gated) return;
#pragma omp simd
  for (int64_t i = 0; i < kPanel / 2; ++i) v[i] *= v[i + kPanel / 2];
}

inline void activate_row(Activation kind, float* v, bool gated) {
  switch (kind) {
    case Activation::silu:
      return activate_row<Activation::silu>(v, gated);
    case Activation::quick_gelu:
      return activate_row<Activation::quick_gelu>(v, gated);
    case Activation::gelu:
      return activate_row<Activation::gelu>(v, gated);
    case Activation::gelu_tanh:
      return activate_row<Activation::gelu_tanh>(v, gated);
    case Activation::none:
      return;
  }
}

template <typename T>
void finish_rows(
    const PackedJob& job, const float* sums, int64_t stride, int64_t first_row, int64_t rows, int64_t panel) {
  const int64_t width = job.columns_per_panel(), first = panel * width;
  const int64_t n = job.features - first < width ? job.features - first : width;
  float bias[kPanel] = {};
  if (job.bias != nullptr)
    for (int64_t half = 0; half <= job.gated; ++half)
      for (int64_t i = 0; i < n; ++i) bias[half * width + i] = job.bias[half * job.features + first + i];
  for (int64_t r = 0; r < rows; ++r) {
    float v[kPanel];
#pragma omp simd
    for (int64_t i = 0; i < kPanel; ++i) v[i] = sums[r * stride + i] + bias[i];
    activate_row(job.activation, v, job.gated);
    if (job.residual.base != nullptr) {
      const T* residual = static_cast<const T*>(job.residual.base) + (first_row + r) * job.residual.stride + first;
      for (int64_t i = 0; i < n; ++i) v[i] += to_float(residual[i]);
    }
    T* out = static_cast<T*>(job.out.base) + (first_row + r) * job.out.stride + first;
    for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(v[i]);
  }
}

// sums [rows][16], `stride` floats apart: the finished products of one panel
inline void finish(
    const PackedJob& job, const float* sums, int64_t stride, int64_t first_row, int64_t rows, int64_t panel) {
  if (job.out.type == Element::f32) return finish_rows<float>(job, sums, stride, first_row, rows, panel);
  if (job.out.type == Element::bf16) return finish_rows<BFloat16>(job, sums, stride, first_row, rows, panel);
  return finish_rows<Float16>(job, sums, stride, first_row, rows, panel);
}

}  // namespace
}  // namespace vpt
