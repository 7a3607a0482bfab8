// nearest_index, which jumps, against nearest_indices, which walks: every index of random and of awkward axes.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/math/resample.h"

int main(int, char** arguments) {
  std::mt19937 random(std::atoi(arguments[1]));
  std::vector<int32_t> indices;
  long axes = 0, wrong = 0;
  auto compare = [&](int32_t in, int32_t out) {
    indices.resize(out);
    vpt::nearest_indices(in, out, indices.data());
    for (int32_t i = 0; i < out; ++i) wrong += vpt::nearest_index(in, out, i) != indices[i];
    ++axes;
  };
  for (int32_t in = 1; in <= 120; ++in)
    for (int32_t out = 1; out <= 120; ++out) compare(in, out);
  for (int i = 0; i < 1500; ++i) compare(1 + random() % 5000, 1 + random() % 1100);
  for (int32_t in : {1, 3, 1 << 10, (1 << 20) - 1, 1 << 20})
    for (int32_t out : {1, 27, 28, 1000, 1 << 16, 65535, 1 << 16}) compare(in, out);
  std::printf("%ld axes, %ld wrong\n", axes, wrong);
  return axes > 15000 && wrong == 0 ? 0 : 1;
}
