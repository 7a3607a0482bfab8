// How many kernels were launched since the last question, and which ever; for the tests, through ctypes.
#include <utility>

extern "C" __attribute__((visibility("default"))) int64_t vpt_launches() {
  return std::exchange(cuda_on_cpu::launches, 0);
}
extern "C" __attribute__((visibility("default"))) int64_t vpt_chained_launches() {
  return std::exchange(cuda_on_cpu::chained_launches, 0);
}
extern "C" __attribute__((visibility("default"))) const char* vpt_launched() {
  static std::string names;
  names.clear();
  for (const std::string& name : cuda_on_cpu::launched) names += name + " ";
  return names.c_str();
}
