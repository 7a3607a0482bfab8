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

// scores [R][kKeys] of four keys at the place to which `scores` points.
template <typename V, int R>
void score(const float* q, const float* keys, int64_t padded, float* scores) {
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
      const F key = V::load(keys + k * padded + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][k] = V::multiply_add(x[r], key, sums[r][k]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) V::sums(sums[r], scores + r * kKeys);
}

// mixed [R][padded] = factor·mixed + weights [R][kKeys]·values, of W vectors from `mixed` on.
template <typename V, int R, int W>
void mix(
    const float* weights, const float* values, int64_t count, int64_t padded, const float* factors, float* mixed) {
  using F = typename V::Float;
  F sums[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w)
      sums[r][w] = V::multiply(V::broadcast(factors[r]), V::load(mixed + r * padded + w * V::kLanes));
  for (int64_t k = 0; k < count; ++k) {
    F value[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) value[w] = V::load(values + k * padded + w * V::kLanes);
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

template <typename V, int R = V::kRows>
void score_rows(int64_t rows, const float* q, const float* keys, int64_t padded, float* scores) {
  if constexpr (R > 1)
    if (rows < R) return score_rows<V, R - 1>(rows, q, keys, padded, scores);
  for (int64_t k = 0; k < kKeys; k += 4) score<V, R>(q, keys + k * padded, padded, scores + k);
}

template <typename V, int R = V::kRows>
void mix_rows(
    int64_t rows, const float* weights, const float* values, int64_t count, int64_t padded, const float* factors,
    float* mixed) {
  if constexpr (R > 1)
    if (rows < R) return mix_rows<V, R - 1>(rows, weights, values, count, padded, factors, mixed);
  int64_t d = 0;
  for (; d + 4 * V::kLanes <= padded; d += 4 * V::kLanes)
    mix<V, R, 4>(weights, values + d, count, padded, factors, mixed + d);
  for (; d < padded; d += V::kLanes) mix<V, R, 1>(weights, values + d, count, padded, factors, mixed + d);
}

template <typename V, typename T>
void attend_item(const AttentionJob& job, int64_t item, float* scratch) {
  const int64_t split = item / (job.kv_heads * job.row_blocks), head = item / job.row_blocks % job.kv_heads;
  const int64_t begin = item % job.row_blocks * kQueryRows, rows = smaller(kQueryRows, job.rows - begin);
  const int64_t place = (split * job.kv_heads + head) * job.rows + begin;
  const int64_t padded = job.padded, last = smaller(job.visible(begin + rows - 1), (split + 1) * job.split);
  const float* q = job.q + (head * job.rows + begin) * padded;
  const T* keys = static_cast<const T*>(job.keys) + head * job.key_head;
  const T* values = static_cast<const T*>(job.values) + head * job.value_head;
  float *wide = scratch, *scores = wide + kKeys * padded, *factors = scores + kQueryRows * kKeys;
  float *mixed = job.mixed + place * padded, *top = job.top + place, *sum = job.sum + place;
  for (int64_t r = 0; r < rows; ++r) top[r] = -__builtin_inff(), sum[r] = 0.f;
  for (int64_t i = 0; i < rows * padded; ++i) mixed[i] = 0.f;
  for (int64_t k = split * job.split; k < last; k += kKeys) {
    const int64_t count = smaller(kKeys, last - k);
    widen_tokens<V>(keys + k * job.key_token, job.key_token, count, job.dim, padded, wide);
    for (int64_t r = 0; r < rows; r += V::kRows)
      score_rows<V>(rows - r, q + r * padded, wide, padded, scores + r * kKeys);
    for (int64_t r = 0; r < rows; ++r)
      factors[r] = weigh(scores + r * kKeys, smaller(count, job.visible(begin + r) - k), top + r, sum + r);
    widen_tokens<V>(values + k * job.value_token, job.value_token, count, job.dim, padded, wide);
    for (int64_t r = 0; r < rows; r += V::kRows)
      mix_rows<V>(rows - r, scores + r * kKeys, wide, count, padded, factors + r, mixed + r * padded);
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
