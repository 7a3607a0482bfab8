"""Recorded runs of the authors' own model with tiny random weights, and the same runs by this one.

A recording is `<name>.safetensors` (inputs, weights, outputs) beside `<name>.json` (configuration, token ids, what
each tensor is). Rows of a batch are left-padded there and ragged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vpt_kernels import control_cross_attention
from vpt_model.checkpoint.weights import read_json
from vpt_model.config import ENCODERS, ModelConfig, parse_config
from vpt_model.network.cache import KVCache
from vpt_model.network.model import Model
from vpt_model.network.positions import mrope_positions
from vpt_model.text.tokens import GRID, TokenIds

_WIDE = {torch.float16: torch.float32, torch.int32: torch.int64}


@dataclass(frozen=True)
class Recording:
    """One recorded file: its tensors (float16 as float32, int32 as int64), their stored types, and its sidecar."""

    name: str
    tensors: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    meta: dict[str, Any]

    @property
    def encoder(self) -> str:
        """The re-encoder's name: clip, dino or sam."""
        return self.meta["config"]["vpt"]["vision_encoder_ls"][0]

    @property
    def config(self) -> ModelConfig:
        sections = self.meta["config"]
        content = {
            "model_type": "qwen2_vl_vpt",
            "rope_scaling": {"mrope_section": sections["mrope_section"]},
            "vision_config": sections["vision"],
            "vision_encoder_ls": [self.encoder],
        }
        # The recorded runs ignore the layers of an encoder that is not theirs.
        encoders = {name: sections[name] for name in ("dinov2", "sam_vision") if name in sections}
        return parse_config(sections["llm"] | encoders | content)

    @property
    def ids(self) -> TokenIds:
        """Token ids of the recorded model; no token ends generation, as in the recorded runs."""
        ids, kind = self.meta["config"]["token_ids"], ENCODERS[self.encoder]
        same = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "endoftext")
        return TokenIds(
            **{name: ids[name] for name in same},
            newline=ids["nl"],
            system=ids["system"],
            user=ids["user"],
            assistant=ids["assistant"],
            stop=frozenset(),
            region_start=ids["region_token_start"],
            region_end=ids["region_token_end"],
            x=tuple(ids[f"x_{i}"] for i in range(GRID)),
            y=tuple(ids[f"y_{i}"] for i in range(GRID)),
            kind=kind,
            kind_pad=ids[f"{kind}_image_pad"],
            action_start=ids[f"{kind}_action_start"],
            action=ids[f"{kind}_action"],
            action_end=ids[f"{kind}_action_end"],
        )

    @property
    def state(self) -> dict[str, Tensor]:
        """The recorded weights under the checkpoint's names; empty where the recording has none of its own."""
        return {k.removeprefix("weights."): v for k, v in self.tensors.items() if k.startswith("weights.")}

    def pixel_values(self, row: int) -> Tensor:
        """Patches [N, 1176] of the ordinary images of a row; row 0 is that of every case with one row."""
        return self.tensors[f"gen_b2.pixel_values_row{row}" if row else "fwd.pixel_values"]

    def reencoded_pixels(self, row: int) -> tuple[Tensor, list[tuple[int, int]]]:
        """The image that a row has re-encoded: pixel values and, if the vision tower does it, its grid in patches.

        Of "clip" [N, 1176], and another image than the row's ordinary one, so that mix-ups show; of "dino" and "sam"
        [1, 3, h, w], without a grid.
        """
        if self.encoder == "clip":
            sizes = self.tensors["gen_b2.clip_images_grid_thw" if row else "fwd.clip_images_grid_thw"]
            pixels = self.tensors[f"gen_b2.clip_pixel_values_row{row}" if row else "fwd.clip_pixel_values"]
            return pixels, _grids(sizes[row : row + 1])
        if self.encoder == "dino":
            return self.tensors[f"gen_b2.detection_images_row{row}" if row else "fwd.detection_images"], []
        # Stored as a tile, uint8, and a formula that float32 computes exactly.
        tile = self.tensors[f"gen_b2.seg_tile_row{row}_u8" if row else "fwd.seg_tiles_u8"].flatten(0, -3).float()
        where = torch.arange(self.config.sam.image_size)
        repeated = tile[:, where % tile.shape[1]][:, :, where % tile.shape[2]]
        return ((repeated / 64 - 2) + (where[:, None] - where) / 1024)[None], []


def load_recording(folder: str | Path, name: str) -> Recording:
    """Raises ValueError naming the file that is missing or unreadable."""
    path = Path(folder) / f"{name}.safetensors"
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): give a folder of recorded runs") from error
    tensors = {key: value.to(_WIDE.get(value.dtype, value.dtype)) for key, value in stored.items()}
    dtypes = {key: value.dtype for key, value in stored.items()}
    return Recording(name, tensors, dtypes, read_json(path.with_suffix(".json")))


@dataclass
class Request:
    """One conversation: prompt, features of its ordinary images, the re-encoded image; then what came of it.

    images: [n_i, H] each. reencoded: what the projector reads. control: h*, [1, H]. special: the projected features
    [N, H]. hidden, positions: of each forward call, [T, H] and [3, T].
    """

    ids: Tensor
    images: list[Tensor]
    grids: list[tuple[int, int]]
    reencoded: Tensor | None = None
    control: Tensor | None = None
    special: Tensor | None = None
    hidden: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)


