// The identity form in two launches, `condition_kernel` and, chained to it, `rank_one_kernel`; one without a control.
#include "control_cross_attention.cuh"

#include <initializer_list>

#include "../calls/control_cross_attention.h"
#include "../ops.h"
#include "device.h"

namespace vpt::cuda {
namespace {

bool aligned(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides, int64_t size) {
  bool ok = true;
  for (const void* p : pointers) ok = ok && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (int64_t stride : strides) ok = ok && stride * size % 16 == 0;
  return ok;
}

// k of every image, float32 [images, H].
template <typename T>
Tensor conditions(const Device& device, const ControlCall& c) {
  constexpr int kOutputs = kConditionThreads / kWarp;
  const int64_t images = c.images(), hidden = c.hidden();
  Tensor k = torch::stable::new_empty(c.features, {images, hidden}, ScalarType::Float);
  const ConditionParams p{
      c.control->const_data_ptr(),
      c.condition_norm_weight.const_data_ptr(),
      c.condition_norm_bias.const_data_ptr(),
      c.condition_weight.const_data_ptr(),
      c.condition_bias.const_data_ptr(),
      mutable_data<float>(k),
      c.control->stride(0),
      images,
      hidden};
  const bool wide = aligned({p.control, p.norm_weight, p.norm_bias, p.weight}, {p.control_stride, hidden}, sizeof(T));
  const int64_t blocks = images == 0 ? 0 : (hidden + kOutputs - 1) / kOutputs;
  device.launch(wide ? condition_kernel<T, true> : condition_kernel<T, false>, blocks, kConditionThreads, 0, p);
  return k;
}

template <typename T>
void run(const ControlCall& c, const Tensor& out, const Indices& rows) {
  constexpr int kTokens = kRankOneThreads / kWarp;
  const Tensor& x = c.features;
  const bool batched = x.dim() == 3;
  const Device device(x);
  RankOneParams p{};
  p.features = x.const_data_ptr();
  p.tokens = c.tokens();
  p.per_image = batched ? x.size(1) : p.tokens;
  p.image_stride = batched ? x.stride(0) : 0;
  p.token_stride = x.stride(batched ? 1 : 0);
  p.hidden = c.hidden();
  p.images = c.images();
  p.out = out.mutable_data_ptr();
  p.out_rows = out.size(0);
  p.out_stride = out.stride(0);
  p.rows = rows;
  OptionalTensor k;
  if (c.control.has_value()) {
    STD_TORCH_CHECK(p.images > 0, "control_cross_attention: ", p.tokens, " tokens, but no image");
    k = conditions<T>(device, c);
    p.k = data<float>(*k);
    if (c.cu_seqlens.has_value()) p.ends = indices(*c.cu_seqlens, c.cu_seqlens->stride(0));
  }
  const bool wide = aligned({p.features, p.out}, {p.image_stride, p.token_stride, p.out_stride, p.hidden}, sizeof(T));
  device.launch(
      wide ? rank_one_kernel<T, true> : rank_one_kernel<T, false>, (p.tokens + kTokens - 1) / kTokens, kRankOneThreads,
      0, p, c.control.has_value());
}

}  // namespace

void project(const ControlCall& c, const Tensor& out, const Indices& rows) {
  STD_TORCH_CHECK(
      !c.weight.has_value(),
      "control_cross_attention: the cuda backend has the identity form only; the linear and conv "
      "forms need a GEMM with an epilogue: use backend 'triton'");
  if (c.tokens() == 0 || c.hidden() == 0) return;
  dispatch(c.features.scalar_type(), "control_cross_attention", [&](auto zero) { run<decltype(zero)>(c, out, rows); });
}

}  // namespace vpt::cuda
