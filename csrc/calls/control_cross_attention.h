// The operands of `control_cross_attention`, what every backend demands of them, and the operator's two forms over a
// backend's one `project(call, out, rows)`. vpt_kernels/control_cross_attention/api.py says in words what is wrong, on
// every backend; what is checked here keeps a call that goes past it within its tensors.
#pragma once

#include <initializer_list>
#include <utility>

#include "../stable.h"

namespace vpt {

constexpr int64_t kKernel = 4;  // the conv form's patch side and stride

// In the schema's order; the feature tensors are absent in the identity form, the score maps are Triton's.
struct ControlCall {
  Tensor features;
  OptionalTensor control, cu_seqlens, norm_weight, norm_bias, weight, bias;
  Tensor condition_norm_weight, condition_norm_bias, condition_weight, condition_bias;
  OptionalTensor score_weight, score_bias;

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

inline void require(const ControlCall& c, const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  bool ok = t.device() == c.features.device() && t.scalar_type() == c.features.scalar_type() &&
      t.dim() == static_cast<int64_t>(shape.size()) && t.is_contiguous();
  int64_t d = 0;
  for (int64_t size : shape) ok = ok && t.size(d++) == size;
  STD_TORCH_CHECK(ok, "control_cross_attention: ", name, " does not fit; use fold_projector");
}

inline void check(const ControlCall& c) {
  const int64_t hidden = c.hidden();
  STD_TORCH_CHECK(c.features.dim() >= 2 && c.features.dim() <= 4, "features: wrong rank");
  require(c, c.condition_weight, {hidden, hidden}, "condition_weight");
  require(c, c.condition_bias, {hidden}, "condition_bias");
  require(c, c.condition_norm_weight, {hidden}, "condition_norm_weight");
  require(c, c.condition_norm_bias, {hidden}, "condition_norm_bias");
  const int64_t channels = c.conv() ? c.features.size(1) : c.features.size(c.features.dim() - 1);
  if (c.weight.has_value()) {
    const int64_t columns = c.conv() ? kKernel * kKernel * channels : channels;
    require(c, *c.weight, {hidden, columns}, "feature_weight");
    STD_TORCH_CHECK(c.bias && c.norm_weight && c.norm_bias, "feature_weight needs feature_bias and feature_norm");
    require(c, *c.bias, {hidden}, "feature_bias");
    require(c, *c.norm_weight, {channels}, "feature_norm_weight");
    require(c, *c.norm_bias, {channels}, "feature_norm_bias");
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
        c.control->device() == c.features.device() && c.control->scalar_type() == c.features.scalar_type() &&
            c.control->dim() == 2 && c.control->size(0) == c.images() && c.control->size(1) == hidden &&
            (hidden <= 1 || c.control->stride(1) == 1),
        "control must be one row of H per image");
  }
  if (c.cu_seqlens.has_value()) {
    STD_TORCH_CHECK(
        c.cu_seqlens->device() == c.features.device() && c.cu_seqlens->dim() == 1 && c.cu_seqlens->size(0) >= 1 &&
            c.features.dim() == 2,
        "cu_seqlens: wrong shape or device");
  }
}

inline void check_scatter(const ControlCall& c, const Tensor& out, const Tensor& rows) {
  STD_TORCH_CHECK(
      out.device() == c.features.device() && out.scalar_type() == c.features.scalar_type() && out.dim() == 2 &&
          out.size(1) == c.hidden() && (c.hidden() <= 1 || out.stride(1) == 1),
      "out must be [L, H] like the features");
  STD_TORCH_CHECK(
      rows.device() == c.features.device() && rows.dim() == 1 && rows.size(0) == c.tokens(),
      "rows must be one index per token");
}

using ControlSignature = void(
    Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, Tensor,
    Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor);

// rows: where token t goes in `out`; base null: to row t.
template <
    void (*project)(const ControlCall&, const Tensor& out, const Indices& rows), typename Signature = ControlSignature>
struct ControlForms;

template <void (*project)(const ControlCall&, const Tensor& out, const Indices& rows), typename... Arguments>
struct ControlForms<project, void(Arguments...)> {
  static Tensor fresh(Arguments... arguments) {
    const ControlCall call{std::move(arguments)...};
    check(call);
    Tensor out = torch::stable::new_empty(call.features, {call.tokens(), call.hidden()});
    project(call, out, {});
    return out;
  }
  static void into(Arguments... arguments, Tensor out, Tensor rows) {
    const ControlCall call{std::move(arguments)...};
    check(call);
    check_scatter(call, out, rows);
    project(call, out, indices(rows, rows.stride(0)));
  }
};

}  // namespace vpt
