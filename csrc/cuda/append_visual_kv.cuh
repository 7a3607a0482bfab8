// RMSNorm, M-RoPE and the cache write: one block per token. cos and sin of the token are gathered once into shared
// memory, beside them 1/√(mean square) of each head that is normalised, found by a warp; then the block's threads
// normalise and rotate q and k and copy v, V elements of a head at a time.
#pragma once

#include "../math/indices.h"
#include "../math/mrope.h"
#include "../math/rounding.h"
#include "../math/slots.h"
#include "kernel.h"

namespace vpt::cuda {

constexpr int kAppendThreads = 256;

// Heads of one tensor, in elements.
struct Heads {
  const void* base;
  int64_t token_stride, head_stride;
};

struct AppendParams {
  Heads q, k, v, q_out;
  void* k_cache;
  void* v_cache;
  CacheLayout k_layout, v_layout;
  const float* table;  // [table_rows, 2·half], cosines first
  int64_t table_rows, table_stride;
  Indices positions[3], slots;
  const float* k_scale;
  const float* v_scale;
  int32_t k_scale_stride, v_scale_stride;
  int32_t q_heads, kv_heads, dim, half;
  Sections sections;
  bool in_place;       // q_out is q
  const void* q_norm;  // [dim], of T; null: heads are rotated as they are
  const void* k_norm;
  float norm_eps;
};

template <typename T>
__device__ __forceinline__ T* head(const Heads& x, int64_t token, int64_t number) {
  return static_cast<T*>(const_cast<void*>(x.base)) + token * x.token_stride + number * x.head_stride;
}

// What is stored of x: x / scale in float8, x itself elsewhere.
template <typename T, typename Stored, int V>
__device__ __forceinline__ Vector<Stored, V> stored(const Vector<T, V>& x, float scale) {
  if constexpr (sizeof(Stored) == sizeof(T)) {
    return x;
  } else {
    Vector<Stored, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out.at[i] = from_float<Stored>(to_float(x.at[i]) / scale);
    return out;
  }
}

// How the heads of q, or of k, are normalised.
template <typename T>
struct Norm {
  const T* weight;        // null: not at all
  const float* inverses;  // of the heads, in shared memory
};

// Channels [at, at + V) of a head, normalised: x/√(mean square) rounded to T, times weight, rounded again.
template <typename T, int V>
__device__ __forceinline__ Vector<T, V> load_normed(const T* from, int at, const Norm<T>& norm, int h) {
  Vector<T, V> x = load<T, V>(from + at);
  if (norm.weight == nullptr) return x;
  const Vector<T, V> weight = load<T, V>(norm.weight + at);
  const float inverse = norm.inverses[h];
#pragma unroll
  for (int i = 0; i < V; ++i)
    x.at[i] = from_float<T>(to_float(weight.at[i]) * to_float(from_float<T>(to_float(x.at[i]) * inverse)));
  return x;
}

// 1/√(mean square + eps) of every head into `inverses`, a warp per head; the order of a sum does not depend on V.
template <typename T>
__device__ __forceinline__ void find_inverses(const Heads& x, int heads, const AppendParams& p, float* inverses) {
  const int lane = threadIdx.x % kWarp;
  for (int h = threadIdx.x / kWarp; h < heads; h += blockDim.x / kWarp) {
    const T* from = head<T>(x, blockIdx.x, h);
    float squares = 0.f;
    for (int i = lane; i < p.dim; i += kWarp) squares = fmaf(to_float(from[i]), to_float(from[i]), squares);
    squares = warp_sum(squares);
    if (lane == 0) inverses[h] = 1.f / sqrtf(squares / static_cast<float>(p.dim) + p.norm_eps);
  }
}

// Rotates channels [at, at + V) and [half + at, half + at + V) of head h, each result divided by `scale`.
template <typename T, typename Stored, int V>
__device__ __forceinline__ void rotate(
    const T* from, const Norm<T>& norm, int h, const float* cos_sin, int half, int at, float scale, Stored* to) {
  const Vector<T, V> a = load_normed<T, V>(from, at, norm, h), b = load_normed<T, V>(from, half + at, norm, h);
  Vector<Stored, V> first, second;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float c = cos_sin[at + i], s = cos_sin[half + at + i];
    // Not fused (nvcc runs with --fmad=false): the same bits as on the CPU.
    float x = to_float(a.at[i]) * c - to_float(b.at[i]) * s;
    float y = to_float(b.at[i]) * c + to_float(a.at[i]) * s;
    if constexpr (sizeof(Stored) != sizeof(T)) {
      x /= scale;
      y /= scale;
    }
    first.at[i] = from_float<Stored>(x);
    second.at[i] = from_float<Stored>(y);
  }
  store<Stored, V>(to + at, first);
  store<Stored, V>(to + half + at, second);
}

