"""Scenes into whole conversations for teacher forcing, laid out by the functions that the engine uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from vpt_kernels import plan_regions, qwen2_vl_policy, roi_patches
from vpt_model.config import PRESETS
from vpt_model.mini.scenes import COLOURS, SHAPES, SIDE, SYMBOLS, Question, Scene, Thing, make_question, make_scene
from vpt_model.mini.vocabulary import DIRECT_TRIGGER, LOOK_TRIGGERS, tokenizer
from vpt_model.network.positions import mrope_positions
from vpt_model.text.prompt import PromptFormat, action_round, first_round, region_round
from vpt_model.text.tokens import crop_box, parse_look, parse_region_ids

CONFIG = PRESETS["mini"]
POLICY = qwen2_vl_policy(longest_edge=CONFIG.image_resolution)
GRID = (8, 8)
"""Patches of every look: the first one and each crop of 3×3 cells have the same size."""
TOKENS = GRID[0] * GRID[1] // 4
STAGES = {
    "parts": ("read", "point", "point", "point", "point", "attribute", "attribute", "count", "count"),
    "whole": ("tag", "two tags", "point", "point", "attribute", "count"),
}
"""The conversations about one scene: first reading crops and naming cells apart, then everything at once.

"read" shows a crop as the only image; "point" ends with the region's span."""
EXPERIMENTS = ("first-look", "crop")
"""Control experiments: every question answered from the first look, or only crops read."""
MODES = ("free", "look", "direct")
_MODE_SHARES = (0.6, 0.2, 0.2)
_CROPS = 3
_MIDDLE = (5, 6, 9, 10)
_SPACE = tokenizer().encode(" ")[0]
IGNORE = -100


@dataclass(frozen=True)
class Row:
    """One conversation. `targets[i]` is what follows token i, IGNORE where the model does not speak.

    name: kind and mode. answers: index from which the last turn's targets begin. looks: what the image pads show, the
    scene's looks in order (0: the whole picture, 1 + i: the crop of thing i). blank: slice of the first user turn.
    gazes: index of a token, and of those that what follows it depends on.
    """

    name: str
    tokens: list[int]
    targets: list[int]
    answers: int
    looks: list[int]
    blank: tuple[int, int]
    weight: float = 1.0
    gazes: tuple[tuple[int, tuple[int, ...]], ...] = ()


def converse(scene: Scene, question: Question, mode: str) -> Row:
    """The conversation that answers the question by the path that `mode` asks for."""
    words = tokenizer()
    ids = words.ids
    path = {"free": question.look, "direct": None, "look": question.look or "clip"}[mode]
    trigger = {"free": None, "direct": DIRECT_TRIGGER, "look": LOOK_TRIGGERS[path and path.partition(":")[0]]}[mode]
    layout = PromptFormat(trigger=trigger)
    user = words.encode(layout.user_text(question.text, image=True))
    tokens, looks = first_round(ids, words.encode(layout.system), user, TOKENS), [0]
    targets = [IGNORE] * len(tokens)
    starts = [i for i, token in enumerate(tokens) if token == ids.im_start]
    blank = (starts[1] + 1, tokens.index(ids.im_end, starts[1]))

    def say(*spoken: int) -> None:
        targets[-1] = spoken[0]
        targets.extend([*spoken[1:], IGNORE])
        tokens.extend(spoken)

    def show(shown: Sequence[int]) -> None:
        targets.extend([IGNORE] * len(shown))
        tokens.extend(shown)

    if path == "clip":
        say(ids.action_start)
        show(action_round(ids, TOKENS))
    elif path is not None:
        # The turn's end is said here and is the first token of the second round's frame.
        say(*parse_look(path, ids))
        looks += [1 + scene.things.index(thing) for thing in question.things]
        if question.kind == "point":
            gazes = _gazes(tokens, targets, len(tokens), question, scene)
            return Row("point", tokens, targets, len(tokens), looks[:1], blank, gazes=gazes)
        show(region_round(ids, [TOKENS] * len(question.things), words.encode)[1:])
    answers = len(tokens) - 1
    say(*words.encode(question.answer), ids.im_end)
    gazes = _gazes(tokens, targets, answers, question, scene)
    hopeless = path is None and question.look not in (None, "clip")
    name = "read" if question.kind == "read" else f"{question.kind}/{mode}"
    # What cannot be seen must be guessed as well as possible, at little cost for the rest.
    return Row(name, tokens, targets, answers, looks, blank, 0.3 if hopeless else 1.0, gazes)


