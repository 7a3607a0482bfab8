// Rows times weights of integers: x is rounded to 16 bits per row and block of 256 columns (or, where 8 were asked for,
// to 8), products and sums of a block or of a group of 32 columns are exact in int32, and those are added up in float32.
// Included by each packed_linear_*.cpp through packed_linear_loops.h; V has besides: Int, zero_int, broadcast_int,
// add_int, load_int, store_int, dot, to_floats, load_words of int8, load_raw and bits of int4.
#pragma once

#include "packed_linear_tile.h"

namespace vpt {
namespace {

// Sums of a block and of a group; the latter is exact as a float as well.
static_assert(kDepth * 127 * 32767 < (int64_t{1} << 31));
static_assert(kGroup * 15 * 32767 < (int64_t{1} << 24));

// Four columns of a row of W as unsigned bytes, 128 more than they are.
struct Quad {
  int32_t columns;
};

// Groups of int4, rounded up to even: minima are columns of panels.
inline int64_t even_groups(const PackedJob& job) { return (job.columns + 2 * kGroup - 1) / (2 * kGroup) * 2; }

// x in integers, pairs of 16 bits or quads of 8, [blocks of kDepth columns][tiles of rows][words][rows of the tile], and
// behind them the scales, [blocks][rows]. For int4 also the sums of kGroup columns each, [tiles of rows][groups, rounded
// up to even][rows of the tile]; for quads −128 times the sum of a block, [blocks][rows].
struct IntegerRows {
  int32_t* words;
  float *scales, *sums;
  int32_t* offsets;

  explicit IntegerRows(const PackedJob& job)
      : words(reinterpret_cast<int32_t*>(job.arranged)),
        scales(job.arranged + job.rows * (job.quads ? (job.pairs() + 1) / 2 : job.pairs())),
        sums(scales + job.rows * ((job.columns + kDepth - 1) / kDepth)),
        offsets(reinterpret_cast<int32_t*>(sums)) {}
};

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

inline int32_t sum_of(const int32_t* x, int64_t n) {
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

template <typename T>
void arrange_integers(const PackedJob& job, const Tiling& tiling, int64_t first, int64_t last) {
  const float top = job.quads ? 127.f : 32767.f;
  constexpr float kRound = 12582912.f;  // 1.5·2^23 leaves the rounded integer in the low bits
  const IntegerRows to(job);
  const int64_t all = job.quads ? (job.pairs() + 1) / 2 : job.pairs(), most_words = job.quads ? kDepth / 4 : kDepth / 2;
  for (int64_t t = first; t < last; ++t) {
    const int64_t row = tiling.begin(t), rows = tiling.begin(t + 1) - row;
    for (int64_t k = 0; k < job.columns; k += kDepth) {
      const int64_t given = least(kDepth, job.columns - k), block = k / kDepth;
      const int64_t words = least(most_words, all - block * most_words);
      int32_t* target = to.words + block * most_words * job.rows + words * row;
      for (int64_t r = 0; r < rows; ++r) {
        const T* x = static_cast<const T*>(job.x.base) + (row + r) * job.x.stride + k;
        const float most = largest_magnitude(x, given), inverse = most > 0x1p-100f ? top / most : 0.f;
        const float scale = most / top;
        to.scales[block * job.rows + row + r] = scale;
        int32_t rounded[kDepth] = {};
#pragma omp simd
        for (int64_t i = 0; i < given; ++i)
          rounded[i] = static_cast<int32_t>(bits_of(VPT_FMA(to_float(x[i]), inverse, kRound)) << 10) >> 10;
        if (job.quads) {
          for (int64_t i = 0; i < words; ++i) {
            const int32_t* four = rounded + 4 * i;
            target[i * rows + r] = static_cast<int32_t>(
                (four[0] & 0xFFu) | (four[1] & 0xFFu) << 8 | (four[2] & 0xFFu) << 16 | (four[3] & 0xFFu) << 24);
          }
          // Unsigned: of what is rounded from a NaN any bits may be set.
          to.offsets[block * job.rows + row + r] =
              static_cast<int32_t>(-128u * static_cast<uint32_t>(sum_of(rounded, given)));
          continue;
        }
        for (int64_t i = 0; i < words; ++i)
          target[i * rows + r] =
              static_cast<int32_t>((rounded[2 * i] & 0xFFFFu) | static_cast<uint32_t>(rounded[2 * i + 1]) << 16);
        if (job.stored != Element::int4) continue;
        const int64_t groups = least(kDepth / kGroup, even_groups(job) - k / kGroup);
        float* sums = to.sums + even_groups(job) * row + k / kGroup * rows + r;
        for (int64_t g = 0; g < groups; ++g)
          sums[g * rows] = static_cast<float>(sum_of(rounded + g * kGroup, kGroup)) * scale;
      }
    }
  }
}

// sums[r][w] += some columns · those of x of row r, which are a[r]
template <typename V, typename S, int R, int W>
[[gnu::always_inline]] inline void add_words(
    const typename V::Int (&words)[W], const int32_t* a, typename V::Int (&sums)[R][W]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const typename V::Int x = V::broadcast_int(a[r]);
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      if constexpr (__is_same(S, Quad))
        sums[r][w] = V::dot_bytes(sums[r][w], words[w], x);
      else
        sums[r][w] = V::dot(sums[r][w], words[w], x);
    }
  }
}

// c [R][16·P] += sums [R][16·P], times the scales of their row of x and of W. A function of its own: inlined into a tile
// it makes gcc keep the tile's sums in memory.
template <typename V, typename T, int R, int P>
[[gnu::noinline]] void add_scaled(
    const int32_t* sums, const float* row_scales, const T* const* scales, int64_t group, float* c, int64_t stride) {
  constexpr int W = P * kVectors<V>;
  typename V::Float scale[W];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) V::template load_column<0>(scales[p] + group * kPanel, &scale[p * kVectors<V>]);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      const auto integers = V::to_floats(V::load_int(sums + (r * W + w) * V::kLanes));
      float* target = c + r * stride + w * V::kLanes;
      V::store(target, V::multiply_add(integers, V::multiply(scale[w], V::broadcast(row_scales[r])), V::load(target)));
    }
}

