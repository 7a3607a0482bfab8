"""Which classes of other libraries `patch` knows: one table, a family of models a row, and what follows from it.

Names are matched exactly: a class that only derives from one of them may compute something else.
"""

from __future__ import annotations

from typing import NamedTuple

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
QWEN2_VL_PIXELS = (56 * 56, 12_845_056)
"""Smallest and largest area of a resized image in the published preprocessor_config.json of Qwen2-VL."""


class Family(NamedTuple):
    """The classes of a family that operators serve, by their names; empty where it has none of a kind.

    attentions: they rotate and fill a cache; transformers before 4.48 had a class for each implementation. patches:
    the embedding of flat patches, normalised by mean and standard deviation of the pixels that its tower was trained
    on. area: of a resized image. images: the patch embedding of whole images. norm: RMSNorm of an attention's heads,
    whose eps is `norm_eps`. centred: it multiplies by 1 + weight and rounds once, instead of multiplying what it has
    rounded by its weight. vision: attentions without a cache. merger: what makes tokens of patches.
    """

    attentions: tuple[str, ...] = ()
    patches: str = ""
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = CLIP
    area: tuple[int, int] = QWEN2_VL_PIXELS
    images: str = ""
    norm: str = ""
    norm_eps: str = "variance_epsilon"
    centred: bool = False
    vision: tuple[str, ...] = ()
    merger: str = ""


FAMILIES = {
    "qwen2_vl": Family(
        attentions=("Qwen2VLAttention", "Qwen2VLSdpaAttention", "Qwen2VLFlashAttention2"),
        patches="PatchEmbed",
        vision=("VisionAttention", "VisionSdpaAttention", "VisionFlashAttention2"),
        merger="PatchMerger",
    ),
    "qwen2_5_vl": Family(
        attentions=("Qwen2_5_VLAttention", "Qwen2_5_VLSdpaAttention", "Qwen2_5_VLFlashAttention2"),
        patches="Qwen2_5_VisionPatchEmbed",
        vision=("Qwen2_5_VLVisionAttention", "Qwen2_5_VLVisionSdpaAttention", "Qwen2_5_VLVisionFlashAttention2"),
        merger="Qwen2_5_VLPatchMerger",
    ),
    "qwen3_vl": Family(
        attentions=("Qwen3VLTextAttention",),
        patches="Qwen3VLVisionPatchEmbed",
        normalisation=HALF,
        area=(65_536, 16_777_216),
        norm="Qwen3VLTextRMSNorm",
        vision=("Qwen3VLVisionAttention",),
        merger="Qwen3VLVisionPatchMerger",
    ),
    "qwen3_vl_moe": Family(
        attentions=("Qwen3VLMoeTextAttention",),
        norm="Qwen3VLMoeTextRMSNorm",
        vision=("Qwen3VLMoeVisionAttention",),
    ),
    "qwen3_5": Family(
        attentions=("Qwen3_5Attention",),
        norm="Qwen3_5RMSNorm",
        norm_eps="eps",
        centred=True,
        vision=("Qwen3_5VisionAttention",),
    ),
    "qwen3_5_moe": Family(
        attentions=("Qwen3_5MoeAttention",),
        norm="Qwen3_5MoeRMSNorm",
        norm_eps="eps",
        centred=True,
        vision=("Qwen3_5MoeVisionAttention",),
    ),
    "dinov2": Family(images="Dinov2PatchEmbeddings"),
    "sam": Family(images="SamPatchEmbeddings"),
}
"""The table: a package of `transformers.models` → what is known of its classes."""

FORMS = {"MinimalProjector": "linear", "MinimalSamProjector": "conv", "MinimalCLIPProjector": "identity"}
"""Projectors of the published re-encoder, which is no part of transformers → form of `control_cross_attention`."""

_ALL = FAMILIES.values()
ATTENTIONS = tuple(name for family in _ALL for name in family.attentions)
NORMALISATION = {family.patches: family.normalisation for family in _ALL if family.patches}
AREAS = {family.patches: family.area for family in _ALL if family.patches}
HEAD_NORMS = {family.norm: family.norm_eps for family in _ALL if family.norm and not family.centred}
CENTRED_NORMS = {family.norm: family.norm_eps for family in _ALL if family.centred}
DINOV2, SAM = FAMILIES["dinov2"].images, FAMILIES["sam"].images
NOT_REPLACED = {
    **dict.fromkeys(
        (name for family in _ALL for name in family.vision), "it rotates without a cache: there is nothing to append"
    ),
    **dict.fromkeys(
        (family.merger for family in _ALL if family.merger),
        "a norm and an MLP without a control state: not the conditioned projector",
    ),
    "Projector": "a base class whose score multiplies the features: not the rank-one update",
}
"""Classes that look like a case for an operator and are none."""


def meant_for(module: str, kind: str) -> str | None:
    """Return the operator of a class that should be in the table and is not, as a newer transformers may have it.

    module: where the class comes from. kind: its name.
    """
    family = FAMILIES.get(module.removeprefix("transformers.models.").partition(".")[0])
    if family is None or not module.startswith("transformers.models."):
        return None
    if family.attentions and "Attention" in kind:
        return "append_visual_kv"
    return "roi_patch_embed" if (family.patches or family.images) and "PatchEmbed" in kind else None
