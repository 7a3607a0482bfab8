"""The published VPT procedure, written literally: the baseline to measure against and the oracle to compare with.

Yu, Ma, Wang, "Introducing Visual Perception Token into Multimodal Large Language Model" (arXiv 2502.17425), with the
authors' inference code on transformers 4.45. Every forward call, also that of one decoded token, copies the KV cache
twice and runs the language model twice; the second round prefills the whole conversation again and sends every image
through the vision tower again. One token-forward costs what it costs in transformers' Qwen2-VL.
"""

from __future__ import annotations

import copy
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vpt_model.config import ModelConfig, VisionConfig
from vpt_model.prompt import PromptFormat
from vpt_model.tokens import TokenIds, Tokenizer, parse_look

Cache = list[tuple[Tensor, Tensor]]
Grid = tuple[int, int]
Box = tuple[int, int, int, int]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MIN_PIXELS, MAX_PIXELS = 3136, 12845056
SPAN = re.compile(r"<\|region_token_start\|>(?:<\|[xy]_[0-7]\|>)+<\|region_token_end\|>")


def first_resize(image: Image.Image, longest_edge: int) -> Image.Image:
    """The authors' step before the processor: NEAREST to `longest_edge`, RGB, at least 28 px, aspect at most 200."""
    if max(image.size) > longest_edge:
        factor = longest_edge / max(image.size)
        image = image.resize((int(image.width * factor), int(image.height * factor)), Image.Resampling.NEAREST)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if min(image.size) < 28:
        image = image.resize((max(image.width, 28), max(image.height, 28)), Image.Resampling.NEAREST)
    if image.width / image.height > 200:
        image = image.resize((image.height * 180, image.height), Image.Resampling.NEAREST)
    if image.height / image.width > 200:
        image = image.resize((image.width, image.width * 180), Image.Resampling.NEAREST)
    return image


def smart_resize(height: int, width: int, factor: int) -> tuple[int, int]:
    """transformers' Qwen2-VL rule: sides rounded to multiples of `factor`, the area kept within the pixel limits."""
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > MAX_PIXELS:
        beta = math.sqrt(height * width / MAX_PIXELS)
        h, w = math.floor(height / beta / factor) * factor, math.floor(width / beta / factor) * factor
    elif h * w < MIN_PIXELS:
        beta = math.sqrt(MIN_PIXELS / (height * width))
        h, w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return h, w


