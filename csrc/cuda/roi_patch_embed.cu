// `roi_patches`: one launch of `table_kernel` per 36 regions, one of `patch_kernel` per 24. `roi_patch_embed`: the same
// into a matrix in the weight's dtype, whose extra columns select the bias, then the library's GEMM, which so adds the
// bias to its float32 sums.
#include <algorithm>
#include <array>
#include <utility>

#include "../calls/roi_patch_embed.h"
#include "../ops.h"
#include "device.h"
#include "resample.cuh"

namespace vpt::cuda {
namespace {

// Patches per GEMM: 16,384 rows of 592 bfloat16 are 19 MB, which stay in the L2 cache of a large GPU.
constexpr int64_t kGroupRows = 1 << 14;
constexpr int64_t kColumnMultiple = 8;  // 16 bytes in the narrow types, as tensor cores want their rows

// The side of the region's tiles, or 0 if even the smallest needs more shared memory than there is.
int32_t tile_size(const Region& r, const Pixels& image) {
  const WindowAxis a(r, r.vertical_first != 0), b(r, r.vertical_first == 0);
  const int32_t p = r.patch_size;
  for (int32_t tile = p <= kLargestTile ? kLargestTile / p * p : kLargestTile; tile >= kSmallestTile; tile /= 2)
    if (TileLayout(a, b, tile, image, r.vertical_first != 0).bytes() <= kSharedBytes) return tile;
  return 0;
}

int64_t work_rows(const Work& w) {
  const Region& r = w.region;
  return static_cast<int64_t>(w.row_end - w.row_begin) / r.patch_size * r.grid.width;
}
int64_t first_patch(const Work& w) {
  const Region& r = w.region;
  return r.first_row + static_cast<int64_t>(w.row_begin) / r.patch_size * r.grid.width;
}

// The tables of the plan's regions, one after the other, and where each region's begin.
struct Tables {
  Tensor words;
  std::vector<const int32_t*> of;
};

Tables make_tables(const Device& device, const Tensor& plan, const Tensor& like) {
  const Region* regions = data<Region>(plan);
  std::vector<int64_t> begins{0};
  for (int64_t i = 0; i < plan.size(0); ++i)
    begins.push_back(begins.back() + WindowAxis(regions[i], false).words() + WindowAxis(regions[i], true).words());
  Tables tables{torch::stable::new_empty(like, {begins.back()}, ScalarType::Int), {}};
  int32_t* words = mutable_data<int32_t>(tables.words);
  TableParams p{};
  int64_t blocks = 0;
  auto launch = [&] {
    device.launch(table_kernel, blocks, kTableThreads, 0, p);
    p.regions = 0;
    blocks = 0;
  };
  for (int64_t i = 0; i < plan.size(0); ++i) {
    if (p.regions == kTablesPerLaunch) launch();
    p.of[p.regions++] = {regions[i], words + begins[i], static_cast<int32_t>(blocks)};
    blocks += WindowAxis(regions[i], false).blocks() + WindowAxis(regions[i], true).blocks();
    tables.of.push_back(words + begins[i]);
  }
  launch();
  return tables;
}

// The plan's regions, cut between rows of merge blocks where they have more than `limit` patches.
std::vector<Work> split(const std::vector<Tensor>& images, const Tensor& plan, const Tables& tables, int64_t limit) {
  const Region* regions = data<Region>(plan);
  std::vector<Work> works;
  works.reserve(plan.size(0));
  for (int64_t i = 0; i < plan.size(0); ++i) {
    const Region& r = regions[i];
    const Tensor& image = images[r.image];
    const int32_t step = static_cast<int32_t>(std::clamp<int64_t>(limit / r.rows_per_block_row(), 1, r.block_rows()));
    const Pixels pixels_of{data<uint8_t>(image), image.stride(0), image.stride(1), image.stride(2)};
    const int32_t tile = tile_size(r, pixels_of), pixels = r.merge_size * r.patch_size,
                  width = r.grid.width * r.patch_size;
    for (int32_t begin = 0; begin < r.block_rows(); begin += step)
      works.push_back(
          {r, pixels_of, tables.of[i], begin * pixels, std::min(begin + step, r.block_rows()) * pixels, tile,
           tile == 0 ? 0 : (width + tile - 1) / tile, 0});
  }
  return works;
}

// Both passes of one piece through device memory.
template <typename T>
void resample_through_memory(
    const Device& device, const Work& w, const PatchRows& rows, const Tensor& like, bool after_tables) {
  const Region& r = w.region;
  const bool down_first = r.vertical_first != 0;
  const WindowAxis a(r, down_first), b(r, !down_first);
  const int32_t width = r.grid.width * r.patch_size;
  const int32_t a0 = down_first ? w.row_begin : 0, a1 = down_first ? w.row_end : width;
  const int32_t b0 = down_first ? 0 : w.row_begin, b1 = down_first ? width : w.row_end;
  const int32_t outputs = std::min(a1, a.valid) - a0, lines = std::min(b1, b.valid) - b0;
  AxisParams first{r, w.image, w.tables, rows, nullptr, down_first, false, a0, a0 + outputs, 0, 0, 0};
  AxisParams last{r, {nullptr, 0, 0, 1}, w.tables, rows, nullptr, !down_first, true, b0, b1, a0, a1, 0};
  auto launch = [&](const AxisParams& p, bool chained) {
    const int64_t chunks = (p.line_end - p.line_begin + kAxisThreads - 1) / kAxisThreads;
    device.launch(axis_kernel<T>, chunks * (p.out_end - p.out_begin), kAxisThreads, 0, p, chained);
  };
  OptionalTensor middle;
  const bool covered = outputs > 0 && lines > 0;
  if (covered) {
    first.line_begin = b.first(b0);
    first.line_end = b.end(b0 + lines - 1);
    const int64_t count = first.line_end - first.line_begin;
    middle = torch::stable::new_empty(like, {count, outputs, 3}, ScalarType::Byte);
    first.middle = mutable_data<uint8_t>(*middle);
    launch(first, after_tables);
    const int64_t line_stride = 3 * static_cast<int64_t>(outputs);
    last.in = {first.middle, down_first ? 3 : line_stride, down_first ? line_stride : 3, 1};
    last.in_begin = first.line_begin;
  }
  launch(last, covered || after_tables);
}

// The patches of works [begin, end) as rows, and the weight's bias columns if there is a weight. `after_tables`: the
// launch before was that of `table_kernel`, to which the first one here is chained.
template <typename T>
void write_patches(
    const Device& device, const Work* begin, const Work* end, const PatchRows& rows, const BiasColumns* bias,
    const Tensor& like, bool after_tables) {
  PatchParams p;
  p.rows = rows;
  p.works = p.blocks = 0;
  size_t shared = 0;
  auto launch = [&] {
    const int64_t extra = bias == nullptr ? 0 : bias->outputs;
    if (bias != nullptr) p.bias = *bias;
    device.launch(patch_kernel<T>, p.blocks + extra, kResampleThreads, shared, p, std::exchange(after_tables, false));
    p.works = p.blocks = 0;
    shared = 0;
    bias = nullptr;
  };
  for (const Work* w = begin; w != end; ++w) {
    if (w->tile == 0) continue;
    if (p.works == kRegionsPerLaunch || w->tiles() > 0x7FFFFFFF - (1 << 24) - p.blocks) launch();
    const Region& r = w->region;
    const WindowAxis a(r, r.vertical_first != 0), b(r, r.vertical_first == 0);
    shared = std::max(shared, static_cast<size_t>(TileLayout(a, b, w->tile, w->image, r.vertical_first != 0).shared()));
    p.work[p.works] = *w;
    p.work[p.works++].first_block = p.blocks;
    p.blocks += w->tiles();
  }
  if (p.works > 0 || bias != nullptr) launch();
  for (const Work* w = begin; w != end; ++w)
    if (w->tile == 0) resample_through_memory<T>(device, *w, rows, like, std::exchange(after_tables, false));
}

// The entries of the bias table that the plan's patches use.
void find_entries(const Tensor& plan, int64_t table_entries, PatchRows& rows) {
  std::vector<bool> used(table_entries, false);
  const Region* regions = data<Region>(plan);
  for (int64_t i = 0; i < plan.size(0); ++i) {
    // Padding is at one edge only: the first patches of the rows and of the columns meet every entry.
    const Region& r = regions[i];
    for (int32_t y = 0; y < r.grid.height; ++y) used[bias_entry(r, y, 0)] = true;
    for (int32_t x = 0; x < r.grid.width; ++x) used[bias_entry(r, 0, x)] = true;
  }
  rows.entries = static_cast<int32_t>(std::count(used.begin(), used.end(), true));
  if (rows.entries > kBiasEntries) {
    rows.entries = static_cast<int32_t>(table_entries);
    return;
  }
  for (int64_t entry = 0, place = 0; entry < table_entries; ++entry)
    if (used[entry]) rows.used[place++] = static_cast<int16_t>(entry);
}

// out = x·weightᵀ through the library.
void multiply(const Tensor& out, const Tensor& x, const Tensor& transposed) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(transposed), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor rows_of(Tensor t, int64_t first, int64_t count) {
  return first == 0 && count == t.size(0) ? t : torch::stable::narrow(t, 0, first, count);
}

void embed_rows(
    const std::vector<Tensor>& images, const Tensor& plan, int64_t rows, const Tensor& weight, const Tensor& bias,
    const Tensor& out, int64_t row) {
  const int64_t total = check_plan(images, plan, rows, pixel_columns(weight, bias));
  check_embed(weight, bias, out, row, total);
  const int64_t embed = weight.size(0), pixels = pixel_columns(weight, bias);
  if (total == 0 || embed == 0) return;
  STD_TORCH_CHECK(images[0].device() == weight.device(), "roi_patch_embed: images and weight are on different devices");
  const Device device(weight);
  const Tables tables = make_tables(device, plan, weight);
  const std::vector<Work> works = split(images, plan, tables, kGroupRows);
  std::vector<size_t> groups{0};
  int64_t group_rows = 0, most_rows = 0;
  for (size_t i = 0; i < works.size(); ++i) {
    if (group_rows > 0 && group_rows + work_rows(works[i]) > kGroupRows) {
      groups.push_back(i);
      group_rows = 0;
    }
    group_rows += work_rows(works[i]);
    most_rows = std::max(most_rows, group_rows);
  }
  groups.push_back(works.size());

  PatchRows target{};
  find_entries(plan, 2 * bias.size(1), target);
  const int64_t columns = pixels + kBiasParts * target.entries;
  target.stride = (columns + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple;
  target.pixel_columns = static_cast<int32_t>(pixels);
  target.columns = static_cast<int32_t>(target.stride);
  const Tensor patches = torch::stable::new_empty(weight, {most_rows, target.stride});
  Tensor matrix = torch::stable::new_empty(weight, {embed, target.stride});
  const Tensor transposed = torch::stable::transpose(matrix, 0, 1);
  target.base = patches.mutable_data_ptr();
  // Rows of the matrix begin at multiples of 16 bytes, in float32 as in the narrow types.
  const int64_t row_bytes = weight.stride(0) * weight.element_size();
  const bool wide =
      (reinterpret_cast<uintptr_t>(weight.const_data_ptr()) | static_cast<uintptr_t>(row_bytes)) % 16 == 0;
  const BiasColumns bias_columns{
      weight.const_data_ptr(), data<float>(bias), matrix.mutable_data_ptr(), embed, weight.stride(0), wide};
  for (size_t g = 0; g + 1 < groups.size(); ++g) {
    const Work* begin = works.data() + groups[g];
    const Work* end = works.data() + groups[g + 1];
    target.first_row = first_patch(*begin);
    const int64_t count = first_patch(end[-1]) + work_rows(end[-1]) - target.first_row;
    dispatch(weight.scalar_type(), "roi_patch_embed", [&](auto zero) {
      write_patches<decltype(zero)>(device, begin, end, target, g == 0 ? &bias_columns : nullptr, weight, g == 0);
    });
    multiply(rows_of(out, row + target.first_row, count), rows_of(patches, 0, count), transposed);
  }
}

}  // namespace

Tensor roi_patches(std::vector<Tensor> images, Tensor plan, int64_t rows, int64_t row_bytes) {
  check_plan(images, plan, rows, row_bytes);
  Tensor out = torch::stable::new_empty(images.empty() ? plan : images[0], {rows, row_bytes}, ScalarType::Byte);
  if (rows == 0) return out;
  const Device device(images[0]);
  const Tables tables = make_tables(device, plan, images[0]);
  const std::vector<Work> works = split(images, plan, tables, rows);
  PatchRows target{};
  target.base = out.mutable_data_ptr();
  target.stride = row_bytes;
  target.pixel_columns = target.columns = static_cast<int32_t>(row_bytes);
  write_patches<uint8_t>(device, works.data(), works.data() + works.size(), target, nullptr, images[0], true);
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

}  // namespace vpt::cuda
