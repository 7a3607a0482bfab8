// Plain C++ over 16 columns: NEON through the compiler, and the fallback on x86-64 without AVX2.
#include "packed_linear_loops.h"
#include "lanes_generic.h"

namespace vpt {
namespace {

struct Vector : Lanes {
  static constexpr int kTileRows = 4, kTilePanels = 1, kFewRows = 16;
  static constexpr int64_t kInt8Rows = kFewRows;
  static constexpr bool kQuads = false;

  template <int odd, typename S>
  static void load_column(const S* pair, Float* column) {
    *column = each([=](int i) { return to_float(pair[kPanel * odd + i]); });
  }
  template <int odd>
  static void load_column(const BFloat16* pair, Float* column) {
    *column = each([=](int i) { return to_float(pair[2 * i + odd]); });
  }
  template <int odd>
  static void load_column(const Int8* pair, Float* column) {
    *column = each([=](int i) { return static_cast<float>(pair[2 * i + odd].value); });
  }

  // 16 sums, or 16 pairs of 16-bit integers, the first of a pair in the low half.
  struct Int {
    int32_t lane[kPanel];
  };
  static Int zero_int() { return broadcast_int(0); }
  static Int broadcast_int(int32_t x) {
    return each<Int>([=](int) { return x; });
  }
  static Int add_int(const Int& a, const Int& b) {
    return each<Int>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Int dot(const Int& sum, const Int& a, const Int& b) {
    return each<Int>([&](int i) {
      const int32_t low = static_cast<int16_t>(a.lane[i]) * static_cast<int16_t>(b.lane[i]);
      return sum.lane[i] + low + (a.lane[i] >> 16) * (b.lane[i] >> 16);
    });
  }
  static Float to_floats(const Int& x) {
    return each([&](int i) { return static_cast<float>(x.lane[i]); });
  }
  static void load_words(const Int8* pair, Int* words) {
    *words = each<Int>([=](int i) {
      return (pair[2 * i].value & 0xFFFF) | static_cast<int32_t>(static_cast<uint32_t>(pair[2 * i + 1].value) << 16);
    });
  }
  static Int load_int(const int32_t* x) {
    return each<Int>([=](int i) { return x[i]; });
  }
  static void store_int(int32_t* x, const Int& v) {
    for (int i = 0; i < kLanes; ++i) x[i] = v.lane[i];
  }
  static void load_raw(const Int4* from, Int* raw) {
    *raw = each<Int>([=](int i) { return static_cast<int32_t>(from[i].columns); });
  }
  template <int shift, int mask>
  static Int bits(const Int& raw) {
    return each<Int>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(raw.lane[i]) >> shift) & mask; });
  }
};

}  // namespace

const PackedKernels kPackedGeneric = packed_kernels<Vector>("generic");

}  // namespace vpt
