// The rank-one update out = f + (f·k)k: first k = Linear(LayerNorm(control)), which needs the whole device to stream the
// weight; then one warp per token.
#pragma once

#include "../math/indices.h"
#include "../math/rounding.h"
#include "kernel.h"

namespace vpt::cuda {

constexpr int kConditionThreads = 256, kRankOneThreads = 128;
constexpr float kLayerNormEps = 1e-5f;

struct ConditionParams {
  const void* control;
  const void* norm_weight;
  const void* norm_bias;
  const void* weight;  // [hidden, hidden], contiguous
  const void* bias;
  float* k;  // [images, hidden]
  int64_t control_stride, images, hidden;
};

// The sum over a block, in every thread.
__device__ __forceinline__ float block_sum(float x, float* partial) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0.f;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) total += partial[w];
  __syncthreads();
  return total;
}

// One warp per output of the linear map. The images follow one another, so that a block's rows of the weight are read
// from device memory once.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kConditionThreads) condition_kernel(const __grid_constant__ ConditionParams p) {
  __shared__ float partial[kConditionThreads / kWarp];
  constexpr int V = 16 / sizeof(T);
  allow_kernel_after();
  const int lane = threadIdx.x % kWarp;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * (kConditionThreads / kWarp) + threadIdx.x / kWarp;
  const T* norm_weight = static_cast<const T*>(p.norm_weight);
  const T* norm_bias = static_cast<const T*>(p.norm_bias);
  const T* row = static_cast<const T*>(p.weight) + (output < p.hidden ? output : 0) * p.hidden;
  for (int64_t image = 0; image < p.images; ++image) {
    const T* x = static_cast<const T*>(p.control) + image * p.control_stride;
    // Sums start from the first element: rows far from zero lose nothing.
    const float origin = to_float(x[0]);
    float sum = 0.f;
    for (int64_t i = threadIdx.x; i < p.hidden; i += kConditionThreads) sum += to_float(x[i]) - origin;
    const float mean = block_sum(sum, partial) / static_cast<float>(p.hidden);
    float squares = 0.f;
    for (int64_t i = threadIdx.x; i < p.hidden; i += kConditionThreads) {
      const float d = (to_float(x[i]) - origin) - mean;
      squares = fmaf(d, d, squares);
    }
    const float variance = block_sum(squares, partial) / static_cast<float>(p.hidden);
    const float scale = 1.f / sqrtf(variance + kLayerNormEps);
    float dot = 0.f;
    for (int64_t i = lane * V; i < p.hidden; i += kWarp * V) {
      const int64_t left = p.hidden - i;
      const Vector<T, V> w = load_row<V, kWide>(row + i, left), values = load_row<V, kWide>(x + i, left);
      const Vector<T, V> gain = load_row<V, kWide>(norm_weight + i, left);
      const Vector<T, V> shift = load_row<V, kWide>(norm_bias + i, left);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float normed = ((to_float(values.at[j]) - origin) - mean) * scale;
        dot = fmaf(to_float(w.at[j]), fmaf(normed, to_float(gain.at[j]), to_float(shift.at[j])), dot);
      }
    }
    dot = warp_sum(dot);
    if (lane == 0 && output < p.hidden)
      p.k[image * p.hidden + output] = dot + to_float(static_cast<const T*>(p.bias)[output]);
  }
}

struct RankOneParams {
  const void* features;
  int64_t tokens, per_image, image_stride, token_stride;  // [images, per_image, hidden], or one "image" of all tokens
  const float* k;                                         // null: out = f
  int64_t images, hidden;
  Indices ends;  // cu_seqlens; base null: token / per_image is the image
  void* out;
  int64_t out_rows, out_stride;
  Indices rows;  // base null: token i goes to row i
};

__device__ __forceinline__ int64_t image_of(const RankOneParams& p, int64_t token) {
  if (p.ends.base == nullptr) return token / p.per_image;
  int64_t low = 0, high = p.images - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (token < p.ends[middle + 1])
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kRankOneThreads) rank_one_kernel(const __grid_constant__ RankOneParams p) {
  constexpr int V = 16 / sizeof(T);
  wait_for_kernel_before();
  const int lane = threadIdx.x % kWarp;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kRankOneThreads / kWarp) + threadIdx.x / kWarp;
  if (token >= p.tokens) return;
  const int64_t row = p.rows.base == nullptr ? token : p.rows[token];
  if (row < 0 || row >= p.out_rows) return;
  const T* f =
      static_cast<const T*>(p.features) + token / p.per_image * p.image_stride + token % p.per_image * p.token_stride;
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  if (p.k == nullptr) {
    for (int64_t i = lane * V; i < p.hidden; i += kWarp * V)
      store_row<V, kWide>(out + i, p.hidden - i, load_row<V, kWide>(f + i, p.hidden - i));
    return;
  }
  const float* k = p.k + image_of(p, token) * p.hidden;
  float score = 0.f;
  for (int64_t i = lane * V; i < p.hidden; i += kWarp * V) {
    const Vector<T, V> x = load_row<V, kWide>(f + i, p.hidden - i);
    const Vector<float, V> y = load_row<V, kWide>(k + i, p.hidden - i);
#pragma unroll
    for (int j = 0; j < V; ++j) score = fmaf(to_float(x.at[j]), y.at[j], score);
  }
  score = warp_sum(score);
  for (int64_t i = lane * V; i < p.hidden; i += kWarp * V) {
    const Vector<T, V> x = load_row<V, kWide>(f + i, p.hidden - i);
    const Vector<float, V> y = load_row<V, kWide>(k + i, p.hidden - i);
    Vector<T, V> sum;
#pragma unroll
    for (int j = 0; j < V; ++j) sum.at[j] = from_float<T>(fmaf(score, y.at[j], to_float(x.at[j])));
    store_row<V, kWide>(out + i, p.hidden - i, sum);
  }
}

}  // namespace vpt::cuda
