// float32 products x·weightᵀ by whichever library is faster here. MKL, which F.linear takes, reaches half of what
// processors of other makers than Intel can do; oneDNN is about twice as fast on them, but sums K one after the other and
// errs up to 2.5 times as much. In chunks of 256 columns, each a product of its own, it is as exact as MKL (bench/NOTES.md).
#pragma once

#include <algorithm>

#include "../stable.h"

// Not in every build of libtorch: then these are null.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, const char*, const double**, int64_t, const char**,
    AtenTensorHandle*);
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise_binary(
    AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, const char*, AtenTensorHandle*);
}

namespace vpt::cpu {

inline bool prefers_onednn() {
#ifdef __x86_64__
  static const bool preferred = aoti_torch_cpu__linear_pointwise != nullptr &&
      aoti_torch_cpu__linear_pointwise_binary != nullptr && !__builtin_cpu_is("intel");
  return preferred;
#else
  return false;
#endif
}

class FloatGemm {
 public:
  // weight: contiguous float32 [N, K]; it must outlive the object. Its chunks live in a per-thread buffer until the next
  // object is made.
  explicit FloatGemm(const Tensor& weight) : weight_(weight), columns_(weight.size(1)) {
    static thread_local Workspace space;
    if (!prefers_onednn()) return;
    const int64_t rows = weight.size(0);
    chunks_ = space.reserve<float>(rows * columns_);
    split(data<float>(weight), rows, chunks_);
  }

  // x·weightᵀ as [rows, N] of x: contiguous [rows, K]. It is valid until the next product of this thread.
  Tensor operator()(const float* x, int64_t rows) const {
    static thread_local Workspace space;
    float* memory = space.reserve<float>(rows * std::max(columns_, weight_.size(0)));
    if (chunks_ == nullptr || rows == 0) {
      Tensor product = wrap(memory, rows, weight_.size(0), ScalarType::Float, weight_);
      linear_into(product, wrap(const_cast<float*>(x), rows, columns_, ScalarType::Float, weight_), weight_);
      return product;
    }
    split(x, rows, memory);
    AtenTensorHandle sum = nullptr;
    for (int64_t first = 0; first < columns_; first += kChunk) {
      const int64_t width = std::min(kChunk, columns_ - first);
      const Tensor left = wrap(memory + first * rows, rows, width, ScalarType::Float, weight_);
      const Tensor right = wrap(chunks_ + first * weight_.size(0), weight_.size(0), width, ScalarType::Float, weight_);
      AtenTensorHandle next = nullptr;
      if (sum == nullptr) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(
            left.get(), right.get(), nullptr, "none", nullptr, 0, nullptr, &next));
      } else {
        const Tensor before(sum);
        TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise_binary(
            left.get(), before.get(), right.get(), nullptr, "add", &next));
      }
      sum = next;
    }
    return Tensor(sum);
  }

 private:
  static constexpr int64_t kChunk = 256;

  // [rows, K] → the chunks of columns one after the other, each [rows, width] and contiguous: strided operands would run
  // in oneDNN's reference implementation.
  void split(const float* from, int64_t rows, float* to) const {
    torch::stable::parallel_for(0, rows, 32, [&](int64_t begin, int64_t end) {
      for (int64_t first = 0; first < columns_; first += kChunk) {
        const int64_t width = std::min(kChunk, columns_ - first);
        for (int64_t r = begin; r < end; ++r)
          std::copy_n(from + r * columns_ + first, width, to + first * rows + r * width);
      }
    });
  }

  const Tensor& weight_;
  int64_t columns_;
  float* chunks_ = nullptr;
};

}  // namespace vpt::cpu
