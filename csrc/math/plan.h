// One row of a region plan. The writer is vpt_kernels/roi_patch_embed/geometry.py (class Column).
#pragma once

#include "host_device.h"

namespace vpt {

struct Size {
  int32_t width, height;
};

struct Region {
  int32_t image;
  Size image_size;
  int32_t left, top;
  Size crop;
  Size nearest[3];  // sizes after each NEAREST step; a step that is not taken repeats the size before it
  Size resized;
  int32_t filter;
  int32_t vertical_first;
  int32_t window_left, window_top;
  Size grid;  // in patches
  int32_t patch_size, merge_size;
  int32_t first_row;

  VPT_HD int64_t rows() const { return static_cast<int64_t>(grid.width) * grid.height; }
  VPT_HD int32_t block_rows() const { return grid.height / merge_size; }
  VPT_HD int64_t rows_per_block_row() const { return static_cast<int64_t>(grid.width) * merge_size; }
};
static_assert(sizeof(Region) == 24 * sizeof(int32_t), "one int32 table row");

// Row of patch (y, x) of the grid, relative to the region: merge blocks row-major, then the patches of a block.
VPT_HD int64_t patch_row(const Region& r, int32_t y, int32_t x) {
  const int64_t m = r.merge_size;
  const int64_t block = (y / m) * (r.grid.width / m) + x / m;
  return (block * m + y % m) * m + x % m;
}

}  // namespace vpt
