// The CPU implementations, one .cpp per operator; schemas and contracts are in vpt_kernels/library.py and the api.py files.
#pragma once

#include "stable.h"

namespace vpt::cpu {

Tensor roi_patches(std::vector<Tensor> images, Tensor plan, int64_t rows, int64_t row_bytes);
Tensor roi_patch_embed(std::vector<Tensor> images, Tensor plan, int64_t rows, Tensor weight, Tensor bias);
void roi_patch_embed_into(
    std::vector<Tensor> images, Tensor plan, Tensor weight, Tensor bias, Tensor out, int64_t row);

Tensor control_cross_attention(
    Tensor features, OptionalTensor control, OptionalTensor cu_seqlens, OptionalTensor feature_norm_weight,
    OptionalTensor feature_norm_bias, OptionalTensor feature_weight, OptionalTensor feature_bias,
    Tensor condition_norm_weight, Tensor condition_norm_bias, Tensor condition_weight, Tensor condition_bias,
    OptionalTensor score_weight, OptionalTensor score_bias);
void control_cross_attention_into(
    Tensor features, OptionalTensor control, OptionalTensor cu_seqlens, OptionalTensor feature_norm_weight,
    OptionalTensor feature_norm_bias, OptionalTensor feature_weight, OptionalTensor feature_bias,
    Tensor condition_norm_weight, Tensor condition_norm_bias, Tensor condition_weight, Tensor condition_bias,
    OptionalTensor score_weight, OptionalTensor score_bias, Tensor out, Tensor rows);

Tensor append_visual_kv(
    Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor slots, Tensor k_cache, Tensor v_cache,
    int64_t section_t, int64_t section_h, int64_t section_w, bool interleaved, bool heads_first,
    OptionalTensor k_scale, OptionalTensor v_scale);
void append_visual_kv_(
    Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor slots, Tensor k_cache, Tensor v_cache,
    int64_t section_t, int64_t section_h, int64_t section_w, bool interleaved, bool heads_first,
    OptionalTensor k_scale, OptionalTensor v_scale);

}  // namespace vpt::cpu
