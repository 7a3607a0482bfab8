// Runs the CUDA sources on a CPU, for tests: included before each of them when g++ compiles it. A block's threads are
// fibers of one OS thread; __syncthreads and the shuffles hand over to a scheduler. Blocks run one after the other.
//
// What it finds: wrong results, a missing barrier (a warp runs as far as it can before another, in ascending order in even
// blocks and in descending order in odd ones), barriers that not all threads reach, shuffles in divergent or partly
// finished warps, writes beyond dynamic shared memory, use of it before it is written (it begins as 0xCD).
// What it cannot find: races between blocks, alignment faults in vector accesses, anything about memory ordering or time.
// It has one-dimensional grids and blocks, full-mask shuffles, no atomics, no textures, no tensor cores.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <typeinfo>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define VPT_DYNAMIC_SHARED(name) unsigned char* name = cuda_on_cpu::dynamic_shared()
#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size

namespace cuda_on_cpu {

struct Index {
  unsigned x;
};
inline Index thread_index, block_index, block_size, grid_size;

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 << 10, kGuard = 256, kSharedLimit = 48 << 10;
constexpr unsigned char kUnwritten = 0xCD, kGuardByte = 0xA7;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::vector<char> stack = std::vector<char>(kStack);
  State state = State::kDone;
  bool started = false;
  uint64_t exchanged = 0;
};

inline std::vector<Fiber*> fibers;
inline unsigned current;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::vector<unsigned char> shared;

inline unsigned char* dynamic_shared() { return shared.data(); }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: block %u: %s\n", block_index.x, what);
  std::abort();
}

inline void hand_over(State state) {
  Fiber& me = *fibers[current];
  me.state = state;
  if (_setjmp(me.resume) == 0) _longjmp(scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    body();
    hand_over(State::kDone);
  }
}

inline void resume(unsigned number) {
  current = number;
  thread_index.x = number;
  Fiber& fiber = *fibers[number];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Lets the threads of [begin, end) go on if all that are not done wait at the same kind of barrier.
inline void release(unsigned begin, unsigned end, State barrier) {
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i]->state != barrier && fibers[i]->state != State::kDone) return;
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i]->state == barrier) fibers[i]->state = State::kReady;
}

// Runs a warp for as long as it needs no other.
inline bool run_warp(unsigned begin, unsigned threads, bool descending) {
  const unsigned end = begin + kWarp < threads ? begin + kWarp : threads;
  for (bool ran = false;; ran = true) {
    bool ready = false;
    for (unsigned n = 0; n < end - begin; ++n) {
      const unsigned i = descending ? end - 1 - n : begin + n;
      if (fibers[i]->state != State::kReady) continue;
      resume(i);
      ready = true;
    }
    if (!ready) return ran;
    release(begin, end, State::kAtWarpBarrier);
  }
}

inline void run_block(unsigned threads, bool descending) {
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  for (unsigned i = 0; i < threads; ++i) fibers[i]->state = State::kReady;
  for (;;) {
    bool ran = false, waits = false;
    for (unsigned n = 0; n < warps; ++n) ran |= run_warp(kWarp * (descending ? warps - 1 - n : n), threads, descending);
    release(0, threads, State::kAtBlockBarrier);
    for (unsigned i = 0; i < threads; ++i) waits |= fibers[i]->state != State::kDone;
    if (!waits) return;
    if (!ran) fail("threads wait at different barriers for ever");
  }
}

inline void run_grid(int64_t blocks, int threads, size_t shared_bytes, std::function<void()> kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (threads < 1 || threads > 1024) fail("a block of more than 1024 threads, or of none");
  if (shared_bytes > kSharedLimit) fail("more than 48 KB of shared memory");
  while (fibers.size() < static_cast<size_t>(threads)) {
    Fiber* fiber = new Fiber;
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack.data();
    fiber->start.uc_stack.ss_size = fiber->stack.size();
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, fiber_main, 0);
    fibers.push_back(fiber);
  }
  body = std::move(kernel);
  block_size.x = static_cast<unsigned>(threads);
  grid_size.x = static_cast<unsigned>(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    block_index.x = static_cast<unsigned>(block);
    shared.assign(shared_bytes + kGuard, kUnwritten);
    std::memset(shared.data() + shared_bytes, kGuardByte, kGuard);
    run_block(static_cast<unsigned>(threads), block % 2 != 0);
    for (size_t i = 0; i < kGuard; ++i)
      if (shared[shared_bytes + i] != kGuardByte) fail("a write beyond dynamic shared memory");
  }
}

inline void warp_barrier() {
  const unsigned first = current / kWarp * kWarp;
  for (unsigned i = first; i < first + kWarp; ++i)
    if (i >= block_size.x || fibers[i]->state == State::kDone) fail("a shuffle with lanes that have ended");
  hand_over(State::kAtWarpBarrier);
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::hand_over(cuda_on_cpu::State::kAtBlockBarrier); }

template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int mask) {
  namespace on_cpu = cuda_on_cpu;
  if (lanes != 0xFFFFFFFFu) on_cpu::fail("a shuffle of part of a warp");
  const unsigned me = on_cpu::current;
  std::memcpy(&on_cpu::fibers[me]->exchanged, &value, sizeof value);
  on_cpu::warp_barrier();
  std::memcpy(&value, &on_cpu::fibers[me ^ static_cast<unsigned>(mask)]->exchanged, sizeof value);
  on_cpu::warp_barrier();
  return value;
}

// In place of csrc/cuda/device.h.
#define VPT_CUDA_DEVICE_H
#define VPT_DEVICE_KEY CPU

#include "stable.h"

namespace cuda_on_cpu {

// Launches since the last question, and how many of them were chained to the one before.
inline int64_t launches, chained_launches;
// The parameter types of all kernels launched so far; every kernel has its own.
inline std::set<std::string> launched;

}  // namespace cuda_on_cpu

namespace vpt::cuda {

class Device {
 public:
  explicit Device(const Tensor&) {}

  template <typename Params>
  void launch(
      void (*kernel)(Params), int64_t blocks, int threads, size_t shared, const Params& params,
      bool chained = false) const {
    if (blocks == 0) return;
    if (sizeof(Params) > 4096) cuda_on_cpu::fail("more than 4 KB of kernel parameters");
    ++cuda_on_cpu::launches;
    cuda_on_cpu::launched.insert(typeid(Params).name());
    cuda_on_cpu::chained_launches += chained;
    cuda_on_cpu::run_grid(blocks, threads, shared, [&] { kernel(params); });
  }
};

}  // namespace vpt::cuda
