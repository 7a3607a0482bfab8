"""Continue a cache with a new image: the call forms of transformers' `generate`, and a live conversation.

    python examples/continue_cache.py            # a tiny random model; the words mean nothing, the differences do
    python examples/continue_cache.py MODEL      # a folder or a name that from_pretrained knows

A first turn with one image has been answered, and its cache is there. Now a crop of that image and a second question
are to be appended. Each way is compared with generating from the whole conversation anew, logit by logit.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from vpt_kernels.live import LiveConversation

NEW_TOKENS = 5
TINY = runpy.run_path(str(Path(__file__).with_name("tiny_model.py")))
PHOTO, BOX = TINY["PHOTO"], (28, 14, 140, 98)


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

    def forms(self) -> dict[str, dict[str, Any]]:
        """Ways to call transformers' `generate` with the first turn's cache, with what each gives it."""
        whole, rest = self.described(self.ids), self.described(self.ids[:, self.question.shape[1] + NEW_TOKENS - 1 :])
        both = {name: torch.cat([self.first[name], self.second[name]]) for name in self.first}
        grids = {"image_grid_thw": both["image_grid_thw"]}
        kinds = whole["mm_token_type_ids"]
        positions, _ = self.model.model.get_rope_index(self.ids, **grids, mm_token_type_ids=kinds)
        unmasked = {name: value for name, value in rest.items() if name != "attention_mask"}
        everything = {"attention_mask": whole["attention_mask"]}
        return {
            "all ids, the new image and grid": whole | self.second,
            "all ids, all images and grids": whole | both,
            "all ids, the new image, all grids": whole | self.second | grids,
            "new ids, the new image, a mask of everything": rest | self.second | everything,
            "new ids, the new image, no mask": unmasked | self.second,
            "all ids, the new image and grid, explicit position_ids": whole | self.second | {"position_ids": positions},
        }

    def native(self, given: dict[str, Any]) -> Tensor:
        """Logits [new, vocabulary] of one of them."""
        return self.steps(self.model.generate(**given, past_key_values=self.answer().past_key_values, **self.options))

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


def outcomes(model: Any, processor: Any) -> dict[str, float | str]:
    """Each way of continuing → the largest difference of a logit from generating anew, or the error."""
    found: dict[str, float | str] = {}
    turns = Turns(model, processor)
    for form, given in turns.forms().items():
        try:
            found[form] = (turns.native(given) - turns.anew).abs().max().item()
        except Exception as error:  # noqa: BLE001  (what other versions raise is what is to be found out)
            found[form] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    for cache in ("dynamic", "static"):
        found[f"LiveConversation, {cache} cache"] = (turns.live(cache) - turns.anew).abs().max().item()
    return found


def main() -> None:
    source = sys.argv[1:2]
    model = Qwen2VLForConditionalGeneration.from_pretrained(*source).eval() if source else TINY["model"]()
    processor = AutoProcessor.from_pretrained(*source) if source else TINY["processor"]()
    for form, outcome in outcomes(model, processor).items():
        print(f"{form:58} {outcome if isinstance(outcome, str) else f'differs by {outcome:.1e}'}")


if __name__ == "__main__":
    main()
