// LayerNorm into a tile, the library's GEMM, and the rank-one update as the epilogue of the tile while it is in cache.
#include <algorithm>
#include <type_traits>

#include "../calls/control_cross_attention.h"
#include "../ops.h"
#include "bias_columns.h"
#include "float_gemm.h"
#include "simd.h"

namespace vpt::cpu {
namespace {

constexpr int64_t kTileTokens = 256;

void check_segments(const ControlCall& c) {
  if (!c.cu_seqlens.has_value()) return;
  const Indices ends = indices(*c.cu_seqlens, c.cu_seqlens->stride(0));
  bool rises = ends[0] == 0 && ends[c.images()] == c.tokens();
  for (int64_t i = 0; i < c.images(); ++i) rises = rises && ends[i] <= ends[i + 1];
  require_value(rises, "cu_seqlens must rise from 0 to the number of tokens, ", c.tokens());
}

// k = Linear(LayerNorm(control)), float32 [images, H]; the weight is read once for all images.
template <typename T>
const float* conditions(const ControlCall& c, Workspace& space) {
  const int64_t hidden = c.hidden(), images = c.images();
  const Loops<T>& loop = loops<T>(simd());
  float* normed = space.reserve<float>(2 * images * hidden);
  float* k = normed + images * hidden;
  for (int64_t i = 0; i < images; ++i)
    loop.layer_norm_wide(
        data<T>(*c.control) + i * c.control->stride(0), 1, data<T>(c.condition_norm_weight),
        data<T>(c.condition_norm_bias), hidden, normed + i * hidden);
  const T* weight = data<T>(c.condition_weight);
  const T* bias = data<T>(c.condition_bias);
  torch::stable::parallel_for(0, hidden, 64, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t i = 0; i < images; ++i)
        k[i * hidden + o] = loop.dot(weight + o * hidden, normed + i * hidden, hidden) + to_float(bias[o]);
  });
  return k;
}

// The image of every token, for ragged batches; null where token / (tokens per image) says it.
const int32_t* token_images(const ControlCall& c, Workspace& space) {
  if (!c.cu_seqlens.has_value()) return nullptr;
  int32_t* image = space.reserve<int32_t>(c.tokens() + 1);
  const Indices ends = indices(*c.cu_seqlens, c.cu_seqlens->stride(0));
  for (int64_t i = 0; i < c.images(); ++i)
    for (int64_t t = ends[i]; t < ends[i + 1]; ++t) image[t] = static_cast<int32_t>(i);
  return image;
}

template <typename T, typename Compute>
void normalise_row(const ControlCall& c, const T* row, int64_t n, Compute* out) {
  const Loops<T>& loop = loops<T>(simd());
  if constexpr (sizeof(Compute) == sizeof(T))
    loop.layer_norm(row, 1, data<T>(*c.norm_weight), data<T>(*c.norm_bias), n, out);
  else
    loop.layer_norm_wide(row, 1, data<T>(*c.norm_weight), data<T>(*c.norm_bias), n, out);
}

// LayerNorm of the tokens' rows: the GEMM's operand.
template <typename T, typename Gemm>
void normalise_rows(const ControlCall& c, int64_t first, int64_t tokens, const Gemm& gemm) {
  const Tensor& x = c.features;
  const int64_t columns = x.size(x.dim() - 1);
  const int64_t per_image = x.dim() == 3 ? x.size(1) : c.tokens();
  const int64_t image_stride = x.dim() == 3 ? x.stride(0) : 0, token_stride = x.stride(x.dim() - 2);
  torch::stable::parallel_for(first, first + tokens, 16, [&](int64_t begin, int64_t end) {
    static thread_local Workspace space;
    auto* normal = space.reserve<typename Gemm::Element>(columns);
    for (int64_t t = begin; t < end; ++t) {
      normalise_row<T>(
          c, data<T>(x) + (t / per_image) * image_stride + (t % per_image) * token_stride, columns, normal);
      gemm.store(t - first, 0, normal, columns);
    }
  });
}

// [channels, pixels] → [pixels, channels], in blocks: channels often lie a power of two apart, and more of their lines
// than a set of the first cache has ways would drive each other out.
template <typename T>
void transpose(
    const T* from, int64_t channel_stride, int64_t stride, int64_t channels, int64_t count, T* to, int64_t padded) {
  constexpr int64_t kChannels = 8, kPixels = 16;
  for (int64_t first = 0; first < channels; first += kChannels)
    for (int64_t left = 0; left < count; left += kPixels) {
      const int64_t end = std::min(first + kChannels, channels), right = std::min(left + kPixels, count);
      for (int64_t i = left; i < right; ++i)
        for (int64_t channel = first; channel < end; ++channel)
          to[i * padded + channel] = from[channel * channel_stride + i * stride];
    }
}

