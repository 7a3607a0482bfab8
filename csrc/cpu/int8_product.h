// float32 products of pixels in integer arithmetic. A centred pixel is a signed byte; a weight row is written as
// scale·(d0·256^(L−1) + … + dL) with signed bytes d, its int8 slices, so x·weightᵀ is L byte products with exact int32
// sums, which processors with VNNI run several times faster than float32. Three slices hold a row's weights to 2^-24 of
// the largest; rows whose largest weight stands out take four, or small weights would lose what float32 keeps.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>

#include "../stable.h"
#include "simd.h"

namespace vpt::cpu {

class Int8Weight {
 public:
  // Whether byte products are fast here and, as a product of the largest bytes shows, exact: oneDNN without VNNI, also
  // where ONEDNN_MAX_CPU_ISA keeps it from VNNI, adds pairs of products in 16 bits, which hold fewer than two. Asked in
  // every call (some 3 µs), for PyTorch may be told between calls to do without oneDNN.
  static bool available(const Tensor& like) { return has_int8_matmul() && multiplies_exactly(like); }

  // weight: float32 [rows, columns], columns adjacent. The slices live in per-thread buffers until the next call.
  explicit Int8Weight(const Tensor& weight) : rows_(weight.size(0)), columns_(weight.size(1)) {
    static thread_local Workspace slice_space, scale_space;
    const float* w = data<float>(weight);
    const int64_t stride = weight.stride(0);
    scales_ = scale_space.reserve<float>(rows_);
    std::atomic<bool> outliers{false};
    torch::stable::parallel_for(0, rows_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        scales_[r] = simd().largest(w + r * stride, columns_);
        const float square = simd().f32.dot(w + r * stride, w + r * stride, columns_);
        if (square != square) scales_[r] = square;  // bytes cannot hold a NaN: let the scale carry it
        if (scales_[r] * scales_[r] * static_cast<float>(columns_) > kOutlier * kOutlier * square) outliers = true;
      }
    });
    slices_ = outliers ? 4 : 3;
    const double top = slices_ == 4 ? 0x7F7F7F7F : 0x7F7F7F;
    int8_t* out = slice_space.reserve<int8_t>(slices_ * rows_ * columns_);
    torch::stable::parallel_for(0, rows_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const double unit = scales_[r] / top;
        const double inverse = unit > 0 ? 1.0 / unit : 0.0;
        simd().int8_slices(w + r * stride, columns_, inverse, slices_, out + r * columns_, rows_ * columns_);
        scales_[r] = static_cast<float>(unit / kPixelScale);
      }
    });
    matrix_ = wrap(out, slices_ * rows_, columns_, ScalarType::Char, weight);
  }

  // Columns of a product row: the slices' products one after the other.
  int64_t width() const { return slices_ * rows_; }

  // product int32 [n, width()] = pixels [n, columns]·slicesᵀ
  void multiply(const Tensor& product, const Tensor& pixels) const { int_multiply(product, pixels, matrix_); }

  // out [rows] = scale·(the slices' products of one product row) + bias
  void combine(const int32_t* product, const float* bias, float* out) const {
    simd().combine(product, rows_, slices_, scales_, bias, out);
  }

 private:
  static constexpr float kOutlier = 8.f;  // in root mean squares
  static constexpr double kPixelScale = 256.0;

  static void int_multiply(const Tensor& product, const Tensor& left, const Tensor& right) {
    const Tensor transposed = torch::stable::transpose(right, 0, 1);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__int_mm_out(product.get(), left.get(), transposed.get()));
  }

  static bool multiplies_exactly(const Tensor& like) {
    constexpr int64_t kRows = 16, kColumns = 64, kLargest = 127;
    std::array<int8_t, kRows * kColumns> bytes;
    std::array<int32_t, kRows * kRows> sums;
    bytes.fill(kLargest);
    const Tensor operand = wrap(bytes.data(), kRows, kColumns, ScalarType::Char, like);
    int_multiply(wrap(sums.data(), kRows, kRows, ScalarType::Int, like), operand, operand);
    return std::all_of(sums.begin(), sums.end(), [](int32_t sum) { return sum == kColumns * kLargest * kLargest; });
  }

  int64_t rows_, columns_;
  int slices_ = 3;
  float* scales_ = nullptr;
  Tensor matrix_;
};

}  // namespace vpt::cpu
