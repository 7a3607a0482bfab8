"""Read by mypy and pyright, never run: every public name as a caller writes it, and the type that comes back."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

import vpt_kernels
from vpt_kernels import (
    ControlProjector,
    FoldedPatchEmbed,
    PackedWeight,
    PatchReport,
    QwenVLImageProcessor,
    RegionPlan,
    RegionPolicy,
    append_to_flashinfer_pages_,
    append_to_layer_,
    append_to_vllm_pages_,
    append_visual_kv,
    append_visual_kv_,
    cached_attention,
    control_cross_attention,
    control_cross_attention_into,
    decode_image,
    dinov2_policy,
    explain,
    flashinfer_slots,
    fold_patch_weight,
    fold_projector,
    pack_weight,
    packed_linear,
    patch,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patch_embed_into,
    roi_patches,
    rotary_table,
    sam_policy,
)
from vpt_kernels.layers import AppendVisualKV, ControlCrossAttention, RoiPatchEmbed

tensor, integers = torch.zeros(2), torch.zeros(2, dtype=torch.int64)

assert_type(vpt_kernels.__version__, str)
image = assert_type(decode_image(Path("photo.jpg")), Tensor)
embed = assert_type(fold_patch_weight(tensor, (0.5, 0.5, 0.5), [0.5, 0.5, 0.5], dtype=torch.bfloat16), FoldedPatchEmbed)
policy = assert_type(qwen2_vl_policy(longest_edge=512), RegionPolicy)
assert_type(dinov2_policy(), RegionPolicy)
assert_type(sam_policy(edge=1024), RegionPolicy)
plan = assert_type(plan_regions([(70, 90)], [(0, 0, 0, 90, 70)], policy), RegionPlan)
assert_type(plan.grids, tuple[tuple[int, int], ...])
assert_type(roi_patches([image], plan, backend="cpp"), Tensor)
assert_type(roi_patch_embed([image], plan, embed), Tensor)
roi_patch_embed_into([image], plan, embed, tensor, 3)

projector = assert_type(
    fold_projector("identity", condition_norm=(tensor, tensor), condition=(tensor, tensor)), ControlProjector
)
assert_type(control_cross_attention(tensor, None, projector, integers), Tensor)
control_cross_attention_into(tensor, tensor, projector, tensor, integers)

table = assert_type(rotary_table(4096, 128), Tensor)
assert_type(append_visual_kv(tensor, tensor, tensor, table, integers, integers, tensor, tensor, (16, 24, 24)), Tensor)
append_visual_kv_(tensor, tensor, tensor, table, integers, integers, tensor, tensor, layout="HND")
append_to_vllm_pages_(tensor, tensor, tensor, table, integers, (tensor, tensor), integers)
slots = assert_type(flashinfer_slots(integers, integers, integers, integers, 16, 4), Tensor)
append_to_flashinfer_pages_(tensor, tensor, tensor, table, integers, tensor, slots, slots, slots, slots)
assert_type(append_to_layer_(tensor, tensor, tensor, table, integers, object()), tuple[Tensor, Tensor])

packed = assert_type(pack_weight([tensor, tensor], "int8", gated=True, group_size=32), PackedWeight)
assert_type(cached_attention(tensor, tensor, tensor, causal=False), tuple[Tensor, Tensor])
assert_type(packed_linear(tensor, packed, tensor, None, "silu", out=tensor), Tensor)
assert_type(packed.rows(integers), Tensor)
assert_type(packed.dequantize(torch.bfloat16), Tensor)

report = assert_type(patch(nn.Linear(2, 2), ops=["append_visual_kv"], strict=False), PatchReport)
assert_type(report.skipped, dict[str, str])
report.unpatch()
with patch(nn.Linear(2, 2)) as inside:
    assert_type(inside, PatchReport)
processor = assert_type(QwenVLImageProcessor.of(nn.Linear(2, 2)), QwenVLImageProcessor)
assert_type(processor([image, b"bytes"], boxes=[(0, 0, 0, 9, 9)]), dict[str, Tensor])
assert_type(explain("roi_patches", image), str)

assert_type(RoiPatchEmbed(tensor, (0.5,) * 3, (0.5,) * 3, policy), RoiPatchEmbed)
assert_type(ControlCrossAttention(projector), ControlCrossAttention)
assert_type(AppendVisualKV(table), AppendVisualKV)