def _gazes(
    tokens: list[int], targets: list[int], answers: int, question: Question, scene: Scene
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """For each token that names a cell or an answer: the visual tokens that tell it."""
    ids = tokenizer().ids
    images = [i + 1 for i, token in enumerate(tokens) if token == ids.vision_start]
    spoken = [i for i, target in enumerate(targets) if target != IGNORE]
    found = []
    cells = {ids.x, ids.y}
    named = [i for i in spoken if i < answers and any(targets[i] in axis for axis in cells)]
    for number, i in enumerate(named):
        found.append((i, (images[0] + _token(question.things[number // 4]),)))
    if question.kind == "count":
        # Beside those that count, one that always does: of their share the number can be told.
        counted = [t for t in scene.things if f" {t.colour}?" in question.text]
        found.append((answers, (images[-1] - 1, *(images[-1] + _token(thing) for thing in counted))))
    elif question.kind != "point":
        cropped = len(images) > len(question.things) or question.kind == "read"
        told = [i for i in spoken if i >= answers and targets[i] not in (ids.im_end, _SPACE)]
        for number, i in enumerate(told):
            thing = number // 2 if question.kind != "attribute" else 0
            if question.kind == "attribute" or not cropped:
                found.append((i, (images[-1] + _token(question.things[thing]),)))
            else:
                first = images[thing if question.kind == "read" else 1 + thing]
                found.append((i, tuple(first + token for token in _MIDDLE)))
    return tuple(found)


def _token(thing: Thing) -> int:
    return thing.row // 2 * (GRID[1] // 2) + thing.column // 2


def read_crop(scene: Scene, index: int) -> Row:
    """A conversation whose only image is the crop of one thing."""
    thing = scene.things[index]
    row = converse(scene, Question("read", "What is on the tag?", thing.tag, None, (thing,)), "free")
    return replace(row, looks=[1 + index])


def conversations(scene: Scene, seed: int, stage: str, control: str | None = None) -> list[Row]:
    """The stage's conversations about the scene, or those of a control experiment (`EXPERIMENTS`)."""
    random = np.random.default_rng([3, seed])
    rows = []
    for number, kind in enumerate(STAGES[stage]):
        if control == "crop" or (kind == "read" and control is None):
            rows.append(read_crop(scene, int(random.integers(len(scene.things)))))
            continue
        kind = "tag" if kind == "read" else kind
        question = make_question(scene, "tag" if kind == "point" else kind, 8 * seed + number)
        if kind == "point":
            question = Question("point", question.text, question.answer, question.look, question.things)
        mode = MODES[random.choice(3, p=_MODE_SHARES)] if stage == "whole" else "free"
        rows.append(converse(scene, question, "direct" if control == "first-look" else mode))
    return rows


@cache
def _positions(pads: tuple[int, ...], length: int, images: int) -> np.ndarray:
    shown = torch.zeros(length, dtype=torch.int64)
    shown[list(pads)] = 1
    return mrope_positions(shown, [GRID] * images, 0, 1)[0].numpy()


def positions(row: Row) -> np.ndarray:
    """M-RoPE positions int64 [3, T]."""
    pad = tokenizer().ids.image_pad
    pads = tuple(i for i, token in enumerate(row.tokens) if token == pad)
    return _positions(pads, len(row.tokens), len(row.looks))


def patches(scenes: Sequence[Scene], wanted: Sequence[Sequence[int]]) -> np.ndarray:
    """The looks as the vision tower gets them, uint8 [looks, 64, 588]; wanted[i]: looks of scene i (see `Row`)."""
    boxes, ids = [], tokenizer().ids
    for number, (scene, looks) in enumerate(zip(scenes, wanted, strict=True)):
        for look in looks:
            box = (0, 0, SIDE, SIDE)
            if look:
                span = parse_look(f"region:{scene.things[look - 1].look}", ids)
                box = crop_box(parse_region_ids(span, ids)[0], SIDE, SIDE)
            boxes.append((number, *box))
    plan = plan_regions([(SIDE, SIDE)] * len(scenes), boxes, POLICY)
    if set(plan.grids) != {GRID}:
        raise ValueError(f"looks have the grids {set(plan.grids)}; training needs {GRID} for all of them")
    cut = roi_patches([torch.from_numpy(scene.pixels) for scene in scenes], plan)
    return cut.view(len(boxes), GRID[0] * GRID[1], -1).numpy()


def batch(seeds: Sequence[int], stage: str, control: str | None = None) -> dict:
    """Everything a training step needs of the scenes with these seeds, as arrays; rows are grouped by length."""
    scenes = [make_scene(seed, "train") for seed in seeds]
    by_scene = [conversations(scene, seed, stage, control) for scene, seed in zip(scenes, seeds, strict=True)]
    wanted = [sorted({0, *(look for row in rows for look in row.looks)}) for rows in by_scene]
    if control != "first-look":
        # Crops that no conversation needs still teach the vision tower to read (`Learner._hint`).
        wanted = [sorted({*looks, *range(1, 1 + _CROPS)}) for looks in wanted]
    place, count = [], 0
    for looks in wanted:
        place.append({look: count + i for i, look in enumerate(looks)})
        count += len(looks)
    rows = [(row, place[i]) for i, group in enumerate(by_scene) for row in group]
    rows.sort(key=lambda item: len(item[0].tokens))
    groups, limit = [], 0
    for item in rows:
        if len(item[0].tokens) > limit:
            limit = max(int(len(item[0].tokens) * 1.35), 64)
            groups.append([])
        groups[-1].append(item)
    return {"patches": patches(scenes, wanted), "groups": [_collate(group) for group in groups]} | _hints(scenes, place)


def _hints(scenes: Sequence[Scene], place: Sequence[dict[int, int]]) -> dict[str, np.ndarray]:
    """What the vision tower's tokens should tell: of the whole picture each cell's colour and shape, of a crop its tag.

    pictures: looks that are whole pictures; cells: int64 [pictures, tokens, 4, 2], 0 where there is no object.
    crops: the other looks; tags: int64 [crops, 2], symbols.
    """
    cells = np.zeros((len(scenes), 4, 2, 4, 2, 2), np.int64)
    crops, tags = [], []
    for number, scene in enumerate(scenes):
        for index, thing in enumerate(scene.things):
            at = number, thing.row // 2, thing.row % 2, thing.column // 2, thing.column % 2
            cells[at] = 1 + list(COLOURS).index(thing.colour), 1 + SHAPES.index(thing.shape)
            if 1 + index in place[number]:
                crops.append(place[number][1 + index])
                tags.append([SYMBOLS.index(symbol) for symbol in thing.tag])
    return {
        "pictures": np.array([looks[0] for looks in place], np.int64),
        "cells": cells.transpose(0, 1, 3, 2, 4, 5).reshape(len(scenes), TOKENS, 4, 2),
        "crops": np.array(crops, np.int64),
        "tags": np.array(tags, np.int64).reshape(-1, 2),
    }


def _collate(rows: Sequence[tuple[Row, dict[int, int]]]) -> dict:
    ids, longest = tokenizer().ids, max(len(row.tokens) for row, _ in rows)
    shape = (len(rows), longest)
    tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    weights, where = np.zeros(shape, np.float32), np.zeros((len(rows), 3, longest), np.int64)
    turn = np.zeros(shape, np.int64)
    pads, sources, actions, action_sources, blanks, gazes = [], [], [], [], [], []
    for r, (row, place) in enumerate(rows):
        length = len(row.tokens)
        tokens[r, :length], targets[r, :length] = row.tokens, row.targets
        weights[r], where[r, :, :length] = row.weight, positions(row)
        turn[r, row.answers :] = 1
        at = [i for i, token in enumerate(row.tokens) if token == ids.image_pad]
        pads += [(r, i) for i in at]
        sources += [place[look] * TOKENS + i for look in row.looks for i in range(TOKENS)]
        gazes += [(r, i, seen) for i, seen in row.gazes]
        if ids.action_start in row.tokens:
            actions.append((r, row.tokens.index(ids.action_start), row.tokens.index(ids.kind_pad)))
            action_sources.append(place[0])
            blanks.append(row.blank)
    return {
        "names": [row.name for row, _ in rows],
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "turn": turn,
        "positions": where,
        "asked": np.array([gaze[:2] for gaze in gazes], np.int64).reshape(-1, 2),
        "seen": np.array([(n, token) for n, (*_, seen) in enumerate(gazes) for token in seen], np.int64).reshape(-1, 2),
        "seen_shares": np.array([1 / len(seen) for *_, seen in gazes for _ in seen], np.float32),
        "pads": np.array(pads, np.int64).reshape(-1, 2),
        "sources": np.array(sources, np.int64),
        "actions": np.array(actions, np.int64).reshape(-1, 3),
        "action_sources": np.array(action_sources, np.int64),
        "blanks": np.array(blanks, np.int64).reshape(-1, 2),
    }
