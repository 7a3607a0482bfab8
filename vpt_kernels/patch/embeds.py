"""Patch embeddings as one GEMM over the flattened weight, or from uint8 patches through `roi_patch_embed`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_kernels.checks import CHECK_VALUES, require_inference
from vpt_kernels.guard import OwnForward, part_of, why_called
from vpt_kernels.patch.rules import Forward, Rule, Serve, folded, lacks, record
from vpt_kernels.patch.supported import DINOV2, NORMALISATION, SAM
from vpt_kernels.roi_patch_embed.api import FoldedPatchEmbed, fold_patch_weight, roi_patch_embed
from vpt_kernels.roi_patch_embed.geometry import MAX_SIZE, RegionPolicy, plan_regions


def _refuse_geometry(projection: Any, kernel: tuple[int, ...]) -> str | None:
    p, axes = projection, len(kernel)
    plain = (kernel, kernel, (0,) * axes, (1,) * axes, 1, 3)
    found = (p.kernel_size, p.stride, p.padding, p.dilation, p.groups, p.in_channels)
    if found != plain:
        return f"its convolution has (kernel, stride, padding, dilation, groups, channels) {found}; needed: {plain}"
    return None


def _refuse_flat(module: Any) -> str | None:
    missing = lacks(module, "proj", "patch_size", "temporal_patch_size", "in_channels", "embed_dim")
    if missing:
        return missing
    frames, side = module.temporal_patch_size, module.patch_size
    if not (isinstance(frames, int) and isinstance(side, int)):
        return f"its patch sizes {(frames, side, side)} are not integers"
    projection = part_of(module, "proj")
    if not isinstance(projection, nn.Conv3d):
        return why_called(projection, nn.Conv3d, "projection")
    return _refuse_geometry(projection, (frames, side, side))


def why_flat_called(module: Any, x: Tensor | None = None) -> str | None:
    """Return why a patch embedding of the Qwen-VL family must call its convolution, or None."""
    return why_called(part_of(module, "proj"), nn.Conv3d, "projection", x) or _refuse_flat(module)


def _holds(module: Any, rows: Tensor) -> str:
    """Return what the rows are: "pixels", "bytes" of `roi_patches`, or "embeddings"."""
    area, width = module.patch_size**2, rows.shape[-1]
    if rows.dtype == torch.uint8:
        return "bytes"
    if rows.dim() != 2 or width == module.in_channels * module.temporal_patch_size * area:
        return "pixels"
    if width == 3 * area == module.embed_dim:
        raise ValueError(
            f"hidden_states are {rows.dtype} [N, {width}]: uint8 patches that were cast, or embeddings, which are as "
            "wide in this model; give the vision tower the uint8 patches, or pixel values"
        )
    # A model casts its pixel values to the dtype of its weights before they come here.
    return "bytes" if width == 3 * area else "embeddings" if width == module.embed_dim else "pixels"


def embed_flat_patches(module: Any, hidden_states: Tensor, calls: Counter[str] | None) -> Tensor:
    """Do the `forward` of the Qwen-VL family's patch embeddings.

    hidden_states: normalised patches [N, 3·T·p·p] (any shape of as many numbers) as transformers' processor gives
    them; or uint8 patches [N, p·p·3] of `roi_patches`, also cast to floats; or embeddings [N, E] of
    `QwenVLImageProcessor`, which pass.

    Raises:
        ValueError: uint8 patches of another shape, floats in their place that are no bytes (seen on the CPU), a
            weight that would need a gradient; or E = p·p·3, where cast patches look like embeddings.
    """
    projection, holds = module.proj, _holds(module, hidden_states)
    if holds == "bytes":
        tokens = _embed_bytes(module, hidden_states)
        record(calls, "roi_patch_embed")
        return tokens
    if holds == "embeddings":
        record(calls, "embedded already")
        return hidden_states.to(projection.weight.dtype)
    record(calls, "linear")
    flat = projection.weight.flatten(1)
    return F.linear(hidden_states.reshape(-1, flat.shape[1]).to(flat.dtype), flat, projection.bias)


def _embed_bytes(module: Any, patches: Tensor) -> Tensor:
    p = module.patch_size
    if patches.dim() != 2 or patches.shape[1] != 3 * p * p:
        raise ValueError(
            f"uint8 patches have shape {tuple(patches.shape)}; they must be [N, {3 * p * p}], see roi_patches"
        )
    require_inference(weight=module.proj.weight, bias=module.proj.bias)
    given, patches = patches, patches.to(torch.uint8)
    if (given.device.type == "cpu" or CHECK_VALUES) and given is not patches and not torch.equal(patches, given):
        raise ValueError(
            f"patches [N, {3 * p * p}] are {given.dtype} and not all whole numbers in 0…255; give those of "
            f"roi_patches, or pixel values [N, {module.proj.weight[0].numel()}]"
        )
    policy = RegionPolicy(lambda height, width: (height, width), patch_size=p)
    # Patches one below the other are an image of one column of patches, which needs no resampling.
    images = [part.reshape(-1, p, 3) for part in patches.split(MAX_SIZE // p)]
    sizes = [tuple(image.shape[:2]) for image in images]
    boxes = [(number, 0, 0, p, height) for number, (height, _) in enumerate(sizes) if height]
    with torch.no_grad():
        return roi_patch_embed(images, plan_regions(sizes, boxes, policy), _fold(module))


def _fold(module: Any) -> FoldedPatchEmbed:
    weight, bias = module.proj.weight, module.proj.bias
    mean, std = NORMALISATION[type(module).__name__]
    tensors = [weight] if bias is None else [weight, bias]
    return folded(module, tensors, lambda: fold_patch_weight(weight, mean, std, bias))


def _refuse_image(module: Any) -> str | None:
    missing = lacks(module, "projection", "patch_size", "num_channels")
    if missing:
        return missing
    projection = part_of(module, "projection")
    if not isinstance(projection, nn.Conv2d):
        return why_called(projection, nn.Conv2d, "projection")
    return _refuse_geometry(projection, tuple(module.patch_size))


def _refuse_sam(module: Any) -> str | None:
    return _refuse_image(module) or lacks(module, "image_size")


def why_image_called(module: Any, x: Tensor | None = None) -> str | None:
    """Return why a patch embedding of images must call its convolution, or None."""
    return why_called(part_of(module, "projection"), nn.Conv2d, "projection", x) or _refuse_image(module)


def embed_images(module: Any, pixel_values: Tensor, calls: Counter[str] | None) -> Tensor:
    """Return tokens [B, rows, columns, E] of images [B, 3, H, W]; a remainder of pixels is dropped, as by a
    convolution.
    """
    if pixel_values.shape[1] != module.num_channels:
        raise ValueError(f"pixel_values have {pixel_values.shape[1]} channels; the model's have {module.num_channels}")
    projection, (p, r) = module.projection, module.patch_size
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // p, width // r
    blocks = pixel_values[:, :, : rows * p, : columns * r].reshape(batch, channels, rows, p, columns, r)
    record(calls, "linear")
    patches = blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows, columns, -1)
    return F.linear(patches, projection.weight.flatten(1), projection.bias)


def embed_dinov2(module: Any, pixel_values: Tensor, calls: Counter[str] | None) -> Tensor:
    """Do the `forward` of DINOv2's patch embedding: [B, rows · columns, E]."""
    return embed_images(module, pixel_values, calls).flatten(1, 2)


