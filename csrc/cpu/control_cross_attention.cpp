// LayerNorm into a tile, the library's GEMM, and the rank-one update as the epilogue of the tile while it is in cache.
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "../ops.h"
#include "bias_columns.h"
#include "simd.h"

namespace vpt::cpu {
namespace {

constexpr int64_t kTileTokens = 256;
constexpr int64_t kKernel = 4;  // the conv form's patch side and stride

struct Call {
  const Tensor& features;
  const OptionalTensor& control;
  const OptionalTensor& cu_seqlens;
  const OptionalTensor& norm_weight;
  const OptionalTensor& norm_bias;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const Tensor& condition_norm_weight;
  const Tensor& condition_norm_bias;
  const Tensor& condition_weight;
  const Tensor& condition_bias;

  bool conv() const { return weight.has_value() && features.dim() == 4; }
  int64_t hidden() const { return condition_weight.size(0); }
  int64_t tokens() const {
    if (conv()) return features.size(0) * (features.size(2) / kKernel) * (features.size(3) / kKernel);
    return features.dim() == 3 ? features.size(0) * features.size(1) : features.size(0);
  }
  int64_t images() const {
    if (cu_seqlens.has_value()) return cu_seqlens->size(0) - 1;
    return features.dim() > 2 ? features.size(0) : 1;
  }
};

void require(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType type, const char* name) {
  bool ok = t.is_cpu() && t.scalar_type() == type && t.dim() == static_cast<int64_t>(shape.size()) && t.is_contiguous();
  int64_t d = 0;
  for (int64_t size : shape) ok = ok && t.size(d++) == size;
  STD_TORCH_CHECK(ok, "control_cross_attention: ", name, " does not fit; use fold_projector");
}

void check(const Call& c) {
  const ScalarType type = c.features.scalar_type();
  const int64_t hidden = c.hidden();
  STD_TORCH_CHECK(c.features.is_cpu() && c.features.dim() >= 2 && c.features.dim() <= 4, "features: wrong rank or device");
  require(c.condition_weight, {hidden, hidden}, type, "condition_weight");
  require(c.condition_bias, {hidden}, type, "condition_bias");
  require(c.condition_norm_weight, {hidden}, type, "condition_norm_weight");
  require(c.condition_norm_bias, {hidden}, type, "condition_norm_bias");
  const int64_t channels = c.conv() ? c.features.size(1) : c.features.size(c.features.dim() - 1);
  if (c.weight.has_value()) {
    const int64_t columns = c.conv() ? kKernel * kKernel * channels : channels;
    require(*c.weight, {hidden, columns}, type, "feature_weight");
    STD_TORCH_CHECK(c.bias && c.norm_weight && c.norm_bias, "feature_weight needs feature_bias and feature_norm");
    require(*c.bias, {hidden}, type, "feature_bias");
    require(*c.norm_weight, {channels}, type, "feature_norm_weight");
    require(*c.norm_bias, {channels}, type, "feature_norm_bias");
  } else {
    STD_TORCH_CHECK(channels == hidden && c.features.dim() < 4, "identity features must have H columns");
  }
  STD_TORCH_CHECK(
      !c.conv() || (c.features.size(2) % kKernel == 0 && c.features.size(3) % kKernel == 0),
      "features: h and w must be multiples of 4");
  STD_TORCH_CHECK(
      c.conv() || channels <= 1 || c.features.stride(-1) == 1, "features: the last dimension must be contiguous");
  if (c.control.has_value()) {
    STD_TORCH_CHECK(
        c.control->is_cpu() && c.control->scalar_type() == type && c.control->dim() == 2 &&
            c.control->size(0) == c.images() && c.control->size(1) == hidden &&
            (hidden <= 1 || c.control->stride(1) == 1),
        "control must be one row of H per image");
  }
  if (c.cu_seqlens.has_value()) {
    STD_TORCH_CHECK(c.cu_seqlens->dim() == 1 && c.cu_seqlens->size(0) >= 1 && c.features.dim() == 2, "cu_seqlens: wrong shape");
    const Indices ends(*c.cu_seqlens, c.cu_seqlens->stride(0));
    bool rises = ends[0] == 0 && ends[c.images()] == c.tokens();
    for (int64_t i = 0; i < c.images(); ++i) rises = rises && ends[i] <= ends[i + 1];
    STD_TORCH_CHECK(rises, "cu_seqlens must rise from 0 to the number of tokens, ", c.tokens());
  }
}

// k = Linear(LayerNorm(control)), float32 [images, H]; the weight is read once for all images.
template <typename T>
const float* conditions(const Call& c, Workspace& space) {
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
const int32_t* token_images(const Call& c, Workspace& space) {
  if (!c.cu_seqlens.has_value()) return nullptr;
  int32_t* image = space.reserve<int32_t>(c.tokens() + 1);
  const Indices ends(*c.cu_seqlens, c.cu_seqlens->stride(0));
  for (int64_t i = 0; i < c.images(); ++i)
    for (int64_t t = ends[i]; t < ends[i + 1]; ++t) image[t] = static_cast<int32_t>(i);
  return image;
}

// LayerNorm of the tokens' rows, `stride` apart: the GEMM's operand.
template <typename T, typename Compute>
void normalise(const Call& c, int64_t first, int64_t tokens, Compute* out, int64_t stride) {
  const Tensor& x = c.features;
  const Loops<T>& loop = loops<T>(simd());
  auto norm = [&](const T* row, int64_t stride, int64_t n, Compute* to) {
    if constexpr (sizeof(Compute) == sizeof(T))
      loop.layer_norm(row, stride, data<T>(*c.norm_weight), data<T>(*c.norm_bias), n, to);
    else
      loop.layer_norm_wide(row, stride, data<T>(*c.norm_weight), data<T>(*c.norm_bias), n, to);
  };
  const T* base = data<T>(x);
  torch::stable::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t token = first + t;
      Compute* row = out + t * stride;
      if (!c.conv()) {
        const int64_t per_image = x.dim() == 3 ? x.size(1) : x.size(0);
        const int64_t offset = x.dim() == 3 ? (token / per_image) * x.stride(0) + (token % per_image) * x.stride(1)
                                            : token * x.stride(0);
        norm(base + offset, 1, x.size(x.dim() - 1), row);
        continue;
      }
      const int64_t channels = x.size(1), width = x.size(3) / kKernel, per_image = width * (x.size(2) / kKernel);
      const int64_t y = (token % per_image) / width * kKernel, left = token % width * kKernel;
      for (int64_t ky = 0; ky < kKernel; ++ky)
        for (int64_t kx = 0; kx < kKernel; ++kx)
          norm(
              base + (token / per_image) * x.stride(0) + (y + ky) * x.stride(2) + (left + kx) * x.stride(3), x.stride(1),
              channels, row + (ky * kKernel + kx) * channels);
    }
  });
}

