"""ROI crop, antialiased resize, normalisation and patch embedding in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vpt_kernels.backends import bind, call
from vpt_kernels.checks import (
    require_disjoint,
    require_inference,
    require_integer,
    require_tensor,
    require_type,
    shown,
)
from vpt_kernels.roi_patch_embed.geometry import PIXEL_SCALE, PIXEL_ZERO, RegionPlan, padded_columns


class _Copy:
    """A weight as the kernels read it, and of which state of it."""

    __slots__ = ("of", "rows", "version")

    def __init__(self, weight: Tensor) -> None:
        columns = weight.shape[1]
        # Kept so that its address is not given to another.
        self.of, self.version = weight.detach(), weight._version
        self.rows = torch.nn.functional.pad(weight, (0, padded_columns(columns) - columns))

    def is_of(self, weight: Tensor) -> bool:
        """Return whether the weight is what it was; its `.data` may have been exchanged, to move or convert it."""
        of = self.of
        same = self.version == weight._version and of.data_ptr() == weight.data_ptr()
        return same and of.dtype == weight.dtype and of.device == weight.device


_FOLDED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FoldedPatchEmbed:
    """A patch embedding that reads uint8 pixels; made by `fold_patch_weight`.

    Attributes:
        weight: [E, p·p·3], columns in (y, x, channel) order, W·256 / (255·std): it multiplies
            (pixel − 128)/256. The kernels read a copy whose rows end in zeros, so that they begin at multiples of 16
            bytes. It follows what is written into the weight, or put in its place; a change in place through `.data`
            leaves no trace.
        bias: float32 [2, p + 1, E]: the bias of a patch of which v rows (first index 0) or v columns (1) are image;
            [., p] is the ordinary one, [., 0] the convolution's own bias.
        patch_size: p.
    """

    weight: Tensor
    bias: Tensor
    patch_size: int
    _padded: _Copy | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # What cannot be a weight stays as it is: the operators say what is wrong with it.
        if isinstance(self.weight, Tensor) and self.weight.dim() == 2 and not self.weight.requires_grad:
            self._rows()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.weight, self.bias, self.patch_size)

    def _rows(self) -> Tensor:
        """Return the weight as the kernels read it, padded to a multiple of 16 columns."""
        weight = self.weight
        if weight.shape[1] % 16 == 0 or torch.compiler.is_compiling() or weight.is_inference():
            # Inference tensors have no version, by which a change in place is seen, and a graph would keep the copy.
            return weight
        known = self._padded
        if known is None or not known.is_of(weight):
            known = _Copy(weight)
            object.__setattr__(self, "_padded", known)
        return known.rows


def fold_patch_weight(
    weight: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> FoldedPatchEmbed:
    """Fold x = (pixel/255 − mean)/std and the sum over repeated frames into a patch convolution.

    Args:
        weight: [E, 3, p, p], or [E, 3, T, p, p] whose T temporal slices see the same frame (a still image).
        mean, std: per channel, of pixels scaled to 0…1.
        bias: [E] or None.
        dtype: of the folded weight; default `weight.dtype`.

    Returns:
        FoldedPatchEmbed. The weight is rounded once; the biases are computed in float64 from the rounded weight,
        so that errors of a constant image cancel, and kept in float32 (float64 for a float64 weight).

    Raises:
        ValueError: shapes do not fit.
    """
    require_tensor("weight", weight, None, None, None)
    require_type("dtype", dtype, (torch.dtype, type(None)), "a torch.dtype or None")
    if bias is not None:
        require_tensor("bias", bias, None, weight.device, 1)
        if not bias.is_floating_point():
            raise TypeError(f"bias is {bias.dtype}; it must be floating point")
    if not weight.is_floating_point() or (dtype or weight.dtype) not in _FOLDED:
        raise TypeError(
            f"weight is {weight.dtype}, to be folded to {dtype or weight.dtype}; it must be floating point, and dtype "
            f"one of {_FOLDED}"
        )
    require_inference(weight=weight, bias=bias)
    if weight.dim() not in (4, 5) or weight.shape[1] != 3 or weight.shape[-1] != weight.shape[-2]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [E, 3, p, p] or [E, 3, T, p, p]")
    mean, std = _three("mean", mean), _three("std", std)
    if min(std) <= 0:
        raise ValueError(f"std is {std}; its three numbers must be positive")
    embed, patch = weight.shape[0], weight.shape[-1]
    if bias is not None and bias.shape != (embed,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; the weight's {embed} outputs need ({embed},)")
    dtype = dtype or weight.dtype
    wide = weight.double()
    if wide.dim() == 5:
        wide = wide.sum(2)
    mean_t = torch.tensor(mean, dtype=torch.float64, device=weight.device)
    std_t = torch.tensor(std, dtype=torch.float64, device=weight.device)
    folded = (wide.permute(0, 2, 3, 1) * (PIXEL_SCALE / (255 * std_t))).to(dtype)  # [E, p, p, 3]
    shift = folded.double() * ((255 * mean_t - PIXEL_ZERO) / PIXEL_SCALE)
    biases = torch.zeros((2, patch + 1, embed), dtype=torch.float64, device=weight.device)
    for axis, other in ((0, 2), (1, 1)):
        biases[axis, 1:] = -shift.sum((other, 3)).cumsum(1).T
    if bias is not None:
        biases += bias.double()
    folded = folded.reshape(embed, -1).contiguous()
    if not torch.compiler.is_compiling() and folded.is_inference():
        with torch.inference_mode(False):
            folded = folded.clone()
    return FoldedPatchEmbed(
        folded,
        biases.to(torch.float64 if dtype == torch.float64 else torch.float32),
        patch,
    )


def _three(name: str, values: Any) -> tuple[float, float, float]:
    """Return three finite numbers, one per channel."""
    try:
        numbers = tuple([math.nan if isinstance(value, (str, bytes)) else float(value) for value in values])
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name} is {shown(values)}; it must be three numbers, one per channel") from None
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} is {numbers}; it must be three finite numbers, one per channel")
    return numbers


def _check_images(images: Sequence[Tensor], plan: RegionPlan) -> torch.device:
    if isinstance(images, Tensor):
        raise TypeError("images is one tensor; give a list of uint8 [height, width, 3] tensors")
    require_type("images", images, (list, tuple), "a list of uint8 [height, width, 3] tensors")
    require_type("plan", plan, RegionPlan, "what plan_regions returns")
    if plan.rows and not images:
        raise ValueError("images is empty, but the plan has regions")
    device = images[0].device if images and isinstance(images[0], Tensor) else torch.device("cpu")
    for number, image in enumerate(images):
        plain = isinstance(image, Tensor) and image.layout is torch.strided and not image.is_nested
        if not plain or image.dtype != torch.uint8:
            kind = f"{image.dtype}, {image.layout}" if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(
                f"image {number} is {kind}; it must be a strided torch.uint8 tensor (0…255, not normalised)"
            )
        if image.dim() != 3 or image.shape[2] != 3:
            raise ValueError(f"image {number} has shape {tuple(image.shape)}; it must be [height, width, 3] (HWC, RGB)")
        if image.device != device:
            raise ValueError(f"image {number} is on {image.device}, image 0 on {device}; move them together")
    sizes = plan.sizes
    if len(images) != len(sizes) or any(image.shape[:2] != size for image, size in zip(images, sizes)):
        found = [tuple(image.shape[:2]) for image in images]
        raise ValueError(f"images have sizes {found}, the plan was made for {list(sizes)}: plan again for these images")
    return device


def _check_embed(embed: FoldedPatchEmbed, plan: RegionPlan, device: torch.device) -> None:
    require_type("embed", embed, FoldedPatchEmbed, "what fold_patch_weight returns")
    require_inference(weight=embed.weight, bias=embed.bias)
    outputs, patch = embed.weight.shape[0], embed.patch_size
    wide = torch.float64 if embed.weight.dtype == torch.float64 else torch.float32
    require_tensor("bias", embed.bias, wide, device, 3)
    if embed.weight.shape != (outputs, 3 * patch * patch) or embed.bias.shape != (2, patch + 1, outputs):
        raise ValueError(
            f"weight {tuple(embed.weight.shape)} and bias {tuple(embed.bias.shape)} must be [E, {3 * patch * patch}] "
            f"and [2, {patch + 1}, E] for patch size {patch}; use fold_patch_weight"
        )
    if embed.patch_size != plan.patch_size:
        raise ValueError(f"the weight has patch size {embed.patch_size}, the plan {plan.patch_size}; they must agree")
    if embed.weight.device != device:
        raise ValueError(f"images are on {device}, the weight on {embed.weight.device}; move one of them")


def roi_patches(images: Sequence[Tensor], plan: RegionPlan, *, backend: str = "auto") -> Tensor:
    """Crop, resize and cut regions into uint8 patches, bit-exact with Pillow's two-pass resampling.

    Args:
        images: uint8 [height, width, 3] tensors of any sizes and strides, on one device.
        plan: from `plan_regions` with these images' sizes.
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Returns:
        uint8 [plan.rows, p·p·3]: bytes of a patch in (y, x, channel) order, patches in (h/m, w/m, m, m) order, regions
        one after the other. Padded pixels are 128.

    Raises:
        TypeError: an image is not uint8.
        ValueError: an image is not HWC, or the plan was made for images of other sizes.
        BackendUnavailable: an explicit backend cannot run here.

    Source: Pillow 12.0 `Image.resize(box=None)` on `Image.crop`; patch order of transformers' Qwen2-VL processor.
    """
    device = _check_images(images, plan)
    op = bind("roi_patches", "roi_patches", backend, device, torch.uint8)
    return call(op, images, plan.table, plan.rows, plan.row_bytes)


def roi_patch_embed(
    images: Sequence[Tensor], plan: RegionPlan, embed: FoldedPatchEmbed, *, backend: str = "auto"
) -> Tensor:
    """Crop, resize, normalise and patch-embed regions: uint8 images to tokens, no image-sized float tensor.

    Args:
        images: uint8 [height, width, 3] tensors of any sizes and strides, on the weight's device.
        plan: from `plan_regions` with these images' sizes.
        embed: from `fold_patch_weight`.
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Returns:
        [plan.rows, E] in `embed.weight.dtype`, rows as in `roi_patches`. The result equals
        conv((pixel/255 − mean)/std) + bias at the pixels of `roi_patches`; zero padding is zero in normalised space.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `roi_patches`; also if plan and weight have different patch sizes.
    """
    device = _check_images(images, plan)
    _check_embed(embed, plan, device)
    op = bind("roi_patch_embed", "roi_patch_embed", backend, device, embed.weight.dtype)
    return call(op, images, plan.table, plan.rows, embed._rows(), embed.bias)


def roi_patch_embed_into(
    images: Sequence[Tensor],
    plan: RegionPlan,
    embed: FoldedPatchEmbed,
    out: Tensor,
    row: int = 0,
    *,
    backend: str = "auto",
) -> None:
    """Do what `roi_patch_embed` does, but write to `out[row : row + plan.rows]`; other rows are left alone.

    Args:
        out: [≥ row + plan.rows, E], dtype and device of `embed.weight`, last dimension contiguous.
        row: first row written.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `roi_patch_embed`; also if the rows do not fit. `out` is
            untouched after an error.
    """
    device = _check_images(images, plan)
    _check_embed(embed, plan, device)
    require_tensor("out", out, embed.weight.dtype, device, 2)
    require_inference(out=out)
    if out.shape[1] != embed.weight.shape[0] or out.stride(1) != 1:
        raise ValueError(
            f"out has shape {tuple(out.shape)} and strides {out.stride()}; it needs {embed.weight.shape[0]} contiguous "
            "columns"
        )
    row = require_integer("row", row, 0)
    if row > out.shape[0] - plan.rows:
        raise ValueError(f"rows {row}..{row + plan.rows} do not fit out's {out.shape[0]} rows; enlarge out")
    read = {"weight": embed.weight, "bias": embed.bias} | {f"image {i}": image for i, image in enumerate(images)}
    require_disjoint({"out": out[row : row + plan.rows]}, read)
    op = bind("roi_patch_embed", "roi_patch_embed_into", backend, device, embed.weight.dtype)
    call(op, images, plan.table, embed._rows(), embed.bias, out, row)
