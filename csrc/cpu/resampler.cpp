#include "resampler.h"

#include <cstring>

namespace vpt::cpu {

void Taps::build(const Axis& axis, int32_t from, int32_t to, const Simd& simd) {
  identity = axis.identity();
  groups = 0;
  if (identity) return;
  int32_t most = 0;
  for (int32_t out = from; out < to; ++out) most = std::max(most, axis.end(out) - axis.first(out));
  groups = (most + kTapGroup - 1) / kTapGroup;
  first.resize(to - from);
  packed.resize(static_cast<size_t>(to - from) * groups * simd.words);
  int32_t* words = packed.data();
  for (int32_t out = from; out < to; ++out) {
    first[out - from] = axis.first(out);
    const int32_t count = axis.end(out) - axis.first(out);
    const double sum = weight_sum(axis, out);
    for (int group = 0; group < groups; ++group, words += simd.words) {
      int32_t weights[kTapGroup];
      for (int t = 0; t < kTapGroup; ++t) {
        const int32_t tap = group * kTapGroup + t;
        weights[t] = tap < count ? fixed_weight(axis, out, tap, sum) : 0;
      }
      simd.pack(weights, words);
    }
  }
}

// source[i] of the last NEAREST step, traced back through the earlier ones to the crop.
static void trace_nearest(const int32_t sizes[4], std::vector<int32_t>& source) {
  source.resize(sizes[0]);
  for (int32_t i = 0; i < sizes[0]; ++i) source[i] = i;
  std::vector<int32_t> step, before;
  for (int s = 0; s < 3; ++s) {
    if (sizes[s + 1] == sizes[s]) continue;
    step.resize(sizes[s + 1]);
    nearest_indices(sizes[s], sizes[s + 1], step.data());
    before.swap(source);
    source.resize(sizes[s + 1]);
    for (int32_t i = 0; i < sizes[s + 1]; ++i) source[i] = before[step[i]];
  }
}

void Resampler::build(const Region& region, const Image& image, const Simd& simd) {
  region_ = &region;
  image_ = image;
  simd_ = &simd;
  const Size* steps = region.nearest;
  nearest_ = region.has_nearest();
  if (nearest_) {
    const int32_t widths[4] = {region.crop.width, steps[0].width, steps[1].width, steps[2].width};
    const int32_t heights[4] = {region.crop.height, steps[0].height, steps[1].height, steps[2].height};
    trace_nearest(widths, xs_);
    trace_nearest(heights, ys_);
  }
  valid_width_ = region.valid_width();
  valid_height_ = region.valid_height();
  across_.build(
      Axis(steps[2].width, region.resized.width, region.filter), region.window_left, region.window_left + valid_width_,
      simd);
  down_.build(
      Axis(steps[2].height, region.resized.height, region.filter), region.window_top, region.window_top + valid_height_,
      simd);
}

void Resampler::gather(int32_t y, uint8_t* out) const {
  const Region& r = *region_;
  const int64_t row = r.top + (nearest_ ? ys_[y] : y);
  const uint8_t* source = image_.data + row * image_.row_stride + r.left * image_.pixel_stride;
  const int64_t width = r.nearest[2].width;
  if (!nearest_ && image_.pixel_stride == 3 && image_.channel_stride == 1) {
    std::memcpy(out, source, 3 * width);
    return;
  }
  for (int64_t x = 0; x < width; ++x) {
    const uint8_t* pixel = source + (nearest_ ? xs_[x] : x) * image_.pixel_stride;
    for (int c = 0; c < 3; ++c) out[3 * x + c] = pixel[c * image_.channel_stride];
  }
}

}  // namespace vpt::cpu
