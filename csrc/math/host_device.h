// Marks functions that CPU and CUDA kernels share; these headers include no torch header.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VPT_HD __host__ __device__ __forceinline__
#else
#define VPT_HD inline
#endif