// T: of q, k and v. Stored: of the caches, T or Float8E4M3.
template <typename T, typename Stored, int V>
__global__ void __launch_bounds__(kAppendThreads) append_visual_kv_kernel(const __grid_constant__ AppendParams p) {
  VPT_DYNAMIC_SHARED(shared);
  float* cos_sin = reinterpret_cast<float*>(shared);
  const int64_t token = blockIdx.x;
  for (int i = threadIdx.x; i < p.half; i += blockDim.x) {
    int64_t row = p.positions[p.sections.axis(i)][token];
    // Reporting a position outside the table would need a synchronisation.
    row = row < 0 ? 0 : row < p.table_rows ? row : p.table_rows - 1;
    cos_sin[i] = p.table[row * p.table_stride + i];
    cos_sin[p.half + i] = p.table[row * p.table_stride + p.half + i];
  }
  float* inverses = cos_sin + 2 * p.half;
  const Norm<T> q_norm{static_cast<const T*>(p.q_norm), inverses};
  const Norm<T> k_norm{static_cast<const T*>(p.k_norm), inverses + p.q_heads};
  if (q_norm.weight != nullptr) find_inverses<T>(p.q, p.q_heads, p, inverses);
  if (k_norm.weight != nullptr) find_inverses<T>(p.k, p.kv_heads, p, inverses + p.q_heads);
  __syncthreads();
  const int64_t slot = p.slots[token];
  const int kv_heads = p.k_layout.holds(slot) ? p.kv_heads : 0;
  Stored* k_cache = static_cast<Stored*>(p.k_cache);
  Stored* v_cache = static_cast<Stored*>(p.v_cache);

  const int pairs = p.half / V;
  for (int i = threadIdx.x; i < (p.q_heads + kv_heads) * pairs; i += blockDim.x) {
    const int number = i / pairs, at = i % pairs * V, h = number - p.q_heads;
    if (h < 0) {
      rotate<T, T, V>(
          head<T>(p.q, token, number), q_norm, number, cos_sin, p.half, at, 1.f, head<T>(p.q_out, token, number));
    } else {
      const float scale = p.k_scale == nullptr ? 1.f : p.k_scale[h * p.k_scale_stride];
      rotate<T, Stored, V>(
          head<T>(p.k, token, h), k_norm, h, cos_sin, p.half, at, scale, k_cache + p.k_layout.offset(slot, h));
    }
  }

  // Channels beyond rotary_dim are not rotated; in place and not normalised, q's are there already.
  const int rest = (p.dim - 2 * p.half) / V;
  const int q_heads = p.in_place && q_norm.weight == nullptr ? 0 : p.q_heads;
  for (int i = threadIdx.x; i < (q_heads + kv_heads) * rest; i += blockDim.x) {
    const int number = i / rest, at = 2 * p.half + i % rest * V, h = number - q_heads;
    if (h < 0) {
      store<T, V>(
          head<T>(p.q_out, token, number) + at, load_normed<T, V>(head<T>(p.q, token, number), at, q_norm, number));
    } else {
      const float scale = p.k_scale == nullptr ? 1.f : p.k_scale[h * p.k_scale_stride];
      store<Stored, V>(
          k_cache + p.k_layout.offset(slot, h) + at,
          stored<T, Stored, V>(load_normed<T, V>(head<T>(p.k, token, h), at, k_norm, h), scale));
    }
  }

  const int pieces = p.dim / V;
  for (int i = threadIdx.x; i < kv_heads * pieces; i += blockDim.x) {
    const int h = i / pieces, at = i % pieces * V;
    const float scale = p.v_scale == nullptr ? 1.f : p.v_scale[h * p.v_scale_stride];
    store<Stored, V>(
        v_cache + p.v_layout.offset(slot, h) + at,
        stored<T, Stored, V>(load<T, V>(head<T>(p.v, token, h) + at), scale));
  }
}

}  // namespace vpt::cuda
