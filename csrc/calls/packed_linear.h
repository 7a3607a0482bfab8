// The operands of `packed_linear`, what is demanded of them whoever calls, and the operator's two forms over a backend's
// one `multiply_packed(call, out)`. vpt_kernels/packed_linear/api.py says in words what is wrong with a call; what is
// checked here keeps one that goes past it within its tensors.
#pragma once

#include <utility>

#include "../stable.h"
#include "overlap.h"

namespace vpt {

// In the schema's order.
struct PackedCall {
  Tensor x, data;
  OptionalTensor scales, minima;
  int64_t features;
  bool gated;
  bool dynamic;  // x of int8 weights may be rounded to 8 bits
  OptionalTensor bias, residual;
  int64_t activation;
};

using PackedSignature =
    void(Tensor, Tensor, OptionalTensor, OptionalTensor, int64_t, bool, bool, OptionalTensor, OptionalTensor, int64_t);

template <void (*multiply_packed)(const PackedCall&, const Tensor& out), typename Signature = PackedSignature>
struct PackedForms;

template <void (*multiply_packed)(const PackedCall&, const Tensor& out), typename... Arguments>
struct PackedForms<multiply_packed, void(Arguments...)> {
  static Tensor fresh(Arguments... arguments) {
    const PackedCall call{std::move(arguments)...};
    check(call);
    Tensor out = torch::stable::new_empty(call.x, {call.x.size(0), call.features});
    multiply_packed(call, out);
    return out;
  }
  static void into(Arguments... arguments, Tensor out) {
    const PackedCall call{std::move(arguments)...};
    check(call);
    check_rows(call, out, "out");
    const auto given = [](const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; };
    // A residual that is `out` itself is read before it is written, element by element.
    const bool in_place = call.residual.has_value() && call.residual->const_data_ptr() == out.const_data_ptr() &&
        call.residual->stride(0) == out.stride(0);
    require_disjoint(
        {{"out", &out}},
        {{"x", &call.x},
         {"data", &call.data},
         {"scales", given(call.scales)},
         {"minima", given(call.minima)},
         {"bias", given(call.bias)},
         {"residual", in_place ? nullptr : given(call.residual)}});
    multiply_packed(call, out);
  }

 private:
  static void check_rows(const PackedCall& c, const Tensor& t, const char* name) {
    STD_TORCH_CHECK(
        t.device() == c.x.device() && t.scalar_type() == c.x.scalar_type() && t.dim() == 2 &&
            t.size(0) == c.x.size(0) && t.size(1) == c.features && (c.features <= 1 || t.stride(1) == 1),
        name, " must be [rows, features] like x, its last dimension contiguous");
  }
  static void check_groups(const PackedCall& c, const Tensor& t, const char* name) {
    STD_TORCH_CHECK(
        t.device() == c.x.device() && t.scalar_type() == ScalarType::Half && t.is_contiguous() && t.dim() == 3 &&
            t.size(0) == c.data.size(0) && t.size(1) == (c.x.size(1) + 63) / 64 && t.size(2) == 32,
        name, " of int4 must be float16 [panels, one per 64 columns, 32]");
  }
  static void check(const PackedCall& c) {
    const int64_t width = c.gated ? 8 : 16;
    STD_TORCH_CHECK(c.x.dim() == 2 && (c.x.size(1) <= 1 || c.x.stride(1) == 1), "x must be rows of contiguous columns");
    const bool int8 = c.data.scalar_type() == ScalarType::Char, int4 = c.data.scalar_type() == ScalarType::Int;
    const int64_t columns = int4 ? 8 : 2;
    STD_TORCH_CHECK(
        c.data.device() == c.x.device() && c.data.is_contiguous() && c.data.dim() == 3 &&
            c.data.size(2) == (int4 ? 16 : 32) && c.features >= 0 &&
            c.data.size(0) == (c.features + width - 1) / width &&
            c.data.size(1) == (c.x.size(1) + columns - 1) / columns,
        "data must be the panels of the features, contiguous, and as wide as x");
    STD_TORCH_CHECK(
        (int8 || int4) == c.scales.has_value() && int4 == c.minima.has_value(),
        "scales go with int8 and int4 panels, minima with int4, and only with them");
    if (int4) check_groups(c, *c.scales, "scales"), check_groups(c, *c.minima, "minima");
    if (int8)
      STD_TORCH_CHECK(
          c.scales->scalar_type() == ScalarType::Float && c.scales->is_contiguous() && c.scales->dim() == 3 &&
              c.scales->size(0) == c.data.size(0) && c.scales->size(2) == 16 &&
              (c.scales->size(1) == 1 || c.scales->size(1) == (c.x.size(1) + 31) / 32),
          "scales must be float32 [panels, 1 or one per 32 columns, 16]");
    STD_TORCH_CHECK(!c.dynamic || (int8 && c.scales->size(1) == 1), "dynamic goes with int8 and a scale per row");
    STD_TORCH_CHECK(c.activation >= (c.gated ? 1 : 0) && c.activation <= 4, "unknown activation");
    if (c.bias.has_value())
      STD_TORCH_CHECK(
          c.bias->device() == c.x.device() && c.bias->scalar_type() == ScalarType::Float && c.bias->is_contiguous() &&
              c.bias->numel() == c.features * (c.gated ? 2 : 1),
          "bias must be float32, one number per row of the weight");
    if (c.residual.has_value()) check_rows(c, *c.residual, "residual");
  }
};

}  // namespace vpt
