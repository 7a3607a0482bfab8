// Attention of new tokens over cached ones: the job that the driver hands to the loops of one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../math/rounding.h"

namespace vpt {

// Keys whose scores are in the first-level cache together; in float32 they are where the second begins.
constexpr int64_t kKeys = 64;
// Rows of queries that take their turn at the same keys.
constexpr int64_t kQueryRows = 96;
// Few rows meet the keys in pieces of at least so many, and in so many pieces at most: work for many threads, whoever
// they are.
constexpr int64_t kSplit = 128, kSplits = 32;

// [tokens][heads][dim], the last dimension contiguous; strides in elements.
template <typename T>
struct Cached {
  const T* base;
  int64_t token, head;
};

// One KV head's query heads are rows: row t·group + g is head g of token t.
struct AttentionJob {
  const float* q;  // [KV heads][rows][padded], scaled; `padded` is dim up to a multiple of 16, zeros behind it
  int64_t rows, group, padded, dim;
  int64_t stored, past;  // row r sees the first past + r / group + 1 keys where the attention is causal, else all
  bool causal;
  const void *keys, *values;
  int64_t key_token, key_head, value_token, value_head;
  int64_t kv_heads, splits, row_blocks, split;
  float *mixed, *top, *sum;  // of every split: [splits][KV heads][rows][padded], and without `padded`

  [[gnu::always_inline]] int64_t items() const { return row_blocks == 1 ? splits : kv_heads * row_blocks; }
  [[gnu::always_inline]] int64_t visible(int64_t row) const { return causal ? past + row / group + 1 : stored; }
};

struct AttentionKernels {
  const char* name;
  // Items [first, last) of the job over keys and values of float32, bfloat16 or float16.
  void (*f32)(const AttentionJob& job, int64_t first, int64_t last, float* scratch);
  void (*bf16)(const AttentionJob& job, int64_t first, int64_t last, float* scratch);
  void (*f16)(const AttentionJob& job, int64_t first, int64_t last, float* scratch);
};

// Floats of scratch memory that an item needs: a block of keys or values, scores, and a factor a row.
[[gnu::always_inline]] inline int64_t attention_scratch(int64_t padded) {
  return kKeys * padded + kQueryRows * (kKeys + 1);
}

extern const AttentionKernels kAttentionGeneric;
#ifdef __x86_64__
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;
#endif

}  // namespace vpt
