"""The published VPT procedure, written literally: the baseline to measure against and the oracle to compare with.

Yu, Ma, Wang, "Introducing Visual Perception Token into Multimodal Large Language Model" (arXiv 2502.17425), with the
authors' inference code on transformers 4.45. Every forward call, also that of one decoded token, copies the KV cache
twice and runs the language model twice; the second round prefills the whole conversation again and sends every image
through the vision tower again. One token-forward costs what it costs in transformers' Qwen2-VL.
"""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vpt_model.config import ModelConfig
from vpt_model.published.encoders import (
    Grid,
    VisionTower,
    Weights,
    first_resize,
    frequencies,
    process_images,
    project,
    reencoder,
    rotate,
)
from vpt_model.text.prompt import PromptFormat
from vpt_model.text.tokens import TokenIds, Tokenizer, parse_look

Cache = list[tuple[Tensor, Tensor]]
Box = tuple[int, int, int, int]

SPAN = re.compile(r"<\|region_token_start\|>(?:<\|[xy]_[0-7]\|>)+<\|region_token_end\|>")


def region_box(span: str, size: tuple[int, int]) -> Box | None:
    """Return pixel box of one region span on a (width, height) file: named cells of an 8×8 grid and a one-cell
    margin.
    """
    bounds = []
    for axis, length in zip("xy", size, strict=True):
        cells = {int(digit) for digit in re.findall(rf"<\|{axis}_([0-7])\|>", span)}
        if not cells:
            return None
        low, high = max(min(cells) - 1, 0), min(max(cells) + 1, 7)
        bounds.append((int(low * (length / 8)), int((high + 1) * (length / 8))))
    return tuple(edge for edges in zip(*bounds, strict=True) for edge in edges)


