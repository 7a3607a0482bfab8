"""The pictures and questions of vpt-mini: determined by their seed, answerable, and unreadable at the first look."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vpt_kernels import plan_regions, qwen2_vl_policy
from vpt_model.config import PRESETS
from vpt_model.mini.scenes import KINDS, PHOTOS, SHAPES, SIDE, SYMBOLS, crop, fingerprint, make_question, make_scene
from vpt_model.mini.vocabulary import tokenizer
from vpt_model.text.tokens import crop_box, parse_look, parse_region_ids

RESOLUTION = PRESETS["mini"].image_resolution


def boxes(look: str) -> list[tuple[int, int, int, int]]:
    ids = tokenizer().ids
    return [crop_box(span, SIDE, SIDE) for span in parse_region_ids(parse_look(look, ids), ids)]


def test_a_seed_makes_the_same_scene_in_another_process() -> None:
    program = (
        "import hashlib; from vpt_model.mini.scenes import *;"
        "s = make_scene(7, 'test'); q = [make_question(s, k, 7) for k in KINDS];"
        "print(hashlib.sha256(s.pixels.tobytes() + repr((s.things, q)).encode()).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in "ab"]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout.strip()) == 64


def test_seeds_and_splits_make_different_scenes() -> None:
    scenes = [make_scene(seed, split).pixels for split in PHOTOS for seed in range(5)]
    assert len({pixels.tobytes() for pixels in scenes}) == 10
    assert not set(PHOTOS["train"]) & set(PHOTOS["test"])


def test_the_first_look_and_every_crop_are_eight_by_eight_patches_and_crops_lose_no_pixel() -> None:
    policy = qwen2_vl_policy(longest_edge=RESOLUTION)
    for seed in range(20):
        scene = make_scene(seed, "test")
        wanted = [(0, 0, SIDE, SIDE), *(box for thing in scene.things for box in boxes(f"region:{thing.look}"))]
        plan = plan_regions([(SIDE, SIDE)], [(0, *box) for box in wanted], policy)
        assert set(plan.grids) == {(8, 8)}
        assert all(max(right - left, bottom - top) <= RESOLUTION for left, top, right, bottom in wanted[1:])


def test_objects_keep_their_distance_and_differ() -> None:
    for seed in range(50):
        things = make_scene(seed, "train").things
        assert 3 <= len(things) <= 5 and len({(t.colour, t.shape) for t in things}) == len(things)
        for a, b in ((a, b) for a in things for b in things if a is not b):
            assert max(abs(a.column - b.column), abs(a.row - b.row)) >= 2
        assert all(len(t.tag) == 2 and set(t.tag) <= set(SYMBOLS) for t in things)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_have_one_true_answer(kind: str) -> None:
    for seed in range(50):
        scene = make_scene(seed, "train")
        question = make_question(scene, kind, seed)
        assert question == make_question(scene, kind, seed)
        named = [t for t in scene.things if f"{t.colour} {t.shape}" in question.text]
        if kind in ("tag", "two tags"):
            assert sorted(t.tag for t in named) == sorted(question.answer.split())
            assert boxes(question.look) == [boxes(f"region:{t.look}")[0] for t in question.things]
        elif kind == "count":
            assert question.answer == str(sum(f" {t.colour}?" in question.text for t in scene.things))
        else:
            [thing] = question.things
            asked = thing.shape if question.answer == thing.colour else thing.colour
            assert (
                asked in question.text
                and Counter(t.shape if asked in SHAPES else t.colour for t in scene.things)[asked] == 1
            )


def test_questions_and_answers_are_short_in_tokens() -> None:
    """Every word of the task is one token: "What is on the tag of the red circle?" has ten."""
    scene = make_scene(3, "train")
    question = make_question(scene, "tag", 3)
    assert len(tokenizer().encode(question.text)) == 10 and len(tokenizer().encode(question.answer)) == 2


def test_a_crop_is_the_original_s_pixels() -> None:
    scene = make_scene(11, "test")
    for thing in scene.things:
        [box] = boxes(f"region:{thing.look}")
        assert np.array_equal(crop(scene, thing), np.asarray(Image.fromarray(scene.pixels).crop(box)))


def test_unknown_splits_and_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="valid.*train, test"):
        make_scene(0, "valid")
    with pytest.raises(ValueError, match="riddle.*tag"):
        make_question(make_scene(0, "train"), "riddle", 0)


def test_the_fingerprint_is_of_the_source() -> None:
    assert len(fingerprint()) == 64 and int(fingerprint(), 16)
