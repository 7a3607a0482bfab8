// The product of panels over tiles; included by each packed_linear_*.cpp inside its instruction-set region, behind its
// vectors `V`.
#pragma once

#include "packed_linear_int4.h"
#include "packed_linear_tile.h"

namespace vpt {
namespace {

// Columns of R rows, `stride` apart, one after the other. Reads follow R rows at once, so that writes are in one place.
template <typename T, int R>
void arrange_rows(int64_t rows, const T* from, int64_t stride, int64_t columns, float* to) {
  if constexpr (R > 1)
    if (rows < R) return arrange_rows<T, R - 1>(rows, from, stride, columns, to);
  for (int64_t i = 0; i < columns; ++i)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) to[i * R + r] = to_float(from[r * stride + i]);
}

template <typename V, typename T>
void arrange_tiles(const PackedJob& job, const Tiling& tiling, int64_t first, int64_t last) {
  const int64_t columns = 2 * job.pairs();
  for (int64_t t = first; t < last; ++t) {
    const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
    for (int64_t k = 0; k < columns; k += kDepth) {
      const int64_t depth = least(kDepth, columns - k), given = least(depth, job.columns - k);
      float* to = job.arranged + k * job.rows + depth * row;
      const T* from = static_cast<const T*>(job.x.base) + row * job.x.stride + k;
      arrange_rows<T, V::kTileRows>(rows, from, job.x.stride, given, to);
      for (int64_t i = given * rows; i < depth * rows; ++i) to[i] = 0.f;
    }
  }
}

template <typename V>
void arrange(const PackedJob& job, int64_t first, int64_t last) {
  const Tiling tiling(job.rows, V::kTileRows);
  const bool integers = (job.stored == Element::int8 || job.stored == Element::int4) && job.rows <= V::kInt8Rows;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    integers ? arrange_integers<T>(job, tiling, first, last) : arrange_tiles<V, T>(job, tiling, first, last);
  };
  if (job.x.type == Element::f32) return run(float{});
  if (job.x.type == Element::bf16) return run(BFloat16{});
  return run(Float16{});
}

// A block in float32, its columns one after the other.
template <typename V, typename S>
const float* expand(const PackedJob& job, int64_t panel, int64_t k, int64_t pairs, float* to) {
  const S* from = block<S>(job, panel, k);
  if constexpr (__is_same(S, float)) return from;
  typename V::Float pair[2][kVectors<V>];
  for (int64_t i = 0; i < pairs; ++i) {
    V::template load_column<0>(from + i * 2 * kPanel, pair[0]);
    V::template load_column<1>(from + i * 2 * kPanel, pair[1]);
    if constexpr (__is_same(S, Int8)) {
      const float* scales = job.scales + (panel * scale_groups(job) + (k + 2 * i) / job.group) * kPanel;
      for (int w = 0; w < kVectors<V>; ++w)
        for (int half = 0; half < 2; ++half)
          pair[half][w] = V::multiply(pair[half][w], V::load(scales + w * V::kLanes));
    }
    for (int half = 0; half < 2; ++half)
      for (int w = 0; w < kVectors<V>; ++w) V::store(to + (2 * i + half) * kPanel + w * V::kLanes, pair[half][w]);
  }
  return to;
}

// Few rows: weights become float32 in registers. One tile runs through a panel at once; of several each asks for a part of
// the next block, so that memory never rests, and finds its own in the first cache.
template <typename V, typename S>
void multiply_few(const PackedJob& job, const Tiling& tiling, int64_t first, int64_t last, float* sums) {
  const int64_t depth = tiling.count == 1 ? 2 * job.pairs() : kDepth;
  const int64_t together = job.rows == 1 ? 1 : V::kTilePanels, stride = together * kPanel;
  for (int64_t panel = first; panel < last; panel += together) {
    const int64_t panels = least(together, last - panel);
    const bool whole = panels == V::kTilePanels;
    for (int64_t k = 0; k < 2 * job.pairs(); k += depth) {
      const int64_t pairs = least(depth / 2, job.pairs() - k / 2);
      const bool ends = k + depth >= 2 * job.pairs();
      const S* b[V::kTilePanels];
      for (int64_t p = 0; p < panels; ++p) b[p] = block<S>(job, panel + p, k);
      for (int64_t t = 0; t < tiling.count; ++t) {
        const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
        const auto run =
            tiling.count == 1 ? tile_of<V, S, Source::memory>(rows, whole) : tile_of<V, S, Source::cache>(rows, whole);
        const float* a = job.arranged + k * job.rows + 2 * pairs * row;
        const auto next =
            share_of<S>(job, ends ? panel + together : panel, ends ? 0 : k + depth, pairs, t, tiling.count);
        run(pairs, a, b, sums + row * stride, stride, k > 0, next);
      }
    }
    for (int64_t p = 0; p < panels; ++p) finish(job, sums + p * kPanel, stride, 0, job.rows, panel + p);
  }
}

