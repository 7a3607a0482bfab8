// Narrow floating-point types stored as integers, rounded to nearest even. Branch-free, so that loops vectorise.
#pragma once

#include <cstring>

#include "host_device.h"

namespace vpt {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8E4M3 {  // "fn": no infinities, largest value 448
  uint8_t bits;
};

VPT_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

VPT_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

VPT_HD float to_float(float x) { return x; }

VPT_HD float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

VPT_HD float to_float(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7FFFu;
  // The exponent bias goes from 15 to 127 by a multiplication, which also normalises subnormals.
  const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  const uint32_t special = magnitude >= 0x7C00u ? 0x7F800000u : 0u;
  return float_of(finite | special | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

template <typename T>
VPT_HD T from_float(float x);

template <>
VPT_HD float from_float<float>(float x) {
  return x;
}

template <>
VPT_HD BFloat16 from_float<BFloat16>(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const bool is_nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
  return BFloat16{static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded)};
}

template <>
VPT_HD Float16 from_float<Float16>(float x) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 moves a subnormal's bits to the bottom of the mantissa, rounded by the addition.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7C00u : half;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return Float16{static_cast<uint16_t>(half | ((u >> 16) & 0x8000u))};
}

// Saturates to ±448; NaN stays NaN.
template <>
VPT_HD Float8E4M3 from_float<Float8E4M3>(float x) {
  const uint32_t u = bits_of(x);
  uint32_t magnitude = u & 0x7FFFFFFFu;
  const bool is_nan = magnitude > 0x7F800000u;
  const uint32_t largest = 0x43E00000u;  // 448
  magnitude = magnitude > largest ? largest : magnitude;
  const uint32_t normal = (magnitude - (120u << 23) + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 16384.f) - bits_of(16384.f);
  const uint32_t rounded = magnitude < (121u << 23) ? subnormal : normal;
  return Float8E4M3{static_cast<uint8_t>((is_nan ? 0x7Fu : rounded) | ((u >> 24) & 0x80u))};
}

}  // namespace vpt
