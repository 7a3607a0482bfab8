// Runs the inner loops of every instruction set that this processor has on the same random rows and compares the
// resampled bytes exactly, the float loops closely. Prints one line per instruction set: "name ok", what differs, or that it could not be tried.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cpu/simd.h"
#include "../../csrc/math/resample.h"

using namespace vpt;

namespace {

std::mt19937 engine;

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }

struct Packed {
  std::vector<int32_t> first, words;
  int groups = 0;
};

Packed pack(const Simd& simd, const Axis& axis) {
  Packed result;
  int most = 0;
  for (int o = 0; o < axis.out_size; ++o) most = std::max(most, axis.end(o) - axis.first(o));
  result.groups = (most + kTapGroup - 1) / kTapGroup;
  result.words.resize(static_cast<size_t>(axis.out_size) * result.groups * simd.words);
  int32_t* words = result.words.data();
  for (int o = 0; o < axis.out_size; ++o) {
    result.first.push_back(axis.first(o));
    const double sum = weight_sum(axis, o);
    for (int g = 0; g < result.groups; ++g, words += simd.words) {
      int32_t weights[kTapGroup];
      for (int t = 0; t < kTapGroup; ++t) {
        const int tap = g * kTapGroup + t;
        weights[t] = tap < axis.end(o) - axis.first(o) ? fixed_weight(axis, o, tap, sum) : 0;
      }
      simd.pack(weights, words);
    }
  }
  return result;
}

std::vector<uint8_t> random_bytes(size_t n) {
  std::vector<uint8_t> bytes(n);
  const int kind = uniform(0, 2);  // noise, saturated, flat
  for (uint8_t& b : bytes)
    b = static_cast<uint8_t>(kind == 0 ? uniform(0, 255) : kind == 1 ? 255 * uniform(0, 1) : 255);
  return bytes;
}

const char* compare_resampling(const Simd& simd) {
  for (int trial = 0; trial < 200; ++trial) {
    const int in = uniform(1, 400), out = uniform(1, 200);
    const Axis axis(in, out, uniform(0, 1));
    const Packed ours = pack(simd, axis), plain = pack(kGeneric, axis);
    const std::vector<uint8_t> row = random_bytes(3 * static_cast<size_t>(in + 8 + 4 * plain.groups) + 64);
    std::vector<uint8_t> a(3 * out + kRowSlack), b(a);
    simd.horizontal(row.data(), ours.first.data(), ours.words.data(), ours.groups, out, a.data());
    kGeneric.horizontal(row.data(), plain.first.data(), plain.words.data(), plain.groups, out, b.data());
    if (std::memcmp(a.data(), b.data(), 3 * out)) return "horizontal differs";
    const int bytes = uniform(1, 300), o = uniform(0, out - 1);
    std::vector<std::vector<uint8_t>> rows;
    std::vector<const uint8_t*> pointers;
    for (int t = 0; t < plain.groups * kTapGroup; ++t) rows.push_back(random_bytes(bytes + 64));
    for (const auto& r : rows) pointers.push_back(r.data());
    std::vector<uint8_t> c(bytes + 64), d(bytes + 64);
    simd.vertical(
        pointers.data(), ours.words.data() + static_cast<size_t>(o) * ours.groups * simd.words, ours.groups, bytes,
        c.data());
    kGeneric.vertical(
        pointers.data(), plain.words.data() + static_cast<size_t>(o) * plain.groups * kGeneric.words, plain.groups,
        bytes, d.data());
    if (std::memcmp(c.data(), d.data(), bytes)) return "vertical differs";
  }
  return nullptr;
}

bool close(float a, float b, float scale) {
  return std::abs(a - b) <= 1e-5f * scale || (std::isnan(a) && std::isnan(b));
}

