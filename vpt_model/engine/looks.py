"""A second look in two replays: the first one sees, the second one reads what was seen and chooses the first token.

    re-encoding   trigger token → h* ┬ (picture → encoder) ─ projector ─┐
                                     └──────────────────────────────────┴─ given ─ chunk ─ first token
    region        crop ─ patches ─ vision tower ────────────────────────── given ─ chunk ─ first token

What the first replay sees it writes to `Graphs.given`, to the rows where the second reads the embeddings of its tokens.
The integers of both are on the device before the first is launched, and nothing is launched between them. The crop
stands before both: an image's address and size, and how many pixels make one, are arguments of its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from vpt_model.engine import perception
from vpt_model.engine.graphs import Graphs, Step, smallest
from vpt_model.engine.requests import Append, CropAndAppend, ReencodeAndAppend, Request
from vpt_model.network.model import Model
from vpt_model.network.tower_graphs import CapturedTower

Seen = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Look(Append):
    """All tokens of a look, which two replays feed and which are counted as fed together.

    launch: feeds them; returns what the second replay does, and the features [n, H] of each region. It times its
    replays itself.
    """

    launch: Callable[[], tuple[Seen, Seen]]

    def timed(self) -> AbstractContextManager[None]:
        return nullcontext()


class Looks:
    """Plans looks of conversations that `graphs` know, with the towers of `model`."""

    def __init__(self, model: Model, graphs: Graphs) -> None:
        self.model, self.graphs = model, graphs

    def plan(self, request: Request) -> Look | None:
        """Return how two replays do what is asked for, or None if they cannot: it is no look, or fits no bucket.

        Crops and embeds the picture, whose copy is the look's own: looks that are planned together do not meet.
        """
        if request.conversation.cache.slab is not self.graphs.slab:
            return None
        if isinstance(request, ReencodeAndAppend) and request.control is None:
            return self._reencode(request)
        return self._crop(request) if isinstance(request, CropAndAppend) else None

    def _reencode(self, request: ReencodeAndAppend) -> Look | None:
        model, picture, clock = self.model, request.picture, request.conversation.clock
        encodes = model.encoder is not None and picture.ahead is None
        trigger = self.graphs.encoding if encodes else self.graphs.trigger
        tokens, count = [*request.tokens], request.tokens.count(request.pad)
        chunk = self._chunk(len(tokens) - 1)
        if chunk is None or trigger is None or count >= len(trigger.host.targets):
            return None
        if encodes:
            with clock("crop+embed", images=1):
                inputs = perception.whole(model, picture.kept)
        else:
            inputs = perception.reencode(model, picture.pixels, picture.seen, clock, picture.ahead)
        known = [-1 if place == 1 or token == request.pad else token for place, token in enumerate(tokens)]
        first = _part(request, known, slice(1))
        rest = _part(request, known, slice(1, None))
        work = {"tokens": 1, "lm_calls": 1, "features": count}
        work |= {"images": 1, "vit_patches": len(inputs), "vit_calls": 1} if encodes else {}
        targets = self._rows(rest.tokens)

        def launch() -> tuple[Seen, Seen]:
            trigger.inputs[: len(inputs)].copy_(inputs)
            trigger.upload([first], targets=targets)
            chunk.upload([rest], behind=1)
            with clock("perceive", **work):
                trigger.replay()
            with clock("append", tokens=len(rest.tokens), lm_calls=1):
                return chunk.again(), ()

        return _look(request, launch)

    def _crop(self, request: CropAndAppend) -> Look | None:
        tower, picture, clock = self.model.vision, request.picture, request.conversation.clock
        grids, chunk = request.plan.grids, self._chunk(len(request.tokens))
        step = tower.step(grids) if isinstance(tower, CapturedTower) else None
        if chunk is None or step is None or step.given is not self.graphs.given:
            return None
        rest = _part(request, [-1 if token == request.pad else token for token in request.tokens], slice(None))
        targets, counts = self._rows(rest.tokens), [height * width // step.merged for height, width in grids]
        if len(targets) != sum(counts):
            return None
        with clock("crop+embed", images=len(grids)):
            patches = tower.embed_plan([picture.kept], request.plan)

        def launch() -> tuple[Seen, Seen]:
            step.upload(patches, grids, targets)
            chunk.upload([rest])
            with clock("ViT", images=len(grids), vit_patches=len(patches), vit_calls=1):
                features = step.replay()
            with clock(request.stage, tokens=len(rest.tokens), lm_calls=1):
                outputs = chunk.again()
            return outputs, features[: len(targets)].clone().split(counts)

        return _look(request, launch)

    def _chunk(self, tokens: int) -> Step | None:
        bucket = smallest(self.graphs.steps, 1, tokens, True)
        return None if bucket is None else self.graphs.steps[bucket]

    def _rows(self, known: Sequence[int]) -> Tensor:
        """Return which rows of `given` the chunk reads for its tokens −1, in order."""
        unknown = torch.tensor(known, device="cpu") < 0
        return unknown.nonzero().flatten().to(torch.int32) + (len(self.graphs.given) - len(known))


def _part(request: ReencodeAndAppend | CropAndAppend, known: Sequence[int], place: slice) -> Append:
    """Return some of a request's tokens for a step, −1 where something else than an embedding is read."""
    return Append(
        conversation=request.conversation,
        tokens=known[place],
        positions=request.positions[:, place],
        next_position=request.next_position,
    )


def _look(request: ReencodeAndAppend | CropAndAppend, launch: Callable[[], tuple[Seen, Seen]]) -> Look:
    return Look(
        conversation=request.conversation,
        tokens=request.tokens,
        positions=request.positions,
        next_position=request.next_position,
        sampler=request.sampler,
        launch=launch,
    )
