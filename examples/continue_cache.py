"""Continue a cache with a new image: transformers' Qwen2-VL, first its own call forms, then with the kernels.

    python examples/continue_cache.py            # a tiny random model; the words mean nothing, the differences do
    python examples/continue_cache.py MODEL      # a folder or a name that from_pretrained knows

A first turn with one image has been answered, and its cache is there. Now a crop of that image and a second question
are to be appended. Each way is compared with generating from the whole conversation anew, logit by logit.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, Qwen2VLConfig, Qwen2VLForConditionalGeneration, StaticCache
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vpt_kernels import QwenVLImageProcessor, patch
from vpt_model.network.positions import mrope_positions

NEW_TOKENS = 5


def tiny_model() -> Any:
    """Two layers of everything, random weights that let every input be seen in the logits."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128, "pad_token_id": 0}
    text |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
        "max_position_embeddings": 512,
    }
    text |= {"bos_token_id": None, "eos_token_id": None}
    vision = {"depth": 2, "num_heads": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    special = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **special))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


@dataclass
class Conversation:
    """Two turns: an image with a question and its answer, then a crop of it with another question."""

    model: Any
    first: dict[str, Tensor]
    second: dict[str, Tensor]

    def __post_init__(self) -> None:
        config = self.model.config
        self.options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        self.options |= {"return_dict_in_generate": True, "output_logits": True}

        def turn(image: dict[str, Tensor], before: list[int], after: list[int]) -> Tensor:
            pads = int(image["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2
            marks = [config.vision_start_token_id, *[config.image_token_id] * pads, config.vision_end_token_id]
            return torch.tensor([[*before, *marks, *after]])

        self.question = turn(self.first, [10, 11, 12], [20, 21, 22, 23])
        answer = self.answer().sequences
        self.ids = torch.cat([answer, turn(self.second, [13], [30, 31])], dim=1)
        both = {name: torch.cat([self.first[name], self.second[name]]) for name in self.first}
        self.anew = self.steps(self.model.generate(**self.described(self.ids), **both, **self.options))

    def described(self, ids: Tensor) -> dict[str, Tensor]:
        kinds = (ids == self.model.config.image_token_id).int()
        return {"input_ids": ids, "mm_token_type_ids": kinds, "attention_mask": torch.ones_like(ids)}

    def answer(self, cache: Any = None) -> Any:
        """The first turn: its ids, and its cache, which lacks the last token only."""
        given = {} if cache is None else {"past_key_values": cache}
        return self.model.generate(**self.described(self.question), **self.first, **self.options, **given)

    @staticmethod
    def steps(out: Any) -> Tensor:
        return torch.stack(out.logits)[:, 0]

    def native(self, form: str) -> Tensor:
        """Logits [new, vocabulary] of one way to call transformers' `generate` with the first turn's cache."""
        model, cache = self.model, self.answer().past_key_values
        known = cache.get_seq_length()
        whole, rest = self.described(self.ids), self.described(self.ids[:, known:])
        both = {name: torch.cat([self.first[name], self.second[name]]) for name in self.first}
        grids = {"image_grid_thw": both["image_grid_thw"]}
        positions, _ = model.model.get_rope_index(self.ids, **grids, mm_token_type_ids=whole["mm_token_type_ids"])
        given = {
            "all ids, the new image and grid": {**whole, **self.second},
            "all ids, all images and grids": {**whole, **both},
            "all ids, the new image, all grids": {**whole, **self.second, **grids},
            "new ids, the new image, a mask of everything": {
                **rest, **self.second, "attention_mask": whole["attention_mask"]
            },
            "new ids, the new image, no mask": {
                **{name: value for name, value in rest.items() if name != "attention_mask"}, **self.second
            },
            "all ids, the new image and grid, explicit position_ids": {
                **whole, **self.second, "position_ids": positions
            },
        }[form]  # fmt: skip
        return self.steps(model.generate(**given, past_key_values=cache, **self.options))

    def appended(self, cache: Any) -> Tensor:
        """Logits [new, vocabulary] of one appended chunk and one forward call per token: nothing is passed twice."""
        model = self.model
        first = self.answer(cache)
        cache = first.past_key_values
        known = int(cache.get_seq_length())
        # A token's place in the cache and its position differ since the first image.
        next_position = known + int(model.model.rope_deltas)
        chunk, grids = self.ids[0, known:], [tuple(self.second["image_grid_thw"][0, 1:].tolist())]
        merge = model.config.vision_config.spatial_merge_size
        positions, next_position = mrope_positions(chunk, grids, next_position, model.config.image_token_id, merge)
        out = model(chunk[None], position_ids=positions[:, None], past_key_values=cache, **self.second)
        logits = [out.logits[0, -1]]
        while len(logits) < NEW_TOKENS:
            position = torch.full((3, 1, 1), next_position)
            token = logits[-1].argmax().view(1, 1)
            logits.append(model(token, position_ids=position, past_key_values=cache).logits[0, -1])
            next_position += 1
        return torch.stack(logits)


NATIVE = (
    "all ids, the new image and grid",
    "all ids, all images and grids",
    "all ids, the new image, all grids",
    "new ids, the new image, a mask of everything",
    "new ids, the new image, no mask",
    "all ids, the new image and grid, explicit position_ids",
)


def outcomes(model: Any) -> dict[str, float | str]:
    """Each way of continuing → the largest difference of a logit from generating anew, or the error."""
    pixels = np.random.default_rng(0).integers(0, 256, (112, 168, 3), dtype=np.uint8)
    photo, box = Image.fromarray(pixels), (28, 14, 140, 98)
    theirs = Qwen2VLImageProcessorPil(max_pixels=12_845_056)
    found: dict[str, float | str] = {}
    with torch.no_grad():
        plain = Conversation(model, *(theirs(image, return_tensors="pt") for image in (photo, photo.crop(box))))
        for form in NATIVE:
            try:
                found[form] = (plain.native(form) - plain.anew).abs().max().item()
            except Exception as error:  # noqa: BLE001  (what other versions raise is what is to be found out)
                found[form] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    ours = QwenVLImageProcessor.of(model, theirs)
    with torch.no_grad(), patch(model) as report:
        conversation = Conversation(model, ours(photo), ours(photo, [(0, *box)]))
        text = model.config.get_text_config()
        room = conversation.ids.shape[1] + NEW_TOKENS
        for name, cache in (("DynamicCache", DynamicCache(config=text)), ("StaticCache", StaticCache(text, room))):
            difference = conversation.appended(cache) - plain.anew
            found[f"appended with explicit positions, {name}"] = difference.abs().max().item()
    print(report)
    return found


def main() -> None:
    source = sys.argv[1:2]
    model = Qwen2VLForConditionalGeneration.from_pretrained(*source).eval() if source else tiny_model()
    for form, outcome in outcomes(model).items():
        print(f"{form:58} {outcome if isinstance(outcome, str) else f'differs by {outcome:.1e}'}")


if __name__ == "__main__":
    main()
