// bfloat16 products that round once: the bias joins the GEMM as extra columns, so that the library adds it to its
// float32 sums before it rounds. A bias is split into three bfloat16 parts, 24 bits in all; the row of the other operand
// has ones in the columns of its own bias and zeros in those of others.
#pragma once

#include <algorithm>

#include "../stable.h"

namespace vpt::cpu {

constexpr int64_t kBiasParts = 3;

// Columns of the operands, a multiple that the library's kernels like.
inline int64_t columns_with_bias(int64_t columns, int64_t biases) {
  return (columns + kBiasParts * biases + 31) / 32 * 32;
}

// weight [N, columns], rows `stride` apart, followed by the parts of biases[b][0..N), as [N, columns_with_bias] in `out`.
inline void append_bias_columns(
    const BFloat16* weight, int64_t stride, int64_t rows, int64_t columns, const std::vector<const float*>& biases,
    BFloat16* out) {
  const int64_t count = static_cast<int64_t>(biases.size()), total = columns_with_bias(columns, count);
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      BFloat16* row = std::copy_n(weight + n * stride, columns, out + n * total);
      for (const float* bias : biases) {
        float rest = bias[n];
        for (int64_t part = 0; part < kBiasParts; ++part, ++row) {
          *row = from_float<BFloat16>(rest);
          rest -= to_float(*row);
        }
      }
      std::fill(row, out + (n + 1) * total, BFloat16{0});
    }
  });
}

// The columns of one row that select bias `b`.
inline void select_bias(BFloat16* row, int64_t columns, int64_t total, int64_t b) {
  std::fill(row + columns, row + total, BFloat16{0});
  std::fill_n(row + columns + kBiasParts * b, kBiasParts, from_float<BFloat16>(1.f));
}

}  // namespace vpt::cpu
