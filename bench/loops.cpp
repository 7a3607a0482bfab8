// The loops whose rates are a machine's ceilings: fused multiply-adds in registers; reads, writes and copies of memory.
// Compiled by bench/ceilings.py for the processor that it runs on; no library, and nothing of the product, is in them.
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 64;
#elif defined(__AVX__)
constexpr int kWidth = 32;
#else
constexpr int kWidth = 16;
#endif
typedef float Vector __attribute__((vector_size(kWidth)));
// A weight may begin anywhere.
typedef float Anywhere __attribute__((vector_size(kWidth), aligned(4)));
constexpr int64_t kLanes = kWidth / 4;
// Two units of a latency of four need eight chains; more than twelve do not fit sixteen registers.
constexpr int kChains = 12;

volatile float sink;

// Seconds of work(0 … threads − 1) on as many threads, from the moment at which all run.
template <typename Work>
double timed(int threads, Work work) {
  std::vector<std::thread> others;
  const auto begin = std::chrono::steady_clock::now();
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (auto& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

inline void store(Vector* to, Vector value, bool around_the_cache) {
#if defined(__AVX512F__)
  if (around_the_cache) return _mm512_stream_ps(reinterpret_cast<float*>(to), value);
#elif defined(__AVX__)
  if (around_the_cache) return _mm256_stream_ps(reinterpret_cast<float*>(to), value);
#elif defined(__x86_64__)
  if (around_the_cache) return _mm_stream_ps(reinterpret_cast<float*>(to), value);
#endif
  *to = value;
}

float read(const Anywhere* from, int64_t count) {
  Vector sums[8] = {};
  for (int64_t i = 0; i < count; i += 8)
    for (int j = 0; j < 8; ++j) sums[j] += from[i + j];
  for (int j = 1; j < 8; ++j) sums[0] += sums[j];
  return sums[0][0];
}

void write(Vector* to, int64_t count, bool around_the_cache) {
  const Vector value = {1.f};
  for (int64_t i = 0; i < count; ++i) store(to + i, value, around_the_cache);
}

void copy(const Vector* from, Vector* to, int64_t count, bool around_the_cache) {
  for (int64_t i = 0; i < count; ++i) store(to + i, from[i], around_the_cache);
}

float multiply_floats(int64_t times) {
  Vector sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = Vector{} + static_cast<float>(i);
  const Vector x = Vector{} + 0.999f, y = Vector{} + 1e-7f;
  for (int64_t k = 0; k < times; ++k)
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * x + y;
  for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
  return sums[0][0];
}

#if defined(__AVX512BF16__)
constexpr int64_t kBfloat16Operations = 2 * 32;
float multiply_bfloat16(int64_t times) {
  __m512 sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f));
  for (int64_t k = 0; k < times; ++k)
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], x, x);
  for (int i = 1; i < kChains; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  return _mm512_cvtss_f32(sums[0]);
}
#endif

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#if defined(__AVX512VNNI__)
typedef __m512i Bytes;
inline Bytes multiplied(Bytes sum, Bytes x) { return _mm512_dpbusd_epi32(sum, x, x); }
inline Bytes filled(int value) { return _mm512_set1_epi32(value); }
#elif defined(__AVXVNNI__)
typedef __m256i Bytes;
inline Bytes multiplied(Bytes sum, Bytes x) { return _mm256_dpbusd_avx_epi32(sum, x, x); }
inline Bytes filled(int value) { return _mm256_set1_epi32(value); }
#else
typedef __m256i Bytes;
inline Bytes multiplied(Bytes sum, Bytes x) {
  asm volatile("" : "+x"(x));  // or the product, always the same, would leave the loop
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, x), _mm256_set1_epi16(1)));
}
inline Bytes filled(int value) { return _mm256_set1_epi32(value); }
#endif
constexpr int64_t kByteOperations = 2 * sizeof(Bytes);
float multiply_bytes(int64_t times) {
  Bytes sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = filled(i);
  const Bytes x = filled(0x01020304);
  for (int64_t k = 0; k < times; ++k)
    for (int i = 0; i < kChains; ++i) sums[i] = multiplied(sums[i], x);
  for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
  return static_cast<float>(sums[0][0]);
}
#endif

}  // namespace

extern "C" {

// A buffer of zeros that every thread's slice of has been written by, in huge pages where the system has them.
void* take(int64_t bytes) {
  constexpr int64_t kPage = 2 << 20;
  const int64_t whole = (bytes + kPage - 1) / kPage * kPage;
  void* buffer = std::aligned_alloc(kPage, whole);
  if (buffer == nullptr) return nullptr;
#ifdef __linux__
  madvise(buffer, whole, MADV_HUGEPAGE);
#endif
  __builtin_memset(buffer, 0, whole);
  return buffer;
}

void give_back(void* buffer) { std::free(buffer); }

// Seconds in which `threads` threads move the bytes `times` times, each its own slice: what = 0 reads them all, 1 and 2
// write them, 3 and 4 copy the first half onto the second; 2 and 4 around the caches.
double move(void* buffer, int64_t bytes, int what, int threads, int64_t times) {
  const int64_t parts = what >= 3 ? 2 * threads : threads;
  const int64_t count = bytes / parts / kWidth / 8 * 8;
  Vector* const all = static_cast<Vector*>(buffer);
  return timed(threads, [=](int thread) {
    Vector* const mine = all + thread * count;
    for (int64_t k = 0; k < times; ++k) {
      if (what == 0)
        sink = read(reinterpret_cast<const Anywhere*>(mine), count);
      else if (what <= 2)
        write(mine, count, what == 2);
      else
        copy(mine, mine + threads * count, count, what == 4);
    }
  });
}

// Seconds in which `threads` threads read every buffer once, each its own slice of each.
double read_all(void* const* buffers, const int64_t* bytes, int64_t count, int threads) {
  return timed(threads, [=](int thread) {
    for (int64_t b = 0; b < count; ++b) {
      const int64_t mine = bytes[b] / threads / kWidth / 8 * 8;
      sink = read(static_cast<const Anywhere*>(buffers[b]) + thread * mine, mine);
    }
  });
}

// Operations of one of `times` steps of `multiply`, or 0 where this processor has no unit for the type: 0 float32,
// 1 bfloat16 with float32 sums, 2 bytes with int32 sums. A multiplication with its addition counts twice.
int64_t operations(int type) {
  if (type == 0) return kChains * 2 * kLanes;
#if defined(__AVX512BF16__)
  if (type == 1) return kChains * kBfloat16Operations;
#endif
#if defined(__AVX512VNNI__) || defined(__AVX2__)
  if (type == 2) return kChains * kByteOperations;
#endif
  return 0;
}

// Seconds in which each of `threads` threads takes `times` steps.
double multiply(int type, int threads, int64_t times) {
  return timed(threads, [=](int) {
    float found = 0.f;
    if (type == 0) found = multiply_floats(times);
#if defined(__AVX512BF16__)
    if (type == 1) found = multiply_bfloat16(times);
#endif
#if defined(__AVX512VNNI__) || defined(__AVX2__)
    if (type == 2) found = multiply_bytes(times);
#endif
    sink = found;
  });
}
}
