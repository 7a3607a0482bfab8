// Pillow's resampling arithmetic (src/libImaging/Resample.c, Geometry.c): coefficients in double, rounded to
// 22 fractional bits. Compile without contraction of a*b+c, or the last bit of a coefficient may differ.
#pragma once

#include <cstring>

#include "host_device.h"

namespace vpt {

constexpr int kPrecisionBits = 32 - 8 - 2;

enum Filter : int32_t { kBicubic = 0, kBilinear = 1 };

VPT_HD double filter_weight(int32_t filter, double x) {
  if (x < 0.0) x = -x;
  if (filter == kBilinear) return x < 1.0 ? 1.0 - x : 0.0;
  constexpr double a = -0.5;
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

struct Axis {
  int32_t in_size, out_size, filter;
  double scale, inverse_filter_scale, support;

  VPT_HD Axis(int32_t in, int32_t out, int32_t kind) : in_size(in), out_size(out), filter(kind) {
    scale = static_cast<double>(in) / out;
    const double filter_scale = scale < 1.0 ? 1.0 : scale;
    inverse_filter_scale = 1.0 / filter_scale;
    support = (kind == kBilinear ? 1.0 : 2.0) * filter_scale;
  }

  VPT_HD bool identity() const { return in_size == out_size; }
  // Bounds for any output, and for any run of n outputs.
  VPT_HD int32_t max_taps() const { return identity() ? 1 : 2 * (static_cast<int32_t>(support) + 1) + 1; }
  VPT_HD int32_t max_span(int32_t n) const {
    const double span = (n - 1) * scale + max_taps() + 2;
    return span < in_size ? static_cast<int32_t>(span) : in_size;
  }
  VPT_HD double center(int32_t out) const { return (out + 0.5) * scale; }
  VPT_HD int32_t first(int32_t out) const {
    const int32_t i = static_cast<int32_t>(center(out) - support + 0.5);
    return i < 0 ? 0 : i;
  }
  VPT_HD int32_t end(int32_t out) const {
    const int32_t i = static_cast<int32_t>(center(out) + support + 0.5);
    return i > in_size ? in_size : i;
  }
};

// Sum of the unnormalised weights of output `out`, in the order in which Pillow adds them.
VPT_HD double weight_sum(const Axis& axis, int32_t out) {
  const double center = axis.center(out);
  const int32_t first = axis.first(out), end = axis.end(out);
  double sum = 0.0;
  for (int32_t i = 0; i < end - first; ++i)
    sum += filter_weight(axis.filter, (i + first - center + 0.5) * axis.inverse_filter_scale);
  return sum;
}

// Weight of tap i of output `out`, in 22-bit fixed point.
VPT_HD int32_t fixed_weight(const Axis& axis, int32_t out, int32_t i, double sum) {
  double w = filter_weight(axis.filter, (i + axis.first(out) - axis.center(out) + 0.5) * axis.inverse_filter_scale);
  if (sum != 0.0) w /= sum;
  const double fixed = w * (1 << kPrecisionBits);
  return static_cast<int32_t>(w < 0 ? fixed - 0.5 : fixed + 0.5);
}

// The smallest power of two above x > 0.
VPT_HD double next_power_of_two(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits & 0x7FF0000000000000u) + 0x0010000000000000u;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// NEAREST source indices, all of an axis. Pillow adds up the step; multiplying instead is wrong on about one axis in nine.
VPT_HD void nearest_indices(int32_t in_size, int32_t out_size, int32_t* indices) {
  const double step = static_cast<double>(in_size) / out_size;
  double position = step * 0.5;
  for (int32_t i = 0; i < out_size; ++i) {
    const int32_t index = static_cast<int32_t>(position);
    indices[i] = index < in_size ? index : in_size - 1;
    position += step;
  }
}

// Index i alone, for threads that do not walk the axis. Within one binade the sum grows by the same multiple of its last
// place at every step, once a first addition has settled the parity of ties: a jump inside a binade is exact.
VPT_HD int32_t nearest_index(int32_t in_size, int32_t out_size, int32_t i) {
  const double step = static_cast<double>(in_size) / out_size;
  double position = step * 0.5;
  while (i > 0) {
    position += step;
    --i;
    const double next = position + step, limit = next_power_of_two(position);
    if (i == 0 || next >= limit) continue;
    position = next;
    --i;
    const double increment = (position + step) - position;
    double jumps = static_cast<double>(static_cast<int64_t>((limit - position) / increment));
    if (position + jumps * increment >= limit) jumps -= 1.0;
    if (position + step >= limit || jumps < 1.0) continue;
    jumps = jumps < i ? jumps : static_cast<double>(i);
    position += jumps * increment;
    i -= static_cast<int32_t>(jumps);
  }
  const int32_t index = static_cast<int32_t>(position);
  return index < in_size ? index : in_size - 1;
}

}  // namespace vpt
