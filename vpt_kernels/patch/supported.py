"""Which classes of other libraries `patch` knows: one table for each kind of module, and those that only look like one.

Names are matched exactly: a class that only derives from one of them may compute something else.
"""

from __future__ import annotations

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NORMALISATION = {"PatchEmbed": CLIP, "Qwen2_5_VisionPatchEmbed": CLIP, "Qwen3VLVisionPatchEmbed": HALF}
"""Patch embeddings of flat patches → mean and standard deviation of the pixels that their tower was trained on."""

DINOV2, SAM = "Dinov2PatchEmbeddings", "SamPatchEmbeddings"
"""Patch embeddings of images."""

FORMS = {"MinimalProjector": "linear", "MinimalSamProjector": "conv", "MinimalCLIPProjector": "identity"}
"""Projectors of the published re-encoder → form of `control_cross_attention`."""

ATTENTIONS = (
    "Qwen2VLAttention",
    "Qwen2_5_VLAttention",
    "Qwen3VLTextAttention",
    "Qwen3VLMoeTextAttention",
    "Qwen3_5Attention",
    "Qwen3_5MoeAttention",
)
LEGACY_ATTENTIONS = tuple(
    f"{family}{kind}" for family in ("Qwen2VL", "Qwen2_5_VL") for kind in ("SdpaAttention", "FlashAttention2")
)
"""Attentions that rotate and fill a cache; those of transformers before 4.48 had a class for each implementation."""

HEAD_NORMS = dict.fromkeys(("Qwen3VLTextRMSNorm", "Qwen3VLMoeTextRMSNorm"), "variance_epsilon")
"""RMSNorms of heads that multiply what they have rounded by their weight → the attribute that holds their eps."""
CENTRED_NORMS = dict.fromkeys(("Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm"), "eps")
"""The same, of those that multiply by 1 + weight and round once."""

NOT_REPLACED = {
    **dict.fromkeys(
        (
            "VisionAttention",
            "VisionSdpaAttention",
            "VisionFlashAttention2",
            "Qwen2_5_VLVisionAttention",
            "Qwen2_5_VLVisionSdpaAttention",
            "Qwen2_5_VLVisionFlashAttention2",
            "Qwen3VLVisionAttention",
            "Qwen3VLMoeVisionAttention",
            "Qwen3_5VisionAttention",
            "Qwen3_5MoeVisionAttention",
        ),
        "it rotates without a cache: there is nothing to append",
    ),
    **dict.fromkeys(
        ("PatchMerger", "Qwen2_5_VLPatchMerger", "Qwen3VLVisionPatchMerger"),
        "a norm and an MLP without a control state: not the conditioned projector",
    ),
    "Projector": "a base class whose score multiplies the features: not the rank-one update",
}
"""Classes that look like a case for an operator and are none."""

_LANGUAGE, _PATCHES = {"Attention": "append_visual_kv"}, {"PatchEmbed": "roi_patch_embed"}
FAMILIES = {
    "transformers.models.qwen2_vl.": _LANGUAGE | _PATCHES,
    "transformers.models.qwen2_5_vl.": _LANGUAGE | _PATCHES,
    "transformers.models.qwen3_vl.": _LANGUAGE | _PATCHES,
    **{f"transformers.models.{family}.": _LANGUAGE for family in ("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")},
    "transformers.models.dinov2.": _PATCHES,
    "transformers.models.sam.": _PATCHES,
}
"""Where supported models come from → what in a class's name says that it should be in a table above → the operator."""
