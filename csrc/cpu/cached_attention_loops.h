// Attention over cached keys, written once over the vectors `V` of an instruction set; included by each
// cached_attention_*.cpp inside its region. V has: Float, kLanes, kRows, zero, broadcast, load (of every stored type),
// store, multiply, multiply_add, and sums (of four vectors, into four floats). Softmax is taken block by block, as in FlashAttention.
#pragma once

#include "cached_attention.h"
#include "exponential.h"

namespace vpt {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// `count` tokens in float32, `padded` apart, and zeros up to kKeys of them.
template <typename V, typename T>
void widen_tokens(const T* from, int64_t stride, int64_t count, int64_t dim, int64_t padded, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const T* row = from + i * stride;
    float* wide = to + i * padded;
    int64_t d = 0;
    for (; d + V::kLanes <= dim; d += V::kLanes) V::store(wide + d, V::load(row + d));
    for (; d < dim; ++d) wide[d] = to_float(row[d]);
    for (; d < padded; ++d) wide[d] = 0.f;
  }
  for (int64_t i = count * padded; i < kKeys * padded; ++i) to[i] = 0.f;
}

// scores [R][kKeys] of four keys, `stride` apart, at the place to which `scores` points.
template <typename V, int R, typename S>
void score(const float* q, const S* keys, int64_t stride, int64_t padded, float* scores) {
  using F = typename V::Float;
  F sums[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sums[r][k] = V::zero();
  for (int64_t d = 0; d < padded; d += V::kLanes) {
    F x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = V::load(q + r * padded + d);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const F key = V::load(keys + k * stride + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][k] = V::multiply_add(x[r], key, sums[r][k]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) V::sums(sums[r], scores + r * kKeys);
}

// The tokens whose numbers are wanted after those at hand; `next` null: none. Where the keys end others are asked for,
// which harms nobody.
template <typename T>
struct Ahead {
  const T* next;
  int64_t stride, dim;

  [[gnu::always_inline]] void ask(int64_t token) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < dim; i += kLine) __builtin_prefetch(next + token * stride + i);
  }
};

