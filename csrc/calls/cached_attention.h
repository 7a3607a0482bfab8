// The operands of `cached_attention`, and what is demanded of them whoever calls. vpt_kernels/cached_attention/api.py
// says in words what is wrong with a call; what is checked here keeps one that goes past it within its tensors.
#pragma once

#include <tuple>

#include "../stable.h"

namespace vpt {

// In the schema's order.
struct CachedAttentionCall {
  Tensor q, keys, values;
  bool causal;

  void check() const {
    for (const Tensor* t : {&q, &keys, &values})
      STD_TORCH_CHECK(
          t->device() == q.device() && t->dim() == 3 && (t->size(2) <= 1 || t->numel() == 0 || t->stride(2) == 1),
          "q, keys and values must be [tokens, heads, dim], the last dimension contiguous, on one device");
    STD_TORCH_CHECK(
        keys.size(0) == values.size(0) && keys.size(1) == values.size(1) && keys.size(2) == values.size(2) &&
            keys.size(2) == q.size(2) && keys.size(1) > 0 && q.size(1) % keys.size(1) == 0,
        "keys and values must be alike, as wide as q, and q's heads a multiple of theirs");
    STD_TORCH_CHECK(!causal || q.size(0) <= keys.size(0), "where causal, the last keys must be the new tokens' own");
    const ScalarType type = keys.scalar_type();
    STD_TORCH_CHECK(
        type == values.scalar_type() &&
            (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half),
        "keys and values must be float32, bfloat16 or float16, both the same");
  }
};

}  // namespace vpt