def process_images(images: Sequence[Image.Image], vision: VisionConfig) -> tuple[Tensor, list[Grid]]:
    """transformers' Qwen2-VL image processor → float32 pixel values [Σ patches, 3·T·p·p] and one (h, w) per image."""
    p, m, t = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rows, grids = [], []
    for image in images:
        height, width = smart_resize(image.height, image.width, p * m)
        # Two calls pin the pass order of Pillow ≤ 12.0 (horizontal first), which newer versions choose by shape.
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = (np.asarray(image) * (1 / 255)).astype(np.float32)
        pixels = (pixels - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
        frames = np.tile(pixels.transpose(2, 0, 1)[None], (t, 1, 1, 1))
        h, w = height // p, width // p
        patches = frames.reshape(t, 3, h // m, m, p, w // m, m, p).transpose(2, 5, 3, 6, 1, 0, 4, 7)
        rows.append(torch.from_numpy(patches.reshape(h * w, 3 * t * p * p)))
        grids.append((h, w))
    return torch.cat(rows), grids


def region_box(span: str, size: tuple[int, int]) -> Box | None:
    """Pixel box of one region span on a (width, height) file: named cells of an 8×8 grid and a one-cell margin."""
    bounds = []
    for axis, length in zip("xy", size, strict=True):
        cells = {int(digit) for digit in re.findall(rf"<\|{axis}_([0-7])\|>", span)}
        if not cells:
            return None
        low, high = max(min(cells) - 1, 0), min(max(cells) + 1, 7)
        bounds.append((int(low * (length / 8)), int((high + 1) * (length / 8))))
    return tuple(edge for edges in zip(*bounds, strict=True) for edge in edges)


def rope_index(ids: Sequence[int], grids: Sequence[Grid], image_pad: int, merge: int) -> tuple[Tensor, int]:
    """transformers' get_rope_index of the whole sequence → M-RoPE positions [3, L] int64 and the delta of decoding."""
    chunks, start, position = [], 0, 0
    for h, w in ((h // merge, w // merge) for h, w in grids):
        end = list(ids).index(image_pad, start)
        chunks.append(torch.arange(position, position + end - start).expand(3, -1))
        position += end - start
        cell = torch.arange(h * w)
        chunks.append(torch.stack([torch.zeros_like(cell), cell // w, cell % w]) + position)
        start, position = end + h * w, position + max(h, w)
    chunks.append(torch.arange(position, position + len(ids) - start).expand(3, -1))
    positions = torch.cat(chunks, dim=1)
    return positions, int(positions.max()) + 1 - len(ids)


def frequencies(theta: float, dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Weights:
    """The tensors of a state dict below one prefix, and transformers' layers on them."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[name + ".weight"], self.tensors.get(name + ".bias"))

    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.tensors[name + ".weight"], self.tensors[name + ".bias"], eps)

    def rms_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
        return self.tensors[name + ".weight"] * y.to(x.dtype)


class VisionTower:
    """Qwen2-VL's `visual`: patch embeddings [N, E] of whole images and their grids → merged tokens [N/4, H]."""

    def __init__(self, config: VisionConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights

    def embed(self, pixel_values: Tensor) -> Tensor:
        # The Conv3d's stride is its kernel: the same product as one GEMM, which is how a CPU does it fastest.
        weight = self.weights.tensors["patch_embed.proj.weight"]
        return F.linear(pixel_values.to(weight), weight.flatten(1))

    def __call__(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        w, lengths = self.weights, [h * w for h, w in grids]
        cos, sin = torch.cat([self.rotary(*grid) for grid in grids], dim=1).to(x.device)[:, :, None]
        for block in (f"blocks.{layer}." for layer in range(self.config.depth)):
            y = w.layer_norm(x, block + "norm1", 1e-6)
            q, k, v = w.linear(y, block + "attn.qkv").view(len(x), 3, self.config.num_heads, -1).unbind(1)
            q, k = (rotate(y.float(), cos, sin).to(x.dtype) for y in (q, k))
            images = zip(*(y.transpose(0, 1)[None].split(lengths, dim=2) for y in (q, k, v)), strict=True)
            y = torch.cat([F.scaled_dot_product_attention(*image) for image in images], dim=2)
            x = x + w.linear(y[0].transpose(0, 1).reshape(x.shape), block + "attn.proj")
            y = w.linear(w.layer_norm(x, block + "norm2", 1e-6), block + "mlp.fc1")
            x = x + w.linear(y * torch.sigmoid(1.702 * y), block + "mlp.fc2")
        x = w.layer_norm(x, "merger.ln_q", 1e-6).view(-1, self.config.spatial_merge_size**2 * self.config.embed_dim)
        return w.linear(F.gelu(w.linear(x, "merger.mlp.0")), "merger.mlp.2")

    def rotary(self, h: int, w: int) -> Tensor:
        m = self.config.spatial_merge_size
        cells = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
        cells = cells.view(2, h // m, m, w // m, m).permute(1, 3, 2, 4, 0).reshape(h * w, 2)
        angles = (cells[..., None] * frequencies(10000.0, self.config.head_dim // 2)).flatten(1).repeat(1, 2)
        return torch.stack((angles.cos(), angles.sin()))


class Decoder:
    """Qwen2-VL's `model`: embeddings [1, T, H], positions [3, T], a cache that grows → hidden states [1, T, H]."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights

    def empty_cache(self) -> Cache:
        """Keys and values [1, kv heads, length, head dim] of each layer, of length 0."""
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
            k, v = cache[index] = tuple(torch.cat(pair, dim=2) for pair in zip(cache[index], (k, v), strict=True))
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


def project(weights: Weights, features: list[Tensor], control: Tensor) -> Tensor:
    """The authors' MinimalCLIPProjector: f + (f·k)k, one control state for each image, the images padded to a batch."""
    k = weights.linear(weights.layer_norm(control, "layernorm_condition", 1e-5), "linear_condition")
    f = nn.utils.rnn.pad_sequence(features, batch_first=True)
    out = f + torch.einsum("bso,bo->bs", f, k)[..., None] * k[:, None]
    return torch.cat([row[: len(feature)] for row, feature in zip(out, features, strict=True)])


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
    vit_calls, vit_patches. Raises ValueError for a re-encoder other than "clip".
    """

    def __init__(
        self,
        config: ModelConfig,
        state: Mapping[str, Tensor],
        ids: TokenIds,
        tokenizer: Tokenizer | None = None,
        *,
        longest_edge: int = 512,
        layout: PromptFormat | None = None,
    ) -> None:
        if config.kind not in ("clip", None):
            raise ValueError(f"kind is {config.kind!r}; the published procedure is written out for 'clip' or None")
        self.config, self.ids, self.tokenizer = config, ids, tokenizer
        self.longest_edge, self.layout = longest_edge, layout or PromptFormat()
        self.merge = config.vision.spatial_merge_size
        self.visual = VisionTower(config.vision, Weights(state, "visual."))
        self.decoder = Decoder(config, Weights(state, "model."))
        self.embedding = state["model.embed_tokens.weight"]
        self.lm_head = state.get("lm_head.weight", self.embedding)
        self.projector = Weights(state, "clip_projector.")
        self.timings: list[Stage] = []

    @torch.inference_mode()
    def forward(
        self,
        ids: Sequence[int],
        positions: Tensor,
        cache: Cache,
        pixel_values: Tensor | None = None,
        grids: Sequence[Grid] = (),
        clip_pixel_values: Tensor | None = None,
        clip_grids: Sequence[Grid] = (),
        stages: tuple[str, str] = ("prefill", "prefill"),
    ) -> tuple[Tensor, Tensor, Cache]:
        """One published forward call: two passes of the language model, each over its own deep copy of `cache`.

        ids: T new ids. positions: [3, T]. Images as pixel values [N, 1176] and grids in patches; `stages` names the two
        passes in `timings`. Returns hidden states [T, H], control states [actions, H] and the second pass's cache.
        Raises ValueError if the number of images to re-encode is not that of the action tokens.
        """
        tokens = torch.tensor(ids, device=self.embedding.device)
        action = (tokens == self.ids.action).nonzero()[:, 0] if self.ids.action is not None else tokens[:0]
        embeds = F.embedding(tokens, self.embedding)
        if grids:
            embeds[tokens == self.ids.image_pad] = self._look(pixel_values, grids)
        if clip_grids:
            if len(clip_grids) != len(action):
                raise ValueError(f"{len(clip_grids)} images for {len(action)} action tokens: give one for each")
            embeds[tokens == self.ids.kind_pad] = features = self._look(clip_pixel_values, clip_grids)

        with self._stage(stages[0]):
            hidden, _ = self._pass(embeds, positions, cache)
            control = hidden[action - 1]
            if clip_grids:
                per_image = features.split([h * w // self.merge**2 for h, w in clip_grids])
                embeds[tokens == self.ids.kind_pad] = project(self.projector, per_image, control)
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
        clip_pixel_values: Tensor | None = None,
        clip_grids: Sequence[Grid] = (),
        *,
        max_new_tokens: int = 64,
        forced: Sequence[int] = (),
        keep_logits: bool = False,
        stages: tuple[str, str] = ("prefill", "prefill"),
    ) -> Generation:
        """Greedy decoding behind the prompt `ids` until a stop token (which is kept) or `max_new_tokens`.

        forced: ids that take the place of the first choices; the work of choosing is done all the same.
        """
        out, running = Generation(), list(ids)
        positions, delta = rope_index(running, grids, self.ids.image_pad, self.merge)
        images = (pixel_values, grids, clip_pixel_values, clip_grids)
        cache, fresh = self.decoder.empty_cache(), running
        for step in range(max_new_tokens):
            if step:
                # Behind an action start stands the action, whatever was chosen: the model never learned to predict it.
                if running[-2] == self.ids.action_start and self.ids.action is not None:
                    running[-1] = out.ids[-1] = self.ids.action
                fresh, images, stages = running[-1:], (), ("decode", "decode")
                if running[-1] == self.ids.action:
                    cache = [(k[:, :, :-1], v[:, :, :-1]) for k, v in cache]
                    fresh = running[-2:]
                positions = torch.arange(len(running) - len(fresh), len(running)).expand(3, -1) + delta
            hidden, _, cache = self.forward(fresh, positions, cache, *images, stages=stages)
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
        """Both rounds of the published evaluation. looks: at most one forced look as `parse_look` reads it."""
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
        boxes = [region_box(span, image.size) for span in SPAN.findall(text)]

        if acts and not boxes:
            images, reencoded, shown, stages = [image], [image], "<clip_image>", ("perceive", "append")
            text, trigger = "<|clip_action_start|><|clip_action|><|clip_action_end|>", self.ids.action_start
        elif boxes and not acts and None not in boxes:
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

    def _round(self, prompt: str, images: list, reencoded: list, **options) -> Generation:
        inputs: list = []
        for kind, pictures in (("image", images), ("clip_image", reencoded)):
            pixel_values, grids = None, []
            if pictures:
                with self._stage("crop+embed") as work:
                    work["images"] += len(pictures)
                    resized = [first_resize(picture, self.longest_edge) for picture in pictures]
                    pixel_values, grids = process_images(resized, self.config.vision)
            for h, w in grids:
                pads = f"<|{kind}_pad|>" * (h * w // self.merge**2)
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
