// The product of panels, written once over the vectors `V` of an instruction set; included by each packed_linear_*.cpp
// inside its region. V has: Float, kLanes, kTileRows, kTilePanels, zero, broadcast, load, store, add, multiply,
// multiply_add, and load_pair of each stored type.
#pragma once

#include "packed_linear_epilogue.h"

namespace vpt {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename V>
constexpr int kVectors = kPanel / V::kLanes;

// c [R][16·P] (+)= a [2·pairs][R] · the blocks b of P panels, each [pairs][32] of type S. Few sums are split over several
// columns, so that no multiply-add waits for the one before it.
template <typename V, typename S, int R, int P>
void tile(int64_t pairs, const float* a, const S* const* b, float* c, int64_t stride, bool add) {
  using F = typename V::Float;
  constexpr int W = P * kVectors<V>, kSplit = R * W > 8 ? 1 : R * W > 4 ? 2 : 4;
  F sums[kSplit][R][W];
  for (int s = 0; s < kSplit; ++s)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sums[s][r][w] = V::zero();
  const auto step = [&](int64_t i, int first) __attribute__((always_inline)) {
    F columns[2][W];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
      V::load_pair(b[p] + i * 2 * kPanel, &columns[0][p * kVectors<V>], &columns[1][p * kVectors<V>]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const F x = V::broadcast(a[(2 * i + half) * R + r]);
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
          F& sum = sums[(first + half) % kSplit][r][w];
          sum = V::multiply_add(x, columns[half][w], sum);
        }
      }
  };
  int64_t i = 0;
  for (; i + 2 <= pairs; i += 2) {
    step(i, 0);
    step(i + 1, 2);
  }
  if (i < pairs) step(i, 0);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      F sum = sums[0][r][w];
      for (int s = 1; s < kSplit; ++s) sum = V::add(sum, sums[s][r][w]);
      float* target = c + r * stride + w * V::kLanes;
      V::store(target, add ? V::add(sum, V::load(target)) : sum);
    }
}

template <typename S>
using Tile = void (*)(int64_t pairs, const float* a, const S* const* b, float* c, int64_t stride, bool add);

// The tile of 1 … V::kTileRows rows.
template <typename V, typename S, int P, int R = V::kTileRows>
Tile<S> tile_of(int64_t rows) {
  if constexpr (R > 1)
    if (rows < R) return tile_of<V, S, P, R - 1>(rows);
  return tile<V, S, R, P>;
}

template <typename T>
void arrange_tiles(const PackedJob& job, const Tiling& tiling, int64_t first, int64_t last) {
  const int64_t columns = 2 * job.pairs();
  for (int64_t t = first; t < last; ++t) {
    const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
    for (int64_t k = 0; k < columns; k += kDepth) {
      const int64_t depth = least(kDepth, columns - k), given = least(depth, job.columns - k);
      float* to = job.arranged + k * job.rows + depth * row;
      for (int64_t r = 0; r < rows; ++r) {
        const T* from = static_cast<const T*>(job.x.base) + (row + r) * job.x.stride + k;
        for (int64_t i = 0; i < given; ++i) to[i * rows + r] = to_float(from[i]);
        if (given < depth) to[given * rows + r] = 0.f;
      }
    }
  }
}

template <typename V>
void arrange(const PackedJob& job, int64_t first, int64_t last) {
  const Tiling tiling(job.rows, V::kTileRows);
  if (job.x.type == Element::f32) return arrange_tiles<float>(job, tiling, first, last);
  if (job.x.type == Element::bf16) return arrange_tiles<BFloat16>(job, tiling, first, last);
  return arrange_tiles<Float16>(job, tiling, first, last);
}

// Columns k … k + 2·pairs of a panel.
template <typename S>
const S* block(const PackedJob& job, int64_t panel, int64_t k) {
  return static_cast<const S*>(job.data) + (panel * job.pairs() * 2 + k) * kPanel;
}

