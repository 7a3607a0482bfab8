"""PyTorch operators for the second look live here: crop and embed a region, condition a projector, append to a cache;
it may import nothing else of this project."""

from vpt_kernels.append_visual_kv import reference as _append_reference  # noqa: F401  (registers the backend)
from vpt_kernels.append_visual_kv.api import append_visual_kv, append_visual_kv_, rotary_table
from vpt_kernels.backends import BackendUnavailable, explain
from vpt_kernels.cached_attention import reference as _attention_reference  # noqa: F401
from vpt_kernels.cached_attention.api import cached_attention
from vpt_kernels.caches import (
    append_to_flashinfer_pages_,
    append_to_layer_,
    append_to_vllm_pages_,
    cache_spare_bytes,
    compact_cache_,
    flashinfer_slots,
)
from vpt_kernels.control_cross_attention import reference as _control_reference  # noqa: F401
from vpt_kernels.control_cross_attention.api import (
    ControlProjector,
    control_cross_attention,
    control_cross_attention_into,
    fold_projector,
)
from vpt_kernels.images import decode_image
from vpt_kernels.packed_linear import reference as _packed_reference  # noqa: F401
from vpt_kernels.packed_linear.api import packed_linear
from vpt_kernels.packed_linear.weights import PackedWeight, pack_weight
from vpt_kernels.patch.api import patch
from vpt_kernels.patch.report import PatchReport
from vpt_kernels.processor import QwenVLImageProcessor
from vpt_kernels.roi_patch_embed import reference as _roi_reference  # noqa: F401
from vpt_kernels.roi_patch_embed.api import (
    FoldedPatchEmbed,
    fold_patch_weight,
    roi_patch_embed,
    roi_patch_embed_into,
    roi_patches,
)
from vpt_kernels.roi_patch_embed.boxes import ClippedBoxes, clip_boxes
from vpt_kernels.roi_patch_embed.geometry import (
    RegionPlan,
    RegionPolicy,
    dinov2_policy,
    plan_regions,
    qwen2_vl_policy,
    sam_policy,
)

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "ClippedBoxes",
    "ControlProjector",
    "FoldedPatchEmbed",
    "PackedWeight",
    "PatchReport",
    "QwenVLImageProcessor",
    "RegionPlan",
    "RegionPolicy",
    "append_to_flashinfer_pages_",
    "append_to_layer_",
    "append_to_vllm_pages_",
    "append_visual_kv",
    "append_visual_kv_",
    "cache_spare_bytes",
    "cached_attention",
    "compact_cache_",
    "clip_boxes",
    "control_cross_attention",
    "control_cross_attention_into",
    "decode_image",
    "dinov2_policy",
    "explain",
    "flashinfer_slots",
    "fold_patch_weight",
    "fold_projector",
    "pack_weight",
    "packed_linear",
    "patch",
    "plan_regions",
    "qwen2_vl_policy",
    "roi_patch_embed",
    "roi_patch_embed_into",
    "roi_patches",
    "rotary_table",
    "sam_policy",
]
