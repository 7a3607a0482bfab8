// The implementations, one source file per operator and backend.
#pragma once

#include "calls/append_visual_kv.h"
#include "calls/cached_attention.h"
#include "calls/control_cross_attention.h"
#include "calls/packed_linear.h"
#include "stable.h"

namespace vpt::cpu {
#include "signatures.inc"

// Both forms of `packed_linear`, which has no other backend.
void multiply_packed(const PackedCall& call, const Tensor& out);
// It has no other backend either.
std::tuple<Tensor, Tensor> cached_attention(Tensor q, Tensor keys, Tensor values, bool causal);
}  // namespace vpt::cpu

namespace vpt::cuda {
#include "signatures.inc"
}
