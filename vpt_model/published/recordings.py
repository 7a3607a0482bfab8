"""Recorded runs of the authors' own model with tiny random weights, and the same runs by this one.

A recording is `<name>.safetensors` (inputs, weights, outputs) beside `<name>.json` (configuration, token ids, what
each tensor is). Rows of a batch are left-padded there and ragged here.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vpt_kernels import control_cross_attention, qwen2_vl_policy
from vpt_model.checkpoint.weights import read_json
from vpt_model.config import ENCODERS, ModelConfig, parse_config
from vpt_model.engine.conversation import Conversation, Question
from vpt_model.engine.events import Clock
from vpt_model.engine.executor import Eager
from vpt_model.engine.loop import Loop
from vpt_model.engine.requests import Append
from vpt_model.engine.sampling import Sampler
from vpt_model.engine.scheduler import Row, Scheduler
from vpt_model.network.cache import KVCache
from vpt_model.network.model import Model
from vpt_model.network.positions import mrope_positions
from vpt_model.text.prompt import PromptFormat
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
        """Return the patches [N, 1176] of the ordinary images of a row; row 0 is that of every case with one row."""
        return self.tensors[f"gen_b2.pixel_values_row{row}" if row else "fwd.pixel_values"]

    def reencoded_pixels(self, row: int) -> tuple[Tensor, list[tuple[int, int]]]:
        """Return the image that a row has re-encoded: pixel values and, if the vision tower does it, its grid in
        patches.

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
        where = torch.arange(self.config.sam.image_size, device=tile.device)
        repeated = tile[:, where % tile.shape[1]][:, :, where % tile.shape[2]]
        return ((repeated / 64 - 2) + (where[:, None] - where) / 1024)[None], []


def load_recording(folder: str | Path, name: str) -> Recording:
    """Load one recorded run. Raises ValueError naming the file that is missing or unreadable."""
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


class _Witness(Eager):
    """Keeps the hidden states [T, H] of all the tokens that each conversation was fed last."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.last: dict[Conversation, Tensor] = {}

    def states(self, appends: Sequence[Append]) -> list[Tensor]:
        states = super().states(appends)
        self.last = {append.conversation: hidden for append, hidden in zip(appends, states, strict=True)}
        return states


@dataclass(frozen=True)
class _Wordless:
    """Takes a tokenizer's place: recorded ids are arbitrary and stand for no text."""

    ids: TokenIds

    def decode(self, ids: Sequence[int]) -> str:
        return ""


class Replay:
    """The conversations of one recording, by the engine's own executor and decoding.

    state: weights instead of the recorded ones, such as those of another recording.
    """

    def __init__(self, recording: Recording, state: dict[str, Tensor] | None = None) -> None:
        self.recording, self.tensors, self.ids = recording, recording.tensors, recording.ids
        self.model = Model.from_state(recording.config, state or recording.state)
        self.executor = _Witness(self.model)
        self.loop = Loop(self.model, cast(Any, _Wordless(self.ids)), PromptFormat(), qwen2_vl_policy())

    def requests(self, case: str) -> list[Request]:
        """Return the prompts of `case`, unpadded, with the images that the recording shows them."""
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
                request.reencoded = self._see(pixels, again)[0] if again else self._reencode(pixels)
            requests.append(request)
        return requests

    def _reencode(self, pixels: Tensor) -> Tensor:
        encoder = self.model.encoder
        assert encoder is not None, "a recording without a second grid is of a model with an encoder of its own"
        return encoder(encoder.embed_pixel_values(pixels))

    def prefill(self, requests: Sequence[Request]) -> None:
        """Feed all up to the action-start token, then the look itself: two forward calls for the whole batch."""
        self._run([self._prompted(request, self._conversation(request)) for request in requests])

    def begin_look(self, request: Request, embeds: Tensor, positions: Tensor) -> None:
        """Complete the part of a prompt that begins with the action token: its embeddings [T, H], in place.

        positions: [3, T] of the same tokens.
        """
        assert request.reencoded is not None and self.model.projector is not None, "the prompt looks again"
        request.control = request.hidden[0][-1:]
        request.special = control_cross_attention(request.reencoded, request.control, self.model.projector)
        embeds[request.ids[-len(embeds) :] == self.ids.kind_pad] = request.special
        embeds[0] = request.control[0]

    def generate(self, requests: Sequence[Request], steps: int) -> tuple[Tensor, Tensor]:
        """Return the engine's greedy decoding of all rows: ids int64 [rows, steps] and logits float32 [rows, steps,
        vocab].

        Nothing ends a row before `steps` tokens.
        """
        # The token that ends a round is as the model chose it: one more than is asked for takes that place.
        questions = [Question([], max_new_tokens=steps + 1, max_looks=0, keep_logits=True) for _ in requests]
        self._run([self._answered(*row, steps) for row in zip(requests, questions, strict=True)])
        turns = [question.turns[0] for question in questions]
        ids = torch.tensor([turn.ids[:steps] for turn in turns], device="cpu")
        return ids, torch.stack([torch.stack(turn.logits[:steps]) for turn in turns])

    def _run(self, rows: Sequence[Row]) -> None:
        for _ in Scheduler(self.executor, rows).events():
            pass

    def _conversation(self, request: Request, room: int = 0) -> Conversation:
        cache = self.model.language.new_cache(len(request.ids) + room)
        return Conversation(cache, Clock(self.model.device), KVCache.clear)

    def _answered(self, request: Request, question: Question, room: int) -> Row:
        conversation = self._conversation(request, room)
        output = yield from self._prompted(request, conversation)
        yield from self.loop.decode(conversation, question, output)

    def _prompted(self, request: Request, conversation: Conversation) -> Generator[Any, Any, Any]:
        """Feed the prompt, in two parts if it holds a look; the last part's output."""
        language, merge = self.model.language, self.model.config.vision.spatial_merge_size
        positions, _ = mrope_positions(request.ids, request.grids, 0, self.ids.image_pad, merge)
        head = [*request.ids.tolist(), self.ids.action].index(self.ids.action)
        embeds = language.embed(request.ids)
        embeds[request.ids == self.ids.image_pad] = torch.cat(request.images)
        parts = [slice(head)] if request.reencoded is None else [slice(head), slice(head, None)]
        for number, part in enumerate(parts):
            if number:
                self.begin_look(request, embeds[part], positions[:, part])
            output = yield Append(
                conversation=conversation,
                tokens=request.ids[part].tolist(),
                embeds=embeds[part],
                positions=positions[:, part],
                next_position=int(positions[:, part].max()) + 1,
                sampler=Sampler(),
            )
            request.hidden.append(self.executor.last[conversation])
            request.positions.append(positions[:, part])
        return output

    def _see(self, pixel_values: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
        vision, merge = self.model.vision, self.model.config.vision.spatial_merge_size
        features = vision.forward(vision.embed_pixel_values(pixel_values), grids)
        return list(features.split([height * width // merge**2 for height, width in grids]))


def _grids(grid_thw: Tensor) -> list[tuple[int, int]]:
    return [(height, width) for _, height, width in grid_thw.tolist()]


def left_padded(rows: Sequence[Tensor], length: int, value: int) -> Tensor:
    """Return the rows [..., T_i] as one tensor [..., rows, length], each at the right end."""
    return torch.stack([torch.nn.functional.pad(row, (length - row.shape[-1], 0), value=value) for row in rows], -2)