// Many rows: what some tiles of x and a group of panels have to do with each other is done block by block, so that a
// block of x and the sums stay in the second-level cache. The panels of a tile are expanded into the first when it is
// their turn, and meanwhile the next are asked for.
template <typename V, typename S>
void multiply_many(const PackedJob& job, const Tiling& tiling, int64_t first, int64_t last, float* scratch) {
  constexpr int64_t kTogether = V::kTilePanels, kBlock = kDepth * kPanel;
  float* const sums = scratch + kTogether * kBlock;
  const Tiling turns(tiling.count, kRowsAtOnce / V::kTileRows);
  for (int64_t group = first; group < last; group += kPanelGroup)
    for (int64_t turn = 0; turn < turns.count; ++turn) {
      const int64_t panels = least(kPanelGroup, last - group), stride = panels * kPanel;
      const int64_t begin = turns.begin(turn), end = turns.begin(turn + 1);
      for (int64_t k = 0; k < job.columns; k += kDepth) {
        const int64_t pairs = least(kDepth / 2, job.pairs() - k / 2);
        const bool ends = k + kDepth >= job.columns;
        for (int64_t p = 0; p < panels; p += kTogether) {
          const float* b[kTogether];
          for (int64_t i = 0; i < least(kTogether, panels - p); ++i) {
            float* const to = scratch + i * kBlock;
            if constexpr (__is_same(S, Int4))
              b[i] = expand_int4<V>(job, group + p + i, k, pairs, to);
            else
              b[i] = expand<V, S>(job, group + p + i, k, pairs, to);
          }
          const bool here = p + kTogether < panels;
          const int64_t next_k = here ? k : ends ? 0 : k + kDepth;
          const int64_t next_panel = here       ? group + p + kTogether
              : ends && turn + 1 == turns.count ? group + kPanelGroup
                                                : group;
          for (int64_t t = begin; t < end; ++t) {
            const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
            const float* a = job.arranged + k * job.rows + 2 * pairs * row;
            float* c = sums + (row - tiling.begin(begin)) * stride + p * kPanel;
            const auto run = tile_of<V, float, Source::expanded>(rows, p + kTogether <= panels);
            Ahead ahead = share_of<S>(job, next_panel, next_k, pairs, t - begin, end - begin);
            // The first panels of a group bring a block of x into the second-level cache for all.
            if (p == 0) ahead.x = a + 2 * pairs * rows;
            run(pairs, a, b, c, stride, k > 0, ahead);
            for (int64_t i = 0; ends && i < least(kTogether, panels - p); ++i)
              finish(job, c + i * kPanel, stride, row, rows, group + p + i);
          }
        }
      }
    }
}

template <typename V, typename S>
void multiply_stored(const PackedJob& job, int64_t first, int64_t last, float* scratch) {
  const Tiling tiling(job.rows, V::kTileRows);
  if constexpr (__is_same(S, Int8)) {
    if (job.rows <= V::kInt8Rows) return multiply_int8<V>(job, tiling, first, last, scratch);
  } else if constexpr (__is_same(S, Int4)) {
    if (job.rows <= V::kInt8Rows) return multiply_int4<V>(job, tiling, first, last, scratch);
  } else {
    if (job.rows <= V::kFewRows) return multiply_few<V, S>(job, tiling, first, last, scratch);
  }
  multiply_many<V, S>(job, tiling, first, last, scratch);
}

template <typename V>
void multiply(const PackedJob& job, int64_t first, int64_t last, float* scratch) {
  if (job.columns == 0) {
    const float nothing[kPanel] = {};
    for (int64_t panel = first; panel < last; ++panel) finish(job, nothing, 0, 0, job.rows, panel);
    return;
  }
  switch (job.stored) {
    case Element::f32:
      return multiply_stored<V, float>(job, first, last, scratch);
    case Element::bf16:
      return multiply_stored<V, BFloat16>(job, first, last, scratch);
    case Element::f16:
      return multiply_stored<V, Float16>(job, first, last, scratch);
    case Element::int8:
      return multiply_stored<V, Int8>(job, first, last, scratch);
    case Element::int4:
      return multiply_stored<V, Int4>(job, first, last, scratch);
  }
}

template <typename V>
constexpr PackedKernels packed_kernels(const char* name) {
  static_assert(V::kTilePanels <= kMostTilePanels);
  return {name, V::kTileRows, V::kQuads, arrange<V>, multiply<V>};
}

}  // namespace
}  // namespace vpt
