// The smallest piece of a product, a tile of a few rows and one or two panels, written once over the vectors `V` of an
// instruction set. V has: Float, kLanes, kTileRows, kTilePanels, zero, broadcast, load, store, add, multiply,
// multiply_add, and load_column<0 or 1> of a pair of columns of each stored type.
#pragma once

#include "packed_linear_epilogue.h"

namespace vpt {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename V>
constexpr int kVectors = kPanel / V::kLanes;

// Where a tile finds its weights: in memory, which it alone reads; in a cache, where it or an earlier tile asked for them
// to be; or expanded, for many rows.
enum class Source { memory, cache, expanded };

// Sums for each number of the result, so that no multiply-add waits for the one before it.
constexpr int split(int vectors) { return vectors <= 2 ? 4 : vectors <= 6 ? 2 : 1; }

// Pairs of columns that one such sum runs over before it is added to the rest. F.linear's own sums of few rows are as
// short, those of many rows as long as a block.
constexpr int64_t kChain = 32;

// How far ahead of its use a weight is asked for where it comes from memory.
constexpr int64_t kAheadBytes = 4096;

template <typename S, int P>
[[gnu::always_inline]] inline void ask_for(const S* const* b, int64_t pair) {
  for (int p = 0; p < P; ++p) {
    const char* next = reinterpret_cast<const char*>(b[p] + pair * 2 * kPanel) + kAheadBytes;
    for (int64_t line = 0; line < 2 * kPanel * static_cast<int64_t>(sizeof(S)); line += 64)
      __builtin_prefetch(next + line);
  }
}

// sums[r][w] += column `odd` of a pair of every panel · x of row r, which is a[r]
template <typename V, int odd, int R, int P, typename S>
[[gnu::always_inline]] inline void step(
    const S* const* b, int64_t pair, const float* a, typename V::Float (&sums)[R][P * kVectors<V>]) {
  typename V::Float column[P * kVectors<V>];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) V::template load_column<odd>(b[p] + pair * 2 * kPanel, &column[p * kVectors<V>]);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const typename V::Float x = V::broadcast(a[r]);
#pragma GCC unroll 4
    for (int w = 0; w < P * kVectors<V>; ++w) sums[r][w] = V::multiply_add(x, column[w], sums[r][w]);
  }
}

// The weights that come next, of every panel of a tile, and how many bytes of them a pair of columns asks for; the x of
// the next tile where the third-level cache or memory has it, else null.
struct Ahead {
  const char* next[kMostTilePanels];
  int64_t step;
  const float* x;
};

// c [R][16·P] (+)= a [2·pairs][R] · the blocks b of P panels, each [pairs][32] of type S; `ahead` where they are not
// in memory.
template <typename V, typename S, int R, int P, Source source>
void tile(int64_t pairs, const float* a, const S* const* b, float* c, int64_t stride, bool add, const Ahead& ahead) {
  using F = typename V::Float;
  constexpr int W = P * kVectors<V>, kSplit = split(R * W);
  for (int64_t i = 0; i < pairs;) {
    const int64_t end = source == Source::expanded ? pairs : least(pairs, i + kSplit * kChain);
    F sums[kSplit][R][W];
    for (int s = 0; s < kSplit; ++s)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) sums[s][r][w] = V::zero();
    if constexpr (kSplit == 4)
      for (; i + 2 <= end; i += 2) {
        if constexpr (source == Source::memory) ask_for<S, P>(b, i), ask_for<S, P>(b, i + 1);
        step<V, 0, R, P>(b, i, a + 2 * i * R, sums[0]);
        step<V, 1, R, P>(b, i, a + (2 * i + 1) * R, sums[1]);
        step<V, 0, R, P>(b, i + 1, a + (2 * i + 2) * R, sums[2]);
        step<V, 1, R, P>(b, i + 1, a + (2 * i + 3) * R, sums[3]);
      }
    for (; i < end; ++i) {
      if constexpr (source == Source::memory) ask_for<S, P>(b, i);
      if constexpr (source != Source::memory)
        for (int p = 0; p < P; ++p) __builtin_prefetch(ahead.next[p] + i * ahead.step);
      if (source == Source::expanded && ahead.x != nullptr)
        for (int line = 0; line < 2 * R; line += 16) __builtin_prefetch(ahead.x + 2 * i * R + line);
      step<V, 0, R, P>(b, i, a + 2 * i * R, sums[0]);
      step<V, 1, R, P>(b, i, a + (2 * i + 1) * R, sums[kSplit > 1]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        F sum = sums[0][r][w];
        for (int s = 1; s < kSplit; ++s) sum = V::add(sum, sums[s][r][w]);
        float* target = c + r * stride + w * V::kLanes;
        V::store(target, add ? V::add(sum, V::load(target)) : sum);
      }
    add = true;
  }
}

template <typename S>
using Tile =
    void (*)(int64_t pairs, const float* a, const S* const* b, float* c, int64_t stride, bool add, const Ahead& ahead);

// The tile of 1 … V::kTileRows rows.
template <typename V, typename S, int P, Source source, int R = V::kTileRows>
Tile<S> tile_of(int64_t rows) {
  if constexpr (R > 1)
    if (rows < R) return tile_of<V, S, P, source, R - 1>(rows);
  return tile<V, S, R, P, source>;
}

template <typename V, typename S, Source source>
Tile<S> tile_of(int64_t rows, bool whole) {
  return whole ? tile_of<V, S, V::kTilePanels, source>(rows) : tile_of<V, S, 1, source>(rows);
}

// Columns of a row in one S.
template <typename S>
constexpr int64_t kColumnsIn = __is_same(S, Int4) ? 8 : 1;

// Columns k … k + 2·pairs of a panel.
template <typename S>
const S* block(const PackedJob& job, int64_t panel, int64_t k) {
  return static_cast<const S*>(job.data) + (panel * job.pairs() * 2 + k) / kColumnsIn<S> * kPanel;
}

// The share of tile t of `tiles` in what comes next: blocks of as many pairs from `panel` and column k on. Where the panels
// end it is for others, which harms nobody.
template <typename S>
Ahead share_of(const PackedJob& job, int64_t panel, int64_t k, int64_t pairs, int64_t t, int64_t tiles) {
  const int64_t share = pairs * 2 / kColumnsIn<S> * kPanel * sizeof(S) / tiles + 1;
  Ahead ahead{{}, share / pairs + 1, nullptr};
  for (int64_t i = 0; i < kMostTilePanels; ++i)
    ahead.next[i] = reinterpret_cast<const char*>(block<S>(job, panel + i, k)) + share * t;
  return ahead;
}

inline int64_t scale_groups(const PackedJob& job) { return (job.columns + job.group - 1) / job.group; }

}  // namespace
}  // namespace vpt
