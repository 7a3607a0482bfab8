"""What people are shown of a look is what the model was fed, and what conditioned it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.model.inputs import random_image, tiny_model
from vpt_kernels import control_cross_attention
from vpt_model.app.seen import Watched, conditioning_map, fed, named_cells, reencoded, sights, tinted
from vpt_model.config import ENCODERS
from vpt_model.engine import Engine, perception
from vpt_model.engine.requests import ReencodeAndAppend
from vpt_model.published.encoders import first_resize, smart_resize
from vpt_model.text.tokens import Tokenizer, parse_regions

each_encoder = pytest.mark.parametrize("encoder", ENCODERS)


def make_engine(encoder: str) -> Engine:
    kind = ENCODERS[encoder]
    return Engine(tiny_model(kind), Tokenizer.byte_level(320, kind))


@pytest.mark.parametrize("box", [None, (10, 20, 290, 147), (0, 0, 31, 400)])
def test_pixels_are_those_of_the_published_preprocessing(box: tuple[int, int, int, int] | None) -> None:
    image, policy = random_image(400, 700, seed=1), make_engine("clip").policy
    seen = fed(image, box, policy)
    picture = Image.fromarray(image.numpy())
    reduced = first_resize(picture.crop(box) if box else picture, 512)
    height, width = smart_resize(reduced.height, reduced.width, 28)
    across = reduced.resize((width, reduced.height), Image.Resampling.BICUBIC)  # rows first, as Pillow did by itself
    expected = np.asarray(across.resize((width, height), Image.Resampling.BICUBIC))
    assert (seen.pixels == expected).all() and (seen.patch, seen.merge) == (14, 2)
    assert seen.tokens == height * width // 28**2


@each_encoder
def test_scores_are_what_the_projector_adds(encoder: str) -> None:
    """f + a·k is what the model is fed, for the a that is shown."""
    engine, kept = make_engine(encoder), []
    inner = engine.executor

    class Keep:
        def run(self, requests):
            results = inner.run(requests)
            kept.extend(result for result in results if isinstance(result, ReencodeAndAppend))
            return results

    engine.executor = watched = Watched(engine.model, Keep())
    answer = engine.ask(random_image(120, 200), "what?", looks=[encoder], max_new_tokens=3)
    (scores,) = watched.take()
    assert watched.take() == [] and len(scores) == answer.looks[0].tokens
    (request,) = (result for result in kept if result.control is not None)
    features, control, projector = request.features, request.control, engine.model.projector
    plain, conditioned = (control_cross_attention(features, c, projector) for c in (None, control))
    size = (projector.hidden_size,)
    normed = torch.layer_norm(control, size, projector.condition_norm_weight, projector.condition_norm_bias)
    key = projector.condition_weight @ normed[0] + projector.condition_bias
    torch.testing.assert_close(plain + scores[:, None] * key, conditioned, rtol=1e-4, atol=1e-4)
    assert scores.abs().max() > 0.1
    assert torch.equal(scores, perception.conditioning(engine.model, features, control))


@each_encoder
def test_a_map_lies_over_what_the_re_encoder_was_fed(encoder: str) -> None:
    engine = make_engine(encoder)
    engine.executor = watched = Watched(engine.model, engine.executor)
    image = random_image(120, 200)
    answer = engine.ask(image, "what?", looks=[encoder], max_new_tokens=2)
    (sight,) = sights(engine.model, engine.policy, image, answer, watched.take())
    seen = reencoded(engine.model, image, engine.policy)
    assert sight.map.size == seen.tokens == answer.looks[0].tokens
    height, width, _ = seen.pixels.shape
    step = seen.patch * seen.merge
    assert sight.map.shape == (height // step, width // step)
    assert (sight.seen[0].pixels == seen.pixels).all()


def test_a_map_goes_row_by_row() -> None:
    engine = make_engine("clip")
    answer = engine.ask(random_image(112, 280), "what?", looks=["clip"], max_new_tokens=2)
    look = answer.looks[0]
    shown = conditioning_map(torch.arange(float(look.tokens)), look)
    assert shown.shape == (4, 10) and shown[0, 9] == 9 and shown[1, 0] == 10


def test_a_tint_tells_sign_and_size() -> None:
    shown = tinted(np.array([[2.0, -1.0], [0.0, 1.0]], np.float32))
    assert (shown[0, 0, :3] == shown[1, 1, :3]).all() and (shown[0, 0, :3] != shown[0, 1, :3]).any()
    assert shown[1, 0, 3] == 0 < shown[0, 1, 3] == shown[1, 1, 3] < shown[0, 0, 3]
    assert not np.isnan(tinted(np.zeros((2, 2), np.float32))).any()


def test_cells_and_crops_of_a_region_belong_together() -> None:
    engine, image = make_engine("clip"), random_image(160, 240)
    looks = ["region:x2,y1,x5,y4+x0,y0,x0,y7"]
    answer = engine.ask(image, "what?", looks=looks, max_new_tokens=2)
    (sight,) = sights(engine.model, engine.policy, image, answer)
    assert sight.cells == ((60.0, 20.0, 180.0, 100.0), (0.0, 0.0, 30.0, 160.0)) and len(sight.seen) == 2
    for cells, box in zip(sight.cells, sight.look.boxes, strict=True):
        assert box[0] <= cells[0] < cells[2] <= box[2] and box[1] <= cells[1] < cells[3] <= box[3]
    (region,) = parse_regions("<|region_token_start|><|x_3|><|y_0|><|x_1|><|y_2|><|region_token_end|>")
    assert named_cells(region, 80, 160) == (10.0, 0.0, 40.0, 60.0)
