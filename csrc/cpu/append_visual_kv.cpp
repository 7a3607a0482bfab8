// One pass over the tokens: gather cos and sin by three position rows, normalise and rotate q and k, store k and v.
#include <algorithm>

#include "../calls/append_visual_kv.h"
#include "../ops.h"
#include "simd.h"

namespace vpt::cpu {
namespace {

void check_positions(const AppendCall& c) {
  const int64_t tokens = c.k.size(0);
  if (tokens == 0) return;
  int64_t low = 0, high = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const Indices row = position_row(c.positions, axis);
    if (axis == 0) low = high = row[0];
    for (int64_t t = 0; t < tokens; ++t) {
      low = std::min(low, row[t]);
      high = std::max(high, row[t]);
    }
  }
  require_value(
      low >= 0 && high < c.cos_sin.size(0), "positions span ", low, "..", high, "; the cos_sin table has rows 0..",
      c.cos_sin.size(0) - 1, ": build a longer table");
}

// cos and sin of one token, [2, half]: every half-dimension from the row of its own position.
void gather_cos_sin(const Sections& s, const float* const rows[3], float* out) {
  const int64_t half = s.half();
  if (s.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float* row = rows[s.axis(i)];
      out[i] = row[i];
      out[half + i] = row[half + i];
    }
    return;
  }
  const int64_t ends[4] = {0, s.t, s.t + s.h, half};
  for (int axis = 0; axis < 3; ++axis)
    for (int64_t part : {int64_t{0}, half})
      std::copy(rows[axis] + part + ends[axis], rows[axis] + part + ends[axis + 1], out + part + ends[axis]);
}

// Where the rotated keys or the values of one token go: T as they are, or float8 divided by a scale.
template <typename T>
struct Store {
  CacheLayout layout;
  void* base;
  const float* scales;  // null unless the cache is float8
  int64_t scale_stride;

  Store(const AppendCall& c, const Tensor& cache, const OptionalTensor& scale)
      : layout(cache_layout(c, cache)),
        base(cache.mutable_data_ptr()),
        scales(scale.has_value() ? data<float>(*scale) : nullptr),
        scale_stride(scale.has_value() && scale->numel() > 1 ? 1 : 0) {}

  T* row(int64_t slot, int64_t head) const { return static_cast<T*>(base) + layout.offset(slot, head); }
  void quantise(const float* x, int64_t n, int64_t slot, int64_t head) const {
    simd().quantise(x, scales[head * scale_stride], n, static_cast<Float8E4M3*>(base) + layout.offset(slot, head));
  }
};

template <typename T>
class Append {
 public:
  Append(const AppendCall& c, const Tensor& q_out)
      : c_(c),
        q_out_(q_out),
        sections_(c.sections()),
        half_(sections_.half()),
        dim_(c.k.size(2)),
        keys_(c, c.k_cache, c.k_scale),
        values_(c, c.v_cache, c.v_scale),
        slots_(indices(c.slots, c.slots.stride(0))),
        positions_{position_row(c.positions, 0), position_row(c.positions, 1), position_row(c.positions, 2)} {}

