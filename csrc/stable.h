// The part of libtorch's stable ABI that the operators use.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "math/indices.h"
#include "math/rounding.h"

namespace vpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T>
inline const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
inline T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// What an operator finds wrong in its caller's values. The dispatcher hands std::out_of_range to Python as an IndexError
// of these words alone, of which vpt_kernels.backends makes a ValueError; others' kind is lost from torch 2.15 on.
// STD_TORCH_CHECK, which names this source, is for what callers cannot bring about.
template <typename... Words>
void require_value(bool ok, const Words&... words) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << words);
  throw std::out_of_range(message.str());
}

// Calls f with a value of the element type.
template <typename F>
void dispatch(ScalarType type, const char* op, F&& f) {
  if (type == ScalarType::Float)
    f(float{});
  else if (type == ScalarType::BFloat16)
    f(BFloat16{});
  else if (type == ScalarType::Half)
    f(Float16{});
  else
    STD_TORCH_CHECK(false, op, ": computes in float32, bfloat16 and float16 only");
}

// Elements offset + i·stride of an int32 or int64 tensor.
inline Indices indices(const Tensor& t, int64_t stride, int64_t offset = 0) {
  const bool wide = t.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || t.scalar_type() == ScalarType::Int, "indices must be int32 or int64");
  return {t.const_data_ptr(), stride, offset, wide};
}

// A 64-byte aligned buffer that grows and is kept, one per calling thread and purpose.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(buffer_); }

  template <typename T>
  T* reserve(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > bytes_) {
      std::free(buffer_);
      bytes_ = 0;
      buffer_ = std::aligned_alloc(64, bytes);
      if (buffer_ == nullptr) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<T*>(buffer_);
  }

 private:
  void* buffer_ = nullptr;
  size_t bytes_ = 0;
};

// A [rows, columns] tensor over memory that outlives it.
inline Tensor wrap(void* memory, int64_t rows, int64_t columns, ScalarType type, const Tensor& like) {
  return torch::stable::from_blob(memory, {rows, columns}, {columns, 1}, like.device(), type);
}

// out = x·weightᵀ through the library that F.linear takes, without autograd.
inline void linear_into(const Tensor& out, const Tensor& x, const Tensor& weight) {
  Tensor transposed = torch::stable::transpose(weight, 0, 1);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), x.get(), transposed.get()));
}

}  // namespace vpt
