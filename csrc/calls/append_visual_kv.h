// The operands of `append_visual_kv`, and its two forms over a backend's one `append(call, q_out)`.
#pragma once

#include <utility>

#include "../math/mrope.h"
#include "../math/slots.h"
#include "../stable.h"
#include "overlap.h"

namespace vpt {

// In the schema's order. Shapes, dtypes and strides are checked in vpt_kernels/append_visual_kv/api.py, once for every
// backend; what addresses and values say is left.
struct AppendCall {
  Tensor q, k, v, cos_sin, positions, slots, k_cache, v_cache;
  int64_t section_t, section_h, section_w;
  bool interleaved, heads_first;  // heads_first: HND
  OptionalTensor k_scale, v_scale, q_norm, k_norm;
  double norm_eps;

  Sections sections() const { return {section_t, section_h, section_w, interleaved}; }
  bool quantised() const { return k_scale.has_value(); }
};

using AppendSignature = void(
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int64_t, int64_t, int64_t, bool, bool,
    OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, double);

template <void (*append)(const AppendCall&, const Tensor& q_out), typename Signature = AppendSignature>
struct AppendForms;

template <void (*append)(const AppendCall&, const Tensor& q_out), typename... Arguments>
struct AppendForms<append, void(Arguments...)> {
  static Tensor fresh(Arguments... arguments) {
    const AppendCall call{std::move(arguments)...};
    check(call, nullptr);
    Tensor q_out = torch::stable::new_empty(call.q, {call.q.size(0), call.q.size(1), call.q.size(2)});
    append(call, q_out);
    return q_out;
  }
  static void in_place(Arguments... arguments) {
    const AppendCall call{std::move(arguments)...};
    check(call, &call.q);
    append(call, call.q);
  }

 private:
  static void check(const AppendCall& c, const Tensor* q_out) {
    const auto given = [](const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; };
    require_disjoint(
        {{"k_cache", &c.k_cache}, {"v_cache", &c.v_cache}, {"q", q_out}},
        {{"q", q_out == nullptr ? &c.q : nullptr},
         {"k", &c.k},
         {"v", &c.v},
         {"cos_sin", &c.cos_sin},
         {"positions", &c.positions},
         {"slots", &c.slots},
         {"k_scale", given(c.k_scale)},
         {"v_scale", given(c.v_scale)},
         {"q_norm", given(c.q_norm)},
         {"k_norm", given(c.k_norm)}});
  }
};

// Dimension of the cache's rows and of its heads.
inline int64_t row_dim(const AppendCall& c) { return c.k_cache.dim() - (c.heads_first ? 2 : 3); }
inline int64_t head_dim(const AppendCall& c) { return c.k_cache.dim() - (c.heads_first ? 3 : 2); }

inline CacheLayout cache_layout(const AppendCall& c, const Tensor& cache) {
  const bool paged = cache.dim() == 4;
  return {
      paged ? cache.size(0) : 1, cache.size(row_dim(c)), paged ? cache.stride(0) : 0, cache.stride(row_dim(c)),
      cache.stride(head_dim(c))};
}

inline Indices position_row(const Tensor& positions, int axis) {
  return indices(positions, positions.stride(1), axis * positions.stride(0));
}

}  // namespace vpt
