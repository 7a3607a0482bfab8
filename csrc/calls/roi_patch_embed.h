// A plan, the images it names, and the operands of `roi_patch_embed`: what every backend demands of them.
#pragma once

#include "../math/plan.h"
#include "../math/resample.h"
#include "../stable.h"

namespace vpt {

inline void check_region(const Region& r, const std::vector<Tensor>& images, int64_t number, int64_t first_row) {
  STD_TORCH_CHECK(
      r.image >= 0 && r.image < static_cast<int64_t>(images.size()), "plan: region ", number, " names image ", r.image,
      " of ", images.size());
  const Tensor& image = images[r.image];
  STD_TORCH_CHECK(
      image.size(0) == r.image_size.height && image.size(1) == r.image_size.width, "plan: region ", number,
      " was planned for an image of ", r.image_size.height, "x", r.image_size.width, ", image ", r.image, " is ",
      image.size(0), "x", image.size(1), ": plan again");
  constexpr int32_t kMax = 1 << 20;
  bool ok = r.left >= 0 && r.top >= 0 && r.crop.width > 0 && r.crop.height > 0 &&
      r.left <= r.image_size.width - r.crop.width && r.top <= r.image_size.height - r.crop.height;
  for (const Size& s : {r.nearest[0], r.nearest[1], r.nearest[2], r.resized})
    ok = ok && s.width > 0 && s.height > 0 && s.width <= kMax && s.height <= kMax;
  ok = ok && (r.filter == kBicubic || r.filter == kBilinear) && r.patch_size > 0 && r.merge_size > 0;
  ok = ok && r.grid.width > 0 && r.grid.height > 0 && r.grid.width <= kMax / r.patch_size &&
      r.grid.height <= kMax / r.patch_size && r.grid.width % r.merge_size == 0 && r.grid.height % r.merge_size == 0;
  ok = ok && r.window_left >= 0 && r.window_top >= 0 && r.window_left < r.resized.width &&
      r.window_top < r.resized.height && r.first_row == first_row;
  STD_TORCH_CHECK(ok, "plan: row ", number, " is not a valid region; use plan_regions");
}

// The plan's regions, after a check against the images; `rows` ≥ 0 must be their number of patches, which is returned.
inline int64_t check_plan(const std::vector<Tensor>& images, const Tensor& plan, int64_t rows, int64_t row_bytes) {
  STD_TORCH_CHECK(
      plan.dim() == 2 && plan.size(1) * sizeof(int32_t) == sizeof(Region) && plan.scalar_type() == ScalarType::Int &&
          plan.is_contiguous() && plan.is_cpu(),
      "plan must be the int32 CPU table of plan_regions");
  for (const Tensor& image : images)
    STD_TORCH_CHECK(
        image.device() == images[0].device() && image.dim() == 3 && image.size(2) == 3 &&
            image.scalar_type() == ScalarType::Byte,
        "images must be uint8 [height, width, 3] tensors on one device");
  const Region* regions = data<Region>(plan);
  int64_t first_row = 0;
  for (int64_t i = 0; i < plan.size(0); ++i) {
    check_region(regions[i], images, i, first_row);
    STD_TORCH_CHECK(
        3LL * regions[i].patch_size * regions[i].patch_size == row_bytes, "plan: region ", i, " has patch size ",
        regions[i].patch_size, ", which does not give rows of ", row_bytes, " bytes");
    first_row += regions[i].rows();
  }
  STD_TORCH_CHECK(rows < 0 || rows == first_row, "plan has ", first_row, " patches, not ", rows);
  return first_row;
}

// The columns of the weight that meet pixels. Zeros may follow, up to a multiple of 16, so that rows can be read by 16
// bytes.
inline int64_t pixel_columns(const Tensor& weight, const Tensor& bias) {
  STD_TORCH_CHECK(weight.dim() == 2 && bias.dim() == 3, "weight and bias must come from fold_patch_weight");
  const int64_t p = bias.size(1) - 1, columns = 3 * p * p, padded = (columns + 15) / 16 * 16;
  STD_TORCH_CHECK(
      (weight.size(1) == columns || weight.size(1) == padded) && (weight.size(1) <= 1 || weight.stride(1) == 1),
      "weight and bias must come from fold_patch_weight");
  return columns;
}

// `total` rows of tokens fit into `out` from `row` on, in the weight's dtype.
inline void check_embed(const Tensor& weight, const Tensor& bias, const Tensor& out, int64_t row, int64_t total) {
  const int64_t embed = weight.size(0);
  STD_TORCH_CHECK(
      bias.device() == weight.device() && bias.is_contiguous() && bias.size(0) == 2 && bias.size(2) == embed &&
          bias.scalar_type() == ScalarType::Float,
      "weight and bias must come from fold_patch_weight");
  STD_TORCH_CHECK(
      out.dim() == 2 && out.device() == weight.device() && out.size(1) == embed && (embed <= 1 || out.stride(1) == 1) &&
          out.scalar_type() == weight.scalar_type() && row >= 0 && row <= out.size(0) - total,
      "out: ", total, " rows from row ", row, " do not fit, or its dtype or columns differ from the weight's");
}

}  // namespace vpt
