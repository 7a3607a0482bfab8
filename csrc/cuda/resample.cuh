// Pillow's two-pass resampling of regions, written as rows of patches. The usual path does both passes of a tile of the
// window in shared memory, one block per tile; a tile that does not fit goes through device memory, one launch per pass.
// The axis that is resampled first is called a, the other b.
#pragma once

#include "../math/rounding.h"
#include "staging.cuh"
#include "tables.cuh"

namespace vpt::cuda {

constexpr int kResampleThreads = 256, kResampleBlocks = 3, kAxisThreads = 128;
constexpr int kSharedBytes = 48 << 10;  // what every device grants without being asked
constexpr int kLargestTile = 32, kSmallestTile = 8;
// Of source rows: a tile of 28x28 pixels at scale 3.5 takes 13 KB besides, of 100 KB that three blocks share.
constexpr int kStageBytes = 10 << 10;
constexpr int kLeastLines = 8;         // that are worth a stage, with 28 outputs each for 256 threads
constexpr int kRegionsPerLaunch = 24;  // as kernel parameters, within 4 KB
constexpr int kPixelZero = 128;
constexpr int kBiasParts = 3;  // a float32 bias as that many values of 8 bits or more
constexpr int kBiasEntries = 64;

struct Pixels {
  const uint8_t* base;
  int64_t row_stride, pixel_stride, channel_stride;
};

// Rows [row_begin, row_end) of a region's window, in tiles.
struct Work {
  Region region;
  Pixels image;
  const int32_t* tables;
  int32_t row_begin, row_end;
  int32_t tile, tiles_across, first_block;

  VPT_HD int32_t tiles() const { return tiles_across * ((row_end - row_begin + tile - 1) / tile); }
};

// The matrix of patches: row r of the plan is row r − first_row. Columns beyond the pixels select the patch's bias.
struct PatchRows {
  void* base;
  int64_t first_row, stride;
  int32_t pixel_columns, columns;
  int32_t entries;             // of the bias table that are in use; 0: no bias columns
  int16_t used[kBiasEntries];  // which; if there are more than that, all are, in order
};

// The folded weight followed by columns that hold the biases.
struct BiasColumns {
  const void* weight;  // [outputs, pixel_columns], rows `stride` apart
  const float* biases;
  void* out;  // [outputs, columns]
  int64_t outputs, stride;
  bool wide;  // rows of both begin at multiples of 16 bytes
};

struct PatchParams {
  PatchRows rows;
  BiasColumns bias;
  int32_t works, blocks;  // blocks that resample; any beyond write bias columns
  Work work[kRegionsPerLaunch];
};
static_assert(sizeof(PatchParams) <= 4096, "the size of kernel parameters that every device takes");

// How shared memory is divided for one tile; all counts are upper bounds.
struct TileLayout {
  int32_t row_a, row_b, span_a, span_b, tile;
  bool nearest, down_first;
  bool packed;  // pixels of a row follow one another

  VPT_HD TileLayout(
      const WindowAxis& a, const WindowAxis& b, int32_t tile_size, const Pixels& image, bool vertical_first)
      : row_a(a.row_words()),
        row_b(b.row_words()),
        span_a(a.max_span(tile_size)),
        span_b(b.max_span(tile_size)),
        tile(tile_size),
        nearest(a.nearest() || b.nearest()),
        down_first(vertical_first),
        packed(image.pixel_stride == 3 && image.channel_stride == 1) {}

  // int32 words: the tables' rows of both axes, NEAREST sources; then the bytes between the passes.
  VPT_HD int64_t words() const {
    return tile * (static_cast<int64_t>(row_a) + row_b) + (nearest ? span_a + span_b : 0);
  }
  VPT_HD int64_t bytes() const { return 4 * words() + 3 * static_cast<int64_t>(tile) * span_b; }