def rope_index(ids: Sequence[int], grids: Sequence[Grid], image_pad: int, merge: int) -> tuple[Tensor, int]:
    """Do transformers' get_rope_index of a whole sequence: M-RoPE positions [3, L] int64, and the decoding's delta."""
    chunks, start, position = [], 0, 0
    for h, w in ((h // merge, w // merge) for h, w in grids):
        end = list(ids).index(image_pad, start)
        chunks.append(torch.arange(position, position + end - start, device="cpu").expand(3, -1))
        position += end - start
        cell = torch.arange(h * w, device="cpu")
        chunks.append(torch.stack([torch.zeros_like(cell), cell // w, cell % w]) + position)
        start, position = end + h * w, position + max(h, w)
    chunks.append(torch.arange(position, position + len(ids) - start, device="cpu").expand(3, -1))
    positions = torch.cat(chunks, dim=1)
    return positions, int(positions.max()) + 1 - len(ids)


class Decoder:
    """Qwen2-VL's `model`: embeddings [1, T, H], positions [3, T], a cache that grows → hidden states [1, T, H]."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights

    def empty_cache(self) -> Cache:
        """Return the keys and values [1, kv heads, length, head dim] of each layer, of length 0."""
        shape = (1, self.config.num_key_value_heads, 0, self.config.head_dim)
        empty = self.weights.tensors["norm.weight"].new_empty(shape)
        return [(empty, empty)] * self.config.num_hidden_layers

    def __call__(self, x: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        w, eps = self.weights, self.config.rms_norm_eps
        past, new = cache[0][0].shape[2], x.shape[1]
        # SDPA's is_causal aligns at the top left, which is wrong for several new tokens behind a cache.
        mask = torch.ones(new, past + new, dtype=torch.bool, device=x.device).tril(past) if past and new > 1 else None
        causal = mask is None and new > 1
        cos, sin = self.rotary(positions.to(x.device), x.dtype)
        for index, layer in enumerate(f"layers.{index}." for index in range(self.config.num_hidden_layers)):
            y = w.rms_norm(x, layer + "input_layernorm", eps)
            q, k, v = (
                w.linear(y, f"{layer}self_attn.{name}_proj").view(1, new, -1, self.config.head_dim).transpose(1, 2)
                for name in "qkv"
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            k, v = (torch.cat(pair, dim=2) for pair in zip(cache[index], (k, v), strict=True))
            cache[index] = k, v
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
            x = x + w.linear(y.transpose(1, 2).reshape(x.shape), layer + "self_attn.o_proj")
            y = w.rms_norm(x, layer + "post_attention_layernorm", eps)
            y = F.silu(w.linear(y, layer + "mlp.gate_proj")) * w.linear(y, layer + "mlp.up_proj")
            x = x + w.linear(y, layer + "mlp.down_proj")
        return w.rms_norm(x, "norm", eps)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequency = frequencies(self.config.rope_theta, self.config.head_dim).to(positions.device)
        axes = (positions[..., None] * frequency).split(self.config.mrope_section, dim=-1)
        angles = torch.cat([angle[axis] for axis, angle in enumerate(axes)], dim=-1).repeat(1, 2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


@dataclass
class Stage:
    """One named stretch of work: wall milliseconds and the counts of what was done in it."""

    name: str
    milliseconds: float = 0.0
    work: Counter[str] = field(default_factory=Counter)


@dataclass
class Generation:
    """New ids of one generate call, the time at which each was chosen and, if kept, the logits it was chosen from."""

    ids: list[int] = field(default_factory=list)
    chosen_at: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


@dataclass
class PublishedAnswer:
    """What `ask` returns; `ids` and `logits` (float32 [vocab] each, if kept) belong to the last of the `rounds`.

    boxes: of the crops. second_look_ms: last trigger token (region end, action start) → first answer token, or None.
    """

    text: str
    ids: list[int]
    logits: list[Tensor]
    rounds: list[Generation]
    timings: list[Stage]
    boxes: list[Box] = field(default_factory=list)
    second_look_ms: float | None = None


class PublishedProcedure:
    """The authors' `generate` and two-round evaluation on one conversation; see the module's docstring.

    config, state: shapes and tensors under their checkpoint names, used in place. ids: token ids of the variant.
    tokenizer, layout: needed by `ask` only. Counted work: images, lm_calls, token_forwards, cache_copies,
    vit_calls, vit_patches.
    """

    def __init__(
        self,
        config: ModelConfig,
        state: Mapping[str, Tensor],
        ids: TokenIds,
        tokenizer: Tokenizer | None = None,
        *,
        longest_edge: int | None = None,
        layout: PromptFormat | None = None,
    ) -> None:
        self.config, self.ids, self._tokenizer = config, ids, tokenizer
        self.longest_edge, self.layout = longest_edge or config.image_resolution, layout or PromptFormat()
        self.merge = config.vision.spatial_merge_size
        self.visual = VisionTower(config.vision, Weights(state, "visual."))
        self.decoder = Decoder(config, Weights(state, "model."))
        self.embedding = state["model.embed_tokens.weight"]
        self.lm_head = state.get("lm_head.weight", self.embedding)
        self.projector = Weights(state, f"{config.kind}_projector.")
        self.reencoder = reencoder(config, state)
        self.timings: list[Stage] = []

    @torch.inference_mode()
    def forward(
        self,
        ids: Sequence[int],
        positions: Tensor,
        cache: Cache,
        pixel_values: Tensor | None = None,
        grids: Sequence[Grid] = (),
        again: Tensor | None = None,
        again_grids: Sequence[Grid] = (),
        stages: tuple[str, str] = ("prefill", "prefill"),
    ) -> tuple[Tensor, Tensor, Cache]:
        """Run one published forward call: two passes of the language model, each over its own deep copy of `cache`.

        ids: T new ids. positions: [3, T]. Images as pixel values [N, 1176] and grids in patches; `again`: those of the
        images to re-encode, for DINOv2 and SAM [n, 3, h, w]. `stages` names the two passes in `timings`. Returns hidden
        states [T, H], control states [actions, H] and the second pass's cache. Raises ValueError if the number of
        images to re-encode is not that of the action tokens.
        """
        tokens = torch.tensor(ids, device=self.embedding.device)
        action = (tokens == self.ids.action).nonzero()[:, 0] if self.ids.action is not None else tokens[:0]
        embeds = F.embedding(tokens, self.embedding)
        if pixel_values is not None:
            embeds[tokens == self.ids.image_pad] = self._look(pixel_values, grids)
        if again is not None:
            features = self._encode_again(again, again_grids)
            if len(features) != len(action):
                raise ValueError(f"{len(features)} images for {len(action)} action tokens: give one for each")
            embeds[tokens == self.ids.kind_pad] = project(self.config.kind, self.projector, features, None)

        with self._stage(stages[0]):
            hidden, _ = self._pass(embeds, positions, cache)
            control = hidden[action - 1]
            if again is not None:
                embeds[tokens == self.ids.kind_pad] = project(self.config.kind, self.projector, features, control)
            embeds[action] = control
        with self._stage(stages[1]):
            hidden, cache = self._pass(embeds, positions, cache)
        return hidden, control, cache

    @torch.inference_mode()
    def generate(
        self,
        ids: Sequence[int],
        pixel_values: Tensor | None = None,
        grids: Sequence[Grid] = (),
        again: Tensor | None = None,
        again_grids: Sequence[Grid] = (),
        *,
        max_new_tokens: int = 64,
        forced: Sequence[int] = (),
        keep_logits: bool = False,
        stages: tuple[str, str] = ("prefill", "prefill"),
    ) -> Generation:
        """Decode greedily behind the prompt `ids` until a stop token (which is kept) or `max_new_tokens`.

        forced: ids that take the place of the first choices; the work of choosing is done all the same.
        """
        out, running = Generation(), list(ids)
        positions, delta = rope_index(running, grids, self.ids.image_pad, self.merge)
        images: dict[str, Any] = {
            "pixel_values": pixel_values,
            "grids": grids,
            "again": again,
            "again_grids": again_grids,
        }
        cache, fresh = self.decoder.empty_cache(), running
        for step in range(max_new_tokens):
            if step:
                # Behind an action start stands the action, whatever was chosen: the model never learned to predict it.
                if running[-2] == self.ids.action_start and self.ids.action is not None:
                    running[-1] = out.ids[-1] = self.ids.action
                fresh, images, stages = running[-1:], {}, ("decode", "decode")
                if running[-1] == self.ids.action:
                    cache = [(k[:, :, :-1], v[:, :, :-1]) for k, v in cache]
                    fresh = running[-2:]
                places = torch.arange(len(running) - len(fresh), len(running), device="cpu")
                positions = places.expand(3, -1) + delta
            hidden, _, cache = self.forward(fresh, positions, cache, **images, stages=stages)
            with self._stage(stages[1]):
                logits = F.linear(hidden[-1], self.lm_head).float()
                chosen = forced[step] if step < len(forced) else int(logits.argmax())
            out.chosen_at.append(time.perf_counter())
            out.ids.append(chosen)
            running.append(chosen)
            if keep_logits:
                out.logits.append(logits)
            if chosen in self.ids.stop:
                break
        return out

    def ask(
        self,
        image: Image.Image,
        question: str,
        *,
        looks: Sequence[str] | None = None,
        max_new_tokens: int = 64,
        keep_logits: bool = False,
    ) -> PublishedAnswer:
        """Answer in both rounds of the published evaluation. looks: at most one forced look, as of `parse_look`."""
        if looks and len(looks) > 1:
            raise ValueError(f"{len(looks)} looks; the published procedure has at most one")
        forced = parse_look(looks[0], self.ids) if looks else []
        if forced[:1] == [self.ids.action_start]:
            forced = [*self.ids.action_span, self.ids.im_end]
        self.timings = []
        prompt = f"<|im_start|>system\n{self.layout.system}<|im_end|>\n<|im_start|>user\n<image>"
        prompt += f"{self.layout.user_text(question, image=True)}<|im_end|>\n<|im_start|>assistant\n"
        free = {"max_new_tokens": max(max_new_tokens, len(forced)), "keep_logits": keep_logits}
        first = self._round(prompt, [image], [], forced=forced, **free)
        text = self.tokenizer.decode(first.ids)
        acts = self.config.kind is not None and f"<|{self.config.kind}_action_start|>" in text
        found = [region_box(span, image.size) for span in SPAN.findall(text)]
        boxes = [box for box in found if box is not None]

        if acts and not found:
            kind = self.config.kind
            images, reencoded, shown, stages = [image], [image], f"<{kind}_image>", ("perceive", "append")
            text, trigger = f"<|{kind}_action_start|><|{kind}_action|><|{kind}_action_end|>", self.ids.action_start
        elif boxes and not acts and len(boxes) == len(found):
            images, reencoded, stages = [image, *map(image.crop, boxes)], [], ("append", "append")
            numbered = "".join(f"Region {index}: <image>\n" for index in range(len(boxes)))
            shown, trigger = numbered if len(boxes) > 1 else "<image>", self.ids.region_end
        else:
            return PublishedAnswer(text, first.ids, first.logits, [first], self.timings)
        prompt += f"{text}<|im_end|>\n<|im_start|>user\n{shown}<|im_end|>\n<|im_start|>assistant\n"
        options = {"max_new_tokens": max_new_tokens, "keep_logits": keep_logits, "stages": stages}
        second = self._round(prompt, images, reencoded, **options)
        triggered_at = max(at for token, at in zip(first.ids, first.chosen_at, strict=True) if token == trigger)
        waited = (second.chosen_at[0] - triggered_at) * 1e3
        final = self.tokenizer.decode(second.ids)
        return PublishedAnswer(final, second.ids, second.logits, [first, second], self.timings, boxes, waited)

    def _round(
        self, prompt: str, images: list[Image.Image], reencoded: list[Image.Image], **options: Any
    ) -> Generation:
        inputs: list[Any] = []
        for kind, pictures in (("image", images), (f"{self.config.kind}_image", reencoded)):
            pixel_values, grids, counts = None, list[Grid](), list[int]()
            if pictures:
                with self._stage("crop+embed") as work:
                    work["images"] += len(pictures)
                    if kind == "image" or self.reencoder is None:
                        resized = [first_resize(picture, self.longest_edge) for picture in pictures]
                        pixel_values, grids = process_images(resized, self.config.vision)
                        counts = [h * w // self.merge**2 for h, w in grids]
                    else:
                        pixel_values = self.reencoder.pixel_values(pictures)
                        counts = [self.reencoder.tokens] * len(pictures)
            for count in counts:
                pads = f"<|{kind}_pad|>" * count
                prompt = prompt.replace(f"<{kind}>", f"<|vision_start|>{pads}<|vision_end|>", 1)
            inputs += [pixel_values, grids]
        return self.generate(self.tokenizer.encode(prompt), *inputs, **options)

    def _pass(self, embeds: Tensor, positions: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        cache = copy.deepcopy(cache)
        hidden = self.decoder(embeds[None], positions, cache)[0]
        self.timings[-1].work.update(lm_calls=1, token_forwards=len(embeds), cache_copies=1)
        return hidden, cache

    def _look(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        with self._stage("crop+embed"):
            patches = self.visual.embed(pixel_values)
        with self._stage("ViT") as work:
            work.update(vit_calls=1, vit_patches=len(patches))
            return self.visual(patches, grids)

    def _encode_again(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Sequence[Tensor] | Tensor:
        if self.reencoder is None:
            counts = [h * w // self.merge**2 for h, w in grids]
            return list(self._look(pixel_values, grids).split(counts))
        with self._stage("ViT") as work:
            patches = pixel_values.shape[-1] * pixel_values.shape[-2] // self.reencoder.patch_size**2
            work.update(vit_calls=1, vit_patches=len(pixel_values) * patches)
            return self.reencoder(pixel_values)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError("the procedure has no tokenizer, which `ask` needs: give one")
        return self._tokenizer

    @contextmanager
    def _stage(self, name: str) -> Iterator[Counter[str]]:
        """Time a stretch of work; neighbours of one name are one stage."""
        if not self.timings or self.timings[-1].name != name:
            self.timings.append(Stage(name))
        stage, start = self.timings[-1], time.perf_counter()
        yield stage.work
        if self.embedding.is_cuda:
            torch.cuda.synchronize(self.embedding.device)
        stage.milliseconds += (time.perf_counter() - start) * 1e3
