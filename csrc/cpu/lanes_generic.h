// Sixteen floats in plain C++: NEON through the compiler, and the fallback on x86-64 without AVX2.
#pragma once

#include "fma.h"

namespace vpt {
namespace {

struct Lanes {
  struct Float {
    float lane[16];
  };
  static constexpr int kLanes = 16;

  template <typename Vector = Float, typename F>
  static Vector each(F&& value) {
    Vector v;
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) v.lane[i] = value(i);
    return v;
  }
  static Float zero() { return broadcast(0.f); }
  static Float broadcast(float x) {
    return each([=](int) { return x; });
  }
  static Float load(const float* x) {
    return each([=](int i) { return x[i]; });
  }
  static void store(float* x, const Float& v) {
    for (int i = 0; i < kLanes; ++i) x[i] = v.lane[i];
  }
  static Float add(const Float& a, const Float& b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Float multiply(const Float& a, const Float& b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Float multiply_add(const Float& a, const Float& b, const Float& c) {
    return each([&](int i) { return VPT_FMA(a.lane[i], b.lane[i], c.lane[i]); });
  }
};

}  // namespace
}  // namespace vpt
