// Rows times int8 weights in integers. Included by each packed_linear_*.cpp through packed_linear_loops.h.
#pragma once

#include "packed_linear_integers.h"

namespace vpt {
namespace {

// A block of a panel as quads. Of an odd number of pairs the last has nothing behind it.
template <typename V>
void unpack(const Int8* from, int64_t pairs, Quad* to) {
  for (int64_t i = 0; i < pairs / 2; ++i) {
    __builtin_prefetch(reinterpret_cast<const char*>(from + i * 4 * kPanel) + kAheadBytes);
    V::store_int(&to[i * kPanel].columns, V::load_quads(from + i * 4 * kPanel));
  }
  if (pairs % 2 == 0) return;
  Int8 last[4 * kPanel] = {};
  for (int64_t i = 0; i < 2 * kPanel; ++i) last[i] = from[(pairs - 1) * 2 * kPanel + i];
  V::store_int(&to[pairs / 2 * kPanel].columns, V::load_quads(last));
}

// S: Int8, or Quad where x is rounded to 8 bits.
template <typename V, typename S>
void multiply_int8_as(const PackedJob& job, const Tiling& tiling, int64_t first, int64_t last, float* scratch) {
  constexpr int64_t kWords = __is_same(S, Quad) ? kDepth / 4 : kDepth / 2;
  S* const unpacked = reinterpret_cast<S*>(scratch);
  float* const sums = scratch + (__is_same(S, Int8) ? 0 : V::kTilePanels * kWords * kPanel);
  const IntegerRows x(job);
  const int64_t together = job.rows == 1 ? 1 : V::kTilePanels, stride = together * kPanel;
  const int64_t groups = scale_groups(job), period = groups == 1 ? kWords : job.group / 2;
  for (int64_t panel = first; panel < last; panel += together) {
    const int64_t panels = least(together, last - panel);
    for (int64_t i = 0; i < job.rows * stride; ++i) sums[i] = 0.f;
    for (int64_t k = 0; k < job.columns; k += kDepth) {
      const int64_t pairs = least(kDepth / 2, job.pairs() - k / 2),
                    words = __is_same(S, Quad) ? (pairs + 1) / 2 : pairs;
      const S* b[V::kTilePanels];
      const float* scales[V::kTilePanels];
      for (int64_t p = 0; p < panels; ++p) {
        if constexpr (__is_same(S, Int8)) {
          b[p] = block<Int8>(job, panel + p, k);
        } else {
          b[p] = unpacked + p * kWords * kPanel;
          unpack<V>(block<Int8>(job, panel + p, k), pairs, unpacked + p * kWords * kPanel);
        }
        scales[p] = job.scales + ((panel + p) * groups + k / job.group) * kPanel;
      }
      for (int64_t t = 0; t < tiling.count; ++t) {
        const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
        const int64_t at = k / kDepth * job.rows + row;
        const auto run = panels == V::kTilePanels ? integer_tile_of<V, S, float, V::kTilePanels>(rows)
                                                  : integer_tile_of<V, S, float, 1>(rows);
        run(words, period, x.words + k / kDepth * kWords * job.rows + words * row, x.offsets + at, x.scales + at, b,
            scales, sums + row * stride, stride);
      }
    }
    for (int64_t p = 0; p < panels; ++p) finish(job, sums + p * kPanel, stride, 0, job.rows, panel + p);
  }
}

template <typename V>
void multiply_int8(const PackedJob& job, const Tiling& tiling, int64_t first, int64_t last, float* scratch) {
  if constexpr (V::kQuads)
    if (job.quads) return multiply_int8_as<V, Quad>(job, tiling, first, last, scratch);
  return multiply_int8_as<V, Int8>(job, tiling, first, last, scratch);
}

}  // namespace
}  // namespace vpt
