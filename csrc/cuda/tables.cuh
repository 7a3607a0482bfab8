// Pillow's coefficients and NEAREST sources of a region's axes, made once per call: what resamples reads integers.
#pragma once

#include "../math/plan.h"
#include "../math/resample.h"
#include "kernel.h"

namespace vpt::cuda {

constexpr int kTableThreads = 128;
constexpr int kTableOutputs = 16;     // of one block: their weights are added up one after the other
constexpr int kTablesPerLaunch = 36;  // as kernel parameters, within 4 KB

// One axis of a region, in coordinates of the window: output i of the window is output offset + i of the axis.
struct WindowAxis {
  int32_t inputs, outputs, filter;
  int32_t offset, valid;  // outputs of the window from `valid` on are padding
  int32_t sizes[4];       // of the crop and after each NEAREST step

  VPT_HD WindowAxis(const Region& r, bool vertical)
      : inputs(vertical ? r.nearest[2].height : r.nearest[2].width),
        outputs(vertical ? r.resized.height : r.resized.width),
        filter(r.filter),
        offset(vertical ? r.window_top : r.window_left),
        valid(vertical ? r.valid_height() : r.valid_width()),
        sizes{
            vertical ? r.crop.height : r.crop.width, vertical ? r.nearest[0].height : r.nearest[0].width,
            vertical ? r.nearest[1].height : r.nearest[1].width, inputs} {}

  VPT_HD bool identity() const { return inputs == outputs; }
  VPT_HD bool nearest() const { return sizes[0] != sizes[1] || sizes[1] != sizes[2] || sizes[2] != sizes[3]; }
  // Bounds for any output, and for any run of n outputs; of integers, so that a kernel divides no doubles for them.
  VPT_HD int32_t max_taps() const {
    const int32_t radius = filter == kBilinear ? 1 : 2, longer = inputs > outputs ? inputs : outputs;
    return identity() ? 1 : 2 * (radius * longer / outputs + 1) + 1;
  }
  VPT_HD int32_t max_span(int32_t n) const {
    const int64_t span = static_cast<int64_t>(n - 1) * inputs / outputs + max_taps() + 2;
    return identity() ? n : span < inputs ? static_cast<int32_t>(span) : inputs;
  }

  // The table: a row per output of the window (first input, number of taps, weights), then the sources of the inputs.
  VPT_HD int32_t row_words() const { return 2 + max_taps(); }
  VPT_HD int64_t sources_begin() const { return static_cast<int64_t>(valid) * row_words(); }
  VPT_HD int64_t words() const { return sources_begin() + (nearest() ? inputs : 0); }
  VPT_HD int32_t row_blocks() const { return (valid + kTableOutputs - 1) / kTableOutputs; }
  VPT_HD int32_t blocks() const {
    return row_blocks() + (nearest() ? (inputs + kTableThreads - 1) / kTableThreads : 0);
  }

  VPT_HD Axis axis() const { return Axis(inputs, outputs, filter); }
  // Taps of a window output: inputs [first, end). Without resampling there is one, of weight one.
  VPT_HD int32_t first(int32_t i) const { return identity() ? offset + i : axis().first(offset + i); }
  VPT_HD int32_t end(int32_t i) const { return identity() ? offset + i + 1 : axis().end(offset + i); }
  // Where input i lies in the crop.
  VPT_HD int32_t source(int32_t i) const {
#pragma unroll
    for (int step = 3; step > 0; --step)
      if (sizes[step] != sizes[step - 1]) i = nearest_index(sizes[step - 1], sizes[step], i);
    return i;
  }
};

// A region's tables: of its columns, then of its rows.
struct RegionTables {
  Region region;
  int32_t* words;
  int32_t first_block;
};

struct TableParams {
  int32_t regions;
  RegionTables of[kTablesPerLaunch];
};
static_assert(sizeof(TableParams) <= 4096, "the size of kernel parameters that every device takes");

// Rows [begin, begin + n) of an axis: their sums one thread each, the longest chain of dependent operations here, and
// then all weights at once.
__device__ inline void write_rows(const WindowAxis& window, int32_t begin, int32_t n, int32_t* table, double* sums) {
  const Axis axis = window.axis();
  const int32_t words = window.row_words(), most = window.max_taps();
  int32_t* rows = table + static_cast<int64_t>(begin) * words;
  for (int32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const int32_t first = window.first(begin + i);
    rows[i * words] = first;
    rows[i * words + 1] = window.end(begin + i) - first;
    sums[i] = window.identity() ? 1.0 : weight_sum(axis, window.offset + begin + i);
  }
  __syncthreads();
  for (int32_t k = threadIdx.x; k < n * most; k += blockDim.x) {
    const int32_t i = k / most, t = k - i * most;
    rows[i * words + 2 + t] =
        window.identity() ? 1 << kPrecisionBits : fixed_weight(axis, window.offset + begin + i, t, sums[i]);
  }
}

__global__ void __launch_bounds__(kTableThreads) table_kernel(const __grid_constant__ TableParams p) {
  __shared__ double sums[kTableOutputs];
  allow_kernel_after();
  int32_t number = 0, block = blockIdx.x;
  while (number + 1 < p.regions && p.of[number + 1].first_block <= block) ++number;
  const RegionTables& tables = p.of[number];
  block -= tables.first_block;
  const WindowAxis across(tables.region, false);
  const bool vertical = block >= across.blocks();
  if (vertical) block -= across.blocks();
  const WindowAxis window(tables.region, vertical);
  int32_t* table = tables.words + (vertical ? across.words() : 0);
  if (block < window.row_blocks()) {
    const int32_t begin = block * kTableOutputs, left = window.valid - begin;
    write_rows(window, begin, left < kTableOutputs ? left : kTableOutputs, table, sums);
    return;
  }
  const int32_t i = (block - window.row_blocks()) * kTableThreads + threadIdx.x;
  if (i < window.inputs) table[window.sources_begin() + i] = window.source(i);
}

// One axis's table, as it is read.
struct AxisTable {
  const int32_t* words;
  int32_t row_words;
  const int32_t* sources;  // null: no NEAREST step moves them

  VPT_HD AxisTable(const WindowAxis& axis, const int32_t* table)
      : words(table), row_words(axis.row_words()), sources(axis.nearest() ? table + axis.sources_begin() : nullptr) {}

  VPT_HD const int32_t* row(int32_t i) const { return words + static_cast<int64_t>(i) * row_words; }
  VPT_HD int32_t first(int32_t i) const { return row(i)[0]; }
  VPT_HD int32_t end(int32_t i) const { return row(i)[0] + row(i)[1]; }
  VPT_HD int32_t source(int32_t i) const { return sources == nullptr ? i : sources[i]; }
};

// The tables of one axis of a region, of which those of the columns come first.
VPT_HD const int32_t* table_of(const Region& r, bool vertical, const int32_t* tables) {
  return vertical ? tables + WindowAxis(r, false).words() : tables;
}

}  // namespace vpt::cuda
