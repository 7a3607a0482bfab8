// The operands of `append_visual_kv` and what every backend demands of them.
#pragma once

#include "../math/mrope.h"
#include "../math/slots.h"
#include "../stable.h"

namespace vpt {

struct AppendCall {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Tensor& cos_sin;
  const Tensor& positions;
  const Tensor& slots;
  const Tensor& k_cache;
  const Tensor& v_cache;
  Sections sections;
  bool heads_first;  // HND
  const OptionalTensor& k_scale;
  const OptionalTensor& v_scale;

  bool quantised() const { return k_cache.scalar_type() == ScalarType::Float8_e4m3fn; }
};

// Dimension of the cache's rows and of its heads.
inline int64_t row_dim(const AppendCall& c) { return c.k_cache.dim() - (c.heads_first ? 2 : 3); }
inline int64_t head_dim(const AppendCall& c) { return c.k_cache.dim() - (c.heads_first ? 3 : 2); }

inline CacheLayout cache_layout(const AppendCall& c, const Tensor& cache) {
  const bool paged = cache.dim() == 4;
  return {paged ? cache.size(0) : 1, cache.size(row_dim(c)), paged ? cache.stride(0) : 0, cache.stride(row_dim(c)),
          cache.stride(head_dim(c))};
}

inline Indices position_row(const Tensor& positions, int axis) {
  return indices(positions, positions.stride(1), axis * positions.stride(0));
}

inline void check(const AppendCall& c) {
  const ScalarType type = c.q.scalar_type();
  STD_TORCH_CHECK(c.q.dim() == 3 && c.k.dim() == 3 && c.v.dim() == 3, "q, k, v must be [tokens, heads, head_dim]");
  const int64_t tokens = c.k.size(0), heads = c.k.size(1), dim = c.k.size(2);
  bool ok = c.q.size(0) == tokens && c.q.size(2) == dim && c.v.size(0) == tokens && c.v.size(1) == heads &&
      c.v.size(2) == dim && c.positions.dim() == 2 && c.positions.size(0) == 3 && c.positions.size(1) == tokens &&
      c.slots.dim() == 1 && c.slots.size(0) == tokens && c.cos_sin.dim() == 2 &&
      c.cos_sin.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(ok, "append_visual_kv: shapes do not fit each other");
  const Sections& s = c.sections;
  STD_TORCH_CHECK(
      s.t >= 0 && s.h >= 0 && s.w >= 0 && 2 * s.half() == c.cos_sin.size(1) && 2 * s.half() <= dim,
      "sections must sum to half of rotary_dim, which must be at most head_dim");
  ok = (c.k_cache.dim() == 3 || c.k_cache.dim() == 4) && c.v_cache.dim() == c.k_cache.dim();
  for (const Tensor* cache : {&c.k_cache, &c.v_cache}) {
    ok = ok && cache->size(head_dim(c)) == heads && cache->size(cache->dim() - 1) == dim;
    for (int64_t d = 0; ok && d < cache->dim(); ++d) ok = cache->size(d) == c.k_cache.size(d);
    ok = ok && cache->scalar_type() == (c.quantised() ? ScalarType::Float8_e4m3fn : type);
  }
  STD_TORCH_CHECK(ok, "append_visual_kv: k_cache and v_cache do not fit k, v and each other");
  for (const Tensor* t : {&c.q, &c.k, &c.v, &c.k_cache, &c.v_cache, &c.cos_sin})
    ok = ok && t->device() == c.q.device() && (t->size(t->dim() - 1) <= 1 || t->stride(-1) == 1);
  ok = ok && c.k.scalar_type() == type && c.v.scalar_type() == type;
  for (const Tensor* t : {&c.positions, &c.slots}) ok = ok && t->device() == c.q.device();
  STD_TORCH_CHECK(ok, "append_visual_kv: one device, one dtype, contiguous last dimensions");
  STD_TORCH_CHECK(
      c.quantised() == c.k_scale.has_value() && c.quantised() == c.v_scale.has_value(),
      "scales go with float8_e4m3fn caches, and only with them");
  for (const OptionalTensor* scale : {&c.k_scale, &c.v_scale})
    STD_TORCH_CHECK(
        !scale->has_value() ||
            ((*scale)->device() == c.q.device() && (*scale)->scalar_type() == ScalarType::Float &&
             (*scale)->is_contiguous() && ((*scale)->numel() == 1 || (*scale)->numel() == heads)),
        "a scale must be float32, one number or one per key/value head");
}

}  // namespace vpt
