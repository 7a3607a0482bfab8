"""One training step: loss and accuracies of a batch of conversations, and the update of the weights."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.mini.conversations import GRID, IGNORE, TOKENS
from examples.mini.network import Network
from vpt_model.checkpoint import random_state
from vpt_model.config import ModelConfig
from vpt_model.mini.scenes import COLOURS, SHAPES, SYMBOLS

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Probability that a re-encoding is answered without its question and first look, as in the published training: what
# the answer needs must then come through the control state.
_BLANK = 0.5
_WEIGHT_DECAY = 0.02
_COLOURS, _SHAPES = 1 + len(COLOURS), 1 + len(SHAPES)
_HINT, _GAZE = 0.5, 0.3


def initial_state(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """`random_state` with branches that begin small, so that the residual stream is the input at first."""
    state = random_state(config, seed)
    depth = config.num_hidden_layers + config.vision.depth
    for name, tensor in state.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.fc2.weight")):
            tensor.mul_((2 * depth) ** -0.5)
        elif name.endswith("linear_condition.weight"):
            tensor.mul_(0.3)
        elif name.endswith("bias"):
            tensor.zero_()
    return state


class Learner:
    """Weights, optimizers and the forward pass over packed batches (`conversations.batch`)."""

    def __init__(self, config: ModelConfig, seed: int, rate: float, device: str = "cpu", low: bool = False) -> None:
        self.config, self.device, self.rate, self.low = config, torch.device(device), rate, low
        state = {name: tensor.to(self.device).requires_grad_() for name, tensor in initial_state(config, seed).items()}
        state[HEAD] = state[EMBEDDING]
        self.state, self.network = state, Network(config, GRID, self.device)
        # Used in training only: what the vision tower's tokens tell, read by one linear layer.
        width = config.hidden_size
        shapes = {"tags": (2 * len(SYMBOLS), width), "cells": (4 * (_COLOURS + _SHAPES), width), "places": (8, width)}
        options = {"device": self.device, "requires_grad": True}
        self.readers = {name: torch.zeros(shape, **options) for name, shape in shapes.items()}
        own = {name: tensor for name, tensor in state.items() if name != HEAD}
        matrices = {n for n, t in own.items() if t.dim() == 2 and n != EMBEDDING and not n.endswith("_feature.weight")}
        self.optimizers = [
            torch.optim.Muon(
                [own[n] for n in own if n in matrices],
                lr=rate,
                weight_decay=_WEIGHT_DECAY,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                [*(own[n] for n in own if n not in matrices and "_feature." not in n), *self.readers.values()],
                lr=rate,
                betas=(0.9, 0.98),
                weight_decay=0.0,
            ),
        ]
        self.random = torch.Generator().manual_seed(seed)

    def step(self, batch: dict[str, Any], scale: float) -> tuple[float, dict[str, list[bool]]]:
        """Learn from one batch at `scale` times the rate; the loss, and by kind of conversation what was all right."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * scale
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
            loss, right = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for o in self.optimizers for g in o.param_groups for p in g["params"]], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item(), right

    def save(self, path: Path, step: int, elapsed: float) -> None:
        """Write everything that `load` needs; the file appears when it is complete."""
        partial = path.with_suffix(".incomplete")
        content = {
            "state": self.state,
            "readers": self.readers,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": self.random.get_state(),
            "step": step,
            "elapsed": elapsed,
        }
        torch.save(content, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> tuple[int, float]:
        """Continue from a saved learner of the same configuration; its step and elapsed seconds."""
        content = torch.load(path, map_location=self.device, weights_only=True)
        with torch.no_grad():
            for own, saved in ((self.state, content["state"]), (self.readers, content["readers"])):
                for name, tensor in saved.items():
                    own[name].copy_(tensor)
        for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.random.set_state(content["random"].cpu())
        return content["step"], content["elapsed"]

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, list[bool]]]:
        features = self.network.see(self.state, self._tensor(batch["patches"])).float()
        total, count, right = 0.0, 0.0, defaultdict(list)
        for group in batch["groups"]:
            loss, weight, good = self._group(group, features)
            total, count = total + loss, count + weight
            for name, answers in good.items():
                right[name] += answers
        hints = self._hint(batch, features, right)
        return total / count + _HINT * hints, right

    def _hint(self, batch: dict[str, Any], features: Tensor, right: dict[str, list[bool]]) -> Tensor:
        """Loss of reading what the single tokens should tell: a picture's cells, a crop's tag, its own place."""
        cells = F.linear(features[self._tensor(batch["pictures"])], self.readers["cells"]).float()
        colours, shapes = cells.unflatten(2, (4, -1)).split([_COLOURS, _SHAPES], dim=-1)
        wanted = self._tensor(batch["cells"])
        loss = sum(
            # An empty cell is the rule: it counts a fifth.
            F.cross_entropy(
                part.flatten(0, 2),
                wanted[..., i].flatten(),
                weight=torch.tensor([0.2] + [1.0] * (part.shape[-1] - 1), device=self.device),
            )
            for i, part in enumerate((colours, shapes))
        )
        # The tower knows relative positions only; where a token is, it must find out from the picture's edges.
        places = F.linear(features, self.readers["places"]).float().view(len(features), 4, 4, 2, 4)
        side = torch.arange(4, device=self.device)
        actual = torch.stack([side[:, None].expand(4, 4), side.expand(4, 4)], dim=-1).expand(len(features), 4, 4, 2)
        loss = loss + F.cross_entropy(places.flatten(0, 3), actual.flatten())
        right["hint: place"] += (places.argmax(-1) == actual).all(-1).flatten(1).all(1).tolist()
        there = wanted[..., 0] > 0
        found = (colours.argmax(-1) == wanted[..., 0]) & (shapes.argmax(-1) == wanted[..., 1])
        right["hint: object"] += found[there].tolist()
        if len(batch["crops"]):
            middle = features[self._tensor(batch["crops"])].unflatten(1, (4, 4))[:, 1:3, 1:3].flatten(1, 2)
            tags = F.linear(middle, self.readers["tags"]).float().unflatten(2, (2, -1))
            expected = self._tensor(batch["tags"])[:, None].expand(-1, 4, -1)
            loss = loss + F.cross_entropy(tags.flatten(0, 2), expected.flatten())
            right["hint: tag"] += (tags.mean(1).argmax(-1) == expected[:, 0]).all(1).tolist()
        return loss

    def _group(self, group: dict[str, Any], features: Tensor) -> tuple[Tensor, float, dict[str, list[bool]]]:
        tokens, positions = self._tensor(group["tokens"]), self._tensor(group["positions"])
        targets, weights = group["targets"], group["weights"]
        embeds = F.embedding(tokens, self.state[EMBEDDING])
        rows, columns = self._tensor(group["pads"]).unbind(1)
        embeds = embeds.index_put((rows, columns), features.flatten(0, 1)[self._tensor(group["sources"])])
        if len(group["actions"]):
            embeds, targets = self._reencode(group, embeds, positions, features)
        asked = tuple(self._tensor(group["asked"]).unbind(1)) if len(group["asked"]) else None
        hidden, gaze = self.network.read(self.state, embeds, positions, asked)
        hidden = hidden.float()
        spoken = np.nonzero(targets != IGNORE)
        at = tuple(self._tensor(index) for index in spoken)
        logits = self.network.logits(self.state, hidden[at])
        expected, weight = self._tensor(targets[spoken]), self._tensor(weights[spoken])
        losses = F.cross_entropy(logits, expected, reduction="none")
        good = (logits.argmax(-1) == expected).cpu().numpy()
        loss = (losses * weight).sum()
        if gaze is not None:
            number, seen = self._tensor(group["seen"]).unbind(1)
            shares = self._tensor(group["seen_shares"])
            loss = loss - _GAZE * (gaze[number, :, seen].mean(1) * shares).sum()
        return loss, float(weight.sum()), _accuracies(group, spoken, good)

    def _reencode(
        self, group: dict[str, Any], embeds: Tensor, positions: Tensor, features: Tensor
    ) -> tuple[Tensor, np.ndarray]:
        """Embeddings with the control state and the conditioned features in place; targets without what is blanked."""
        actions = self._tensor(group["actions"])
        rows, starts, pads = actions.unbind(1)
        end = int(starts.max()) + 1
        control, _ = self.network.read(self.state, embeds[rows, :end], positions[rows, :, :end])
        control = control[torch.arange(len(rows), device=self.device), starts].float()
        seen = self.network.reencode(self.state, features[self._tensor(group["action_sources"])], control).float()
        embeds = embeds.index_put((rows, starts + 1), control)
        columns = pads[:, None] + torch.arange(TOKENS, device=self.device)
        embeds = embeds.index_put((rows[:, None].expand_as(columns), columns), seen)
        keep, targets = torch.ones(embeds.shape[:2]), group["targets"].copy()
        blanked = torch.rand(len(rows), generator=self.random) < _BLANK
        for (row, *_), (begin, stop), blank in zip(group["actions"], group["blanks"], blanked, strict=True):
            if blank:
                keep[row, begin:stop] = 0.0
                targets[row][group["turn"][row] == 0] = IGNORE
        return embeds * keep[..., None].to(self.device), targets

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _accuracies(group: dict[str, Any], spoken: tuple[np.ndarray, ...], good: np.ndarray) -> dict[str, list[bool]]:
    """By kind: whether all tokens of the last turn, and (kind "…→look") of the turn before it, are right."""
    rows, columns = spoken
    turns = group["turn"][rows, columns]
    found = defaultdict(list)
    for row, name in enumerate(group["names"]):
        for turn, label in ((1, name), (0, f"{name}→look")):
            here = (rows == row) & (turns == turn)
            if here.any():
                found[label].append(bool(good[here].all()))
    return found