// mixed [R][padded] = factor·mixed + weights [R][kKeys]·values, of W vectors from `mixed` on.
template <typename V, int R, int W, typename S, typename T>
void mix(
    const float* weights, const S* values, int64_t stride, int64_t count, int64_t padded, const float* factors,
    float* mixed, Ahead<T> ahead) {
  using F = typename V::Float;
  F sums[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w)
      sums[r][w] = V::multiply(V::broadcast(factors[r]), V::load(mixed + r * padded + w * V::kLanes));
  for (int64_t k = 0; k < count; ++k) {
    if (ahead.next != nullptr) ahead.ask(k);
    F value[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) value[w] = V::load(values + k * stride + w * V::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F weight = V::broadcast(weights[r * kKeys + k]);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sums[r][w] = V::multiply_add(weight, value[w], sums[r][w]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) V::store(mixed + r * padded + w * V::kLanes, sums[r][w]);
}

// Scores → weights of one row, of which the first `visible` count; its top and sum so far are updated. Returns by what
// the mixture so far is multiplied.
inline float weigh(float* scores, int64_t visible, float* top, float* sum) {
  if (visible <= 0) {
    for (int64_t k = 0; k < kKeys; ++k) scores[k] = 0.f;
    return 1.f;
  }
  float best = *top;
  for (int64_t k = visible; k < kKeys; ++k) scores[k] = -__builtin_inff();
#pragma omp simd reduction(max : best)
  for (int64_t k = 0; k < kKeys; ++k) best = scores[k] > best ? scores[k] : best;
  const float factor = exponential(*top - best);
  float total = 0.f;
#pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < kKeys; ++k) {
    scores[k] = k < visible ? exponential(scores[k] - best) : 0.f;
    total += scores[k];
  }
  *sum = *sum * factor + total;
  *top = best;
  return factor;
}

template <typename V, typename S, typename T, int R = V::kRows>
void score_rows(
    int64_t rows, const float* q, const S* keys, int64_t stride, int64_t padded, Ahead<T> ahead, float* scores) {
  if constexpr (R > 1)
    if (rows < R) return score_rows<V, S, T, R - 1>(rows, q, keys, stride, padded, ahead, scores);
  for (int64_t k = 0; k < kKeys; k += 4) {
    for (int64_t i = k; ahead.next != nullptr && i < k + 4; ++i) ahead.ask(i);
    score<V, R>(q, keys + k * stride, stride, padded, scores + k);
  }
}

template <typename V, typename S, typename T, int R = V::kRows>
void mix_rows(
    int64_t rows, const float* weights, const S* values, int64_t stride, int64_t count, int64_t padded, Ahead<T> ahead,
    const float* factors, float* mixed) {
  if constexpr (R > 1)
    if (rows < R) return mix_rows<V, S, T, R - 1>(rows, weights, values, stride, count, padded, ahead, factors, mixed);
  int64_t d = 0;
  for (; d + 4 * V::kLanes <= padded; d += 4 * V::kLanes) {
    mix<V, R, 4>(weights, values + d, stride, count, padded, factors, mixed + d, ahead);
    ahead.next = nullptr;
  }
  for (; d < padded; d += V::kLanes) {
    mix<V, R, 1>(weights, values + d, stride, count, padded, factors, mixed + d, ahead);
    ahead.next = nullptr;
  }
}

// Rows [first, first + rows) of a KV head meet `count` keys from `k` on; what they have seen before is in the job's
// `mixed`, `top` and `sum` at `place`.
template <typename V, typename T>
void attend_block(
    const AttentionJob& job, int64_t head, int64_t first, int64_t rows, int64_t place, int64_t k, int64_t count,
    const T* next, float* scratch) {
  const int64_t padded = job.padded;
  const float* q = job.q + (head * job.rows + first) * padded;
  const T* keys = static_cast<const T*>(job.keys) + head * job.key_head + k * job.key_token;
  const T* values = static_cast<const T*>(job.values) + head * job.value_head + k * job.value_token;
  float *wide = scratch, *scores = wide + kKeys * padded, *factors = scores + kQueryRows * kKeys;
  float *mixed = job.mixed + place * padded, *top = job.top + place, *sum = job.sum + place;
  // Rows are dealt evenly to as few tiles as hold them. One or two tiles take keys to float32 in registers.
  const int64_t tiles = (rows + V::kRows - 1) / V::kRows, deal = (rows + tiles - 1) / tiles;
  const bool registers = tiles <= 2 && job.dim == padded && count == kKeys;
  const auto score_tiles = [&](const auto* from, int64_t stride) {
    for (int64_t r = 0; r < rows; r += deal)
      score_rows<V>(
          smaller(deal, rows - r), q + r * padded, from, stride, padded,
          Ahead<T>{registers && r == 0 ? values : nullptr, job.value_token, padded}, scores + r * kKeys);
  };
  const auto mix_tiles = [&](const auto* from, int64_t stride) {
    for (int64_t r = 0; r < rows; r += deal)
      mix_rows<V>(
          smaller(deal, rows - r), scores + r * kKeys, from, stride, count, padded,
          Ahead<T>{registers && r == 0 ? next : nullptr, job.key_token, padded}, factors + r, mixed + r * padded);
  };
  if (registers) {
    score_tiles(keys, job.key_token);
  } else {
    widen_tokens<V>(keys, job.key_token, count, job.dim, padded, wide);
    score_tiles(wide, padded);
  }
  for (int64_t r = 0; r < rows; ++r)
    factors[r] = weigh(scores + r * kKeys, smaller(count, job.visible(first + r) - k), top + r, sum + r);
  if (registers) return mix_tiles(values, job.value_token);
  widen_tokens<V>(values, job.value_token, count, job.dim, padded, wide);
  mix_tiles(wide, padded);
}

// Few rows: an item is a piece of the keys, and all heads take turns at it, as their keys lie side by side. Many rows:
// an item is some of the rows of one head, and all keys.
template <typename V, typename T>
void attend_item(const AttentionJob& job, int64_t item, float* scratch) {
  const bool few = job.row_blocks == 1;
  const int64_t split = few ? item : 0, head = few ? 0 : item / job.row_blocks, heads = few ? job.kv_heads : 1;
  const int64_t first = few ? 0 : item % job.row_blocks * kQueryRows, rows = smaller(kQueryRows, job.rows - first);
  const int64_t last = smaller(job.visible(first + rows - 1), (split + 1) * job.split);
  const int64_t place = (split * job.kv_heads + head) * job.rows + first;
  for (int64_t r = place; r < place + (heads - 1) * job.rows + rows; ++r) {
    job.top[r] = -__builtin_inff(), job.sum[r] = 0.f;
    for (int64_t d = 0; d < job.padded; ++d) job.mixed[r * job.padded + d] = 0.f;
  }
  for (int64_t k = split * job.split; k < last; k += kKeys)
    for (int64_t h = 0; h < heads; ++h) {
      const bool here = h + 1 < heads;
      const T* next = static_cast<const T*>(job.keys) + (here ? head + h + 1 : head) * job.key_head +
          (here ? k : k + kKeys) * job.key_token;
      attend_block<V, T>(job, head + h, first, rows, place + h * job.rows, k, smaller(kKeys, last - k), next, scratch);
    }
}

template <typename V, typename T>
void attend_items(const AttentionJob& job, int64_t first, int64_t last, float* scratch) {
  for (int64_t item = first; item < last; ++item) attend_item<V, T>(job, item, scratch);
}

template <typename V>
constexpr AttentionKernels attention_kernels(const char* name) {
  return {name, attend_items<V, float>, attend_items<V, BFloat16>, attend_items<V, Float16>};
}

}  // namespace
}  // namespace vpt
