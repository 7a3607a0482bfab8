// Attention of new tokens over cached ones: queries are arranged once, every thread takes pieces of the keys, and the
// pieces are merged by their log-sum-exp.
#include "cached_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../ops.h"

namespace vpt::cpu {
namespace {

// Operations that are worth waking a thread for.
constexpr int64_t kGrain = 1 << 17;

const AttentionKernels* const kKernels[] = {
#ifdef __x86_64__
    &kAttentionAvx512,
    &kAttentionAvx2,
#endif
    &kAttentionGeneric,
};

bool runs_here(const AttentionKernels& kernels) {
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&kernels == &kAttentionAvx2) return avx2;
  if (&kernels == &kAttentionAvx512)
    return avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#endif
  return true;
}

const AttentionKernels* widest() {
  return *std::find_if(std::begin(kKernels), std::end(kKernels), [](const auto* k) { return runs_here(*k); });
}

const AttentionKernels*& chosen() {
  static const AttentionKernels* kernels = widest();
  return kernels;
}

// q [tokens][query heads][dim] → [KV heads][tokens·group][padded] in float32, times the softmax's scale.
template <typename T>
void arrange(const CachedAttentionCall& c, const AttentionJob& job, float* to) {
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(job.dim)));
  const int64_t heads = c.q.size(1);
  for (int64_t t = 0; t < c.q.size(0); ++t)
    for (int64_t h = 0; h < heads; ++h) {
      const T* from = data<T>(c.q) + t * c.q.stride(0) + h * c.q.stride(1);
      float* row = to + ((h / job.group) * job.rows + t * job.group + h % job.group) * job.padded;
      for (int64_t d = 0; d < job.dim; ++d) row[d] = to_float(from[d]) * scale;
      std::fill(row + job.dim, row + job.padded, 0.f);
    }
}

// The splits' mixtures of one row → out, and the log of its sum of exponentials.
template <typename T>
float merge(const AttentionJob& job, int64_t row, T* out) {
  const int64_t stride = job.kv_heads * job.rows;
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t s = 0; s < job.splits; ++s) top = std::max(top, job.top[row + s * stride]);
  float sum = 0.f;
  for (int64_t s = 0; s < job.splits; ++s)
    if (const int64_t place = row + s * stride; job.sum[place] != 0.f)
      sum += job.sum[place] * std::exp(job.top[place] - top);
  float mixed[kKeys];
  for (int64_t first = 0; first < job.dim; first += kKeys) {
    const int64_t count = std::min(kKeys, job.dim - first);
    std::fill(mixed, mixed + kKeys, 0.f);
    for (int64_t s = 0; s < job.splits; ++s) {
      const int64_t place = row + s * stride;
      if (job.sum[place] == 0.f) continue;
      const float share = std::exp(job.top[place] - top) / sum;
      const float* from = job.mixed + place * job.padded + first;
      for (int64_t d = 0; d < count; ++d) mixed[d] += share * from[d];
    }
    for (int64_t d = 0; d < count; ++d) out[first + d] = from_float<T>(mixed[d]);
  }
  return sum == 0.f ? -std::numeric_limits<float>::infinity() : top + std::log(sum);
}

}  // namespace

std::tuple<Tensor, Tensor> cached_attention(Tensor q, Tensor keys, Tensor values, bool causal) {
  const CachedAttentionCall c{q, keys, values, causal};
  c.check();
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  Tensor out = torch::stable::new_empty(q, {tokens, heads, dim});
  Tensor log_sum = torch::stable::new_empty(q, {tokens, heads}, ScalarType::Float);
  AttentionJob job{};
  job.kv_heads = keys.size(1);
  job.group = heads / std::max<int64_t>(1, job.kv_heads);
  job.rows = tokens * job.group;
  job.dim = dim;
  job.padded = (dim + 15) / 16 * 16;
  job.stored = keys.size(0);
  job.past = job.stored - tokens;
  job.causal = causal;
  job.keys = keys.const_data_ptr();
  job.values = values.const_data_ptr();
  job.key_token = keys.stride(0), job.key_head = keys.stride(1);
  job.value_token = values.stride(0), job.value_head = values.stride(1);
  if (job.rows == 0 || dim == 0) return {out, log_sum};
  job.row_blocks = (job.rows + kQueryRows - 1) / kQueryRows;
  const int64_t even = (job.stored + kSplits * kKeys - 1) / (kSplits * kKeys) * kKeys;
  // Many rows are pieces of work by themselves.
  job.split = job.row_blocks > 1 ? std::max<int64_t>(1, job.stored) : std::max(kSplit, even);
  job.splits = std::max<int64_t>(1, (job.stored + job.split - 1) / job.split);

  static thread_local Workspace space;
  const int64_t rows = job.kv_heads * job.rows;
  float* memory = space.reserve<float>(rows * (job.padded + job.splits * (job.padded + 2)));
  job.q = memory;
  job.mixed = memory + rows * job.padded;
  job.top = job.mixed + job.splits * rows * job.padded;
  job.sum = job.top + job.splits * rows;
  dispatch(q.scalar_type(), "cached_attention", [&](auto t) { arrange<decltype(t)>(c, job, memory); });
  const AttentionKernels& kernels = *chosen();
  const int64_t operations =
      std::max<int64_t>(1, 4 * std::min(job.stored, job.split) * job.padded * std::min(rows, kQueryRows));
  torch::stable::parallel_for(0, job.items(), 1 + kGrain / operations, [&](int64_t begin, int64_t end) {
    static thread_local Workspace scratch;
    const ScalarType type = keys.scalar_type();
    const auto run = type == ScalarType::Float ? kernels.f32
        : type == ScalarType::BFloat16         ? kernels.bf16
                                               : kernels.f16;
    run(job, begin, end, scratch.reserve<float>(attention_scratch(job.padded)));
  });
  dispatch(q.scalar_type(), "cached_attention", [&](auto t) {
    using T = decltype(t);
    for (int64_t token = 0; token < tokens; ++token)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t row = (h / job.group) * job.rows + token * job.group + h % job.group;
        mutable_data<float>(log_sum)[token * heads + h] =
            merge<T>(job, row, mutable_data<T>(out) + (token * heads + h) * dim);
      }
  });
  return {out, log_sum};
}

}  // namespace vpt::cpu

// For tests: compute with the kernels of this name from now on, or with the widest again (null). Returns the name of
// those in use, or null, and changes nothing, where the processor or the build lacks them.
extern "C" __attribute__((visibility("default"))) const char* vpt_cached_attention_kernels(const char* name) {
  using namespace vpt;
  if (name == nullptr) return (cpu::chosen() = cpu::widest())->name;
  for (const AttentionKernels* kernels : cpu::kKernels)
    if (std::strcmp(kernels->name, name) == 0 && cpu::runs_here(*kernels)) return (cpu::chosen() = kernels)->name;
  return nullptr;
}
