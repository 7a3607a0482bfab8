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
  // Pixels of the window that the resized image covers; the rest is padding.
  VPT_HD int32_t valid_width() const { return smaller(resized.width - window_left, grid.width * patch_size); }
  VPT_HD int32_t valid_height() const { return smaller(resized.height - window_top, grid.height * patch_size); }
  VPT_HD bool has_nearest() const {
    return nearest[0].width != crop.width || nearest[0].height != crop.height || nearest[1].width != crop.width ||
        nearest[1].height != crop.height || nearest[2].width != crop.width || nearest[2].height != crop.height;
  }

 private:
  VPT_HD static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
};
static_assert(sizeof(Region) == 24 * sizeof(int32_t), "one int32 table row");

// Row of patch (y, x) of the grid, relative to the region: merge blocks row-major, then the patches of a block.
VPT_HD int64_t patch_row(const Region& r, int32_t y, int32_t x) {
  const int64_t m = r.merge_size;
  const int64_t block = (y / m) * (r.grid.width / m) + x / m;
  return (block * m + y % m) * m + x % m;
}

// Entry of the bias table [2, p + 1] for patch (y, x): by valid rows at the bottom edge, by valid columns at the right.
VPT_HD int32_t bias_entry(const Region& r, int32_t y, int32_t x) {
  const int32_t p = r.patch_size;
  const int32_t below = r.valid_height() - y * p, beside = r.valid_width() - x * p;
  const int32_t tall = below < 0 ? 0 : below < p ? below : p, wide = beside < 0 ? 0 : beside < p ? beside : p;
  return tall < p ? tall : wide < p ? p + 1 + wide : p;
}

}  // namespace vpt
