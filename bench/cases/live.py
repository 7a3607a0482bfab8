"""A further turn of a live conversation with a model of transformers, against what people do without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.cases import Alternative, Case, WrongResult, absent, require_close, smooth_pixels, sweep
from bench.transformers_model import transformers_model
from bench.workloads import LiveTurn

if TYPE_CHECKING:
    from vpt_kernels.live import LiveConversation

TOLERANCE = 1e-4
OPTIONS = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
QUESTION, BOX = 12, (120, 80, 392, 304)
IMAGE, START, END = 151655, 151652, 151653
ATTENTIONS = ("aten::scaled_dot_product_attention", "vpt_kernels::cached_attention")


class _Words:
    """A tokenizer of numbers: what a conversation needs of one."""

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def conversation(model: Any, end: int = END) -> LiveConversation:
    """Return a live conversation whose texts are ids as numbers; it stops at no token, and `end` follows a picture."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from vpt_kernels.live import LiveConversation

    model.config.vision_end_token_id = end
    model.generation_config.eos_token_id = None
    images = Qwen2VLImageProcessorPil(max_pixels=12_845_056)
    return LiveConversation(model, SimpleNamespace(tokenizer=_Words(), image_processor=images))


def forget(chat: LiveConversation, length: int) -> None:
    """Go back to a first turn of `length` tokens, whose last one `generate` has not fed, and one picture."""
    del chat.ids[length:], chat._pictures[1:]
    chat._fed.truncate(length - 1)


class Turn:
    """Two models over the same weights behind the same first turn: a photo and `behind` tokens of text.

    Every call takes one turn, up to its first answer token, and forgets it.
    """

    def __init__(self, workload: LiveTurn, device: str) -> None:
        from PIL import Image

        self.workload, self.device = workload, device
        config, state = _weights(workload.preset)
        self.plain, patched = (transformers_model(config, state, IMAGE, START).to(device) for _ in range(2))
        self.plain.generation_config.eos_token_id = None
        self.photo, self.other = (Image.fromarray(smooth_pixels(384, 512 - 28 * shift)) for shift in (0, 1))
        self.chat = conversation(patched)
        self.images = self.chat.processor.image_processor
        self.chat.append(" ".join(str(1000 + i % 97) for i in range(workload.behind + 8)), image=self.photo)
        self.chat.generate(**OPTIONS)
        self.before = len(self.chat.ids)
        self.seen = self.images(images=[self.photo], return_tensors="pt")
        self.question = " ".join(str(2000 + i) for i in range(QUESTION))
        self.ids = self._whole()
        self.cache = self._first_turn()

    def ours(self) -> Tensor:
        """Return the logits of the first answer token."""
        self._extend()
        out = self.chat.generate(**OPTIONS)
        forget(self.chat, self.before)
        return out.logits[0][0]

    def new(self) -> tuple[int, int]:
        """Return how many tokens and how many patches of pictures the turn adds; the last token was not fed yet."""
        grid = self._pixels().get("image_grid_thw")
        return len(self.ids) - self.before + 1, 0 if grid is None else int(grid.prod())

    def anew(self) -> Tensor:
        """Call `generate` on the whole conversation; only a new picture is preprocessed, all of them pass the tower."""
        new, ids = self._pixels(), torch.tensor([self.ids], device=self.device)
        pixels = [self.seen, *([new] if new else [])]
        given = {name: torch.cat([one[name] for one in pixels]).to(self.device) for name in self.seen}
        kinds = {"mm_token_type_ids": (ids == IMAGE).int(), "attention_mask": torch.ones_like(ids)}
        return self.plain.generate(ids, **kinds, **given, **OPTIONS).logits[0][0]

    def by_hand(self) -> Tensor:
        """Return one forward call over its own cache with explicit positions."""
        known, new = self.before - 1, self._pixels()
        ids = torch.tensor([self.ids[known:]], device=self.device)
        given = {name: tensor.to(self.device) for name, tensor in new.items()}
        options = {"past_key_values": self.cache, "logits_to_keep": 1}
        logits = self.plain(ids, position_ids=self.positions[:, None, known:], **given, **options).logits[0, -1]
        self.cache.crop(known - len(self.ids))
        return logits

    def _extend(self) -> None:
        if self.workload.turn == "zoom":
            self.chat.crop(BOX)
        self.chat.append(self.question, self.other if self.workload.turn == "image" else None)

    def _pixels(self) -> dict[str, Tensor]:
        picture = {"image": self.other, "zoom": self.photo.crop(BOX)}.get(self.workload.turn)
        return {} if picture is None else dict(self.images(images=[picture], return_tensors="pt"))

    def _whole(self) -> list[int]:
        self._extend()
        ids, grids = list(self.chat.ids), [picture.grid for picture in self.chat._pictures]
        self.positions, _ = self.chat._family.positions(ids, grids, 0)
        forget(self.chat, self.before)
        return ids

    @torch.no_grad()
    def _first_turn(self) -> Any:
        from transformers import DynamicCache

        cache, known = DynamicCache(config=self.plain.config.get_text_config()), self.before - 1
        ids = torch.tensor([self.ids[:known]], device=self.device)
        given = {name: tensor.to(self.device) for name, tensor in self.seen.items()}
        options = {"past_key_values": cache, "logits_to_keep": 1}
        self.plain(ids, position_ids=self.positions[:, None, :known], **given, **options)
        return cache


