"""transformers' own Qwen2-VL with the weights of a state dict of ours: the strongest alternative, and an oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vpt_model.config import ModelConfig, VisionConfig


def transformers_model(config: ModelConfig, state: Mapping[str, Tensor], image_pad: int, vision_start: int) -> Any:
    """Return `Qwen2VLForConditionalGeneration` over the tensors of `state`, shared, but for those of a re-encoder."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    vision = {key: getattr(config.vision, key) for key in VisionConfig.__dataclass_fields__}
    skip = ("rope_theta", "mrope_section", "kind", "vision", "dino", "sam", "tie_word_embeddings")
    text = {key: getattr(config, key) for key in ModelConfig.__dataclass_fields__ if key not in skip}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, "mrope_section": list(config.mrope_section)}
    settings = Qwen2VLConfig(
        text_config=text | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": None},
        vision_config=vision | {"mlp_ratio": int(config.vision.mlp_ratio)},
        tie_word_embeddings=config.tie_word_embeddings,
        image_token_id=image_pad,
        vision_start_token_id=vision_start,
    )
    with no_init_weights():  # all of them are replaced
        model = Qwen2VLForConditionalGeneration(settings)
    names = {"model.": "model.language_model.", "visual.": "model.visual.", "lm_head.": "lm_head."}
    renamed = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), None)
        if prefix is not None:
            renamed[names[prefix] + name.removeprefix(prefix)] = tensor
    model.load_state_dict(renamed, strict=True, assign=True)
    model.tie_weights()
    return model.eval()
