// One region on the CPU: its coefficients, and its resampled rows one after the other.
#pragma once

#include <algorithm>
#include <vector>

#include "../math/plan.h"
#include "../math/resample.h"
#include "../stable.h"
#include "simd.h"

namespace vpt::cpu {

struct Image {
  const uint8_t* data;
  int64_t row_stride, pixel_stride, channel_stride;
};

// The taps of a run of outputs along one axis, counted from the run's first, packed for the instruction set.
struct Taps {
  bool identity = true;
  int groups = 0;
  std::vector<int32_t> first, packed;

  void build(const Axis& axis, int32_t from, int32_t to, const Simd& simd);
  const int32_t* words(int32_t out, const Simd& simd) const {
    return packed.data() + static_cast<int64_t>(out) * groups * simd.words;
  }
};

// Buffers of one worker thread, kept between calls.
struct Scratch {
  Workspace source, ring, column, row;
  std::vector<const uint8_t*> taps;
  std::vector<int32_t> held;
};

class Resampler {
 public:
  void build(const Region& region, const Image& image, const Simd& simd);

  const Region& region() const { return *region_; }
  // Pixels of the window that the resized image covers; the rest is padding.
  int32_t valid_width() const { return valid_width_; }
  int32_t valid_height() const { return valid_height_; }
  bool padded() const {
    return valid_width_ < region_->grid.width * region_->patch_size ||
        valid_height_ < region_->grid.height * region_->patch_size;
  }

  // Calls sink(y, row) for the window's rows y in [begin, end); row holds valid_width() RGB pixels.
  template <typename Sink>
  void rows(int32_t begin, int32_t end, Scratch& scratch, Sink&& sink) const;

 private:
  void gather(int32_t y, uint8_t* out) const;

  const Region* region_ = nullptr;
  Image image_{};
  const Simd* simd_ = nullptr;
  int32_t valid_width_ = 0, valid_height_ = 0;
  bool nearest_ = false;
  std::vector<int32_t> xs_, ys_;  // NEAREST source columns and rows, relative to the crop
  Taps across_, down_;
};

inline int64_t padded_bytes(int64_t pixels) { return (3 * pixels + 63) / 64 * 64 + kRowSlack; }

template <typename Sink>
void Resampler::rows(int32_t begin, int32_t end, Scratch& scratch, Sink&& sink) const {
  if (begin >= end) return;
  const int32_t in_width = region_->nearest[2].width;
  const bool across_first = !region_->vertical_first || down_.identity;
  const int32_t held_width = across_first && !across_.identity ? valid_width_ : in_width;
  const int taps = down_.identity ? 1 : down_.groups * kTapGroup;
  // Vectors of taps may start at the last pixel and reach a whole group beyond it.
  const int64_t source_bytes = padded_bytes(in_width + across_.groups * kTapGroup + kTapGroup);
  const int64_t held_bytes = std::max(padded_bytes(held_width), across_first ? 0 : source_bytes);
  uint8_t* source = scratch.source.reserve<uint8_t>(source_bytes);
  uint8_t* ring = scratch.ring.reserve<uint8_t>(held_bytes * taps);
  uint8_t* column = scratch.column.reserve<uint8_t>(source_bytes);
  uint8_t* row = scratch.row.reserve<uint8_t>(padded_bytes(valid_width_));
  scratch.held.assign(taps, -1);
  scratch.taps.resize(taps);
  const int32_t* columns = across_.first.data();
  // Without a horizontal pass the window's left edge is cut off at the end.
  const int64_t cut = across_.identity ? 3 * static_cast<int64_t>(region_->window_left) : 0;

  auto hold = [&](int32_t y) -> const uint8_t* {
    uint8_t* slot = ring + (y % taps) * held_bytes;
    if (scratch.held[y % taps] == y) return slot;
    scratch.held[y % taps] = y;
    if (across_first && !across_.identity) {
      gather(y, source);
      simd_->horizontal(source, columns, across_.packed.data(), across_.groups, valid_width_, slot);
    } else {
      gather(y, slot);
    }
    return slot;
  };
  const int32_t in_height = region_->nearest[2].height;
  for (int32_t y = begin; y < end; ++y) {
    const uint8_t* result;
    if (down_.identity) {
      result = hold(y + region_->window_top);
    } else {
      // Taps beyond the last row have weight zero: any held row will do.
      for (int t = 0; t < taps; ++t)
        scratch.taps[t] = down_.first[y] + t < in_height ? hold(down_.first[y] + t) : scratch.taps[t - 1];
      uint8_t* target = across_first && !across_.identity ? row : column;
      const int64_t bytes = 3 * static_cast<int64_t>(held_width);
      simd_->vertical(scratch.taps.data(), down_.words(y, *simd_), down_.groups, bytes, target);
      result = target;
    }
    if (!across_first && !across_.identity) {
      simd_->horizontal(result, columns, across_.packed.data(), across_.groups, valid_width_, row);
      result = row;
    }
    sink(y, result + cut);
  }
}

}  // namespace vpt::cpu