ALTERNATIVES = (
    Alternative(
        "transformers, generating anew",
        "`generate` from the whole conversation (SDPA, same weights); earlier pictures stay preprocessed",
        lambda turn: turn.anew,
    ),
    Alternative(
        "transformers, its cache continued by hand",
        "one forward call over a DynamicCache with explicit positions, not patched, its Pillow-based processor",
        lambda turn: torch.no_grad()(turn.by_hand),
    ),
)


@lru_cache(maxsize=1)  # rows of one preset follow one another
def _weights(preset: str) -> tuple[Any, dict[str, Tensor]]:
    from vpt_model.checkpoint import random_state
    from vpt_model.config import PRESETS

    return PRESETS[preset], random_state(PRESETS[preset])


def build(workload: LiveTurn, device: str) -> Case:
    """Return a turn of `LiveConversation` up to its first answer token."""
    if missing := absent("transformers"):
        others: dict[str, Any] = {one.name: missing for one in ALTERNATIVES}
        shown = (workload.op, workload.shape, workload.dtype, device)
        return Case(*shown, [lambda: None], others, lambda: None, None)
    turn = Turn(workload, device)
    others = {one.name: one.calls([turn]) for one in ALTERNATIVES}

    def check() -> None:
        fed = dict(turn.chat.fed)
        ours = turn.ours()
        found = tuple(turn.chat.fed[name] - fed[name] for name in ("tokens", "patches"))
        new = turn.new()
        if found != new:
            raise WrongResult(f"the turn fed {found} tokens and patches, not the {new} new ones")
        for name, calls in others.items():
            require_close(name, calls[0](), ours, TOLERANCE)

    def timeline() -> dict[str, dict[str, float]]:
        return {"ours": attention_apart(turn.ours)}

    shown = (workload.op, workload.shape, workload.dtype, device)
    series = sweep(workload.op, workload)
    return Case(*shown, [turn.ours], others, check, None, capture=False, sweep=series, timeline=timeline)


def attention_apart(call: Callable[[], object]) -> dict[str, float]:
    """Return the milliseconds on the CPU that one call spends in attention over the cache, and in everything else."""
    with torch.profiler.profile() as profile:
        call()
    events = profile.key_averages()
    attention = sum(event.cpu_time_total for event in events if event.key in ATTENTIONS) / 1e3
    total = sum(event.self_cpu_time_total for event in events) / 1e3
    return {"attention": attention, "everything else": total - attention}