def embed_sam(module: Any, pixel_values: Tensor, calls: Counter[str] | None) -> Tensor:
    """Do the `forward` of SAM's patch embedding: [B, rows, columns, E] of images of exactly the model's size."""
    if tuple(pixel_values.shape[2:]) != tuple(module.image_size):
        raise ValueError(
            f"pixel_values are {tuple(pixel_values.shape[2:])}; the model takes {tuple(module.image_size)}"
        )
    return embed_images(module, pixel_values, calls)


def _reject_bytes(module: Any, reason: str, hidden_states: Tensor) -> None:
    """Raise ValueError for uint8 patches: the module's own code would take two of them for one."""
    known = lacks(module, "patch_size", "temporal_patch_size", "in_channels", "embed_dim") is None
    if hidden_states.dtype == torch.uint8 or (known and _holds(module, hidden_states) == "bytes"):
        raise ValueError(f"uint8 patches cannot be embedded: {reason}; undo that, or give the model pixel values")


def _make_flat(_: Forward) -> Serve:
    def serve(module: Any, calls: Counter[str] | None, hidden_states: Tensor) -> Tensor:
        if _holds(module, hidden_states) != "embeddings":
            reason = why_flat_called(module, hidden_states)
            if reason is not None:
                raise OwnForward(reason)
        return embed_flat_patches(module, hidden_states, calls)

    return serve


def _make_image(embed: Callable[..., Tensor]) -> Callable[[Forward], Serve]:
    def make(_: Forward) -> Serve:
        def serve(module: Any, calls: Counter[str] | None, pixel_values: Tensor) -> Tensor:
            reason = why_image_called(module, pixel_values)
            if reason is not None:
                raise OwnForward(reason)
            return embed(module, pixel_values, calls)

        return serve

    return make


OP = "roi_patch_embed"
RULES = (
    Rule(OP, tuple(NORMALISATION), _refuse_flat, why_flat_called, _make_flat, _reject_bytes),
    Rule(OP, (DINOV2,), _refuse_image, why_image_called, _make_image(embed_dinov2)),
    Rule(OP, (SAM,), _refuse_sam, why_image_called, _make_image(embed_sam)),
)
