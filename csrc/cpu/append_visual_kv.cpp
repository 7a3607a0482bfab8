// One pass over the tokens: gather cos and sin by three position rows, rotate q and k, store k and v.
#include <algorithm>

#include "../math/mrope.h"
#include "../math/slots.h"
#include "../ops.h"
#include "simd.h"

namespace vpt::cpu {
namespace {

struct Call {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Tensor& cos_sin;
  const Tensor& positions;
  const Tensor& slots;
  const Tensor& k_cache;
  const Tensor& v_cache;
  Sections sections;
  bool heads_first;  // HND
  const OptionalTensor& k_scale;
  const OptionalTensor& v_scale;

  bool quantised() const { return k_cache.scalar_type() == ScalarType::Float8_e4m3fn; }
};

// Dimension of the cache's rows and of its heads.
int64_t row_dim(const Call& c) { return c.k_cache.dim() - (c.heads_first ? 2 : 3); }
int64_t head_dim(const Call& c) { return c.k_cache.dim() - (c.heads_first ? 3 : 2); }

CacheLayout layout(const Call& c, const Tensor& cache) {
  const bool paged = cache.dim() == 4;
  return {paged ? cache.size(0) : 1, cache.size(row_dim(c)), paged ? cache.stride(0) : 0, cache.stride(row_dim(c)),
          cache.stride(head_dim(c))};
}

Indices position_row(const Tensor& positions, int axis) {
  return Indices(positions, positions.stride(1), axis * positions.stride(0));
}

void check(const Call& c) {
  const ScalarType type = c.q.scalar_type();
  STD_TORCH_CHECK(c.q.dim() == 3 && c.k.dim() == 3 && c.v.dim() == 3, "q, k, v must be [tokens, heads, head_dim]");
  const int64_t tokens = c.k.size(0), heads = c.k.size(1), dim = c.k.size(2);
  bool ok = c.q.size(0) == tokens && c.q.size(2) == dim && c.v.size(0) == tokens && c.v.size(1) == heads &&
      c.v.size(2) == dim && c.positions.dim() == 2 && c.positions.size(0) == 3 && c.positions.size(1) == tokens &&
      c.slots.dim() == 1 && c.slots.size(0) == tokens && c.cos_sin.dim() == 2 &&
      c.cos_sin.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(ok, "append_visual_kv: shapes do not fit each other");
  const Sections& s = c.sections;
  STD_TORCH_CHECK(
      s.t >= 0 && s.h >= 0 && s.w >= 0 && 2 * s.half() == c.cos_sin.size(1) && 2 * s.half() <= dim,
      "sections must sum to half of rotary_dim, which must be at most head_dim");
  ok = (c.k_cache.dim() == 3 || c.k_cache.dim() == 4) && c.v_cache.dim() == c.k_cache.dim();
  for (const Tensor* cache : {&c.k_cache, &c.v_cache}) {
    ok = ok && cache->size(head_dim(c)) == heads && cache->size(cache->dim() - 1) == dim;
    for (int64_t d = 0; ok && d < cache->dim(); ++d) ok = cache->size(d) == c.k_cache.size(d);
    ok = ok && cache->scalar_type() == (c.quantised() ? ScalarType::Float8_e4m3fn : type);
  }
  STD_TORCH_CHECK(ok, "append_visual_kv: k_cache and v_cache do not fit k, v and each other");
  for (const Tensor* t : {&c.q, &c.k, &c.v, &c.k_cache, &c.v_cache, &c.cos_sin})
    ok = ok && t->is_cpu() && (t->size(t->dim() - 1) <= 1 || t->stride(-1) == 1);
  ok = ok && c.k.scalar_type() == type && c.v.scalar_type() == type;
  STD_TORCH_CHECK(ok, "append_visual_kv: one device, one dtype, contiguous last dimensions");
  STD_TORCH_CHECK(c.quantised() == c.k_scale.has_value() && c.quantised() == c.v_scale.has_value(),
                  "scales go with float8_e4m3fn caches, and only with them");
  for (const OptionalTensor* scale : {&c.k_scale, &c.v_scale})
    STD_TORCH_CHECK(
        !scale->has_value() ||
            ((*scale)->is_cpu() && (*scale)->scalar_type() == ScalarType::Float && (*scale)->is_contiguous() &&
             ((*scale)->numel() == 1 || (*scale)->numel() == heads)),
        "a scale must be float32, one number or one per key/value head");
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
  STD_TORCH_CHECK(
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

  Store(const Call& c, const Tensor& cache, const OptionalTensor& scale)
      : layout(vpt::cpu::layout(c, cache)),
        base(cache.mutable_data_ptr()),
        scales(scale.has_value() ? data<float>(*scale) : nullptr),
        scale_stride(scale.has_value() && scale->numel() > 1 ? 1 : 0) {}

  T* row(int64_t slot, int64_t head) const { return static_cast<T*>(base) + layout.offset(slot, head); }
  void quantise(const float* x, int64_t n, int64_t slot, int64_t head) const {
    simd().quantise(
        x, scales[head * scale_stride], n, static_cast<Float8E4M3*>(base) + layout.offset(slot, head));
  }
};

template <typename T>
class Append {
 public:
  Append(const Call& c, const Tensor& q_out)
      : c_(c),
        q_out_(q_out),
        keys_(c, c.k_cache, c.k_scale),
        values_(c, c.v_cache, c.v_scale),
        slots_(c.slots, c.slots.stride(0)),
        positions_{position_row(c.positions, 0), position_row(c.positions, 1), position_row(c.positions, 2)} {}

  void run() const {
    const int64_t elements = (c_.q.size(1) + 2 * c_.k.size(1)) * c_.k.size(2);
    // About 16k elements a thread: less is not worth waking one.
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, elements));
    torch::stable::parallel_for(0, c_.k.size(0), grain, [this](int64_t begin, int64_t end) {
      static thread_local Workspace space;
      float* cos_sin = space.reserve<float>(2 * c_.sections.half() + c_.k.size(2));
      for (int64_t t = begin; t < end; ++t) token(t, cos_sin, cos_sin + 2 * c_.sections.half());
    });
  }

