// Plain C++ over 16 numbers: NEON through the compiler, and the fallback on x86-64 without AVX2.
#include "cached_attention_loops.h"

namespace vpt {
namespace {

struct Vector {
  struct Float {
    float lane[16];
  };
  static constexpr int kLanes = 16, kRows = 2;

  template <typename F>
  static Float each(F&& value) {
    Float v;
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) v.lane[i] = value(i);
    return v;
  }
  static Float zero() { return broadcast(0.f); }
  static Float broadcast(float x) {
    return each([=](int) { return x; });
  }
  template <typename T>
  static Float load(const T* x) {
    return each([=](int i) { return to_float(x[i]); });
  }
  static void store(float* x, const Float& v) {
    for (int i = 0; i < kLanes; ++i) x[i] = v.lane[i];
  }
  static Float multiply(const Float& a, const Float& b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Float multiply_add(const Float& a, const Float& b, const Float& c) {
    return each([&](int i) { return VPT_FMA(a.lane[i], b.lane[i], c.lane[i]); });
  }
  // Four vectors → the sums of each.
  static void sums(const Float* v, float* to) {
    for (int k = 0; k < 4; ++k) {
      float sum = 0.f;
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < kLanes; ++i) sum += v[k].lane[i];
      to[k] = sum;
    }
  }
};

}  // namespace

const AttentionKernels kAttentionGeneric = attention_kernels<Vector>("generic");

}  // namespace vpt