// A block in float32, its columns one after the other.
template <typename V, typename S>
const float* expand(const PackedJob& job, int64_t panel, int64_t k, int64_t pairs, float* to) {
  const S* from = block<S>(job, panel, k);
  if constexpr (__is_same(S, float)) return from;
  typename V::Float pair[2][kVectors<V>];
  for (int64_t i = 0; i < pairs; ++i) {
    V::load_pair(from + i * 2 * kPanel, pair[0], pair[1]);
    if constexpr (__is_same(S, Int8)) {
      const int64_t groups = (job.columns + job.group - 1) / job.group;
      const float* scales = job.scales + (panel * groups + (k + 2 * i) / job.group) * kPanel;
      for (int w = 0; w < kVectors<V>; ++w)
        for (int half = 0; half < 2; ++half)
          pair[half][w] = V::multiply(pair[half][w], V::load(scales + w * V::kLanes));
    }
    for (int half = 0; half < 2; ++half)
      for (int w = 0; w < kVectors<V>; ++w) V::store(to + (2 * i + half) * kPanel + w * V::kLanes, pair[half][w]);
  }
  return to;
}

// Few rows: a block of weights is turned into float32 in registers, and read from the first cache by every tile but one.
template <typename V, typename S>
void multiply_few(const PackedJob& job, const Tiling& tiling, int64_t first, int64_t last, float* sums) {
  for (int64_t panel = first; panel < last; ++panel)
    for (int64_t k = 0; k < job.columns; k += kDepth) {
      const int64_t pairs = least(kDepth / 2, job.pairs() - k / 2);
      const S* b = block<S>(job, panel, k);
      for (int64_t t = 0; t < tiling.count; ++t) {
        const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
        const float* a = job.arranged + k * job.rows + 2 * pairs * row;
        tile_of<V, S, 1>(rows)(pairs, a, &b, sums + row * kPanel, kPanel, k > 0);
        if (k + kDepth >= job.columns) finish(job, sums + row * kPanel, kPanel, row, rows, panel);
      }
    }
}

// Many rows: blocks of a group of panels are expanded once into the second-level cache; the panels of one tile stay in
// the first while all rows pass.
template <typename V, typename S>
void multiply_many(const PackedJob& job, const Tiling& tiling, int64_t first, int64_t last, float* scratch) {
  constexpr int64_t kTogether = V::kTilePanels, kBlock = kDepth * kPanel;
  float* const sums = scratch + kPanelGroup * kBlock;
  for (int64_t group = first; group < last; group += kPanelGroup) {
    const int64_t panels = least(kPanelGroup, last - group), stride = panels * kPanel;
    for (int64_t k = 0; k < job.columns; k += kDepth) {
      const int64_t pairs = least(kDepth / 2, job.pairs() - k / 2);
      const float* b[kPanelGroup];
      for (int64_t p = 0; p < panels; ++p) b[p] = expand<V, S>(job, group + p, k, pairs, scratch + p * kBlock);
      for (int64_t p = 0; p < panels; p += kTogether)
        for (int64_t t = 0; t < tiling.count; ++t) {
          const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
          const float* a = job.arranged + k * job.rows + 2 * pairs * row;
          float* c = sums + row * stride + p * kPanel;
          const bool whole = p + kTogether <= panels;
          (whole ? tile_of<V, float, kTogether>(rows) : tile_of<V, float, 1>(rows))(pairs, a, b + p, c, stride, k > 0);
          if (k + kDepth < job.columns) continue;
          for (int64_t i = p; i < least(panels, p + kTogether); ++i)
            finish(job, sums + row * stride + i * kPanel, stride, row, rows, i + group);
        }
    }
  }
}

template <typename V, typename S>
void multiply_stored(const PackedJob& job, int64_t first, int64_t last, float* scratch) {
  const Tiling tiling(job.rows, V::kTileRows);
  if constexpr (!__is_same(S, Int8))
    if (job.rows <= V::kFewRows) return multiply_few<V, S>(job, tiling, first, last, scratch);
  multiply_many<V, S>(job, tiling, first, last, scratch);
}

template <typename V>
void multiply(const PackedJob& job, int64_t first, int64_t last, float* scratch) {
  switch (job.stored) {
    case Element::f32:
      return multiply_stored<V, float>(job, first, last, scratch);
    case Element::bf16:
      return multiply_stored<V, BFloat16>(job, first, last, scratch);
    case Element::f16:
      return multiply_stored<V, Float16>(job, first, last, scratch);
    case Element::int8:
      return multiply_stored<V, Int8>(job, first, last, scratch);
  }
}

template <typename V>
constexpr PackedKernels packed_kernels(const char* name) {
  return {name, V::kTileRows, arrange<V>, multiply<V>};
}

}  // namespace
}  // namespace vpt
