"""A patched model of transformers against itself: images to patch embeddings, and a few decoded tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from bench.cases import Alternative, Case, WrongResult, absent, require_close, smooth_pixels
from bench.workloads import DropInDecode, DropInImage
from vpt_kernels import QwenVLImageProcessor, patch

EMBED, PATCH = 1280, 14
TOLERANCE = 1e-4


class Images:
    """Pictures that were never seen before, as every second look is, and both ways to their patch embeddings."""

    def __init__(self, workload: DropInImage, device: str) -> None:
        from PIL import Image
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
        from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

        torch.manual_seed(0)
        self.workload, self.device, self.fresh = workload, device, count()
        self.picture = Image.fromarray(smooth_pixels(workload.height, workload.width))
        self.plain, self.patched = (PatchEmbed(PATCH, 2, 3, EMBED).to(device) for _ in range(2))
        self.patched.load_state_dict(self.plain.state_dict())
        patch(self.patched)
        self.theirs = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=workload.max_pixels)
        self.processor = QwenVLImageProcessor.of(self.plain, self.theirs)

    def crop(self) -> Any:
        i = next(self.fresh)
        return self.picture.crop((i % 7, i % 3, self.workload.width - i % 5, self.workload.height - i % 11))

    def ours(self, image: Any = None) -> Tensor:
        return self.patched(self.processor(image or self.crop())["pixel_values"])

    def processed(self, embed: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        """Run transformers' processor, then `embed`."""

        def call(image: Any = None) -> Tensor:
            values = self.theirs(images=[image or self.crop()], return_tensors="pt")["pixel_values"]
            return embed(values.to(self.device))

        return call


IMAGE_ALTERNATIVES = (
    Alternative(
        "transformers' processor and patch embedding",
        "Qwen2VLImageProcessorPil and PatchEmbed, a Conv3d, as shipped",
        lambda images: images.processed(images.plain),
    ),
    Alternative(
        "transformers' processor, patched patch embedding",
        "the same with vpt_kernels.patch on the embedding only",
        lambda images: images.processed(images.patched),
    ),
)
NOT_PATCHED = Alternative(
    "transformers, not patched",
    "the same model, weights and cache without vpt_kernels.patch",
    lambda decoders: decoders[0],
)
ALTERNATIVES = (*IMAGE_ALTERNATIVES, NOT_PATCHED)


def _without_transformers(workload: Any, device: str, alternatives: Sequence[Alternative], reason: str) -> Case:
    """Return the row that says why it was not measured."""
    absent_ones = {one.name: reason for one in alternatives}
    return Case("drop-in", workload.shape, workload.dtype, device, [lambda: None], absent_ones, lambda: None, None)


def build_image(workload: DropInImage, device: str) -> Case:
    """Return a row from Pillow image to patch embeddings: `QwenVLImageProcessor` and a patched patch embedding."""
    if missing := absent("transformers"):
        return _without_transformers(workload, device, IMAGE_ALTERNATIVES, missing)
    images = Images(workload, device)
    alternatives = {one.name: one.calls([images]) for one in IMAGE_ALTERNATIVES}
    plain, patched = (calls[0] for calls in alternatives.values())

    def check() -> None:
        image = images.crop()
        expected = plain(image)
        require_close("QwenVLImageProcessor", images.ours(image), expected, TOLERANCE)
        require_close("patched patch embedding", patched(image), expected, TOLERANCE)

    return Case("drop-in", workload.shape, workload.dtype, device, [images.ours], alternatives, check, None)


@lru_cache(maxsize=1)  # the caches' rows of one model follow one another
def _weights(preset: str) -> tuple[Any, dict[str, Tensor]]:
    from vpt_model.checkpoint import random_state
    from vpt_model.config import PRESETS

    return PRESETS[preset], random_state(PRESETS[preset])


class _Decoder:
    """transformers' Qwen2-VL behind a prompt of `context` tokens; every call decodes some and forgets them."""

    def __init__(self, config: Any, state: dict[str, Tensor], workload: DropInDecode, device: str) -> None:
        from transformers import DynamicCache, StaticCache

        from bench.transformers_model import transformers_model

        self.model = transformers_model(config, state, 0, 1).to(device)
        text = self.model.config.get_text_config()
        capacity = workload.context + workload.tokens
        self.cache = DynamicCache(config=text) if workload.cache == "dynamic" else StaticCache(text, capacity)
        self.static, self.context, self.device = workload.cache == "static", workload.context, device
        self.tokens = workload.tokens

    def prefill(self) -> None:
        self._forward(torch.arange(self.context, device=self.device) % 97, 0)

    def __call__(self) -> Tensor:
        ids = torch.tensor([7], device=self.device)
        for step in range(self.tokens):
            logits = self._forward(ids, self.context + step)
        for layer in self.cache.layers:
            layer.cumulative_length.sub_(self.tokens) if self.static else layer.crop(-self.tokens)
        return logits

    def _forward(self, ids: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + len(ids), device=self.device).expand(3, 1, -1)
        options = {"past_key_values": self.cache, "logits_to_keep": 1}
        return self.model(input_ids=ids[None], position_ids=positions, **options).logits


def build_decode(workload: DropInDecode, device: str) -> Case:
    """Return a few tokens through two instances over the same weights, of which one is patched."""
    if missing := absent("transformers"):
        return _without_transformers(workload, device, [NOT_PATCHED], missing)
    config, state = _weights(workload.preset)
    plain, patched = (_Decoder(config, state, workload, device) for _ in range(2))
    report = patch(patched.model)
    for decoder in (plain, patched):
        decoder.prefill()

    def check() -> None:
        require_close("patched decode", patched(), plain(), TOLERANCE)
        layers = config.num_hidden_layers
        if report.calls["append_visual_kv_"] % layers or report.calls["append_visual_kv_"] < 2 * layers:
            raise WrongResult(f"the kernel did not run in every layer: {report}; a wrong row is not timed")

    alternatives = {NOT_PATCHED.name: NOT_PATCHED.calls([(plain, patched)])}
    return Case("drop-in", workload.shape, workload.dtype, device, [patched], alternatives, check, None)