// The same for 4×4 pixels a token. A pixel's channels lie far apart: rows of pixels are transposed first, so that memory
// is read along the row; all four of a token by one thread, which finds them side by side.
template <typename T, typename Gemm>
void normalise_blocks(const ControlCall& c, int64_t first, int64_t tokens, const Gemm& gemm) {
  const Tensor& x = c.features;
  const int64_t channels = x.size(1), width = x.size(3) / kKernel, height = x.size(2) / kKernel;
  const int64_t begin_row = first / width, end_row = (first + tokens + width - 1) / width;
  const int64_t padded = channels + 64 / static_cast<int64_t>(sizeof(T));  // not a power of two
  torch::stable::parallel_for(begin_row, end_row, 1, [&](int64_t begin, int64_t end) {
    static thread_local Workspace pixel_space, space;
    T* pixels = pixel_space.reserve<T>(width * kKernel * padded);
    auto* normal = space.reserve<typename Gemm::Element>(channels);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t left = std::max(first, row * width), right = std::min(first + tokens, (row + 1) * width);
      const int64_t count = (right - left) * kKernel;
      for (int64_t ky = 0; ky < kKernel; ++ky) {
        const T* from = data<T>(x) + (row / height) * x.stride(0) + (row % height * kKernel + ky) * x.stride(2) +
            (left % width) * kKernel * x.stride(3);
        transpose(from, x.stride(1), x.stride(3), channels, count, pixels, padded);
        for (int64_t i = 0; i < count; ++i) {
          normalise_row<T>(c, pixels + i * padded, channels, normal);
          gemm.store(left - first + i / kKernel, (ky * kKernel + i % kKernel) * channels, normal, channels);
        }
      }
    }
  });
}

// Where token t goes: row rows[t] of out, or row t.
struct Target {
  const Tensor& out;
  const Indices& rows;

  template <typename T>
  T* row(int64_t token) const {
    const int64_t r = rows.base == nullptr ? token : rows[token];
    return r < 0 || r >= out.size(0) ? nullptr : mutable_data<T>(out) + r * out.stride(0);
  }
};

struct Conditions {
  const float* k;
  const int32_t* image;
  int64_t per_image, hidden;

  const float* of(int64_t token) const {
    return k == nullptr ? nullptr : k + (image == nullptr ? token / per_image : image[token]) * hidden;
  }
};

template <typename T>
void identity(const ControlCall& c, const Conditions& k, const Target& target) {
  const Tensor& x = c.features;
  const Loops<T>& loop = loops<T>(simd());
  torch::stable::parallel_for(0, c.tokens(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      T* out = target.row<T>(t);
      if (out == nullptr) continue;
      const T* f =
          data<T>(x) + (x.dim() == 3 ? (t / x.size(1)) * x.stride(0) + (t % x.size(1)) * x.stride(1) : t * x.stride(0));
      if (k.k == nullptr)
        std::copy(f, f + k.hidden, out);
      else
        loop.rank_one(f, k.of(t), k.hidden, out);
    }
  });
}

// bfloat16 products by the library that F.linear takes; the bias is in extra columns of the weight.
class BFloat16Gemm {
 public:
  using Element = BFloat16;

  // matrix: `columns` columns of weights, then those of the bias; it must outlive the object.
  BFloat16Gemm(const Tensor& matrix, int64_t columns) : matrix_(matrix), columns_(columns) {}

  void begin(int64_t rows) {
    static thread_local Workspace space;
    rows_ = rows;
    x_ = space.reserve<BFloat16>(rows * matrix_.size(1));
    for (int64_t row = 0; row < rows; ++row) select_bias(x_ + row * matrix_.size(1), columns_, matrix_.size(1), 0);
  }

  void store(int64_t row, int64_t first, const BFloat16* values, int64_t count) const {
    std::copy_n(values, count, x_ + row * matrix_.size(1) + first);
  }

  Tensor product() const {
    static thread_local Workspace space;
    const int64_t outputs = matrix_.size(0);
    Tensor product = wrap(space.reserve<BFloat16>(rows_ * outputs), rows_, outputs, ScalarType::BFloat16, matrix_);
    linear_into(product, wrap(x_, rows_, matrix_.size(1), ScalarType::BFloat16, matrix_), matrix_);
    return product;
  }

