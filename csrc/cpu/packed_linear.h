// x·Wᵀ over weights packed in panels: the job that the driver hands to the kernels of one instruction set. The
// translation units that define those include neither torch nor the standard library, for the reason in simd.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../math/rounding.h"

namespace vpt {

// A panel holds 16 rows of W, its columns two by two: [⌈K/2⌉][32], zero where W ends.
constexpr int64_t kPanel = 16;
// Columns of W that one sum in float32 runs over: longer ones are added up block by block, as exact as a pairwise sum.
constexpr int64_t kDepth = 256;
// Panels side by side in a tile, at most.
constexpr int64_t kMostTilePanels = 2;
// Panels and rows of x of which a block of x and the sums stay in the second-level cache: 384 KiB each at most.
constexpr int64_t kPanelGroup = 16;
constexpr int64_t kRowsAtOnce = 384;

// Columns of W that share a scale and a minimum in int4.
constexpr int64_t kGroup = 32;

struct Int8 {
  int8_t value;
};
// Eight columns of a row: those of the pair p in bits 4p … 4p + 3 and 16 + 4p … 19 + 4p.
struct Int4 {
  uint32_t columns;
};

enum class Element { f32, bf16, f16, int8, int4 };
enum class Activation { none, silu, quick_gelu, gelu, gelu_tanh };

// Rows of float32, bfloat16 or float16, `stride` elements apart.
struct Rows {
  void* base;
  int64_t stride;
  Element type;
};

struct PackedJob {
  Rows x;
  int64_t rows, columns;  // of x
  const void* data;       // panels of `stored`
  Element stored;
  const float* scales;  // int8: [panels][groups][16], else null
  int64_t group;        // columns of W that share a scale, even
  // int4: [panels][groups, rounded up to even][16], else null; W = steps·integers + minima
  const Float16 *steps, *minima;
  int64_t features;  // columns of out
  bool quads;        // x of int8 weights is rounded to 8 bits, not to 16
  bool gated;        // a panel holds eight rows of the gate, then the same eight of what it gates
  Activation activation;
  const float* bias;   // null, [features], or gated [2·features]
  Rows residual, out;  // base null: none
  float* arranged;     // x in float32, [blocks of kDepth columns][tiles of rows][columns][rows of the tile]

  // Of columns, as the panels have them.
  [[gnu::always_inline]] int64_t pairs() const {
    return stored == Element::int4 ? (columns + 7) / 8 * 4 : (columns + 1) / 2;
  }
  [[gnu::always_inline]] int64_t columns_per_panel() const { return gated ? kPanel / 2 : kPanel; }
  [[gnu::always_inline]] int64_t panels() const { return (features + columns_per_panel() - 1) / columns_per_panel(); }
};

struct PackedKernels {
  const char* name;
  int64_t tile_rows;
  bool quads;  // whether bytes are multiplied faster than 16 bits
  // Tiles [first, last) of x into `arranged`.
  void (*arrange)(const PackedJob& job, int64_t first, int64_t last);
  // Panels [first, last) of the product.
  void (*multiply)(const PackedJob& job, int64_t first, int64_t last, float* scratch);
};

// Rows are dealt to as few tiles as hold them, evenly: no tile is a narrow rest.
struct Tiling {
  int64_t rows, count;

  [[gnu::always_inline]] Tiling(int64_t rows, int64_t most) : rows(rows), count((rows + most - 1) / most) {}
  [[gnu::always_inline]] int64_t begin(int64_t tile) const {
    return tile * (rows / count) + (tile < rows % count ? tile : rows % count);
  }
};

// Floats of scratch memory that `multiply` needs: a tile's blocks, and sums of all rows and a tile's panels, or of some
// rows and a group of panels.
[[gnu::always_inline]] inline int64_t scratch_floats(int64_t rows) {
  const int64_t some = kPanelGroup * (rows < kRowsAtOnce ? rows : kRowsAtOnce), all = kMostTilePanels * rows;
  return kPanel * (kMostTilePanels * kDepth + (some > all ? some : all));
}

extern const PackedKernels kPackedGeneric;
#ifdef __x86_64__
extern const PackedKernels kPackedAvx2;
extern const PackedKernels kPackedAvx512;
#endif

}  // namespace vpt
