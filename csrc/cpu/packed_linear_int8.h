// Few rows times int8 or int4 weights in integers: x is rounded to 16 bits per row and block of 256 columns, products and sums
// of a block are exact in int32, and blocks are added up in float32. Included by each packed_linear_*.cpp through
// packed_linear_loops.h; V has besides: Int, zero_int, broadcast_int, load_words, dot, to_floats.
#pragma once

#include "packed_linear_tile.h"

namespace vpt {
namespace {

// 256·127·32767 < 2^31
static_assert(kDepth * 127 * 32767 < (int64_t{1} << 31));

// x as pairs of 16-bit integers, [blocks of kDepth columns][tiles of rows][pairs][rows of the tile], and behind them
// the scales, [blocks][rows]; for int4 also the sums of kGroup columns each, [tiles of rows][groups, rounded up to
// even][rows of the tile]. In all no more than x in float32.
struct Int16Rows {
  int32_t* pairs;
  float *scales, *sums;

  explicit Int16Rows(const PackedJob& job)
      : pairs(reinterpret_cast<int32_t*>(job.arranged)),
        scales(job.arranged + job.rows * job.pairs()),
        sums(scales + job.rows * ((job.columns + kDepth - 1) / kDepth)) {}
};

// Of int4, rounded up to even: minima are columns of panels.
inline int64_t even_groups(const PackedJob& job) { return (job.columns + 2 * kGroup - 1) / (2 * kGroup) * 2; }

// The largest magnitude, NaN if there is one.
template <typename T>
float largest_magnitude(const T* x, int64_t n) {
  int32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(to_float(x[i])) & 0x7FFFFFFFu);
    most = magnitude > most ? magnitude : most;
  }
  return float_of(static_cast<uint32_t>(most));
}

template <typename T>
void arrange_int16(const PackedJob& job, const Tiling& tiling, int64_t first, int64_t last) {
  constexpr float kTop = 32767.f, kRound = 12582912.f;  // 1.5·2^23 leaves the rounded integer in the low bits
  const Int16Rows to(job);
  for (int64_t t = first; t < last; ++t) {
    const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
    for (int64_t k = 0; k < job.columns; k += kDepth) {
      const int64_t given = least(kDepth, job.columns - k), pairs = least(kDepth / 2, job.pairs() - k / 2);
      int32_t* target = to.pairs + k / 2 * job.rows + pairs * row;
      for (int64_t r = 0; r < rows; ++r) {
        const T* x = static_cast<const T*>(job.x.base) + (row + r) * job.x.stride + k;
        const float most = largest_magnitude(x, given), inverse = most > 0x1p-100f ? kTop / most : 0.f;
        to.scales[k / kDepth * job.rows + row + r] = most / kTop;
        int32_t rounded[kDepth] = {};
#pragma omp simd
        for (int64_t i = 0; i < given; ++i)
          rounded[i] = static_cast<int32_t>(bits_of(VPT_FMA(to_float(x[i]), inverse, kRound)) << 10) >> 10;
        for (int64_t i = 0; i < pairs; ++i)
          target[i * rows + r] = (rounded[2 * i] & 0xFFFF) | static_cast<int32_t>(uint32_t(rounded[2 * i + 1]) << 16);
        if (job.stored != Element::int4) continue;
        const int64_t groups = least(kDepth / kGroup, even_groups(job) - k / kGroup);
        float* sums = to.sums + even_groups(job) * row + k / kGroup * rows + r;
        for (int64_t g = 0; g < groups; ++g) {
          int32_t sum = 0;
          for (int64_t i = 0; i < kGroup; ++i) sum += rounded[g * kGroup + i];
          sums[g * rows] = static_cast<float>(sum) * (most / kTop);
        }
      }
    }
  }
}

// c [R][16·P] (+)= one block of x, a [pairs][R] with a scale a row · the blocks b of P panels. Scales of the weights are
// [16] per `period` pairs, `scales[p]` those of a panel; period ≥ pairs: one for all.
template <typename V, int R, int P>
void int8_tile(
    int64_t pairs, const int32_t* a, const float* row_scales, const Int8* const* b, const float* const* scales,
    int64_t period, float* c, int64_t stride, bool add) {
  using Int = typename V::Int;
  constexpr int W = P * kVectors<V>, kSplit = split(R * W);
  for (int64_t i = 0, group = 0; i < pairs; ++group) {
    const int64_t end = least(pairs, i + period);
    Int sums[kSplit][R][W];
    for (int s = 0; s < kSplit; ++s)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) sums[s][r][w] = V::zero_int();
    const auto step = [&](int64_t pair, Int(&sum)[R][W]) __attribute__((always_inline)) {
      Int words[W];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) V::load_words(b[p] + pair * 2 * kPanel, &words[p * kVectors<V>]);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Int x = V::broadcast_int(a[pair * R + r]);
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) sum[r][w] = V::dot(sum[r][w], words[w], x);
      }
    };
    for (; i + 4 <= end; i += 4) {
      // Four pairs of 16 bytes are two lines.
      ask_for<Int8, P>(b, i), ask_for<Int8, P>(b, i + 2);
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) step(i + s, sums[s % kSplit]);
    }
    for (; i < end; ++i) step(i, sums[0]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        Int sum = sums[0][r][w];
        for (int s = 1; s < kSplit; ++s) sum = V::add_int(sum, sums[s][r][w]);
        const float* scale = scales[w / kVectors<V>] + group * kPanel + w % kVectors<V> * V::kLanes;
        const auto scaled = V::multiply(V::to_floats(sum), V::multiply(V::broadcast(row_scales[r]), V::load(scale)));
        float* target = c + r * stride + w * V::kLanes;
        V::store(target, add ? V::add(scaled, V::load(target)) : scaled);
      }
    add = true;
  }
}

template <typename V, int P, int R = V::kTileRows>
auto int8_tile_of(int64_t rows) -> decltype(&int8_tile<V, R, P>) {
  if constexpr (R > 1)
    if (rows < R) return int8_tile_of<V, P, R - 1>(rows);
  return int8_tile<V, R, P>;
}

template <typename V>
void multiply_int8(const PackedJob& job, const Tiling& tiling, int64_t first, int64_t last, float* sums) {
  const Int16Rows x(job);
  const int64_t together = job.rows == 1 ? 1 : V::kTilePanels, stride = together * kPanel;
  const int64_t groups = scale_groups(job), period = groups == 1 ? kDepth / 2 : job.group / 2;
  for (int64_t panel = first; panel < last; panel += together) {
    const int64_t panels = least(together, last - panel);
    for (int64_t k = 0; k < job.columns; k += kDepth) {
      const int64_t pairs = least(kDepth / 2, job.pairs() - k / 2);
      const Int8* b[V::kTilePanels];
      const float* scales[V::kTilePanels];
      for (int64_t p = 0; p < panels; ++p) {
        b[p] = block<Int8>(job, panel + p, k);
        scales[p] = job.scales + ((panel + p) * groups + k / job.group) * kPanel;
      }
      for (int64_t t = 0; t < tiling.count; ++t) {
        const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
        const auto run = panels == V::kTilePanels ? int8_tile_of<V, V::kTilePanels>(rows) : int8_tile_of<V, 1>(rows);
        run(pairs, x.pairs + k / 2 * job.rows + pairs * row, x.scales + k / kDepth * job.rows + row, b, scales, period,
            sums + row * stride, stride, k > 0);
      }
    }
    for (int64_t p = 0; p < panels; ++p) finish(job, sums + p * kPanel, stride, 0, job.rows, panel + p);
  }
}

}  // namespace
}  // namespace vpt
