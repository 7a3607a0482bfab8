// Plain C++ over 16 numbers: NEON through the compiler, and the fallback on x86-64 without AVX2.
#include "cached_attention_loops.h"
#include "lanes_generic.h"

namespace vpt {
namespace {

struct Vector : Lanes {
  static constexpr int kRows = 2;

  template <typename T>
  static Float load(const T* x) {
    return each([=](int i) { return to_float(x[i]); });
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
