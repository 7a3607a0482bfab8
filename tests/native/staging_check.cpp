// Rectangle::bring, thread by thread: what it writes, and that it touches nothing else; see test_staging.py.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define __device__
#define __forceinline__ inline
float __shfl_xor_sync(unsigned, float x, int) { return x; }

#include "../../csrc/cuda/staging.cuh"

using vpt::cuda::Rectangle;

int main(int, char** arguments) {
  std::mt19937 random(std::atoi(arguments[1]));
  auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  int64_t wrong = 0, wide = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    const int rows = draw(1, 6), bytes = draw(1, 90), stride = bytes + draw(0, 40), offset = draw(0, 15);
    // The rectangle ends where the memory does: a read beyond it is AddressSanitizer's to find.
    std::vector<uint8_t> image(offset + (rows - 1) * stride + bytes);
    for (uint8_t& byte : image) byte = static_cast<uint8_t>(draw(0, 127));
    const Rectangle from{image.data() + offset, stride, rows, bytes};
    std::vector<uint8_t> memory(Rectangle::most(rows, bytes) + 64, 0xCD);
    uint8_t* aligned = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
    const int threads = draw(1, 40);
    uint8_t* out = nullptr;
    for (int thread = 0; thread < threads; ++thread) out = from.bring(aligned, thread, threads);
    if (out + (rows - 1) * from.pitch() + bytes > aligned + Rectangle::most(rows, bytes)) ++wrong;
    std::vector<uint8_t> expected(memory.size(), 0xCD);
    for (int row = 0; row < rows; ++row)
      std::memcpy(
          expected.data() + (out - memory.data()) + row * from.pitch(), image.data() + offset + row * stride, bytes);
    // A vector that began before a row, or ended behind it, would have been written there too.
    wrong += expected != memory;
    for (int row = 0; row < rows; ++row)
      wrong += (reinterpret_cast<uintptr_t>(out + row * from.pitch()) -
                reinterpret_cast<uintptr_t>(from.base + row * stride)) %
              16 !=
          0;
    wide += bytes >= 31;
  }
  std::printf("%lld wrong, %lld with a whole vector\n", static_cast<long long>(wrong), static_cast<long long>(wide));
  return wrong == 0 && wide > 5000 ? 0 : 1;
}
