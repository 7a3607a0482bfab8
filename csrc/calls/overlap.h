// Whether tensors share memory, exactly, for strides of any kind: nothing is written before all of it is read. The same
// rule as `require_disjoint` of vpt_kernels/checks.py, whose words these are; there for implementations in Python.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <initializer_list>
#include <utility>

#include "../stable.h"

namespace vpt {

struct Named {
  const char* name;
  const Tensor* tensor;  // null: not given
};

// Σ steps·i over 0 ≤ i < count of each axis: what the addresses of a tensor, or of two, differ by.
struct Axes {
  static constexpr int kMost = 12;
  std::array<std::pair<int64_t, int64_t>, kMost> step_and_count{};
  int used = 0;

  void add(int64_t step, int64_t count) {
    for (int i = 0; i < used; ++i)
      if (step_and_count[i].first == step) {
        step_and_count[i].second += count - 1;
        return;
      }
    if (count > 1 && step > 0) step_and_count[used++] = {step, count};
  }
  int64_t reach(int from) const {
    int64_t sum = 0;
    for (int i = from; i < used; ++i) sum += step_and_count[i].first * (step_and_count[i].second - 1);
    return sum;
  }
  // Whether a sum lies in [low, high]; axes sorted by falling steps. What takes too long to decide counts as one.
  bool hits(int64_t low, int64_t high, int axis, int& work) const {
    if (high < 0 || low > reach(axis)) return false;
    if (low <= 0 || --work < 0) return true;
    if (axis == used) return false;
    const auto [step, count] = step_and_count[axis];
    const int64_t least = low - reach(axis + 1), first = least > 0 ? (least + step - 1) / step : 0;
    for (int64_t i = first, last = std::min(count - 1, high / step); i <= last; ++i)
      if (hits(low - i * step, high - i * step, axis + 1, work)) return true;
    return false;
  }
};

// A tensor's axes from `axis` on; `skip` leaves out the first elements of that one.
struct Extent {
  const char* begin;
  int64_t element, bytes;  // from the first element to the end of the last; 0: no element
  Axes axes;

  explicit Extent(const Tensor& t, int64_t axis = 0, int64_t skip = 0) : element(t.element_size()), bytes(element) {
    begin = static_cast<const char*>(t.const_data_ptr());
    for (int64_t d = axis; d < t.dim(); ++d) {
      const int64_t step = t.stride(d) * element, count = t.size(d) - (d == axis ? skip : 0);
      if (count <= 0) bytes = 0;
      if (bytes == 0) return;
      axes.add(step, count);
      bytes += step * (count - 1);
    }
    if (skip > 0) begin += skip * t.stride(axis) * element;
  }

  bool meets(const Extent& other) const { return begin < other.begin + other.bytes && other.begin < begin + bytes; }
  bool shares_memory_with(const Extent& other) const {
    if (bytes == 0 || other.bytes == 0 || !meets(other)) return false;
    Axes both = axes;
    for (int i = 0; i < other.axes.used; ++i) {
      const auto [step, count] = other.axes.step_and_count[i];
      both.add(step, count);
    }
    std::sort(both.step_and_count.begin(), both.step_and_count.begin() + both.used, std::greater<>());
    // other − this, with this one's steps counted from its far end
    const int64_t shift = axes.reach(0) - (other.begin - begin);
    int work = 100000;
    return both.hits(shift - other.element + 1, shift + element - 1, 0, work);
  }
};

// Whether two indices name the same memory. They differ first in some axis, and steps along it are all alike.
inline bool overlaps_itself(const Tensor& t) {
  if (t.is_contiguous()) return false;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1 && Extent(t, d + 1).shares_memory_with(Extent(t, d, 1))) return true;
  return false;
}

inline void require_disjoint(std::initializer_list<Named> written, std::initializer_list<Named> read) {
  for (const Named& target : written) {
    if (target.tensor == nullptr) continue;
    require_value(
        !overlaps_itself(*target.tensor), target.name,
        " has strides by which some of its elements are one and the same "
        "memory and would be written several times; pass a clone");
    const Extent extent(*target.tensor);
    const auto check = [&](const Named& other) {
      if (other.tensor == nullptr || other.tensor == target.tensor) return;
      require_value(
          !extent.shares_memory_with(Extent(*other.tensor)), other.name, " and ", target.name,
          " share memory: rows would be overwritten before they are read; clone ", other.name);
    };
    for (const Named& other : written) check(other);
    for (const Named& other : read) check(other);
  }
}

}  // namespace vpt
