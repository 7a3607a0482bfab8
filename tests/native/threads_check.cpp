// The operators' parallel loops on plain threads, for ThreadSanitizer: OpenMP's own runtime is not instrumented, and what
// it orders would be reported as a race. Prints one line per operator: "name ok" or what differs from one thread.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/math/plan.h"
#include "../../csrc/ops.h"

namespace {

int64_t threads = 1;
bool planted = false;
int64_t counted = 0;  // by every thread, unprotected, where a race is planted

std::vector<std::pair<int64_t, int64_t>> ranges(int64_t begin, int64_t end, int64_t grain) {
  const int64_t size = std::max<int64_t>({(end - begin + threads - 1) / threads, threads > 1 ? 1 : grain, 1});
  std::vector<std::pair<int64_t, int64_t>> found;
  for (int64_t at = begin; at < end; at += size) found.emplace_back(at, std::min(at + size, end));
  return found;
}

}  // namespace

// In the place of libtorch's: as many threads as asked for, however little there is to do. A loop inside a loop runs in
// its caller's thread, as there.
extern "C" AOTITorchError torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain, ParallelFunc call, void* context) {
  static thread_local bool inside = false;
  if (inside || threads == 1) {
    if (begin < end) call(begin, end, context);
    return 0;
  }
  std::vector<std::thread> running;
  for (const auto& [from, to] : ranges(begin, end, grain))
    running.emplace_back([=, from = from, to = to] {
      inside = true;
      if (planted) ++counted;
      call(from, to, context);
    });
  for (std::thread& thread : running) thread.join();
  return 0;
}

namespace {

using vpt::ScalarType;
using vpt::Tensor;

std::mt19937 engine;

// A tensor over memory of its own, which lives as long as the program.
template <typename T>
Tensor tensor(std::vector<int64_t> shape, ScalarType type, const std::function<T()>& draw) {
  int64_t count = 1;
  for (int64_t n : shape) count *= n;
  auto* memory = new std::vector<T>(count);
  for (T& x : *memory) x = draw();
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(memory->data(), shape, strides, cpu, type);
}

Tensor floats(std::vector<int64_t> shape) {
  return tensor<float>(shape, ScalarType::Float, [] { return std::normal_distribution<float>(0, 0.5)(engine); });
}

Tensor integers(std::vector<int64_t> shape, int64_t high) {
  return tensor<int64_t>(
      shape, ScalarType::Long, [=] { return std::uniform_int_distribution<int64_t>(0, high)(engine); });
}

Tensor zeros(std::vector<int64_t> shape) {
  return tensor<float>(shape, ScalarType::Float, [] { return 0.f; });
}

Tensor counting(int64_t n) {
  int64_t next = 0;
  return tensor<int64_t>({n}, ScalarType::Long, [&next] { return next++; });
}

// Two regions of a 90×70 image, resampled to 84×56 and 28×28 pixels, the second by NEAREST steps first.
Tensor plan() {
  const int32_t rows[2][24] = {
      {0, 90, 70, 0, 0, 90, 70, 90, 70, 90, 70, 90, 70, 84, 56, 1, 0, 0, 0, 6, 4, 14, 2, 0},
      {0, 90, 70, 5, 6, 80, 60, 60, 45, 60, 45, 60, 45, 28, 28, 0, 1, 0, 0, 2, 2, 14, 2, 24}};
  const int32_t* next = rows[0];
  return tensor<int32_t>({2, 24}, ScalarType::Int, [&next] { return *next++; });
}

struct Case {
  const char* name;
  std::function<std::vector<Tensor>()> run;
};

std::vector<Case> cases() {
  const Tensor image = tensor<uint8_t>({70, 90, 3}, ScalarType::Byte, [] { return static_cast<uint8_t>(engine()); });
  const Tensor regions = plan(), weight = floats({40, 588}), bias = floats({2, 15, 40});
  const int64_t patches = 28, hidden = 96, width = 80, tokens = 70;
  const Tensor features = floats({tokens, width}), control = floats({2, hidden});
  const Tensor norm = floats({width}), shift = floats({width}), inner = floats({hidden, width}), add = floats({hidden});
  const Tensor scale = floats({hidden}), offset = floats({hidden}), condition = floats({hidden, hidden});
  const Tensor stack = floats({hidden});
  const Tensor ends = tensor<int64_t>({3}, ScalarType::Long, [n = 0]() mutable {
    const int64_t values[3] = {0, 33, 70};
    return values[n++];
  });
  const Tensor q = floats({tokens, 4, 16}), k = floats({tokens, 2, 16}), v = floats({tokens, 2, 16});
  const Tensor table = floats({50, 16}), positions = integers({3, tokens}, 49), slots = counting(tokens);
  const Tensor head_norm = floats({16});
  const auto append = [=](const std::optional<Tensor>& weight_of_heads) {
    const Tensor keys = zeros({tokens, 2, 16}), values = zeros({tokens, 2, 16});
    const Tensor rotated = vpt::AppendForms<vpt::cpu::append>::fresh(
        q, k, v, table, positions, slots, keys, values, 2, 3, 3, false, false, std::nullopt, std::nullopt,
        weight_of_heads, weight_of_heads, 1e-6);
    return std::vector{rotated, keys, values};
  };
  return {
      {"roi_patches", [=] { return std::vector{vpt::cpu::roi_patches({image}, regions, patches, 588)}; }},
      {"roi_patch_embed",
       [=] { return std::vector{vpt::cpu::roi_patch_embed({image}, regions, patches, weight, bias)}; }},
      {"control_cross_attention",
       [=] {
         return std::vector{vpt::ControlForms<vpt::cpu::project>::fresh(
             features, control, ends, norm, shift, inner, add, scale, offset, condition, stack, std::nullopt,
             std::nullopt)};
       }},
      {"append_visual_kv", [=] { return append(std::nullopt); }},
      {"append_visual_kv with norms", [=] { return append(head_norm); }},
  };
}

bool equal(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(a[i].const_data_ptr(), b[i].const_data_ptr(), a[i].numel() * a[i].element_size()) != 0)
      return false;
  return true;
}

}  // namespace

// threads_check SEED [plant]
int main(int count, char** arguments) {
  engine.seed(static_cast<unsigned>(std::atoi(arguments[1])));
  planted = count > 2;
  int failures = 0;
  for (const Case& one : cases()) {
    threads = 1;
    const std::vector<Tensor> expected = one.run();
    threads = 7;
    bool same = equal(one.run(), expected);
    // Two callers at once, each with its own threads: what is kept between calls is the caller's.
    std::vector<Tensor> beside[2];
    std::thread first([&] { beside[0] = one.run(); }), second([&] { beside[1] = one.run(); });
    first.join();
    second.join();
    same = same && equal(beside[0], expected) && equal(beside[1], expected);
    std::printf("%s %s\n", one.name, same ? "ok" : "differs from one thread");
    failures += !same;
  }
  return failures;
}
