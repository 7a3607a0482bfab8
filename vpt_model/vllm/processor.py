"""vLLM's multimodal processor for VPT: decoded pixels pass as they are; cropping and resizing are the worker's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from vpt_kernels import decode_image
from vpt_model.config import ModelConfig
from vpt_model.vllm.defaults import VPTConfig
from vpt_model.vllm.items import GRID, IMAGE, PIXELS
from vpt_model.vllm.perception import checkpoint_config, image_grid, image_tokens, reencoded_tokens


class Info(BaseProcessingInfo):  # type: ignore[misc]
    """What vLLM plans with."""

    def get_hf_config(self) -> VPTConfig:
        return self.ctx.get_hf_config(VPTConfig)

    @property
    def shapes(self) -> ModelConfig:
        """The checkpoint's own configuration."""
        return checkpoint_config(self.ctx.model_config.model, self.ctx.model_config.revision)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {IMAGE: None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        # The encoder's budget must hold what is encoded again, too, and the control state in front of it.
        return {IMAGE: 1 + max(count(self.shapes, *self.largest) for count in (image_tokens, reencoded_tokens))}

    @property
    def largest(self) -> tuple[int, int]:
        """Height and width of an image of the most tokens."""
        return self.shapes.image_resolution, self.shapes.image_resolution


class Dummies(BaseDummyInputsBuilder[Info]):  # type: ignore[misc]
    """Inputs with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "<|image_pad|>" * mm_counts.get(IMAGE, 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        height, width = self.info.largest
        return {IMAGE: self._get_dummy_images(width=width, height=height, num_images=mm_counts.get(IMAGE, 0))}


class Processor(BaseMultiModalProcessor[Info]):  # type: ignore[misc]
    """Pixels and grids of a prompt's images, and how many pads each of them becomes."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        pixels = [decode_image(image) for image in hf_data.get("images", ())]
        grids = [[1, *image_grid(self.info.shapes, *image.shape[:2])] for image in pixels]
        return BatchFeature({PIXELS: pixels, GRID: torch.tensor(grids).reshape(-1, 3)})

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, MultiModalFieldConfig]:
        return {name: MultiModalFieldConfig.batched(IMAGE, keep_on_cpu=True) for name in (PIXELS, GRID)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()
        pad, merge = config.image_token_id, config.vision_config.spatial_merge_size

        def pads(index: int) -> list[int]:
            return [pad] * (int(out_mm_kwargs[IMAGE][index][GRID].data.prod()) // merge**2)

        return [PromptReplacement(modality=IMAGE, target=[pad], replacement=pads)]
