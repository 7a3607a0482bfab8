"""Image processor and patch embedding of the Qwen-VL family in one call, on the device of the weights."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vpt_kernels.checks import require_type, shown
from vpt_kernels.images import pillow_rgb, pixels_of
from vpt_kernels.patch.embeds import why_flat_called
from vpt_kernels.patch.supported import AREAS, NORMALISATION, QWEN2_VL_PIXELS
from vpt_kernels.patch.swap import has_foreign_forward
from vpt_kernels.roi_patch_embed.api import fold_patch_weight, roi_patch_embed, roi_patches
from vpt_kernels.roi_patch_embed.geometry import RegionPlan, plan_regions, qwen2_vl_policy

BICUBIC = 3
"""Pillow's number of the filter, as processors store it."""


def _installed_rgb(image: Image.Image) -> Image.Image | np.ndarray:
    """Return the image as RGB as the installed transformers converts it, or Pillow where there is none."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    try:
        theirs = importlib.import_module("transformers.image_transforms").convert_to_rgb
    except ImportError:
        return pillow_rgb(image)
    # Where it can return an array, it announces that it will return nothing else.
    return theirs(image, **{"return_numpy": True} if "return_numpy" in signature(theirs).parameters else {})


def plain_patch_embed(model: nn.Module) -> Any:
    """Return the model's patch embedding, whose weight says all that it does.

    Raises:
        ValueError: there is none or several, or it does more than its weight says.
    """
    found = [module for module in model.modules() if type(module).__name__ in NORMALISATION]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} patch embeddings of {tuple(NORMALISATION)}; needed: one"
        )
    reason = "its forward was replaced" if has_foreign_forward(found[0]) else why_flat_called(found[0])
    if reason is not None:
        raise ValueError(
            f"the patch embedding cannot be read from its weight: {reason}; make the processor before that, or "
            "after adapters are merged and weights are in place"
        )
    return found[0]


class QwenVLImageProcessor:
    """PIL images, file bytes or uint8 pixels, whole or cropped → patch embeddings and `image_grid_thw`.

    Pixels are those of transformers' Pillow-based processor with the installed Pillow, bit for bit; they are never
    normalised nor stored as floats. Transparency becomes what the installed transformers makes of it: dropped before
    5.21, composited on white since. The embeddings go where `pixel_values` go, into a model that `patch` was called on.

    Args:
        weight: [E, 3, T, p, p] of the patch embedding's convolution; bias: [E] or None. Folded now: make a new
            processor when they change.
        mean, std: per channel, of pixels scaled to 0…1.
        min_pixels, max_pixels: limits of a resized image's area.
        merge_size: side of the block of patches that becomes one token.
        pass_order: "installed" resamples in the order of the installed Pillow, "hv" as Pillow ≤ 12.0 does.

    Raises:
        ValueError: shapes or limits that do not fit; or E = 3·T·p·p or 3·p·p, which would make embeddings look like
            pixels or patches.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        min_pixels: int = QWEN2_VL_PIXELS[0],
        max_pixels: int = QWEN2_VL_PIXELS[1],
        merge_size: int = 2,
        pass_order: str = "installed",
    ) -> None:
        with torch.no_grad():
            self.embed = fold_patch_weight(weight, mean, std, bias)
        patch_size = self.embed.patch_size
        if weight.shape[0] in (weight[0].numel(), 3 * patch_size**2):
            raise ValueError(
                f"the weight {tuple(weight.shape)} has as many outputs as inputs or as a patch has bytes: a model "
                "could not tell embeddings from those; use roi_patch_embed and call the vision tower's blocks"
            )
        self.policy = qwen2_vl_policy(
            min_pixels, max_pixels, patch_size=patch_size, merge_size=merge_size, pass_order=pass_order
        )

    @classmethod
    def of(
        cls, model: nn.Module, image_processor: Any = None, *, pass_order: str = "installed"
    ) -> QwenVLImageProcessor:
        """Return the processor of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model of transformers.

        Args:
            model: contains one patch embedding of the family; its weight's device and dtype are the embeddings'.
            image_processor: transformers' processor, whose limits, mean, std and merge_size are taken over as they are
                now, from `size`, `min_pixels` and `max_pixels` as the installed transformers reads them;
                default: what the family's published processor has.

        Raises:
            ValueError: the model has no such patch embedding or several; its convolution does more than its weight
                says (hooks, an adapter, offloading); or the processor does something else.
        """
        require_type("model", model, nn.Module, "a torch.nn.Module")
        embed = plain_patch_embed(model)
        projection = embed.proj
        if image_processor is None:
            kind = type(embed).__name__
            mean, std = NORMALISATION[kind]
            low, high = AREAS[kind]
            weights = projection.weight, projection.bias
            return cls(*weights, mean=mean, std=std, min_pixels=low, max_pixels=high, pass_order=pass_order)
        expected = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": BICUBIC}
        expected |= {"patch_size": projection.kernel_size[-1], "temporal_patch_size": projection.kernel_size[0]}
        read = (*expected, "rescale_factor", "size", "image_mean", "image_std", "merge_size")
        if missing := [name for name in read if not hasattr(image_processor, name)]:
            raise TypeError(
                f"image_processor is {shown(image_processor)} without {', '.join(missing)}; it must be transformers' "
                "image processor of the model, or None"
            )
        for name, value in expected.items():
            if getattr(image_processor, name) != value:
                raise ValueError(f"the image processor has {name} {getattr(image_processor, name)}; needed: {value}")
        if abs(image_processor.rescale_factor * 255 - 1) > 1e-9:
            raise ValueError(f"the image processor has rescale_factor {image_processor.rescale_factor}; needed: 1/255")
        # Which of them count is the processor's to say: older ones take both or none, 5.24 each.
        set_apart = {name: getattr(image_processor, name, None) for name in ("min_pixels", "max_pixels")}
        size = image_processor._standardize_kwargs(size=image_processor.size, **set_apart)["size"]
        limits = [size[name] for name in ("shortest_edge", "longest_edge")]
        return cls(
            projection.weight,
            projection.bias,
            mean=image_processor.image_mean,
            std=image_processor.image_std,
            min_pixels=limits[0],
            max_pixels=limits[1],
            merge_size=image_processor.merge_size,
            pass_order=pass_order,
        )

    def __call__(self, images: Any, boxes: Sequence[Sequence[int]] | None = None) -> dict[str, Tensor]:
        """Return the patch embeddings and grids, under the names of a model's arguments.

        Args:
            images: one image or a list: PIL images, paths, open files, bytes of image files, or uint8
                [height, width, 3] tensors or arrays, see `decode_image`. Files are turned as their EXIF orientation
                says and PIL images are not, as in transformers.
            boxes: (image, left, top, right, bottom) in pixels per crop, of the turned image, right and bottom
                exclusive; default: every whole image.

        Returns:
            {"pixel_values": embeddings [Σ patches, E], "image_grid_thw": int64 [boxes, 3] = (1, rows, columns)}, both
            on the weight's device.

        Raises:
            TypeError, ValueError: an image that cannot be read, a box outside its image, an aspect ratio above 200.
        """
        pixels, plan = self._plan(images, boxes)
        grids = torch.tensor([[1, *grid] for grid in plan.grids], dtype=torch.int64, device="cpu").reshape(-1, 3)
        device = self.embed.weight.device
        with torch.no_grad():
            tokens = roi_patch_embed(pixels, plan, self.embed)
        return {"pixel_values": tokens, "image_grid_thw": grids.to(device)}

    def patches(self, images: Any, boxes: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Return the uint8 patches [Σ patches, p·p·3] behind the embeddings; arguments as of the call."""
        return roi_patches(*self._plan(images, boxes))

    def _plan(self, images: Any, boxes: Sequence[Sequence[int]] | None) -> tuple[list[Tensor], RegionPlan]:
        listed = list(images) if isinstance(images, (list, tuple)) else [images]
        pixels = [pixels_of(image, to_rgb=_installed_rgb).to(self.embed.weight.device) for image in listed]
        sizes = [(image.shape[0], image.shape[1]) for image in pixels]
        if boxes is None:
            boxes = [(number, 0, 0, width, height) for number, (height, width) in enumerate(sizes)]
        return pixels, plan_regions(sizes, boxes, self.policy)
