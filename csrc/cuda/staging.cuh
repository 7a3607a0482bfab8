// Rows of an image brought into shared memory by 16 bytes a load.
#pragma once

#include "kernel.h"

namespace vpt::cuda {

// `rows` runs of `bytes` bytes, `stride` apart. In shared memory a run begins `pitch()` behind the one before, and every
// byte keeps its address modulo 16: what can be read at once can be written at once, however rows are aligned.
struct Rectangle {
  static constexpr int32_t kWide = 16;

  const uint8_t* base;
  int64_t stride;
  int32_t rows, bytes;

  __device__ int32_t shift() const { return static_cast<int32_t>(reinterpret_cast<uintptr_t>(base) % kWide); }
  __device__ int32_t pitch() const { return bytes + ((static_cast<int32_t>(stride % kWide) - bytes) & (kWide - 1)); }

  // Bytes that any rectangle of this size takes, its shift included.
  VPT_HD static int64_t most(int64_t rows, int64_t bytes) { return kWide - 1 + rows * (bytes + kWide - 1); }

  // Writes the rectangle to `to`, which is aligned; returns where its first byte is. The bytes of a run before its first
  // and behind its last whole vector are read one by one: nothing outside of the rectangle is.
  __device__ uint8_t* bring(uint8_t* to, int32_t thread, int32_t threads) const {
    uint8_t* const out = to + shift();
    const int32_t vectors = (bytes + 2 * (kWide - 1)) / kWide, apart = pitch();
    for (int32_t i = thread; i < rows * vectors; i += threads) {
      const int32_t row = i / vectors;
      const uint8_t* from = base + row * stride;
      const int32_t begin =
          (i - row * vectors) * kWide - static_cast<int32_t>(reinterpret_cast<uintptr_t>(from) % kWide);
      const int32_t end = begin + kWide;
      uint8_t* target = out + row * apart;
      if (begin >= 0 && end <= bytes) {
        store<uint8_t, kWide>(target + begin, load<uint8_t, kWide>(from + begin));
      } else {
        for (int32_t k = begin < 0 ? 0 : begin; k < (end < bytes ? end : bytes); ++k) target[k] = from[k];
      }
    }
    return out;
  }
};

}  // namespace vpt::cuda
