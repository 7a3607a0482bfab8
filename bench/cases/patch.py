"""A patched model of transformers against itself: images to patch embeddings, and a few decoded tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, WrongResult, absent, require_close, smooth_pixels
from bench.workloads import DropInDecode, DropInImage
from vpt_kernels import QwenVLImageProcessor, patch

EMBED, PATCH = 1280, 14
TOLERANCE = 1e-4


def build_image(workload: DropInImage, device: str) -> Case:
    """Pillow image → patch embeddings of Qwen2-VL's tower: `QwenVLImageProcessor` and a patched patch embedding."""
    missing = absent("transformers")
    alternatives = ("transformers' processor and patch embedding", "transformers' processor, patched patch embedding")
    if missing:
        return Case(
            "drop-in", workload.shape, "float32", device, [lambda: None], dict.fromkeys(alternatives, missing),
            lambda: None, None,
        )  # fmt: skip
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

    torch.manual_seed(0)
    picture = Image.fromarray(smooth_pixels(workload.height, workload.width))
    plain, patched = (PatchEmbed(PATCH, 2, 3, EMBED).to(device) for _ in range(2))
    patched.load_state_dict(plain.state_dict())
    patch(patched)
    theirs = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=workload.max_pixels)
    ours, fresh = QwenVLImageProcessor.of(plain, theirs), count()

    def crop() -> Any:
        """A part of the picture never seen before, as every second look is."""
        i = next(fresh)
        return picture.crop((i % 7, i % 3, workload.width - i % 5, workload.height - i % 11))

    def drop_in(image: Any = None) -> Tensor:
        return patched(ours(image or crop())["pixel_values"])

    def processed(embed: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        def call(image: Any = None) -> Tensor:
            return embed(theirs(images=[image or crop()], return_tensors="pt")["pixel_values"].to(device))

        return call

    calls = [processed(plain), processed(patched)]

    def check() -> None:
        image = crop()
        expected = calls[0](image)
        require_close("QwenVLImageProcessor", drop_in(image), expected, TOLERANCE)
        require_close("patched patch embedding", calls[1](image), expected, TOLERANCE)

    timed: dict[str, Any] = {name: [call] for name, call in zip(alternatives, calls)}
    return Case("drop-in", workload.shape, "float32", device, [drop_in], timed, check, None)


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
    """A few tokens through two instances over the same weights, of which one is patched."""
    missing = absent("transformers")
    name = "transformers, not patched"
    if missing:
        return Case(
            "drop-in", workload.shape, "float32", device, [lambda: None], {name: missing}, lambda: None, None
        )  # fmt: skip
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

    return Case("drop-in", workload.shape, "float32", device, [patched], {name: [plain]}, check, None)
