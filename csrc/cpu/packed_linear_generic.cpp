// Plain C++ over 16 columns: NEON through the compiler, and the fallback on x86-64 without AVX2.
#include "packed_linear_loops.h"

namespace vpt {
namespace {

struct Vector {
  struct Float {
    float lane[kPanel];
  };
  static constexpr int kLanes = kPanel, kTileRows = 4, kTilePanels = 1, kFewRows = 16;

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

  template <typename S>
  static void load_pair(const S* from, Float* even, Float* odd) {
    *even = each([=](int i) { return to_float(from[i]); });
    *odd = each([=](int i) { return to_float(from[kPanel + i]); });
  }
  static void load_pair(const BFloat16* from, Float* even, Float* odd) {
    *even = each([=](int i) { return to_float(from[2 * i]); });
    *odd = each([=](int i) { return to_float(from[2 * i + 1]); });
  }
  static void load_pair(const Int8* from, Float* even, Float* odd) {
    *even = each([=](int i) { return static_cast<float>(from[2 * i].value); });
    *odd = each([=](int i) { return static_cast<float>(from[2 * i + 1].value); });
  }
};

}  // namespace

const PackedKernels kPackedGeneric = packed_kernels<Vector>("generic");

}  // namespace vpt
