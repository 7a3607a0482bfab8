// Crop, resize and cut regions into patches, one strip of merge-block rows per work item; then the library's GEMM on
// a tile of patches at a time, so that no image-sized float tensor exists.
#include <cstring>
#include <type_traits>

#include "../calls/roi_patch_embed.h"
#include "../ops.h"
#include "bias_columns.h"
#include "int8_product.h"
#include "resampler.h"

namespace vpt::cpu {
namespace {

constexpr int64_t kTileRows = 1024;
constexpr int kPixelZero = 128;

// A run of merge-block rows of one region.
struct Strip {
  const Resampler* resampler;
  int32_t begin, end;  // merge-block rows
  int64_t first_row() const {
    const Region& r = resampler->region();
    return r.first_row + begin * r.rows_per_block_row();
  }
  int64_t rows() const { return (end - begin) * resampler->region().rows_per_block_row(); }
};

// The plan's regions with their coefficients. Kept per thread, so that a steady caller allocates nothing.
const std::vector<Resampler>& prepare(
    const std::vector<Tensor>& images, const Tensor& plan, int64_t rows, int64_t row_bytes, size_t* count) {
  check_plan(images, plan, rows, row_bytes);
  const Region* regions = data<Region>(plan);
  *count = static_cast<size_t>(plan.size(0));
  static thread_local std::vector<Resampler> resamplers;
  if (resamplers.size() < *count) resamplers.resize(*count);
  for (size_t i = 0; i < *count; ++i) {
    const Tensor& image = images[regions[i].image];
    resamplers[i].build(regions[i], {data<uint8_t>(image), image.stride(0), image.stride(1), image.stride(2)}, simd());
  }
  return resamplers;
}

// Cuts every region into strips of about `target` patches.
void split(const std::vector<Resampler>& regions, size_t count, int64_t target, std::vector<Strip>& strips) {
  strips.clear();
  for (size_t i = 0; i < count; ++i) {
    const Region& r = regions[i].region();
    const int32_t step = static_cast<int32_t>(std::max<int64_t>(1, target / r.rows_per_block_row()));
    for (int32_t begin = 0; begin < r.block_rows(); begin += step)
      strips.push_back({&regions[i], begin, std::min(begin + step, r.block_rows())});
  }
}

template <typename T>
void put(const uint8_t* pixels, int64_t n, T* out) {
  loops<T>(simd()).centre(pixels, n, out);
}
template <>
void put<uint8_t>(const uint8_t* pixels, int64_t n, uint8_t* out) {
  std::memcpy(out, pixels, n);
}
template <>
void put<int8_t>(const uint8_t* pixels, int64_t n, int8_t* out) {
  simd().centre(pixels, n, out);
}

// Patches of a strip as rows of p·p·3 values, `stride` apart: raw bytes, pixel − 128, or (pixel − 128)/256 in T.
template <typename T>
void write_patches(const Strip& strip, Scratch& scratch, T* out, int64_t stride) {
  const Resampler& resampler = *strip.resampler;
  const Region& r = resampler.region();
  const int64_t p = r.patch_size, origin = strip.begin * r.rows_per_block_row();
  if (resampler.padded()) {
    T zero{};
    if constexpr (std::is_same_v<T, uint8_t>) zero = kPixelZero;
    std::fill(out, out + strip.rows() * stride, zero);
  }
  const int32_t rows_per_block = r.merge_size * r.patch_size;
  const int32_t end = std::min(strip.end * rows_per_block, resampler.valid_height());
  const int32_t width = resampler.valid_width();
  resampler.rows(strip.begin * rows_per_block, end, scratch, [&](int32_t y, const uint8_t* row) {
    const int32_t patch_y = y / r.patch_size;
    T* line = out + (y % p) * 3 * p;
    for (int32_t x = 0, left = 0; left < width; ++x, left += r.patch_size) {
      const int64_t pixels = std::min<int64_t>(p, width - left);
      put(row + 3 * static_cast<int64_t>(left), 3 * pixels, line + (patch_row(r, patch_y, x) - origin) * stride);
    }
  });
}

template <typename T>
void write_strips(const Strip* strips, size_t count, T* out, int64_t stride) {
  const int64_t base = strips[0].first_row();
  torch::stable::parallel_for(0, static_cast<int64_t>(count), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t i = begin; i < end; ++i)
      write_patches(strips[i], scratch, out + (strips[i].first_row() - base) * stride, stride);
  });
}

