"""The engine over the recorded weights, prompts and pixels of the authors' model, and what it must answer."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from tests.model.engine.scripts import Wrapped, answers_of, question_of
from tests.model.inputs import golden, golden_again, golden_config, golden_state, golden_token_ids
from vpt_model.engine import Engine
from vpt_model.engine.events import Answer
from vpt_model.engine.executor import Executor
from vpt_model.engine.requests import CropAndAppend, ReencodeAndAppend
from vpt_model.network.model import Model
from vpt_model.network.vision import VisionTower
from vpt_model.text.prompt import PromptFormat
from vpt_model.text.tokens import Tokenizer

VARIANTS = ["clip", "dino", "sam"]
CASES = ["clip", "dino", "sam", "region"]


def prompt(name: str, case: str, row: int) -> list[int]:
    """The recorded prompt without its padding."""
    tensors, _ = golden(name)
    ids, mask = tensors[f"{case}.input_ids"][row], tensors.get(f"{case}.attention_mask")
    return ids.tolist() if mask is None else ids[mask[row].bool()].tolist()


def turns(prompt: list[int], im_start: int, im_end: int) -> list[list[int]]:
    """Contents of the complete turns, without role and newline."""
    starts = [i + 3 for i, token in enumerate(prompt) if token == im_start]
    return [prompt[start : prompt.index(im_end, start)] for start in starts if im_end in prompt[start:]]


class RecordedTokenizer(Tokenizer):
    """The golden prompts are arbitrary ids: questions "0" and "1" stand for those of the rows, other texts likewise."""

    def __init__(self, name: str, prompts: list[list[int]]) -> None:
        ids = golden_token_ids(name)
        super().__init__(Tokenizer.byte_level(320, ids.kind)._backend, ids.kind)
        self.ids = ids
        self._texts = {}
        for row, row_prompt in enumerate(prompts):
            system, user, *rest = turns(row_prompt, ids.im_start, ids.im_end)
            self._texts |= {PromptFormat().system: system, f"\n{row}": user[user.index(ids.vision_end) + 1 :]}
            if row == 0 and rest and ids.image_pad in rest[1]:
                shown = [token for token in rest[1] if token != ids.image_pad]
                for number in range(shown.count(ids.vision_start)):
                    cut = shown.index(ids.vision_start)
                    self._texts["\n" * (number > 0) + f"Region {number}: "] = shown[:cut]
                    shown = shown[cut + 2 :]

    def encode(self, text: str) -> list[int]:
        return self._texts[text] if text in self._texts else super().encode(text)


class RecordedVision(VisionTower):
    """Sees the recorded pixels: an image filled with i stands for the images of row i."""

    def __init__(self, tower: VisionTower, name: str) -> None:
        vars(self).update(vars(tower))
        self.tensors = golden(name)[0]

    def plan(self, images, boxes, policy):
        """The first recorded image where the whole is asked for, else the others."""
        row = row_of(images[0])
        grids = self.tensors["gen_b2.image_grid_thw"][1:] if row else self.tensors["fwd.image_grid_thw"]
        grids = [tuple(grid[1:]) for grid in grids.tolist()]
        pixels = self.tensors["gen_b2.pixel_values_row1" if row else "fwd.pixel_values"]
        height, width, _ = images[0].shape
        seen = slice(1) if boxes == [(0, 0, 0, width, height)] else slice(1, None)
        parts = pixels.split([height * width for height, width in grids])
        return SimpleNamespace(grids=tuple(grids[seen]), pixels=torch.cat(parts[seen]))

    def embed_plan(self, images, plan):
        return self.embed_pixel_values(plan.pixels)


class Recorded(Wrapped):
    """What the recorded model is shown where it re-encodes by "clip" differs on purpose from its first image."""

    def __init__(self, executor: Executor, name: str, vision: VisionTower) -> None:
        super().__init__(executor)
        self.name, self.vision, self.controls = name, vision, []

    def run(self, requests):
        results = super().run(requests)
        for number, (request, result) in enumerate(zip(requests, results, strict=True)):
            if isinstance(result, ReencodeAndAppend):
                self.controls.append(result.control)
            elif isinstance(request, CropAndAppend) and self.name == "clip":
                pixels, grids = golden_again("clip", row_of(request.picture.pixels))
                features = self.vision.forward(self.vision.embed_pixel_values(pixels), grids)
                request.picture.grids = tuple(grids)
                results[number] = replace(result, features=(features,))
        return results


class RecordedEngine(Engine):
    """Over the recorded weights, prompts and pixels."""

    def __init__(self, name: str, case: str, state: dict[str, torch.Tensor] | None = None, **options) -> None:
        self.name, tensors = name, golden(name)[0]
        prompts = [prompt(name, case, row) for row in range(len(tensors[f"{case}.input_ids"]))]
        weights = "clip" if name == "region" else name
        model = Model.from_state(golden_config(name), state or golden_state(weights))
        model = replace(model, vision=RecordedVision(model.vision, name))
        if model.encoder is not None:
            model.encoder.embed_regions = lambda images, boxes: model.encoder.embed_pixel_values(
                golden_again(name, row_of(images[0]))[0]
            )
        super().__init__(model, RecordedTokenizer(name, prompts), **options)
        self.recorded = self.executor = Recorded(self.executor, name, model.vision)
        self.rows = range(len(prompts))

    def recorded_look(self) -> str:
        sidecar = golden(self.name)[1]
        boxes = [
            ",".join(f"{axis}{i}" for axis, i in zip("xyxy", box, strict=True)) for box in sidecar.get("boxes", [])
        ]
        return f"region:{'+'.join(boxes)}" if boxes else self.loop.reencoder

    def follow(self, forced: list[list[int]], steps: int) -> list[Answer]:
        """Answers of rows whose first tokens are `forced`, side by side."""
        questions = [
            question_of(self, str(row), image(row), [tokens], max_new_tokens=steps + len(tokens), keep_logits=True)
            for row, tokens in enumerate(forced)
        ]
        return answers_of(self, questions)


def image(row: int) -> torch.Tensor:
    return torch.full((150, 230, 3), row, dtype=torch.uint8)


def row_of(image: torch.Tensor) -> int:
    return int(image[0, 0, 0])


def recorded(name: str, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """New ids [rows, steps] and their logits [rows, steps, vocab]."""
    tensors, _ = golden(name)
    rows = len(tensors[f"{case}.input_ids"]) if f"{case}.input_ids" in tensors else 1
    ids, logits = tensors[f"{case}.new_ids"], tensors[f"{case}.step_logits"]
    return ids.view(rows, -1), logits.view(rows, ids.numel() // rows, -1)


def matches(answers: list[Answer], name: str, case: str, skipped: tuple[int, ...] | None = None) -> None:
    ids, logits = recorded(name, case)
    assert len(answers) == len(ids)
    for row, answer in enumerate(answers):
        begin = skipped[row] if skipped else 0
        assert answer.ids[begin:] == ids[row].tolist()
        assert (answer.logits[begin:] - logits[row]).abs().max() <= 1e-4
