// One launch: `append_visual_kv_kernel`.
#include "append_visual_kv.cuh"

#include <algorithm>

#include "../calls/append_visual_kv.h"
#include "../ops.h"
#include "device.h"

namespace vpt::cuda {
namespace {

// Whether V elements at a time of these heads can be read in one access.
bool aligned(const Heads& x, int64_t element_size, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(x.base) % bytes == 0 && x.token_stride * element_size % bytes == 0 &&
      x.head_stride * element_size % bytes == 0;
}

bool aligned(const void* base, const CacheLayout& layout, int64_t element_size, int64_t bytes) {
  return aligned({base, layout.row_stride, layout.head_stride}, element_size, bytes) &&
      layout.page_stride * element_size % bytes == 0;
}

Heads heads(const Tensor& x, const void* base) { return {base, x.stride(0), x.stride(1)}; }

template <typename T, typename Stored>
void launch(const Device& device, const AppendParams& p, int64_t tokens) {
  constexpr int kWide = 16 / sizeof(T);
  bool wide = p.half % kWide == 0 && p.dim % kWide == 0;
  for (const Heads& x : {p.q, p.k, p.v, p.q_out, Heads{p.q_norm, 0, 0}, Heads{p.k_norm, 0, 0}})
    wide = wide && aligned(x, sizeof(T), 16);
  wide = wide && aligned(p.k_cache, p.k_layout, sizeof(Stored), kWide * sizeof(Stored)) &&
      aligned(p.v_cache, p.v_layout, sizeof(Stored), kWide * sizeof(Stored));
  const int64_t items = (p.q_heads + p.kv_heads) * static_cast<int64_t>(p.half) / (wide ? kWide : 1);
  const int threads = static_cast<int>(std::clamp<int64_t>((items + kWarp - 1) / kWarp * kWarp, 64, kAppendThreads));
  const bool normed = p.q_norm != nullptr || p.k_norm != nullptr;
  const size_t shared = (2 * p.half + (normed ? p.q_heads + p.kv_heads : 0)) * sizeof(float);
  if (wide)
    device.launch(append_visual_kv_kernel<T, Stored, kWide>, tokens, threads, shared, p);
  else
    device.launch(append_visual_kv_kernel<T, Stored, 1>, tokens, threads, shared, p);
}

}  // namespace

void append(const AppendCall& c, const Tensor& q_out) {
  const Sections sections = c.sections();
  const int64_t tokens = c.k.size(0), half = sections.half();
  if (tokens == 0) return;
  // 48 KB of shared memory: cos and sin, and a factor per normalised head.
  require_value(
      half <= 4096 && c.q.size(1) + c.k.size(1) <= 4096, "rotary_dim is ", 2 * half, " and there are ", c.q.size(1),
      " + ", c.k.size(1), " heads; the cuda backend takes at most 8192 and 4096: use backend 'triton'");
  AppendParams p{};
  p.q = heads(c.q, c.q.const_data_ptr());
  p.k = heads(c.k, c.k.const_data_ptr());
  p.v = heads(c.v, c.v.const_data_ptr());
  p.q_out = heads(q_out, q_out.mutable_data_ptr());
  p.k_cache = c.k_cache.mutable_data_ptr();
  p.v_cache = c.v_cache.mutable_data_ptr();
  p.k_layout = cache_layout(c, c.k_cache);
  p.v_layout = cache_layout(c, c.v_cache);
  p.table = data<float>(c.cos_sin);
  p.table_rows = c.cos_sin.size(0);
  p.table_stride = c.cos_sin.stride(0);
  for (int axis = 0; axis < 3; ++axis) p.positions[axis] = position_row(c.positions, axis);
  p.slots = indices(c.slots, c.slots.stride(0));
  if (c.quantised()) {
    p.k_scale = data<float>(*c.k_scale);
    p.v_scale = data<float>(*c.v_scale);
    p.k_scale_stride = c.k_scale->numel() > 1;
    p.v_scale_stride = c.v_scale->numel() > 1;
  }
  p.q_heads = static_cast<int32_t>(c.q.size(1));
  p.kv_heads = static_cast<int32_t>(c.k.size(1));
  p.dim = static_cast<int32_t>(c.k.size(2));
  p.half = static_cast<int32_t>(half);
  p.sections = sections;
  p.in_place = p.q_out.base == p.q.base;
  if (c.q_norm.has_value()) p.q_norm = c.q_norm->const_data_ptr();
  if (c.k_norm.has_value()) p.k_norm = c.k_norm->const_data_ptr();
  p.norm_eps = static_cast<float>(c.norm_eps);
  const Device device(c.q);
  dispatch(c.q.scalar_type(), "append_visual_kv", [&](auto zero) {
    using T = decltype(zero);
    if (c.quantised())
      launch<T, Float8E4M3>(device, p, tokens);
    else
      launch<T, T>(device, p, tokens);
  });
}

}  // namespace vpt::cuda