// Calls f(row, entry) with every patch row of a strip and its entry of the bias table [2, p + 1]: by valid rows at the
// bottom edge, by valid columns at the right edge.
template <typename F>
void for_each_bias(const Strip& strip, F&& f) {
  const Region& r = strip.resampler->region();
  for (int32_t y = strip.begin * r.merge_size; y < strip.end * r.merge_size; ++y)
    for (int32_t x = 0; x < r.grid.width; ++x) f(r.first_row + patch_row(r, y, x), bias_entry(r, y, x));
}

// Calls f(strip) for the strips, in parallel.
template <typename F>
void for_each_strip(const Strip* strips, size_t count, F&& f) {
  torch::stable::parallel_for(0, static_cast<int64_t>(count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(strips[i]);
  });
}

// The GEMMs of one call, a tile of strips at a time. `row` is the row of `out` for the plan's first patch.
class Embedding {
 public:
  Embedding(const Tensor& weight, const Tensor& bias, const Tensor& out, int64_t row)
      : weight_(weight), bias_(bias), out_(out), row_(row) {}

  template <typename T>
  void run(const std::vector<Strip>& strips) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      widened<T>(strips, weight_);
    } else if (has_matmul<T>()) {
      if constexpr (std::is_same_v<T, BFloat16>) native(strips);
    } else {
      static thread_local Workspace space;
      const int64_t columns = weight_.size(1), apart = weight_.stride(0);
      float* wide = space.reserve<float>(weight_.numel());
      torch::stable::parallel_for(0, weight_.size(0), 64, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n)
          loops<T>(simd()).widen(data<T>(weight_) + n * apart, columns, wide + n * columns);
      });
      widened<T>(strips, wrap(wide, weight_.size(0), weight_.size(1), ScalarType::Float, weight_));
    }
  }

 private:
  template <typename F>
  static void tiles(const std::vector<Strip>& strips, F&& f) {
    for (size_t begin = 0, end; begin < strips.size(); begin = end) {
      int64_t rows = 0;
      for (end = begin; end < strips.size() && (end == begin || rows + strips[end].rows() <= kTileRows); ++end)
        rows += strips[end].rows();
      f(&strips[begin], end - begin, rows);
    }
  }

  // A float32 product; bias and rounding to T afterwards, while the tile is in cache.
  template <typename T>
  void widened(const std::vector<Strip>& strips, const Tensor& matrix) const {
    if (Int8Weight::available(weight_)) {
      integral<T>(strips, matrix);
      return;
    }
    static thread_local Workspace space, product_space;
    const int64_t columns = matrix.size(1), embed = matrix.size(0), stride = out_.stride(0);
    const float* biases = data<float>(bias_);
    T* target = mutable_data<T>(out_) + row_ * stride;
    tiles(strips, [&](const Strip* tile, size_t count, int64_t rows) {
      float* patches = space.reserve<float>(rows * columns);
      write_strips(tile, count, patches, columns);
      float* product = product_space.reserve<float>(rows * embed);
      linear_into(
          wrap(product, rows, embed, ScalarType::Float, weight_),
          wrap(patches, rows, columns, ScalarType::Float, weight_), matrix);
      const float* sums = product - tile->first_row() * embed;
      for_each_strip(tile, count, [&](const Strip& strip) {
        for_each_bias(strip, [&](int64_t row, int64_t entry) {
          loops<T>(simd()).add_bias_wide(sums + row * embed, biases + entry * embed, embed, target + row * stride);
        });
      });
    });
  }

  // The same through byte products with exact sums.
  template <typename T>
  void integral(const std::vector<Strip>& strips, const Tensor& matrix) const {
    static thread_local Workspace space, product_space;
    const int64_t columns = matrix.size(1), embed = matrix.size(0), stride = out_.stride(0);
    const float* biases = data<float>(bias_);
    T* target = mutable_data<T>(out_) + row_ * stride;
    const Int8Weight weight(matrix);
    tiles(strips, [&](const Strip* tile, size_t count, int64_t rows) {
      int8_t* patches = space.reserve<int8_t>(rows * columns);
      write_strips(tile, count, patches, columns);
      int32_t* product = product_space.reserve<int32_t>(rows * weight.width());
      weight.multiply(
          wrap(product, rows, weight.width(), ScalarType::Int, weight_),
          wrap(patches, rows, columns, ScalarType::Char, weight_));
      const int32_t* sums = product - tile->first_row() * weight.width();
      for_each_strip(tile, count, [&](const Strip& strip) {
        static thread_local Workspace wide_space;
        float* wide = wide_space.reserve<float>(embed);
        for_each_bias(strip, [&](int64_t row, int64_t entry) {
          const int32_t* products = sums + row * weight.width();
          const float* bias = biases + entry * embed;
          if constexpr (std::is_same_v<T, float>) {
            weight.combine(products, bias, target + row * stride);
          } else {
            weight.combine(products, bias, wide);
            for (int64_t i = 0; i < embed; ++i) target[row * stride + i] = from_float<T>(wide[i]);
          }
        });
      });
    });
  }

  // A bfloat16 product with the biases in it, rounded once, straight into `out`.
  void native(const std::vector<Strip>& strips) const {
    static thread_local Workspace space, matrix_space;
    const int64_t columns = weight_.size(1), embed = weight_.size(0), entries = 2 * bias_.size(1);
    std::vector<int64_t> column_of(entries, -1);
    std::vector<const float*> used;
    for (const Strip& strip : strips)
      for_each_bias(strip, [&](int64_t, int64_t entry) {
        if (column_of[entry] >= 0) return;
        column_of[entry] = static_cast<int64_t>(used.size());
        used.push_back(data<float>(bias_) + entry * embed);
      });
    const int64_t total = columns_with_bias(columns, static_cast<int64_t>(used.size()));
    BFloat16* augmented = matrix_space.reserve<BFloat16>(embed * total);
    append_bias_columns(data<BFloat16>(weight_), weight_.stride(0), embed, columns, used, augmented);
    const Tensor matrix = wrap(augmented, embed, total, ScalarType::BFloat16, weight_);
    tiles(strips, [&](const Strip* tile, size_t count, int64_t rows) {
      BFloat16* patches = space.reserve<BFloat16>(rows * total);
      write_strips(tile, count, patches, total);
      const int64_t first = tile->first_row();
      for_each_strip(tile, count, [&](const Strip& strip) {
        for_each_bias(strip, [&](int64_t row, int64_t entry) {
          select_bias(patches + (row - first) * total, columns, total, column_of[entry]);
        });
      });
      const Tensor target = torch::stable::narrow(const_cast<Tensor&>(out_), 0, row_ + first, rows);
      linear_into(target, wrap(patches, rows, total, ScalarType::BFloat16, weight_), matrix);
    });
  }

  const Tensor weight_;  // [outputs, columns]; rows may lie farther apart
  const Tensor& bias_;
  const Tensor& out_;
  int64_t row_;
};

