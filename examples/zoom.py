"""Zoom in where the model asks: a DeepEyes-style tool loop over one live conversation.

    python examples/zoom.py                                # a tiny random model that is made to ask; it shows the work
    python examples/zoom.py MODEL IMAGE QUESTION           # a real one, e.g. a folder with DeepEyes or Qwen3-VL

Every token passes the model once, whatever number of crops it asks for.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, LogitsProcessorList

from vpt_kernels.live import Zoom, ZoomAnswer, zoom

TOOL = {
    "type": "function",
    "function": {
        "name": "image_zoom_in_tool",
        "description": "Shows a part of an image, enlarged.",
        "parameters": {
            "type": "object",
            "properties": {
                "bbox_2d": {"type": "array", "items": {"type": "number"}, "description": "left, top, right, bottom"},
                "label": {"type": "string"},
                "img_idx": {"type": "integer"},
            },
            "required": ["bbox_2d"],
        },
    },
}


class Asking(LogitsProcessor):
    """Makes the random model write the numbers of two boxes, one after the other, and then an answer."""

    def __init__(self) -> None:
        self.left = [28, 14, 112, 98, 99, 5, 6, 40, 60, 99, 7, 7, 99]

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.left.pop(0)] = 0
        return forced


def numbers(text: str) -> list[Zoom]:
    """The random model's format: four numbers are a box of the first image."""
    found = [float(word) for word in text.split()]
    return [Zoom(tuple(found))] if len(found) == 4 else []


def random_run() -> ZoomAnswer:
    """The loop on a tiny model whose words are numbers; 99 ends an answer."""
    tiny = runpy.run_path(str(Path(__file__).with_name("tiny_model.py")))
    model, words = tiny["model"](), tiny["processor"]()
    words.tokenizer.add_special_tokens({"eos_token": "99"})
    words.apply_chat_template = template
    forced = {"logits_processor": LogitsProcessorList([Asking()]), "eos_token_id": 99}
    return zoom(model, words, tiny["PHOTO"], "10 11", parser=numbers, max_new_tokens=8, do_sample=False, **forced)


def template(messages: list[dict[str, Any]], **_: Any) -> str:
    """A chat template of numbers: 92 90 93 is an image, 99 ends a message."""
    parts = ["92 90 93" if part["type"] == "image" else part["text"] for m in messages for part in [*m["content"], END]]
    return " ".join(parts)


END = {"type": "text", "text": "99"}


def main() -> None:
    if len(sys.argv) < 4:
        answer = random_run()
    else:
        source, image, question = sys.argv[1:4]
        model = AutoModelForImageTextToText.from_pretrained(source).eval()
        processor = AutoProcessor.from_pretrained(source)
        # Qwen3-VL writes thousandths of the image, Qwen2.5-VL (DeepEyes) pixels of the image as it saw it.
        coordinates = "thousandths" if "qwen3" in model.config.model_type else "resized"
        options = {"template": {"tools": [TOOL]}, "coordinates": coordinates, "max_new_tokens": 1024}
        answer = zoom(model, processor, Image.open(image), question, **options)
    for number, turn in enumerate(answer.turns, 1):
        print(f"answer {number}: {turn}")
    print(f"crops: {json.dumps(answer.boxes)}")
    fed, ids = answer.conversation.fed, len(answer.conversation.ids)
    print(f"{ids} tokens, of which {fed['tokens']} passed the language model, once each; {fed['patches']} patches")


if __name__ == "__main__":
    main()
