"""Continue a cache with a new image: the call forms of transformers' `generate`, and a live conversation.

    python examples/continue_cache.py            # a tiny random model; the words mean nothing, the differences do
    python examples/continue_cache.py MODEL      # a folder or a name that from_pretrained knows

A first turn with one image has been answered, and its cache is there. Now a crop of that image and a second question
are to be appended. Each way is compared with generating from the whole conversation anew, logit by logit.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vpt_kernels.live import LiveConversation

NEW_TOKENS = 5
PIXELS = np.random.default_rng(0).integers(0, 256, (112, 168, 3), dtype=np.uint8)
PHOTO, BOX = Image.fromarray(PIXELS), (28, 14, 140, 98)


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


def tiny_processor() -> SimpleNamespace:
    """Numbers as words, so that a text is a list of ids, and transformers' image processor."""
    words = Tokenizer(WordLevel({str(number): number for number in range(128)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    images = Qwen2VLImageProcessorPil(max_pixels=12_845_056)
    return SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=words), image_processor=images)


@dataclass
class Turns:
    """Two turns: an image with a question and its answer, then a crop of it with another question."""

    model: Any
    processor: Any

    def __post_init__(self) -> None:
        self.options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        self.options |= {"return_dict_in_generate": True, "output_logits": True}
        self.first, self.second = (
            dict(self.processor.image_processor(images=image, return_tensors="pt"))
            for image in (PHOTO, PHOTO.crop(BOX))
        )
        self.question = self.turn(self.first, "10 11 12", "20 21 22 23")
        self.ids = torch.cat([self.answer().sequences, self.turn(self.second, "13", "30 31")], dim=1)
        both = {name: torch.cat([self.first[name], self.second[name]]) for name in self.first}
        self.anew = self.steps(self.model.generate(**self.described(self.ids), **both, **self.options))

    def turn(self, image: dict[str, Tensor], before: str, after: str) -> Tensor:
        config, encode = self.model.config, lambda text: self.processor.tokenizer(text)["input_ids"]
        pads = int(image["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2
        marks = [config.vision_start_token_id, *[config.image_token_id] * pads, config.vision_end_token_id]
        return torch.tensor([[*encode(before), *marks, *encode(after)]])

    def described(self, ids: Tensor) -> dict[str, Tensor]:
        kinds = (ids == self.model.config.image_token_id).int()
        return {"input_ids": ids, "mm_token_type_ids": kinds, "attention_mask": torch.ones_like(ids)}

    def answer(self) -> Any:
        """The first turn: its ids, and its cache, which lacks the last token only."""
        return self.model.generate(**self.described(self.question), **self.first, **self.options)

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
                **rest,
                **self.second,
                "attention_mask": whole["attention_mask"],
            },
            "new ids, the new image, no mask": {
                **{name: value for name, value in rest.items() if name != "attention_mask"},
                **self.second,
            },
            "all ids, the new image and grid, explicit position_ids": {
                **whole,
                **self.second,
                "position_ids": positions,
            },
        }[form]
        return self.steps(model.generate(**given, past_key_values=cache, **self.options))

    def live(self, cache: str) -> Tensor:
        """Logits [new, vocabulary] of a live conversation: every token passes the model once."""
        room = {"capacity": self.ids.shape[1] + NEW_TOKENS} if cache == "static" else {}
        with LiveConversation(self.model, self.processor, cache=cache, **room) as chat:
            chat.append("10 11 12")
            chat.append("20 21 22 23", image=PHOTO)
            chat.generate(**self.options)
            chat.append("13")
            chat.crop(BOX)
            chat.append("30 31")
            return self.steps(chat.generate(**self.options))


NATIVE = (
    "all ids, the new image and grid",
    "all ids, all images and grids",
    "all ids, the new image, all grids",
    "new ids, the new image, a mask of everything",
    "new ids, the new image, no mask",
    "all ids, the new image and grid, explicit position_ids",
)


def outcomes(model: Any, processor: Any) -> dict[str, float | str]:
    """Each way of continuing → the largest difference of a logit from generating anew, or the error."""
    found: dict[str, float | str] = {}
    turns = Turns(model, processor)
    for form in NATIVE:
        try:
            found[form] = (turns.native(form) - turns.anew).abs().max().item()
        except Exception as error:  # noqa: BLE001  (what other versions raise is what is to be found out)
            found[form] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    for cache in ("dynamic", "static"):
        found[f"LiveConversation, {cache} cache"] = (turns.live(cache) - turns.anew).abs().max().item()
    return found


def main() -> None:
    source = sys.argv[1:2]
    model = Qwen2VLForConditionalGeneration.from_pretrained(*source).eval() if source else tiny_model()
    processor = AutoProcessor.from_pretrained(*source) if source else tiny_processor()
    for form, outcome in outcomes(model, processor).items():
        print(f"{form:58} {outcome if isinstance(outcome, str) else f'differs by {outcome:.1e}'}")


if __name__ == "__main__":
    main()
