// Sixteen floats of AVX-512; included inside a region that may use it.
#pragma once

#include <immintrin.h>

namespace vpt {
namespace {

struct Lanes {
  using Float = __m512;
  static constexpr int kLanes = 16;

  static Float zero() { return _mm512_setzero_ps(); }
  static Float broadcast(float x) { return _mm512_set1_ps(x); }
  static Float load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* x, Float v) { _mm512_storeu_ps(x, v); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace vpt
