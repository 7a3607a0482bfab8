// Rows times int4 weights, steps·integers + minima, both in float16 per row of W and group of 32 columns: the sums of
// 16-bit x times integers are exact, and what the minima add is a product of the groups' sums of x with panels of
// float16. Included through packed_linear_loops.h; V has besides: load_raw, bits.
#pragma once

#include "packed_linear_int8.h"

namespace vpt {
namespace {

// kGroup·15·32767 < 2^24: a group's sum is exact as a float as well.
static_assert(kGroup * 15 * 32767 < (int64_t{1} << 24));

// The float16 numbers of a panel, [groups, rounded up to even][16], from that of column k on.
inline const Float16* groups_of(const PackedJob& job, const Float16* numbers, int64_t panel, int64_t k) {
  return numbers + (panel * even_groups(job) + k / kGroup) * kPanel;
}

// The integers of a block of one panel, [pairs][16]: a pair of columns of each row as 16-bit integers.
template <typename V>
void unpack_int4(const Int4* from, int64_t pairs, int32_t* to) {
  for (int64_t i = 0; i < pairs; i += 4) {
    typename V::Int raw[kVectors<V>];
    __builtin_prefetch(reinterpret_cast<const char*>(from + i / 4 * kPanel) + kAheadBytes);
    V::load_raw(from + i / 4 * kPanel, raw);
    const auto unpack = [&]<int p>() __attribute__((always_inline)) {
      for (int w = 0; w < kVectors<V>; ++w)
        V::store_int(to + (i + p) * kPanel + w * V::kLanes, V::template bits<4 * p, 0x000F000F>(raw[w]));
    };
    unpack.template operator()<0>(), unpack.template operator()<1>();
    unpack.template operator()<2>(), unpack.template operator()<3>();
  }
}

// The pair p of the four in each word.
template <typename V, int p, int W>
[[gnu::always_inline]] inline void unpack_pair(const typename V::Int (&raw)[W], typename V::Int (&words)[W]) {
#pragma GCC unroll 4
  for (int w = 0; w < W; ++w) words[w] = V::template bits<4 * p, 0x000F000F>(raw[w]);
}

// sums[r][w] += a pair of columns · that of x of row r, which is a[r]
template <typename V, int R, int W>
[[gnu::always_inline]] inline void add_pair(
    const typename V::Int (&words)[W], const int32_t* a, typename V::Int (&sums)[R][W]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const typename V::Int x = V::broadcast_int(a[r]);
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sums[r][w] = V::dot(sums[r][w], words[w], x);
  }
}

// c [R][16·P] += sums [R][16·P] of a group, times the scales of their row of x and of W. A function of its own: inlined
// into a tile, it makes gcc keep a tile's sums in memory.
template <typename V, int R, int P>
[[gnu::noinline]] void add_group(
    const int32_t* sums, const float* row_scales, const Float16* const* steps, int64_t group, float* c,
    int64_t stride) {
  constexpr int W = P * kVectors<V>;
  typename V::Float scale[W];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) V::template load_column<0>(steps[p] + group * kPanel, &scale[p * kVectors<V>]);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      const auto integers = V::to_floats(V::load_int(sums + (r * W + w) * V::kLanes));
      float* target = c + r * stride + w * V::kLanes;
      V::store(target, V::multiply_add(integers, V::multiply(scale[w], V::broadcast(row_scales[r])), V::load(target)));
    }
}

