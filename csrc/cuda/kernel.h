// What the kernels use beside the language itself; includes no torch header.
#pragma once

#include "../math/host_device.h"

namespace vpt::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// A test build that runs kernels on the CPU defines this differently.
#ifndef VPT_DYNAMIC_SHARED
#define VPT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// The start of a kernel that was launched as `chained`: waits until the kernel before it has finished and its writes
// are visible. Every thread calls it, also those with nothing to do: the kernel after this one relies on it.
__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the chained kernel may be brought onto the device, where it waits.
__device__ __forceinline__ void allow_kernel_after() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// V elements that are read and written in one access.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> load(const T* from) {
  return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <typename T, int V>
__device__ __forceinline__ void store(T* to, const Vector<T, V>& value) {
  *reinterpret_cast<Vector<T, V>*>(to) = value;
}

// Up to V of `left` elements, zeros behind them: one access if kWide, which needs alignment and left ≥ V. Sums over a
// row take the same elements in the same order either way: a result does not depend on where its operands lie.
template <int V, bool kWide, typename T>
__device__ __forceinline__ Vector<T, V> load_row(const T* from, int64_t left) {
  if constexpr (kWide) {
    return load<T, V>(from);
  } else {
    Vector<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out.at[i] = i < left ? from[i] : T{};
    return out;
  }
}

template <int V, bool kWide, typename T>
__device__ __forceinline__ void store_row(T* to, int64_t left, const Vector<T, V>& value) {
  if constexpr (kWide) {
    store<T, V>(to, value);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < left) to[i] = value.at[i];
  }
}

// The sum over a warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

}  // namespace vpt::cuda
