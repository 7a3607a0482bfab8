// eˣ in float32, written so that loops over it are vectorised; included inside an instruction set's region.
#pragma once

#include "../math/rounding.h"
#include "fma.h"

namespace vpt {
namespace {

// eˣ to 2 units in the last place for −87 ≤ x ≤ 88, and the nearer end's beyond: 2ⁿ·e^r with |r| ≤ ln 2 / 2. The
// polynomial is a weighted least-squares fit at Chebyshev nodes; e^r = 1 + r + r²·p(r) errs by 5e-11.
inline float exponential(float x) {
  const float limited = x > 88.f ? 88.f : x < -87.f ? -87.f : x;
  const float shifted = VPT_FMA(limited, 1.44269504f, 12582912.f);  // 1.5·2^23 leaves the integer in the low bits
  const float n = shifted - 12582912.f;
  const float r = VPT_FMA(n, 2.12194440e-4f, VPT_FMA(n, -0.693359375f, limited));  // n·ln 2 in two parts
  float p = 1.97903104e-4f;
  p = VPT_FMA(p, r, 1.39446889e-3f);
  p = VPT_FMA(p, r, 8.33349726e-3f);
  p = VPT_FMA(p, r, 4.16662946e-2f);
  p = VPT_FMA(p, r, 1.66666659e-1f);
  p = VPT_FMA(p, r, 5.00000007e-1f);
  const float power = VPT_FMA(p * r, r, r) + 1.f;
  return float_of(bits_of(power) + (bits_of(shifted) << 23));
}

}  // namespace
}  // namespace vpt
