"""A conversation written down part by part, then computed in a single prefill: what the engine must agree with."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vpt_model.engine import Engine
from vpt_model.engine.events import Answer
from vpt_model.network.positions import mrope_positions
from vpt_model.published.encoders import Weights, project
from vpt_model.text.prompt import action_round, first_round, region_round

Box = tuple[int, int, int, int]


class Replay:
    """One conversation of `engine`, whose projector has the weights `state`."""

    def __init__(
        self, engine: Engine, question: str, image: torch.Tensor | None, state: Mapping[str, torch.Tensor]
    ) -> None:
        self.model, self.policy, self.ids = engine.model, engine.policy, engine.ids
        self.encode = engine.tokenizer.encode
        self.projector = Weights(state, f"{self.ids.kind}_projector.")
        self.image, self.tokens, self.grids = image, [], []
        self.embeds = torch.empty(0, self.model.config.hidden_size, dtype=self.model.dtype)
        system, user = (
            self.encode(text) for text in (engine.prompt.system, engine.prompt.user_text(question, image is not None))
        )
        if image is None:
            self.add(first_round(self.ids, system, user, None))
        else:
            self.whole = (0, 0, image.shape[1], image.shape[0])
            self.first = self.look(self.whole)
            self.add(first_round(self.ids, system, user, len(self.first)), self.first)

    def look(self, box: Box) -> torch.Tensor:
        (features,), grids = self.model.vision.look([self.image], [(0, *box)], self.policy)
        self.grids += grids
        return features

    def add(self, tokens: list[int], features: torch.Tensor | None = None) -> None:
        ids = torch.tensor(tokens, dtype=torch.int64)
        embeds = self.model.language.embed(ids)
        if features is not None:
            embeds[ids == self.ids.image_pad] = features
        self.tokens += tokens
        self.embeds = torch.cat([self.embeds, embeds])

    def hidden(self) -> torch.Tensor:
        positions, _ = mrope_positions(torch.tensor(self.tokens), self.grids, 0, self.ids.image_pad)
        cache = self.model.language.new_cache(len(self.tokens))
        return self.model.language.forward(self.embeds, positions, [cache], [len(self.tokens)])

    def region(self, boxes: list[Box]) -> None:
        crops = [self.look(box) for box in boxes]
        self.add(region_round(self.ids, [len(crop) for crop in crops], self.encode), torch.cat(crops))

    @torch.inference_mode()
    def action(self) -> None:
        """The action span and the re-encoded image, by the published formula."""
        self.add([self.ids.action_start])
        control, encoder = self.hidden()[-1:], self.model.encoder
        features = [self.first]
        if encoder is not None:
            features = encoder(encoder.embed_regions([self.image], [(0, *self.whole)]))
        special = project(self.ids.kind, self.projector, features, control)
        tokens, begin = action_round(self.ids, len(special)), len(self.tokens)
        self.add(tokens)
        self.embeds[begin] = control[0]
        self.embeds[begin:][torch.tensor(tokens) == self.ids.kind_pad] = special

    def check(self, answer: Answer) -> None:
        """The answer's logits and ids are those of one prefill of this conversation and the answer."""
        begin, last = len(self.tokens) - 1, self.tokens[-1]
        self.add(answer.ids[:-1])
        for i, token in enumerate(answer.ids[:-1]):
            if token == self.ids.action:
                self.embeds[begin + 1 + i] = self.hidden()[begin + i]
        logits = self.model.language.logits(self.hidden()[begin:])
        assert (answer.logits - logits).abs().max() <= (1e-4 if self.model.dtype == torch.float32 else 1e-6)
        assert answer.ids == [
            self.ids.action if before == self.ids.action_start else int(row.argmax())
            for before, row in zip([last, *answer.ids], logits, strict=False)
        ]