void embed_rows(
    const std::vector<Tensor>& images, const Tensor& plan, int64_t rows, const Tensor& weight, const Tensor& bias,
    const Tensor& out, int64_t row) {
  const int64_t embed = weight.size(0), columns = pixel_columns(weight, bias);
  size_t count = 0;
  const std::vector<Resampler>& regions = prepare(images, plan, rows, columns, &count);
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) total += regions[i].region().rows();
  check_embed(weight, bias, out, row, total);
  if (total == 0 || embed == 0) return;
  static thread_local std::vector<Strip> strips;
  split(regions, count, kTileRows / (2 * torch::stable::get_num_threads()), strips);
  const Embedding embedding(torch::stable::narrow(const_cast<Tensor&>(weight), 1, 0, columns), bias, out, row);
  dispatch(weight.scalar_type(), "roi_patch_embed", [&](auto zero) { embedding.run<decltype(zero)>(strips); });
}

}  // namespace

Tensor roi_patches(std::vector<Tensor> images, Tensor plan, int64_t rows, int64_t row_bytes) {
  size_t count = 0;
  const std::vector<Resampler>& regions = prepare(images, plan, rows, row_bytes, &count);
  Tensor out = images.empty() ? torch::stable::empty({rows, row_bytes}, ScalarType::Byte)
                              : torch::stable::new_empty(images[0], {rows, row_bytes}, ScalarType::Byte);
  if (count == 0) return out;
  static thread_local std::vector<Strip> strips;
  split(regions, count, std::max<int64_t>(1, rows / (4 * torch::stable::get_num_threads())), strips);
  write_strips(strips.data(), strips.size(), mutable_data<uint8_t>(out), row_bytes);
  return out;
}

Tensor roi_patch_embed(std::vector<Tensor> images, Tensor plan, int64_t rows, Tensor weight, Tensor bias) {
  Tensor out = torch::stable::new_empty(weight, {rows, weight.size(0)});
  embed_rows(images, plan, rows, weight, bias, out, 0);
  return out;
}

void roi_patch_embed_into(
    std::vector<Tensor> images, Tensor plan, Tensor weight, Tensor bias, Tensor out, int64_t row) {
  embed_rows(images, plan, -1, weight, bias, out, row);
}

}  // namespace vpt::cpu