template <typename T>
const char* compare_loops(const Loops<T>& ours, const Loops<T>& plain) {
  const float tolerance = sizeof(T) == 2 ? 800.f : 1.f;  // one bfloat16 step is 2^-8 of the value
  for (int n : {1, 2, 7, 15, 16, 31, 64, 65, 129, 1536}) {
    std::normal_distribution<float> normal;
    std::vector<float> k(n), bias(n), cos(n), sin(n);
    std::vector<T> x(2 * n), weight(n), shift(n), a(2 * n), b(2 * n);
    for (auto* v : {&k, &bias, &cos, &sin})
      for (float& f : *v) f = normal(engine) / std::sqrt(static_cast<float>(n));
    for (auto* v : {&x, &weight, &shift})
      for (T& e : *v) e = from_float<T>(normal(engine));
    const float dot_a = ours.dot(x.data(), k.data(), n), dot_b = plain.dot(x.data(), k.data(), n);
    if (!close(dot_a, dot_b, 10.f)) return "dot differs";
    auto same = [&](int count) {
      for (int i = 0; i < count; ++i)
        if (!close(to_float(a[i]), to_float(b[i]), tolerance * (1.f + std::abs(to_float(b[i]))))) return false;
      return true;
    };
    ours.layer_norm(x.data(), 1, weight.data(), shift.data(), n, a.data());
    plain.layer_norm(x.data(), 1, weight.data(), shift.data(), n, b.data());
    if (!same(n)) return "layer_norm differs";
    ours.rank_one(x.data(), k.data(), n, a.data());
    plain.rank_one(x.data(), k.data(), n, b.data());
    if (!same(n)) return "rank_one differs";
    ours.rotate(x.data(), 0, cos.data(), sin.data(), n, 1, a.data(), 0);
    plain.rotate(x.data(), 0, cos.data(), sin.data(), n, 1, b.data(), 0);
    if (!same(2 * n)) return "rotate differs";
    std::vector<uint8_t> pixels = random_bytes(n);
    ours.centre(pixels.data(), n, a.data());
    for (int i = 0; i < n; ++i)
      if (to_float(a[i]) != (static_cast<float>(pixels[i]) - 128.f) / 256.f) return "centre differs";
  }
  return nullptr;
}

// Slices must be identical and stand for the rounded number; sums of their products must be close.
const char* compare_int8_slices(const Simd& simd) {
  for (int n : {1, 7, 64, 588, 1000})
    for (int count : {3, 4}) {
      std::normal_distribution<float> normal;
      std::vector<float> x(n), scale(n), bias(n), out(n), plain(n);
      for (auto* v : {&x, &scale, &bias})
        for (float& f : *v) f = normal(engine);
      const float largest = simd.largest(x.data(), n);
      if (largest != kGeneric.largest(x.data(), n)) return "largest differs";
      const double inverse = (count == 4 ? 0x7F7F7F7F : 0x7F7F7F) / static_cast<double>(largest);
      std::vector<int8_t> a(count * n), b(count * n);
      simd.int8_slices(x.data(), n, inverse, count, a.data(), n);
      kGeneric.int8_slices(x.data(), n, inverse, count, b.data(), n);
      if (a != b) return "slices differ";
      std::vector<int32_t> products(count * n);
      for (int i = 0; i < n; ++i) {
        double value = 0;
        for (int d = 0; d < count; ++d) {
          value = 256 * value + a[d * n + i];
          products[d * n + i] = uniform(-9000000, 9000000);
        }
        if (std::abs(value - x[i] * inverse) > 0.5 + 1e-6) return "slices do not stand for the number";
      }
      simd.combine(products.data(), n, count, scale.data(), bias.data(), out.data());
      kGeneric.combine(products.data(), n, count, scale.data(), bias.data(), plain.data());
      for (int i = 0; i < n; ++i)
        if (!close(out[i], plain[i], std::abs(plain[i]) + 1.f)) return "combine differs";
    }
  return nullptr;
}

int check(const Simd& simd) {
  const char* problem = compare_resampling(simd);
  if (!problem) problem = compare_int8_slices(simd);
  if (!problem) problem = compare_loops(simd.f32, kGeneric.f32);
  if (!problem) problem = compare_loops(simd.bf16, kGeneric.bf16);
  if (!problem) problem = compare_loops(simd.f16, kGeneric.f16);
  std::printf("%s %s\n", simd.name, problem ? problem : "ok");
  return problem ? 1 : 0;
}

#ifdef __x86_64__
int absent(const Simd& simd) {
  std::printf("%s not on this processor\n", simd.name);
  return 0;
}
#endif

}  // namespace

int main(int, char** arguments) {
  engine.seed(static_cast<unsigned>(std::atoi(arguments[1])));
  int failures = check(kGeneric);
#ifdef __x86_64__
  failures += __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? check(kAvx2) : absent(kAvx2);
  failures +=
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") ? check(kAvx512) : absent(kAvx512);
#endif
  return failures;
}