  void run() const {
    const int64_t elements = (c_.q.size(1) + 2 * c_.k.size(1)) * dim_;
    // About 16k elements a thread: less is not worth waking one.
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, elements));
    torch::stable::parallel_for(0, c_.k.size(0), grain, [this](int64_t begin, int64_t end) {
      static thread_local Workspace space;
      float* cos_sin = space.reserve<float>(2 * half_ + 2 * dim_);
      float* wide = cos_sin + 2 * half_;
      for (int64_t t = begin; t < end; ++t) token(t, {cos_sin, wide, reinterpret_cast<T*>(wide + dim_)});
    });
  }

 private:
  // One token's cos and sin [2, half], and a head's room in float32 and in T.
  struct Scratch {
    float* cos_sin;
    float* wide;
    T* normed;
  };

  void token(int64_t t, const Scratch& scratch) const {
    const float* table = data<float>(c_.cos_sin);
    const int64_t stride = c_.cos_sin.stride(0);
    const float* const rows[3] = {
        table + positions_[0][t] * stride, table + positions_[1][t] * stride, table + positions_[2][t] * stride};
    gather_cos_sin(sections_, rows, scratch.cos_sin);
    rotate(
        data<T>(c_.q) + t * c_.q.stride(0), c_.q.stride(1), c_.q_norm, scratch, c_.q.size(1),
        mutable_data<T>(q_out_) + t * q_out_.stride(0), q_out_.stride(1));
    const int64_t slot = slots_[t], heads = c_.k.size(1);
    if (!keys_.layout.holds(slot)) return;
    const T* k = data<T>(c_.k) + t * c_.k.stride(0);
    const T* v = data<T>(c_.v) + t * c_.v.stride(0);
    if (keys_.scales != nullptr) {
      for (int64_t h = 0; h < heads; ++h) quantise(k + h * c_.k.stride(1), v + h * c_.v.stride(1), scratch, slot, h);
      return;
    }
    rotate(k, c_.k.stride(1), c_.k_norm, scratch, heads, keys_.row(slot, 0), keys_.layout.head_stride);
    for (int64_t h = 0; h < heads; ++h, v += c_.v.stride(1)) std::copy(v, v + dim_, values_.row(slot, h));
  }

  void quantise(const T* k, const T* v, const Scratch& scratch, int64_t slot, int64_t head) const {
    const Loops<T>& loop = loops<T>(simd());
    if (c_.k_norm.has_value()) k = normalise(k, *c_.k_norm, scratch);
    loop.rotate_wide(k, 0, scratch.cos_sin, scratch.cos_sin + half_, half_, 1, scratch.wide, 0);
    loop.widen(k + 2 * half_, dim_ - 2 * half_, scratch.wide + 2 * half_);
    keys_.quantise(scratch.wide, dim_, slot, head);
    loop.widen(v, dim_, scratch.wide);
    values_.quantise(scratch.wide, dim_, slot, head);
  }

  // The heads of one token, `stride` apart, to `out`, which may be x.
  void rotate(
      const T* x, int64_t stride, const OptionalTensor& norm, const Scratch& scratch, int64_t heads, T* out,
      int64_t out_stride) const {
    const Loops<T>& loop = loops<T>(simd());
    const float *cos = scratch.cos_sin, *sin = cos + half_;
    if (norm.has_value()) {
      for (int64_t h = 0; h < heads; ++h, x += stride, out += out_stride) {
        const T* normed = normalise(x, *norm, scratch);
        loop.rotate(normed, 0, cos, sin, half_, 1, out, 0);
        std::copy(normed + 2 * half_, normed + dim_, out + 2 * half_);
      }
      return;
    }
    loop.rotate(x, stride, cos, sin, half_, heads, out, out_stride);
    if (x == out || dim_ == 2 * half_) return;
    for (int64_t h = 0; h < heads; ++h, x += stride, out += out_stride)
      std::copy(x + 2 * half_, x + dim_, out + 2 * half_);
  }

  const T* normalise(const T* x, const Tensor& weight, const Scratch& scratch) const {
    loops<T>(simd()).rms_norm(x, data<T>(weight), dim_, c_.norm_eps, scratch.normed);
    return scratch.normed;
  }

  const AppendCall& c_;
  const Tensor& q_out_;
  const Sections sections_;
  const int64_t half_, dim_;
  Store<T> keys_, values_;
  Indices slots_;
  Indices positions_[3];
};

}  // namespace

void append(const AppendCall& c, const Tensor& q_out) {
  check_positions(c);
  if (c.k.size(0) == 0) return;
  dispatch(c.q.scalar_type(), "append_visual_kv", [&](auto zero) { Append<decltype(zero)>(c, q_out).run(); });
}

}  // namespace vpt::cpu
