// The operands of `cached_attention`. Shapes, dtypes and strides are checked in vpt_kernels/cached_attention/api.py.
#pragma once

#include <tuple>

#include "../stable.h"

namespace vpt {

// In the schema's order.
struct CachedAttentionCall {
  Tensor q, keys, values;
  bool causal;
};

}  // namespace vpt