  // Behind them the stage for source rows, in what is left; what NEAREST steps skip is not worth the way there.
  VPT_HD int64_t stage_begin() const { return (bytes() + Rectangle::kWide - 1) / Rectangle::kWide * Rectangle::kWide; }
  VPT_HD int64_t stage_bytes() const {
    if (nearest || !packed) return 0;
    const int64_t all = down_first ? Rectangle::most(span_a, 3 * span_b) : Rectangle::most(span_b, 3 * span_a);
    const int64_t left = kSharedBytes - stage_begin(), most = left < kStageBytes ? left : kStageBytes;
    return all < most ? all : most;
  }
  // Lines of `span` inputs, that a stage holds at once, or 0 if these are too few.
  VPT_HD int32_t staged_lines(int32_t span, int32_t lines) const {
    const int64_t left = stage_bytes() - (Rectangle::kWide - 1), gap = Rectangle::kWide - 1;
    const int64_t fit = left <= 0 ? 0
        : down_first              ? (left / span - gap) / 3
                                  : left / (3 * static_cast<int64_t>(span) + gap);
    return fit >= lines ? lines : fit >= kLeastLines ? static_cast<int32_t>(fit) : 0;
  }
  VPT_HD int64_t shared() const { return stage_bytes() > 0 ? stage_begin() + stage_bytes() : bytes(); }
};

__device__ __forceinline__ uint8_t clip8(int32_t sum) {
  const int32_t value = sum >> kPrecisionBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

template <typename T>
__device__ __forceinline__ T patch_value(int32_t pixel) {
  if constexpr (sizeof(T) == 1)
    return static_cast<T>(pixel);
  else
    return from_float<T>(static_cast<float>(pixel - kPixelZero) * 0x1p-8f);
}

__device__ __forceinline__ int32_t entry_columns(const PatchRows& rows) { return kBiasParts * rows.entries; }

// Pixel (y, x) of the window: three columns of its patch's row, and at the patch's corner its bias columns.
template <typename T>
__device__ __forceinline__ void put(
    const PatchRows& rows, const Region& r, int32_t y, int32_t x, const int32_t rgb[3]) {
  const int32_t p = r.patch_size, patch_y = y / p, patch_x = x / p;
  const int32_t in_y = y - patch_y * p, in_x = x - patch_x * p;
  T* row = static_cast<T*>(rows.base) + (r.first_row + patch_row(r, patch_y, patch_x) - rows.first_row) * rows.stride;
  T* out = row + 3 * (static_cast<int64_t>(in_y) * p + in_x);
  for (int c = 0; c < 3; ++c) out[c] = patch_value<T>(rgb[c]);
  if constexpr (sizeof(T) > 1) {
    if (in_y != 0 || in_x != 0) return;
    const int32_t entry = bias_entry(r, patch_y, patch_x);
    int32_t place = 0;
    if (rows.entries > kBiasEntries)
      place = entry;
    else
      while (place + 1 < rows.entries && rows.used[place] != entry) ++place;
    for (int32_t column = rows.pixel_columns; column < rows.columns; ++column) {
      const int32_t part = column - rows.pixel_columns - kBiasParts * place;
      row[column] = from_float<T>(part >= 0 && part < kBiasParts ? 1.f : 0.f);
    }
  }
}

__device__ __forceinline__ void copy(const int32_t* from, int32_t n, int32_t* to, int thread, int threads) {
  for (int32_t i = thread; i < n; i += threads) to[i] = from[i];
}

// The first pass of `lines` lines, as bytes [lines, tile] pixels. `in` is where the first line's inputs begin, or with
// NEAREST sources the crop.
template <typename Stride>
__device__ __forceinline__ void first_pass(
    const uint8_t* in, Stride along, Stride across, Stride channel, const int32_t* source_a, const int32_t* source_b,
    const int32_t* rows_a, const TileLayout& layout, int32_t outputs, int32_t lines, uint8_t* middle) {
  const int32_t low = rows_a[0];
  for (int32_t i = threadIdx.x; i < lines * outputs; i += blockDim.x) {
    const int32_t line = i / outputs, a = i - line * outputs;
    const uint8_t* from = in + (source_b == nullptr ? line : source_b[line]) * across;
    const int32_t* row = rows_a + a * layout.row_a;
    const int32_t first = row[0] - low, count = row[1];
    const int32_t* weights = row + 2;
    int32_t sums[3] = {1 << (kPrecisionBits - 1), 1 << (kPrecisionBits - 1), 1 << (kPrecisionBits - 1)};
    // Unrolled further, 64-bit addresses of taps and their channels take more registers than three blocks have.
#pragma unroll 2
    for (int32_t t = 0; t < count; ++t) {
      const uint8_t* pixel = from + (source_a == nullptr ? first + t : source_a[first + t]) * along;
      for (int c = 0; c < 3; ++c) sums[c] += weights[t] * pixel[c * channel];
    }
    uint8_t* out = middle + 3 * (line * layout.tile + a);
    for (int c = 0; c < 3; ++c) out[c] = clip8(sums[c]);
  }
}

// One tile of the window at (top, left): both passes.
template <typename T>
__device__ void resample_tile(const Work& work, const PatchRows& rows, int32_t number, unsigned char* shared) {
  const Region& r = work.region;
  const bool down_first = r.vertical_first != 0;
  const WindowAxis axis_a(r, down_first), axis_b(r, !down_first);
  const AxisTable table_a(axis_a, table_of(r, down_first, work.tables));
  const AxisTable table_b(axis_b, table_of(r, !down_first, work.tables));
  const TileLayout layout(axis_a, axis_b, work.tile, work.image, down_first);
  const int32_t top = work.row_begin + number / work.tiles_across * work.tile;
  const int32_t left = number % work.tiles_across * work.tile;
  const int32_t width = r.grid.width * r.patch_size;
  const int32_t bottom = top + work.tile < work.row_end ? top + work.tile : work.row_end;
  const int32_t right = left + work.tile < width ? left + work.tile : width;
  const int32_t a0 = down_first ? top : left, b0 = down_first ? left : top;
  const int32_t a1 = down_first ? bottom : right, b1 = down_first ? right : bottom;
  const int32_t valid_a = (a1 < axis_a.valid ? a1 : axis_a.valid) - a0;
  const int32_t valid_b = (b1 < axis_b.valid ? b1 : axis_b.valid) - b0;
  const int thread = threadIdx.x, threads = blockDim.x;

  int32_t* rows_a = reinterpret_cast<int32_t*>(shared);
  int32_t* rows_b = rows_a + layout.tile * layout.row_a;
  int32_t* source_a = rows_b + layout.tile * layout.row_b;
  int32_t* source_b = source_a + (layout.nearest ? layout.span_a : 0);
  uint8_t* middle = shared + 4 * layout.words();  // [inputs of b, tile] pixels

  if (valid_a > 0 && valid_b > 0) {
    copy(table_a.row(a0), valid_a * layout.row_a, rows_a, thread, threads);
    copy(table_b.row(b0), valid_b * layout.row_b, rows_b, thread, threads);
    const int32_t low_a = table_a.first(a0), low_b = table_b.first(b0);
    const int32_t lines = table_b.end(b0 + valid_b - 1) - low_b, span_a = table_a.end(a0 + valid_a - 1) - low_a;
    if (layout.nearest) {
      for (int32_t i = thread; i < span_a; i += threads) source_a[i] = table_a.source(low_a + i);
      for (int32_t i = thread; i < lines; i += threads) source_b[i] = table_b.source(low_b + i);
    }
    const int64_t stride_a = down_first ? work.image.row_stride : work.image.pixel_stride;
    const int64_t stride_b = down_first ? work.image.pixel_stride : work.image.row_stride;
    const uint8_t* crop = work.image.base + r.top * work.image.row_stride + r.left * work.image.pixel_stride;
    const uint8_t* in = crop + low_a * stride_a + low_b * stride_b;
    const int32_t at_once = layout.staged_lines(span_a, lines);
    if (at_once == 0) {
      __syncthreads();
      first_pass<int64_t>(
          layout.nearest ? crop : in, stride_a, stride_b, work.image.channel_stride,
          layout.nearest ? source_a : nullptr, layout.nearest ? source_b : nullptr, rows_a, layout, valid_a, lines,
          middle);
      __syncthreads();
    }
    for (int32_t begin = 0; at_once > 0 && begin < lines; begin += at_once) {
      const int32_t n = lines - begin < at_once ? lines - begin : at_once;
      const Rectangle source{
          in + begin * stride_b, work.image.row_stride, down_first ? span_a : n, 3 * (down_first ? n : span_a)};
      const uint8_t* staged = source.bring(shared + layout.stage_begin(), thread, threads);
      __syncthreads();
      const int32_t apart = source.pitch();
      first_pass<int32_t>(
          staged, down_first ? apart : 3, down_first ? 3 : apart, 1, nullptr, nullptr, rows_a, layout, valid_a, n,
          middle + 3 * begin * layout.tile);
      __syncthreads();
    }

    for (int32_t i = thread; i < valid_a * valid_b; i += threads) {
      // Neighbouring threads write neighbouring pixels of the window.
      const int32_t n = down_first ? valid_b : valid_a, slow = i / n, fast = i - slow * n;
      const int32_t a = down_first ? slow : fast, b = down_first ? fast : slow;
      const int32_t* row = rows_b + b * layout.row_b;
      const int32_t first = row[0], count = row[1];
      const int32_t* weights = row + 2;
      const uint8_t* in = middle + 3 * ((first - low_b) * layout.tile + a);
      int32_t sums[3] = {1 << (kPrecisionBits - 1), 1 << (kPrecisionBits - 1), 1 << (kPrecisionBits - 1)};
      for (int32_t t = 0; t < count; ++t, in += 3 * layout.tile)
        for (int c = 0; c < 3; ++c) sums[c] += weights[t] * in[c];
      const int32_t rgb[3] = {clip8(sums[0]), clip8(sums[1]), clip8(sums[2])};
      put<T>(rows, r, down_first ? a0 + a : b0 + b, down_first ? b0 + b : a0 + a, rgb);
    }
  }

  if (valid_a == a1 - a0 && valid_b == b1 - b0) return;
  const int32_t tile_width = right - left, pixels = (bottom - top) * tile_width;
  const int32_t padding[3] = {kPixelZero, kPixelZero, kPixelZero};
  for (int32_t i = thread; i < pixels; i += threads) {
    const int32_t y = top + i / tile_width, x = left + i % tile_width;
    if (x >= r.valid_width() || y >= r.valid_height()) put<T>(rows, r, y, x, padding);
  }
}

// One row of the weight with the parts of the used biases behind it. T's own precision would do for the parts; those of
// float32 are bfloat16, so that they are exact in TensorFloat-32 too, which the library may be told to use. The smallest
// comes first: a sum that runs along the row is then rounded at its full size only once more.
template <typename T>
__device__ void write_bias_columns(const PatchRows& rows, const BiasColumns& bias, int64_t output) {
  constexpr int kVector = 16 / sizeof(T);
  const T* weight = static_cast<const T*>(bias.weight) + output * bias.stride;
  T* out = static_cast<T*>(bias.out) + output * rows.columns;
  const int32_t vectors = bias.wide ? rows.pixel_columns / kVector : 0;
  for (int32_t i = threadIdx.x; i < vectors; i += blockDim.x)
    store<T, kVector>(out + i * kVector, load<T, kVector>(weight + i * kVector));
  for (int32_t i = vectors * kVector + threadIdx.x; i < rows.columns; i += blockDim.x) {
    const int32_t extra = i - rows.pixel_columns;
    if (extra < 0) {
      out[i] = weight[i];
      continue;
    }
    float value = 0.f;
    if (extra < entry_columns(rows)) {
      const int32_t place = extra / kBiasParts;
      const int32_t entry = rows.entries > kBiasEntries ? place : rows.used[place];
      float rest = bias.biases[entry * bias.outputs + output];
      for (int part = 0; part < kBiasParts - extra % kBiasParts; ++part) {
        if constexpr (sizeof(T) == sizeof(float))
          value = to_float(from_float<BFloat16>(rest));
        else
          value = to_float(from_float<T>(rest));
        // Beyond float16's range the first part is infinite, and so is the product: the others add nothing.
        rest = value - value == 0.f ? rest - value : 0.f;
      }
    }
    out[i] = from_float<T>(value);
  }
}

// T: uint8 pixels, or (pixel − 128)/256 in the type of the weight.
template <typename T>
__global__ void __launch_bounds__(kResampleThreads, kResampleBlocks)
    patch_kernel(const __grid_constant__ PatchParams p) {
  VPT_DYNAMIC_SHARED(shared);
  wait_for_kernel_before();
  const int32_t block = blockIdx.x;
  if (block >= p.blocks) {
    if constexpr (sizeof(T) > 1) write_bias_columns<T>(p.rows, p.bias, block - p.blocks);
    return;
  }
  int32_t number = 0;
  while (number + 1 < p.works && p.work[number + 1].first_block <= block) ++number;
  resample_tile<T>(p.work[number], p.rows, block - p.work[number].first_block, shared);
}

// One pass through device memory: window outputs [out_begin, out_end) of an axis for lines [line_begin, line_end) of the
// other, the image's own lines in the first pass and the window's in the last.
struct AxisParams {
  Region region;
  Pixels in;  // first pass: the image. last: what the first has written, [lines of b, outputs of a, 3]
  const int32_t* tables;
  PatchRows rows;
  uint8_t* middle;  // written by the first pass
  bool vertical, last;
  int32_t out_begin, out_end, line_begin, line_end;
  int32_t in_begin;  // last pass: the line of b that `in` begins with
};

// One block per output and kAxisThreads lines. The weights are read a chunk at a time, so that any number of taps fits.
template <typename T>
__global__ void __launch_bounds__(kAxisThreads) axis_kernel(const __grid_constant__ AxisParams p) {
  __shared__ int32_t weights[kAxisThreads], sources[kAxisThreads];
  allow_kernel_after();
  wait_for_kernel_before();
  const WindowAxis axis(p.region, p.vertical), other(p.region, !p.vertical);
  const AxisTable table(axis, table_of(p.region, p.vertical, p.tables));
  const AxisTable lines(other, table_of(p.region, !p.vertical, p.tables));
  const int32_t outputs = p.out_end - p.out_begin;
  const int32_t i = p.out_begin + static_cast<int32_t>(blockIdx.x % outputs);
  const int32_t line = p.line_begin + static_cast<int32_t>(blockIdx.x / outputs) * kAxisThreads + threadIdx.x;
  const bool mine = line < p.line_end, covered = i < axis.valid;
  const bool reads = mine && (!p.last || line < other.valid);
  const int32_t* row = table.row(i);
  const int32_t first = covered ? row[0] : 0, taps = covered ? row[1] : 0;
  const int64_t along = p.vertical ? p.in.row_stride : p.in.pixel_stride;
  const int64_t across = p.vertical ? p.in.pixel_stride : p.in.row_stride;
  const uint8_t* in = p.in.base;
  if (p.last) {
    in += (line - p.line_begin) * across;
  } else if (reads) {
    in += p.region.top * p.in.row_stride + p.region.left * p.in.pixel_stride + lines.source(line) * across;
  }
  int32_t sums[3] = {1 << (kPrecisionBits - 1), 1 << (kPrecisionBits - 1), 1 << (kPrecisionBits - 1)};
  for (int32_t begin = 0; begin < taps; begin += kAxisThreads) {
    const int32_t n = taps - begin < kAxisThreads ? taps - begin : kAxisThreads, t = threadIdx.x;
    if (t < n) {
      weights[t] = row[2 + begin + t];
      sources[t] = p.last ? first + begin + t - p.in_begin : table.source(first + begin + t);
    }
    __syncthreads();
    for (int32_t k = 0; reads && k < n; ++k) {
      const uint8_t* pixel = in + sources[k] * along;
      for (int c = 0; c < 3; ++c) sums[c] += weights[k] * pixel[c * p.in.channel_stride];
    }
    __syncthreads();
  }
  if (!mine) return;
  if (!p.last) {
    uint8_t* out = p.middle + 3 * (static_cast<int64_t>(line - p.line_begin) * outputs + (i - p.out_begin));
    for (int c = 0; c < 3; ++c) out[c] = clip8(sums[c]);
    return;
  }
  int32_t rgb[3] = {kPixelZero, kPixelZero, kPixelZero};
  if (covered && reads)
    for (int c = 0; c < 3; ++c) rgb[c] = clip8(sums[c]);
  put<T>(p.rows, p.region, p.vertical ? i : line, p.vertical ? line : i, rgb);
}

}  // namespace vpt::cuda