// The pair p of the four in each word of int4.
template <typename V, int p, int W>
[[gnu::always_inline]] inline void unpack_pair(const typename V::Int (&raw)[W], typename V::Int (&words)[W]) {
#pragma GCC unroll 4
  for (int w = 0; w < W; ++w) words[w] = V::template bits<4 * p, 0x000F000F>(raw[w]);
}

// c [R][16·P] += one block of x, a [words][R] with a scale a row · the integers of the blocks b of P panels · their
// scales, [16] for every `period` words. S: Int8 and Int4, read from memory, or Quad, in a cache.
template <typename V, typename S, typename T, int R, int P>
void integer_tile(
    int64_t words, int64_t period, const int32_t* a, const int32_t* offsets, const float* row_scales, const S* const* b,
    const T* const* scales, float* c, int64_t stride) {
  using Int = typename V::Int;
  constexpr int W = P * kVectors<V>, kSplit = split(R * W);
  for (int64_t i = 0, group = 0; i < words; ++group) {
    const int64_t end = least(words, i + period);
    Int sums[kSplit][R][W];
    for (int s = 0; s < kSplit; ++s)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w)
          sums[s][r][w] = __is_same(S, Quad) && s == 0 ? V::broadcast_int(offsets[r]) : V::zero_int();
    const auto step = [&](int64_t word, Int(&sum)[R][W]) __attribute__((always_inline)) {
      if constexpr (!__is_same(S, Int4)) {
        Int found[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
          const S* from = b[w / kVectors<V>];
          if constexpr (__is_same(S, Quad))
            found[w] = V::load_int(&from[word * kPanel + w % kVectors<V> * V::kLanes].columns);
          else if (w % kVectors<V> == 0)
            V::load_words(from + word * 2 * kPanel, &found[w]);
        }
        add_words<V, S, R, W>(found, a + word * R, sum);
      }
    };
    if constexpr (__is_same(S, Int4)) {
      for (; i < end; i += 4) {
        Int raw[W], found[W];
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          const S* from = b[p] + i / 4 * kPanel;
          __builtin_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes);
          V::load_raw(from, &raw[p * kVectors<V>]);
        }
        unpack_pair<V, 0, W>(raw, found), add_words<V, S, R, W>(found, a + i * R, sums[0]);
        unpack_pair<V, 1, W>(raw, found), add_words<V, S, R, W>(found, a + (i + 1) * R, sums[1 % kSplit]);
        unpack_pair<V, 2, W>(raw, found), add_words<V, S, R, W>(found, a + (i + 2) * R, sums[2 % kSplit]);
        unpack_pair<V, 3, W>(raw, found), add_words<V, S, R, W>(found, a + (i + 3) * R, sums[3 % kSplit]);
      }
    } else if constexpr (kSplit > 1 || __is_same(S, Int8)) {
      for (; i + 4 <= end; i += 4) {
        // Four pairs of 16 bytes are two lines.
        if constexpr (__is_same(S, Int8)) ask_for<S, P>(b, i), ask_for<S, P>(b, i + 2);
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) step(i + s, sums[s % kSplit]);
      }
    }
    for (; i < end; ++i) step(i, sums[0]);
    alignas(64) int32_t found[R * W * V::kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        Int sum = sums[0][r][w];
        for (int s = 1; s < kSplit; ++s) sum = V::add_int(sum, sums[s][r][w]);
        V::store_int(found + (r * W + w) * V::kLanes, sum);
      }
    add_scaled<V, T, R, P>(found, row_scales, scales, group, c, stride);
  }
}

template <typename V, typename S, typename T, int P, int R = V::kTileRows>
auto integer_tile_of(int64_t rows) -> decltype(&integer_tile<V, S, T, R, P>) {
  if constexpr (R > 1)
    if (rows < R) return integer_tile_of<V, S, T, P, R - 1>(rows);
  return integer_tile<V, S, T, R, P>;
}

}  // namespace
}  // namespace vpt
