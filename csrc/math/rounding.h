// bfloat16 stored as 16 bits, rounded to nearest even.
#pragma once

#include <cstring>

#include "host_device.h"

namespace vpt {

struct BFloat16 {
  uint16_t bits;
};

VPT_HD float to_float(float x) { return x; }

VPT_HD float to_float(BFloat16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

template <typename T>
VPT_HD T from_float(float x);

template <>
VPT_HD float from_float<float>(float x) {
  return x;
}

template <>
VPT_HD BFloat16 from_float<BFloat16>(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const bool is_nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
  return BFloat16{static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded)};
}

}  // namespace vpt
