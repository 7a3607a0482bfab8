// One pass over the tokens: gather cos and sin by three position rows, rotate q and k, store k and v.
#include <algorithm>

#include "../math/mrope.h"
#include "../math/slots.h"
#include "../ops.h"
#include "simd.h"

namespace vpt::cpu {
namespace {

struct Call {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Tensor& cos_sin;
  const Tensor& positions;
  const Tensor& slots;
  const Tensor& k_cache;
  const Tensor& v_cache;
  Sections sections;
};

CacheLayout layout(const Tensor& cache) {
  if (cache.dim() == 3) return {1, cache.size(0), 0, cache.stride(0), cache.stride(1)};
  return {cache.size(0), cache.size(1), cache.stride(0), cache.stride(1), cache.stride(2)};
}

Indices position_row(const Tensor& positions, int axis) {
  return Indices(positions, positions.stride(1), axis * positions.stride(0));
}

void check(const Call& c) {
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
  for (const Tensor* cache : {&c.k_cache, &c.v_cache})
    ok = ok && (cache->dim() == 3 || cache->dim() == 4) && cache->dim() == c.k_cache.dim() &&
        cache->size(cache->dim() - 2) == heads && cache->size(cache->dim() - 1) == dim &&
        cache->size(0) == c.k_cache.size(0) && cache->size(1) == c.k_cache.size(1);
  STD_TORCH_CHECK(ok, "k_cache and v_cache must be [capacity, heads, head_dim] or [pages, page_size, heads, head_dim]");
  for (const Tensor* t : {&c.q, &c.k, &c.v, &c.k_cache, &c.v_cache, &c.cos_sin})
    ok = ok && t->is_cpu() && (t == &c.cos_sin || t->scalar_type() == type) &&
        (t->size(t->dim() - 1) <= 1 || t->stride(-1) == 1);
  STD_TORCH_CHECK(ok, "append_visual_kv: one device, one dtype, contiguous last dimensions");
  if (tokens == 0) return;
  int64_t low = 0, high = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const Indices row = position_row(c.positions, axis);
    if (axis == 0) low = high = row[0];
    for (int64_t t = 0; t < tokens; ++t) {
      low = std::min(low, row[t]);
      high = std::max(high, row[t]);
    }
  }
  STD_TORCH_CHECK(
      low >= 0 && high < c.cos_sin.size(0), "positions span ", low, "..", high, "; the cos_sin table has rows 0..",
      c.cos_sin.size(0) - 1, ": build a longer table");
}

template <typename T>
void rotate_heads(
    const Loops<T>& loop, const T* from, int64_t from_stride, const float* cos_sin, int64_t half, int64_t heads,
    int64_t dim, T* to, int64_t to_stride) {
  for (int64_t h = 0; h < heads; ++h, from += from_stride, to += to_stride) {
    loop.rotate(from, cos_sin, cos_sin + half, half, to);
    if (to != from) std::copy(from + 2 * half, from + dim, to + 2 * half);
  }
}

template <typename T>
void append(const Call& c, const Tensor& q_out) {
  const int64_t tokens = c.k.size(0), heads = c.k.size(1), dim = c.k.size(2), q_heads = c.q.size(1);
  const int64_t half = c.sections.half(), table_stride = c.cos_sin.stride(0);
  const CacheLayout keys = layout(c.k_cache), values = layout(c.v_cache);
  const Indices slots(c.slots, c.slots.stride(0));
  const Indices rows[3] = {position_row(c.positions, 0), position_row(c.positions, 1), position_row(c.positions, 2)};
  const float* table = data<float>(c.cos_sin);
  const T *q = data<T>(c.q), *k = data<T>(c.k), *v = data<T>(c.v);
  T *q_to = mutable_data<T>(q_out), *k_to = mutable_data<T>(c.k_cache), *v_to = mutable_data<T>(c.v_cache);
  const Loops<T>& loop = loops<T>(simd());
  const int64_t q_strides[2] = {c.q.stride(0), c.q.stride(1)}, k_strides[2] = {c.k.stride(0), c.k.stride(1)};
  const int64_t v_strides[2] = {c.v.stride(0), c.v.stride(1)}, to_strides[2] = {q_out.stride(0), q_out.stride(1)};
  // About 16k elements a thread: less is not worth waking one.
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, (q_heads + 2 * heads) * dim));
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    static thread_local Workspace space;
    float* cos_sin = space.reserve<float>(2 * half);
    for (int64_t t = begin; t < end; ++t) {
      for (int axis = 0; axis < 3; ++axis) {
        const float* row = table + rows[axis][t] * table_stride;
        const int64_t from = c.sections.begin(axis), to = c.sections.begin(axis + 1);
        std::copy(row + from, row + to, cos_sin + from);
        std::copy(row + half + from, row + half + to, cos_sin + half + from);
      }
      rotate_heads(
          loop, q + t * q_strides[0], q_strides[1], cos_sin, half, q_heads, dim, q_to + t * to_strides[0],
          to_strides[1]);
      const int64_t slot = slots[t];
      if (!keys.holds(slot)) continue;
      rotate_heads(
          loop, k + t * k_strides[0], k_strides[1], cos_sin, half, heads, dim, k_to + keys.offset(slot, 0),
          keys.head_stride);
      for (int64_t h = 0; h < heads; ++h) {
        const T* from = v + t * v_strides[0] + h * v_strides[1];
        std::copy(from, from + dim, v_to + values.offset(slot, h));
      }
    }
  });
}

void run(const Call& c, const Tensor& q_out) {
  if (c.k.size(0) == 0) return;
  dispatch(c.q.scalar_type(), "append_visual_kv", [&](auto zero) { append<decltype(zero)>(c, q_out); });
}

}  // namespace

Tensor append_visual_kv(
    Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor slots, Tensor k_cache, Tensor v_cache,
    int64_t section_t, int64_t section_h, int64_t section_w) {
  const Call call{q, k, v, cos_sin, positions, slots, k_cache, v_cache, {section_t, section_h, section_w}};
  check(call);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  run(call, out);
  return out;
}

void append_visual_kv_(
    Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor slots, Tensor k_cache, Tensor v_cache,
    int64_t section_t, int64_t section_h, int64_t section_w) {
  const Call call{q, k, v, cos_sin, positions, slots, k_cache, v_cache, {section_t, section_h, section_w}};
  check(call);
  run(call, q);
}

}  // namespace vpt::cpu
