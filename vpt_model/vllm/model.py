"""vLLM's Qwen2-VL with the second look: raw pixels in, conditioned tokens out; h* never leaves the device.

Tower and decoder are vLLM's own, with its tensor parallelism, quantisation and graphs. Ours are the crop and patch
embedding, the re-encoders and their projector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_vl import Qwen2VisionPatchEmbed, Qwen2VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from vpt_kernels import control_cross_attention_into, fold_patch_weight, plan_regions, roi_patch_embed
from vpt_model.checkpoint.load import published_tensors
from vpt_model.network.encoders import DinoEncoder, SamEncoder, build_encoder
from vpt_model.network.model import build_projector
from vpt_model.network.vision import MEAN, STD
from vpt_model.vllm.capture import Controls
from vpt_model.vllm.items import AGAIN, CONTROL, FEATURES, IMAGE, PIXELS
from vpt_model.vllm.perception import checkpoint_config, look_policy
from vpt_model.vllm.processor import Dummies, Info, Processor


class EmbeddedPatches(Qwen2VisionPatchEmbed):  # type: ignore[misc]
    """Holds the convolution's weight; what comes in has been embedded by `roi_patch_embed` already."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummies)
class VPTQwen2VL(Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """A VPT checkpoint of any kind."""

    supports_encoder_cudagraph = False
    """Raw pixels have no fixed shape."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model = vllm_config.model_config
        self.shapes = checkpoint_config(model.model, model.revision)
        vision = self.shapes.vision
        self.visual.patch_embed = EmbeddedPatches(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            in_channels=vision.in_channels,
            embed_dim=vision.embed_dim,
        )
        self.policy, self.merge = look_policy(self.shapes), vision.spatial_merge_size**2
        self.controls = Controls(vllm_config, self.shapes.hidden_size)
        # Held by the encoder cache of vLLM alone, which says what fits; what it evicts is computed again.
        self.features = WeakValueDictionary[tuple[int, ...], Tensor]()
        self.encoder: DinoEncoder | SamEncoder | None = None
        self.own: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take a checkpoint's tensors in any stored form, or some of them as trainers send; returns what was loaded."""
        kind, visual = str(self.shapes.kind), self.visual
        changed: dict[str, Tensor] = {}

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in published_tensors(self.shapes, weights):
                if name.startswith((f"{kind}_projector.", f"{kind}_model.")):
                    changed[name] = tensor.to(visual.device, visual.dtype)
                else:
                    yield name, tensor

        loaded: set[str] = super().load_weights(others())
        self.features.clear()  # other weights may see something else
        if changed:
            self.own |= changed
            self.projector = build_projector(kind, self.own)
            if kind != "clip":
                self.encoder, prefix = build_encoder(kind, self.shapes), f"{kind}_model."
                self.encoder.load({n.removeprefix(prefix): t for n, t in self.own.items() if n.startswith(prefix)})
                loaded |= {f"encoder.{name}" for name, _ in self.encoder.named_parameters()}
        self.folded = fold_patch_weight(visual.patch_embed.proj.weight.detach(), MEAN, STD)
        self.controls.states = self.controls.states.to(visual.device, visual.dtype)
        return loaded

    def embed_multimodal(self, **fields: Any) -> Sequence[Tensor]:
        """Return the features of images, or of images that are encoded again.

        The fields are those of `vpt_model.vllm.items`.
        """
        # Images with which vLLM measures memory have no names.
        names = [tuple(name) for name in fields[FEATURES].tolist()] if FEATURES in fields else []
        if CONTROL in fields:
            return [self.reencode(*each) for each in zip(fields[AGAIN], fields[CONTROL].tolist(), names, strict=True)]
        features = self.look(fields[PIXELS])
        self.features.update(zip(names, features))
        return features

    def look(self, images: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return features [n_i, H] of each image or crop. images: uint8 [height, width, 3] on the CPU."""
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        boxes = [(i, 0, 0, width, height) for i, (height, width) in enumerate(sizes)]
        plan = plan_regions(sizes, boxes, self.policy)
        patches = roi_patch_embed([self._upload(image) for image in images], plan, self.folded)
        features = self.visual(patches, grid_thw=[[1, *grid] for grid in plan.grids])
        return features.split([rows * columns // self.merge for rows, columns in plan.grids])

    def reencode(self, image: Tensor, control: tuple[int, int], name: tuple[int, ...]) -> Tensor:
        """Return [1 + n, H]: the state in a slot as the action token's embedding, then the image conditioned by it.

        control: the slot, and whether there is an image; without one the result is the state alone, [1, H]. name: of
        the features that the first look at the image may have left.
        """
        slot, has_image = control
        state = self.controls.states[slot : slot + 1]
        if not has_image:
            return state.clone()
        if self.encoder is None:
            if (features := self.features.get(name)) is None:
                (features,) = self.look([image])
            count = len(features)
        else:
            height, width, _ = image.shape
            features = self.encoder(self.encoder.embed_regions([self._upload(image)], [(0, 0, 0, width, height)]))
            count = self.encoder.tokens
        embeds = state.new_empty(1 + count, state.shape[1])
        embeds[0] = state[0]
        rows = torch.arange(1, 1 + count, device=embeds.device)
        control_cross_attention_into(features, state, self.projector, embeds, rows)
        return embeds

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Return vLLM's positions, where images that are encoded again stand at positions of text, as published."""
        return super().get_mrope_input_positions(input_tokens, [f for f in mm_features if f.modality == IMAGE])

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        self.controls.sampled = hidden_states
        return super().compute_logits(hidden_states)

    def _upload(self, image: Tensor) -> Tensor:
        device = self.visual.device
        return image if device.type == "cpu" else image.pin_memory().to(device, non_blocking=True)