 private:
  const Tensor& matrix_;
  int64_t columns_, rows_ = 0;
  BFloat16* x_ = nullptr;
};

// f of a tile through the library's GEMM, then each row's rank-one update in float32, rounded once. A bfloat16 product
// has its bias inside, to a float32 one it is added after.
template <typename T, typename Gemm>
void project_tiles(const ControlCall& c, const Conditions& k, const Target& target, Gemm gemm) {
  using Compute = typename Gemm::Element;
  static thread_local Workspace bias_space;
  const int64_t hidden = c.hidden(), total = c.tokens();
  const int64_t tile = std::min(total, kTileTokens);
  const Loops<T>& loop = loops<T>(simd());
  float* bias = bias_space.reserve<float>(hidden);
  loop.widen(data<T>(*c.bias), hidden, bias);
  for (int64_t first = 0; first < total; first += tile) {
    const int64_t tokens = std::min(tile, total - first);
    gemm.begin(tokens);
    if (c.conv())
      normalise_blocks<T>(c, first, tokens, gemm);
    else
      normalise_rows<T>(c, first, tokens, gemm);
    const Tensor product = gemm.product();
    torch::stable::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
      static thread_local Workspace wide_space;
      float* wide = wide_space.reserve<float>(hidden);
      for (int64_t t = begin; t < end; ++t) {
        T* out = target.row<T>(first + t);
        if (out == nullptr) continue;
        const Compute* f = data<Compute>(product) + t * hidden;
        const float* condition = k.of(first + t);
        if constexpr (std::is_same_v<Compute, BFloat16>) {
          if (condition == nullptr)
            std::copy(f, f + hidden, out);
          else
            loop.rank_one(f, condition, hidden, out);
        } else if (condition == nullptr) {
          loop.add_bias_wide(f, bias, hidden, out);
        } else {
          loops<float>(simd()).add_bias(f, bias, hidden, wide);
          loop.rank_one_wide(wide, condition, hidden, out);
        }
      }
    });
  }
}

// The weight as the GEMM reads it: float32 (widened if T is narrower), or bfloat16 with the bias in extra columns.
template <typename T>
void project_widened(const ControlCall& c, const Conditions& k, const Target& target) {
  if constexpr (sizeof(T) == sizeof(float)) {
    project_tiles<T>(c, k, target, FloatGemm(*c.weight));
  } else {
    static thread_local Workspace space;
    const int64_t n = c.weight->numel();
    float* wide = space.reserve<float>(n);
    loops<T>(simd()).widen(data<T>(*c.weight), n, wide);
    const Tensor weight = wrap(wide, c.weight->size(0), c.weight->size(1), ScalarType::Float, c.features);
    project_tiles<T>(c, k, target, FloatGemm(weight));
  }
}

void project_native(const ControlCall& c, const Conditions& k, const Target& target) {
  static thread_local Workspace bias_space, space;
  const int64_t hidden = c.hidden(), columns = c.weight->size(1), total = columns_with_bias(columns, 1);
  float* bias = bias_space.reserve<float>(hidden);
  loops<BFloat16>(simd()).widen(data<BFloat16>(*c.bias), hidden, bias);
  BFloat16* matrix = space.reserve<BFloat16>(hidden * total);
  append_bias_columns(data<BFloat16>(*c.weight), columns, hidden, columns, {bias}, matrix);
  const Tensor with_bias = wrap(matrix, hidden, total, ScalarType::BFloat16, c.features);
  project_tiles<BFloat16>(c, k, target, BFloat16Gemm(with_bias, columns));
}

}  // namespace

void project(const ControlCall& c, const Tensor& out, const Indices& rows) {
  check_segments(c);
  const int64_t tokens = c.tokens(), hidden = c.hidden();
  if (tokens == 0 || hidden == 0) return;
  const Target target{out, rows};
  dispatch(c.features.scalar_type(), "control_cross_attention", [&](auto zero) {
    using T = decltype(zero);
    static thread_local Workspace condition_space, image_space;
    Conditions k{nullptr, nullptr, 1, hidden};
    if (c.control.has_value()) {
      k.k = conditions<T>(c, condition_space);
      k.image = token_images(c, image_space);
      k.per_image = tokens / std::max<int64_t>(1, c.images());
    }
    if (!c.weight.has_value())
      identity<T>(c, k, target);
    else if (std::is_same_v<T, BFloat16> && has_matmul<T>())
      project_native(c, k, target);
    else
      project_widened<T>(c, k, target);
  });
}

}  // namespace vpt::cpu