 private:
  void token(int64_t t, float* cos_sin, float* wide) const {
    const float* table = data<float>(c_.cos_sin);
    const int64_t stride = c_.cos_sin.stride(0), half = c_.sections.half();
    const float* const rows[3] = {
        table + positions_[0][t] * stride, table + positions_[1][t] * stride, table + positions_[2][t] * stride};
    gather_cos_sin(c_.sections, rows, cos_sin);
    const int64_t dim = c_.k.size(2), heads = c_.k.size(1);
    rotate(
        data<T>(c_.q) + t * c_.q.stride(0), c_.q.stride(1), cos_sin, c_.q.size(1),
        mutable_data<T>(q_out_) + t * q_out_.stride(0), q_out_.stride(1));
    const int64_t slot = slots_[t];
    if (!keys_.layout.holds(slot)) return;
    const T* k = data<T>(c_.k) + t * c_.k.stride(0);
    const T* v = data<T>(c_.v) + t * c_.v.stride(0);
    if (keys_.scales != nullptr) {
      for (int64_t h = 0; h < heads; ++h) quantise(k + h * c_.k.stride(1), v + h * c_.v.stride(1), cos_sin, slot, h, wide);
      return;
    }
    rotate(k, c_.k.stride(1), cos_sin, heads, keys_.row(slot, 0), keys_.layout.head_stride);
    for (int64_t h = 0; h < heads; ++h, v += c_.v.stride(1)) std::copy(v, v + dim, values_.row(slot, h));
  }

  void quantise(const T* k, const T* v, const float* cos_sin, int64_t slot, int64_t head, float* wide) const {
    const int64_t dim = c_.k.size(2), half = c_.sections.half();
    const Loops<T>& loop = loops<T>(simd());
    loop.rotate_wide(k, 0, cos_sin, cos_sin + half, half, 1, wide, 0);
    loop.widen(k + 2 * half, dim - 2 * half, wide + 2 * half);
    keys_.quantise(wide, dim, slot, head);
    loop.widen(v, dim, wide);
    values_.quantise(wide, dim, slot, head);
  }

  void rotate(const T* x, int64_t stride, const float* cos_sin, int64_t heads, T* out, int64_t out_stride) const {
    const int64_t half = c_.sections.half(), dim = c_.k.size(2);
    loops<T>(simd()).rotate(x, stride, cos_sin, cos_sin + half, half, heads, out, out_stride);
    if (x == out || dim == 2 * half) return;
    for (int64_t h = 0; h < heads; ++h, x += stride, out += out_stride)
      std::copy(x + 2 * half, x + dim, out + 2 * half);
  }

  const Call& c_;
  const Tensor& q_out_;
  Store<T> keys_, values_;
  Indices slots_;
  Indices positions_[3];
};

void run(const Call& c, const Tensor& q_out) {
  if (c.k.size(0) == 0) return;
  dispatch(c.q.scalar_type(), "append_visual_kv", [&](auto zero) { Append<decltype(zero)>(c, q_out).run(); });
}

}  // namespace

Tensor append_visual_kv(
    Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor slots, Tensor k_cache, Tensor v_cache,
    int64_t section_t, int64_t section_h, int64_t section_w, bool interleaved, bool heads_first,
    OptionalTensor k_scale, OptionalTensor v_scale) {
  const Sections sections{section_t, section_h, section_w, interleaved};
  const Call call{q, k, v, cos_sin, positions, slots, k_cache, v_cache, sections, heads_first, k_scale, v_scale};
  check(call);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  run(call, out);
  return out;
}

void append_visual_kv_(
    Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor slots, Tensor k_cache, Tensor v_cache,
    int64_t section_t, int64_t section_h, int64_t section_w, bool interleaved, bool heads_first,
    OptionalTensor k_scale, OptionalTensor v_scale) {
  const Sections sections{section_t, section_h, section_w, interleaved};
  const Call call{q, k, v, cos_sin, positions, slots, k_cache, v_cache, sections, heads_first, k_scale, v_scale};
  check(call);
  run(call, q);
}

}  // namespace vpt::cpu
