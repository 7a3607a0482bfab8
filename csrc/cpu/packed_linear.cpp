// x·Wᵀ over packed weights: x is arranged once for all, then every thread streams a contiguous slice of the panels.
#include <algorithm>
#include <cstring>

#include "../calls/packed_linear.h"
#include "../ops.h"
#include "packed_linear.h"

namespace vpt::cpu {
namespace {

// Operations that are worth waking a thread for.
constexpr int64_t kGrain = 1 << 17;

const PackedKernels* const kKernels[] = {
#ifdef __x86_64__
    &kPackedAvx512,
    &kPackedAvx2,
#endif
    &kPackedGeneric,
};

bool runs_here(const PackedKernels& kernels) {
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&kernels == &kPackedAvx2) return avx2;
  if (&kernels == &kPackedAvx512)
    return avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#endif
  return true;
}

const PackedKernels* widest() {
  return *std::find_if(std::begin(kKernels), std::end(kKernels), [](const auto* k) { return runs_here(*k); });
}

const PackedKernels*& chosen() {
  static const PackedKernels* kernels = widest();
  return kernels;
}

Element element(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::f16;
    default:
      STD_TORCH_CHECK(false, "packed_linear: computes in float32, bfloat16 and float16 only");
  }
}

Element stored_element(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Char) return Element::int8;
  if (t.scalar_type() == ScalarType::Int) return Element::int4;
  return element(t);
}

Rows rows_of(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), t.stride(0), element(t)}; }

}  // namespace

void multiply_packed(const PackedCall& c, const Tensor& out) {
  PackedJob job{};
  job.x = rows_of(c.x);
  job.rows = c.x.size(0);
  job.columns = c.x.size(1);
  job.data = c.data.const_data_ptr();
  job.stored = stored_element(c.data);
  if (c.minima.has_value()) {
    job.steps = data<Float16>(*c.scales);
    job.minima = data<Float16>(*c.minima);
  } else if (c.scales.has_value()) {
    job.scales = data<float>(*c.scales);
    job.group = c.scales->size(1) == 1 ? 2 * job.pairs() : 32;
  }
  job.features = c.features;
  job.gated = c.gated;
  job.activation = static_cast<Activation>(c.activation);
  if (c.bias.has_value()) job.bias = data<float>(*c.bias);
  if (c.residual.has_value()) job.residual = rows_of(*c.residual);
  job.out = rows_of(out);
  if (job.rows == 0 || job.features == 0) return;

  static thread_local Workspace space;
  const PackedKernels& kernels = *chosen();
  // With fewer rows the reading of the weights is waited for, or as much as bytes save goes into bringing them in order.
  job.quads = c.dynamic && kernels.quads && job.rows > kernels.tile_rows;
  job.arranged = space.reserve<float>(job.rows * 2 * (job.pairs() + 1));
  const Tiling tiling(job.rows, kernels.tile_rows);
  const int64_t tile_elements = std::max<int64_t>(1, kernels.tile_rows * job.columns);
  torch::stable::parallel_for(0, tiling.count, 1 + (1 << 15) / tile_elements, [&](int64_t begin, int64_t end) {
    kernels.arrange(job, begin, end);
  });
  const int64_t panel_operations = std::max<int64_t>(1, kPanel * job.rows * job.columns);
  torch::stable::parallel_for(0, job.panels(), 1 + kGrain / panel_operations, [&](int64_t begin, int64_t end) {
    static thread_local Workspace scratch;
    kernels.multiply(job, begin, end, scratch.reserve<float>(scratch_floats(job.rows)));
  });
}

}  // namespace vpt::cpu

// For tests: compute with the kernels of this name from now on, or with the widest again (null). Returns the name of
// those in use, or null, and changes nothing, where the processor or the build lacks them.
extern "C" __attribute__((visibility("default"))) const char* vpt_packed_linear_kernels(const char* name) {
  using namespace vpt;
  if (name == nullptr) return (cpu::chosen() = cpu::widest())->name;
  for (const PackedKernels* kernels : cpu::kKernels)
    if (std::strcmp(kernels->name, name) == 0 && cpu::runs_here(*kernels)) return (cpu::chosen() = kernels)->name;
  return nullptr;
}