// Where token t goes: row rows[t] of out, or row t.
struct Target {
  const Tensor& out;
  const Indices* rows;

  template <typename T>
  T* row(int64_t token) const {
    const int64_t r = rows == nullptr ? token : (*rows)[token];
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
void identity(const Call& c, const Conditions& k, const Target& target) {
  const Tensor& x = c.features;
  const Loops<T>& loop = loops<T>(simd());
  torch::stable::parallel_for(0, c.tokens(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      T* out = target.row<T>(t);
      if (out == nullptr) continue;
      const T* f = data<T>(x) +
          (x.dim() == 3 ? (t / x.size(1)) * x.stride(0) + (t % x.size(1)) * x.stride(1) : t * x.stride(0));
      if (k.k == nullptr)
        std::copy(f, f + k.hidden, out);
      else
        loop.rank_one(f, k.of(t), k.hidden, out);
    }
  });
}

// f of a tile through the library's GEMM, then each row's rank-one update in float32, rounded once. `matrix` has
// `columns` columns of weights; in bfloat16 (Compute == T) the bias follows in extra columns, in float32 it is added after.
template <typename T, typename Compute>
void project(const Call& c, const Conditions& k, const Target& target, const Tensor& matrix) {
  static thread_local Workspace bias_space, rows_space, product_space;
  const int64_t hidden = c.hidden(), columns = c.weight->size(1), stride = matrix.size(1), total = c.tokens();
  const int64_t tile = std::min(total, kTileTokens);
  const Loops<T>& loop = loops<T>(simd());
  float* bias = bias_space.reserve<float>(hidden);
  loop.widen(data<T>(*c.bias), hidden, bias);
  Compute* rows = rows_space.reserve<Compute>(tile * stride);
  Compute* product = product_space.reserve<Compute>(tile * hidden);
  for (int64_t first = 0; first < total; first += tile) {
    const int64_t tokens = std::min(tile, total - first);
    normalise<T, Compute>(c, first, tokens, rows, stride);
    if constexpr (std::is_same_v<Compute, BFloat16>)
      for (int64_t t = 0; t < tokens; ++t) select_bias(rows + t * stride, columns, stride, 0);
    linear_into(
        wrap(product, tokens, hidden, matrix.scalar_type(), c.features),
        wrap(rows, tokens, stride, matrix.scalar_type(), c.features), matrix);
    torch::stable::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
      static thread_local Workspace wide_space;
      float* wide = wide_space.reserve<float>(hidden);
      for (int64_t t = begin; t < end; ++t) {
        T* out = target.row<T>(first + t);
        if (out == nullptr) continue;
        const Compute* f = product + t * hidden;
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
void project_widened(const Call& c, const Conditions& k, const Target& target) {
  if constexpr (sizeof(T) == sizeof(float)) {
    project<T, float>(c, k, target, *c.weight);
  } else {
    static thread_local Workspace space;
    const int64_t n = c.weight->numel();
    float* wide = space.reserve<float>(n);
    loops<T>(simd()).widen(data<T>(*c.weight), n, wide);
    project<T, float>(c, k, target, wrap(wide, c.weight->size(0), c.weight->size(1), ScalarType::Float, c.features));
  }
}

void project_native(const Call& c, const Conditions& k, const Target& target) {
  static thread_local Workspace bias_space, space;
  const int64_t hidden = c.hidden(), columns = c.weight->size(1), total = columns_with_bias(columns, 1);
  float* bias = bias_space.reserve<float>(hidden);
  loops<BFloat16>(simd()).widen(data<BFloat16>(*c.bias), hidden, bias);
  BFloat16* matrix = space.reserve<BFloat16>(hidden * total);
  append_bias_columns(data<BFloat16>(*c.weight), hidden, columns, {bias}, matrix);
  project<BFloat16, BFloat16>(c, k, target, wrap(matrix, hidden, total, ScalarType::BFloat16, c.features));
}

void run(const Call& c, const Target& target) {
  const int64_t tokens = c.tokens(), hidden = c.hidden();
  if (tokens == 0 || hidden == 0) return;
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

}  // namespace

Tensor control_cross_attention(
    Tensor features, OptionalTensor control, OptionalTensor cu_seqlens, OptionalTensor feature_norm_weight,
    OptionalTensor feature_norm_bias, OptionalTensor feature_weight, OptionalTensor feature_bias,
    Tensor condition_norm_weight, Tensor condition_norm_bias, Tensor condition_weight, Tensor condition_bias,
    OptionalTensor, OptionalTensor) {
  const Call call{features,         control,           cu_seqlens,           feature_norm_weight,
                  feature_norm_bias, feature_weight,   feature_bias,         condition_norm_weight,
                  condition_norm_bias, condition_weight, condition_bias};
  check(call);
  Tensor out = torch::stable::new_empty(features, {call.tokens(), call.hidden()});
  run(call, {out, nullptr});
  return out;
}

void control_cross_attention_into(
    Tensor features, OptionalTensor control, OptionalTensor cu_seqlens, OptionalTensor feature_norm_weight,
    OptionalTensor feature_norm_bias, OptionalTensor feature_weight, OptionalTensor feature_bias,
    Tensor condition_norm_weight, Tensor condition_norm_bias, Tensor condition_weight, Tensor condition_bias,
    OptionalTensor, OptionalTensor, Tensor out, Tensor rows) {
  const Call call{features,         control,           cu_seqlens,           feature_norm_weight,
                  feature_norm_bias, feature_weight,   feature_bias,         condition_norm_weight,
                  condition_norm_bias, condition_weight, condition_bias};
  check(call);
  STD_TORCH_CHECK(
      out.is_cpu() && out.scalar_type() == features.scalar_type() && out.dim() == 2 && out.size(1) == call.hidden() &&
          (call.hidden() <= 1 || out.stride(1) == 1),
      "out must be [L, H] like the features");
  STD_TORCH_CHECK(rows.is_cpu() && rows.dim() == 1 && rows.size(0) == call.tokens(), "rows must be one index per token");
  const Indices indices(rows, rows.stride(0));
  run(call, {out, &indices});
}

}  // namespace vpt::cpu