// c [R][16·P] += one block of x, a [pairs][R] with a scale a row · the integers of the blocks b of P panels · steps.
// S: Int4, or int32_t of unpacked ones.
template <typename V, typename S, int R, int P>
void int4_tile(
    int64_t pairs, const int32_t* a, const float* row_scales, const S* const* b, const Float16* const* steps, float* c,
    int64_t stride) {
  using Int = typename V::Int;
  constexpr int W = P * kVectors<V>, kSplit = split(R * W);
  for (int64_t i = 0; i < pairs;) {
    Int sums[kSplit][R][W];
    for (int s = 0; s < kSplit; ++s)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) sums[s][r][w] = V::zero_int();
    const int64_t end = least(pairs, i + kGroup / 2);
    if constexpr (__is_same(S, Int4)) {
      for (; i < end; i += 4) {
        Int raw[W], words[W];
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          const Int4* from = b[p] + i / 4 * kPanel;
          __builtin_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes);
          V::load_raw(from, &raw[p * kVectors<V>]);
        }
        unpack_pair<V, 0, W>(raw, words), add_pair<V, R, W>(words, a + i * R, sums[0]);
        unpack_pair<V, 1, W>(raw, words), add_pair<V, R, W>(words, a + (i + 1) * R, sums[1 % kSplit]);
        unpack_pair<V, 2, W>(raw, words), add_pair<V, R, W>(words, a + (i + 2) * R, sums[2 % kSplit]);
        unpack_pair<V, 3, W>(raw, words), add_pair<V, R, W>(words, a + (i + 3) * R, sums[3 % kSplit]);
      }
    } else {
      const auto step = [&](int64_t pair, Int(&sum)[R][W]) __attribute__((always_inline)) {
        Int words[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w)
          words[w] = V::load_int(b[w / kVectors<V>] + pair * kPanel + w % kVectors<V> * V::kLanes);
        add_pair<V, R, W>(words, a + pair * R, sum);
      };
      if constexpr (kSplit > 1)
        for (; i < end; i += 4) {
#pragma GCC unroll 4
          for (int p = 0; p < 4; ++p) step(i + p, sums[p % kSplit]);
        }
      for (; i < end; ++i) step(i, sums[0]);
    }
    alignas(64) int32_t found[R * W * V::kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        Int sum = sums[0][r][w];
        for (int s = 1; s < kSplit; ++s) sum = V::add_int(sum, sums[s][r][w]);
        V::store_int(found + (r * W + w) * V::kLanes, sum);
      }
    add_group<V, R, P>(found, row_scales, steps, (i - 1) / (kGroup / 2), c, stride);
  }
}

template <typename V, typename S, int P, int R = V::kTileRows>
auto int4_tile_of(int64_t rows) -> decltype(&int4_tile<V, S, R, P>) {
  if constexpr (R > 1)
    if (rows < R) return int4_tile_of<V, S, P, R - 1>(rows);
  return int4_tile<V, S, R, P>;
}

template <typename V, typename S>
auto int4_tile_of(int64_t rows, bool whole) {
  return whole ? int4_tile_of<V, S, V::kTilePanels>(rows) : int4_tile_of<V, S, 1>(rows);
}

template <typename V>
void multiply_int4(const PackedJob& job, const Tiling& tiling, int64_t first, int64_t last, float* scratch) {
  // One tile of so few rows unpacks on its way.
  const bool at_once = job.rows <= V::kTileRows / 3;
  int32_t* const words = reinterpret_cast<int32_t*>(scratch);
  float* const sums = scratch + V::kTilePanels * kDepth / 2 * kPanel;
  const Int16Rows x(job);
  const int64_t together = job.rows == 1 ? 1 : V::kTilePanels, stride = together * kPanel, groups = even_groups(job);
  for (int64_t panel = first; panel < last; panel += together) {
    const int64_t panels = least(together, last - panel);
    const bool whole = panels == V::kTilePanels;
    const Float16* numbers[V::kTilePanels];
    for (int64_t p = 0; p < panels; ++p) numbers[p] = groups_of(job, job.minima, panel + p, 0);
    for (int64_t t = 0; t < tiling.count; ++t) {
      const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
      tile_of<V, Float16, Source::memory>(rows, whole)(
          groups / 2, x.sums + groups * row, numbers, sums + row * stride, stride, false);
    }
    for (int64_t k = 0; k < job.columns; k += kDepth) {
      const int64_t pairs = least(kDepth / 2, job.pairs() - k / 2);
      const Int4* b[V::kTilePanels];
      const int32_t* unpacked[V::kTilePanels];
      for (int64_t p = 0; p < panels; ++p) {
        b[p] = block<Int4>(job, panel + p, k);
        unpacked[p] = words + p * kDepth / 2 * kPanel;
        if (!at_once) unpack_int4<V>(b[p], pairs, words + p * kDepth / 2 * kPanel);
        numbers[p] = groups_of(job, job.steps, panel + p, k);
      }
      for (int64_t t = 0; t < tiling.count; ++t) {
        const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
        const int32_t* a = x.pairs + k / 2 * job.rows + pairs * row;
        const float* row_scales = x.scales + k / kDepth * job.rows + row;
        float* const c = sums + row * stride;
        if (at_once)
          int4_tile_of<V, Int4>(rows, whole)(pairs, a, row_scales, b, numbers, c, stride);
        else
          int4_tile_of<V, int32_t>(rows, whole)(pairs, a, row_scales, unpacked, numbers, c, stride);
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
