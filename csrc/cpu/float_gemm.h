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

// The operands lie in chunks of columns one after the other, each [rows, width] and contiguous: strided operands would
// run in oneDNN's reference implementation.
class FloatGemm {
 public:
  using Element = float;

  // weight: contiguous float32 [N, K]; it must outlive the object.
  explicit FloatGemm(const Tensor& weight)
      : weight_(weight), columns_(weight.size(1)), chunk_(prefers_onednn() ? kChunk : columns_) {}

  // Room for `rows` rows of x, until this thread asks for the next.
  void begin(int64_t rows) {
    static thread_local Workspace space;
    rows_ = rows;
    x_ = space.reserve<float>(rows * columns_);
  }

  // Columns first … first + count of a row of x; several threads may store different ones.
  void store(int64_t row, int64_t first, const float* values, int64_t count) const {
    while (count > 0) {
      const int64_t inside = first % chunk_, begin = first - inside, width = std::min(chunk_, columns_ - begin);
      const int64_t n = std::min(count, width - inside);
      std::copy_n(values, n, x_ + begin * rows_ + row * width + inside);
      first += n, values += n, count -= n;
    }
  }

  // x·weightᵀ as [rows, N]. It is valid until the next product of this thread.
  Tensor product() const {
    static thread_local Workspace space;
    const int64_t outputs = weight_.size(0);
    if (!prefers_onednn()) {
      Tensor product = wrap(space.reserve<float>(rows_ * outputs), rows_, outputs, ScalarType::Float, weight_);
      linear_into(product, wrap(x_, rows_, columns_, ScalarType::Float, weight_), weight_);
      return product;
    }
    AtenTensorHandle sum = nullptr;
    for (int64_t first = 0; first < columns_; first += kChunk) {
      const int64_t width = std::min(kChunk, columns_ - first);
      const Tensor left = wrap(x_ + first * rows_, rows_, width, ScalarType::Float, weight_);
      // One chunk at a time: the product finds it in the cache, where all of them would have gone to memory and back.
      float* chunk = space.reserve<float>(outputs * width);
      torch::stable::parallel_for(0, outputs, 64, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; ++o)
          std::copy_n(data<float>(weight_) + o * columns_ + first, width, chunk + o * width);
      });
      const Tensor right = wrap(chunk, outputs, width, ScalarType::Float, weight_);
      AtenTensorHandle next = nullptr;
      if (sum == nullptr) {
        TORCH_ERROR_CODE_CHECK(
            aoti_torch_cpu__linear_pointwise(left.get(), right.get(), nullptr, "none", nullptr, 0, nullptr, &next));
      } else {
        const Tensor before(sum);
        TORCH_ERROR_CODE_CHECK(
            aoti_torch_cpu__linear_pointwise_binary(left.get(), before.get(), right.get(), nullptr, "add", &next));
      }
      sum = next;
    }
    return Tensor(sum);
  }

 private:
  static constexpr int64_t kChunk = 256;

  const Tensor& weight_;
  int64_t columns_, chunk_, rows_ = 0;
  float* x_ = nullptr;
};

}  // namespace vpt::cpu
