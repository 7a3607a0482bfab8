// Rows times int4 weights, steps·integers + minima, both in float16 per row of W and group of 32 columns: the sums of
// 16-bit x times integers are exact, and what the minima add is a product of the groups' sums of x with panels of
// float16. Included through packed_linear_loops.h.
#pragma once

#include "packed_linear_int8.h"

namespace vpt {
namespace {

// The float16 numbers of a panel, [groups, rounded up to even][16], from that of column k on.
inline const Float16* groups_of(const PackedJob& job, const Float16* numbers, int64_t panel, int64_t k) {
  return numbers + (panel * even_groups(job) + k / kGroup) * kPanel;
}

template <typename V>
void multiply_int4(const PackedJob& job, const Tiling& tiling, int64_t first, int64_t last, float* sums) {
  const IntegerRows x(job);
  const int64_t together = job.rows == 1 ? 1 : V::kTilePanels, stride = together * kPanel, groups = even_groups(job);
  for (int64_t panel = first; panel < last; panel += together) {
    const int64_t panels = least(together, last - panel);
    const bool whole = panels == V::kTilePanels;
    const Float16* numbers[V::kTilePanels];
    for (int64_t p = 0; p < panels; ++p) numbers[p] = groups_of(job, job.minima, panel + p, 0);
    for (int64_t t = 0; t < tiling.count; ++t) {
      const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
      tile_of<V, Float16, Source::memory>(rows, whole)(
          groups / 2, x.sums + groups * row, numbers, sums + row * stride, stride, false, {});
    }
    for (int64_t k = 0; k < job.columns; k += kDepth) {
      const int64_t pairs = least(kDepth / 2, job.pairs() - k / 2);
      const Int4* b[V::kTilePanels];
      for (int64_t p = 0; p < panels; ++p) {
        b[p] = block<Int4>(job, panel + p, k);
        numbers[p] = groups_of(job, job.steps, panel + p, k);
      }
      for (int64_t t = 0; t < tiling.count; ++t) {
        const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
        const auto run = whole ? integer_tile_of<V, Int4, Float16, V::kTilePanels>(rows)
                               : integer_tile_of<V, Int4, Float16, 1>(rows);
        run(pairs, kGroup / 2, x.words + k / 2 * job.rows + pairs * row, nullptr,
            x.scales + k / kDepth * job.rows + row, b, numbers, sums + row * stride, stride);
      }
    }
    for (int64_t p = 0; p < panels; ++p) finish(job, sums + p * kPanel, stride, 0, job.rows, panel + p);
  }
}

// A block in float32, its columns one after the other.
template <typename V>
const float* expand_int4(const PackedJob& job, int64_t panel, int64_t k, int64_t pairs, float* to) {
  const Int4* from = block<Int4>(job, panel, k);
  typename V::Float step[kVectors<V>], minimum[kVectors<V>];
  for (int64_t i = 0; i < pairs; i += 4) {
    if (i % (kGroup / 2) == 0) {
      V::template load_column<0>(groups_of(job, job.steps, panel, k + 2 * i), step);
      V::template load_column<0>(groups_of(job, job.minima, panel, k + 2 * i), minimum);
    }
    typename V::Int raw[kVectors<V>];
    V::load_raw(from + i / 4 * kPanel, raw);
    const auto column = [&]<int shift>(int64_t at) __attribute__((always_inline)) {
      for (int w = 0; w < kVectors<V>; ++w) {
        const auto integers = V::to_floats(V::template bits<shift, 15>(raw[w]));
        V::store(to + (2 * i + at) * kPanel + w * V::kLanes, V::multiply_add(integers, step[w], minimum[w]));
      }
    };
    column.template operator()<0>(0), column.template operator()<16>(1);
    column.template operator()<4>(2), column.template operator()<20>(3);
    column.template operator()<8>(4), column.template operator()<24>(5);
    column.template operator()<12>(6), column.template operator()<28>(7);
  }
  return to;
}

}  // namespace
}  // namespace vpt