class Replay:
    """The conversations of one recording, by this model's parts.

    state: weights instead of the recorded ones, such as those of another recording.
    """

    def __init__(self, recording: Recording, state: dict[str, Tensor] | None = None) -> None:
        self.recording, self.tensors, self.ids = recording, recording.tensors, recording.ids
        self.model = Model.from_state(recording.config, state or recording.state)

    def requests(self, case: str) -> list[Request]:
        """The prompts of `case`, unpadded, with the images that the recording shows them."""
        rows = self.tensors[f"{case}.input_ids"]
        mask = self.tensors.get(f"{case}.attention_mask", torch.ones_like(rows)).bool()
        sizes = _grids(self.tensors["fwd.image_grid_thw" if len(rows) == 1 else "gen_b2.image_grid_thw"])
        requests = []
        for row, (ids, kept) in enumerate(zip(rows, mask, strict=True)):
            ids = ids[kept]
            count = int(((ids[1:] == self.ids.image_pad) & (ids[:-1] == self.ids.vision_start)).sum())
            grids, sizes = sizes[:count], sizes[count:]
            request = Request(ids, self._see(self.recording.pixel_values(row), grids), grids)
            if (ids == self.ids.kind_pad).any():
                pixels, again = self.recording.reencoded_pixels(row)
                encoder = self.model.encoder
                request.reencoded = (
                    self._see(pixels, again)[0] if again else encoder(encoder.embed_pixel_values(pixels))
                )
            requests.append(request)
        return requests

    def prefill(self, requests: Sequence[Request], room: int = 0) -> list[KVCache]:
        """Up to the action-start token, then the look itself: two forward calls for the whole batch.

        room: tokens that may follow.
        """
        language, merge = self.model.language, self.model.config.vision.spatial_merge_size
        caches = [language.new_cache(len(request.ids) + room) for request in requests]
        where = [mrope_positions(r.ids, r.grids, 0, self.ids.image_pad, merge)[0] for r in requests]
        heads = [[*request.ids.tolist(), self.ids.action].index(self.ids.action) for request in requests]
        prompts = [language.embed(request.ids) for request in requests]
        for request, prompt in zip(requests, prompts, strict=True):
            prompt[request.ids == self.ids.image_pad] = torch.cat(request.images)
        firsts = [prompt[:head] for prompt, head in zip(prompts, heads, strict=True)]
        self._append(requests, caches, firsts, [w[:, :head] for w, head in zip(where, heads, strict=True)])
        looks = [i for i, request in enumerate(requests) if request.reencoded is not None]
        if looks:
            for i in looks:
                self.begin_look(requests[i], prompts[i][heads[i] :], where[i][:, heads[i] :])
            self._append(
                [requests[i] for i in looks],
                [caches[i] for i in looks],
                [prompts[i][heads[i] :] for i in looks],
                [where[i][:, heads[i] :] for i in looks],
            )
        return caches

    def begin_look(self, request: Request, embeds: Tensor, positions: Tensor) -> None:
        """Complete the part of a prompt that begins with the action token: its embeddings [T, H], in place.

        positions: [3, T] of the same tokens.
        """
        request.control = request.hidden[0][-1:]
        request.special = control_cross_attention(request.reencoded, request.control, self.model.projector)
        embeds[request.ids[-len(embeds) :] == self.ids.kind_pad] = request.special
        embeds[0] = request.control[0]

    def generate(self, requests: Sequence[Request], steps: int) -> tuple[Tensor, Tensor]:
        """Greedy decoding of the whole batch: ids int64 [rows, steps] and logits float32 [rows, steps, vocab].

        After an action-start token the next one is always the action token, and its embedding is the hidden state of
        the action-start token.
        """
        language = self.model.language
        caches = self.prefill(requests, room=steps)
        last = torch.stack([request.hidden[-1][-1] for request in requests])
        previous = [int(request.ids[-1]) for request in requests]
        ids, logits = [], []
        for step in range(steps):
            logits.append(language.logits(last))
            forced = [token == self.ids.action_start for token in previous]
            sampled = logits[-1].argmax(-1).tolist()
            previous = [self.ids.action if force else best for force, best in zip(forced, sampled, strict=True)]
            ids.append(previous)
            if step + 1 < steps:
                embeds = language.embed(torch.tensor(previous))
                embeds = torch.where(torch.tensor(forced)[:, None], last, embeds)
                positions = torch.tensor([cache.next_position for cache in caches]).expand(3, -1)
                last = language.forward(embeds, positions, caches, [1] * len(caches))
        return torch.tensor(ids).T, torch.stack(logits, 1)

    def _append(
        self, requests: Sequence[Request], caches: list[KVCache], embeds: list[Tensor], positions: list[Tensor]
    ) -> None:
        """One ragged forward call; every request gets its hidden states."""
        lengths = [len(chunk) for chunk in embeds]
        hidden = self.model.language.forward(torch.cat(embeds), torch.cat(positions, 1), caches, lengths)
        for request, states, where in zip(requests, hidden.split(lengths), positions, strict=True):
            request.hidden.append(states)
            request.positions.append(where)

    def _see(self, pixel_values: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
        vision, merge = self.model.vision, self.model.config.vision.spatial_merge_size
        features = vision.forward(vision.embed_pixel_values(pixel_values), grids)
        return list(features.split([height * width // merge**2 for height, width in grids]))


def _grids(grid_thw: Tensor) -> list[tuple[int, int]]:
    return [(height, width) for _, height, width in grid_thw.tolist()]


def left_padded(rows: Sequence[Tensor], length: int, value: int) -> Tensor:
    """Rows [..., T_i] as one tensor [..., rows, length], each at the right end."""
    return torch.stack([torch.nn.functional.pad(row, (length - row.shape[-1], 0), value=value) for row in rows], -2)
