// Eight floats of AVX2; included inside a region that may use it.
#pragma once

#include <immintrin.h>

namespace vpt {
namespace {

struct Lanes {
  using Float = __m256;
  static constexpr int kLanes = 8;

  static Float zero() { return _mm256_setzero_ps(); }
  static Float broadcast(float x) { return _mm256_set1_ps(x); }
  static Float load(const float* x) { return _mm256_loadu_ps(x); }
  static void store(float* x, Float v) { _mm256_storeu_ps(x, v); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace vpt
