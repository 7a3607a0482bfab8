"""A patched model on a GPU says what it said unpatched, on either cache; the processor has the pixels of the CPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from tests.helpers import noise, require
from vpt_kernels import QwenVLImageProcessor, patch

require("transformers", None if find_spec("transformers") else "transformers is not installed")

from tests.patch import foreign  # noqa: E402  (needs transformers)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", foreign.QWEN)
@pytest.mark.parametrize("cache", (None, "static"), ids=("dynamic", "static"))
@pytest.mark.parametrize("rows", foreign.PROMPTS.values(), ids=foreign.PROMPTS)
def test_qwen_says_the_same(kind, cache, rows) -> None:
    model = foreign.qwen(kind).cuda()
    given = foreign.prompt(model, rows)
    given.inputs = {name: value.cuda() for name, value in given.inputs.items()}
    before_ids, before = foreign.generate(model, given, cache)
    with patch(model) as report:
        ids, logits = foreign.generate(model, given, cache)
    assert (logits - before).abs().max() < 1e-4 and torch.equal(ids, before_ids)
    assert report.calls == {"linear": 1, "append_visual_kv_": 2 * foreign.NEW_TOKENS}


@pytest.mark.parametrize("kind", foreign.QWEN)
def test_the_processor_follows_the_weights(kind) -> None:
    model, images = foreign.qwen(kind), [noise(200, 300, "gpu"), noise(61, 83, "gpu")]
    boxes = [(0, 10, 20, 250, 190), (1, 0, 0, 83, 61)]
    processor = QwenVLImageProcessor.of(model)
    expected, pixels = processor(images, boxes), processor.patches(images, boxes)
    moved = QwenVLImageProcessor.of(model.cuda())
    found = moved(images, boxes)
    assert torch.equal(moved.patches(images, boxes).cpu(), pixels)
    assert found["pixel_values"].is_cuda and torch.equal(found["image_grid_thw"].cpu(), expected["image_grid_thw"])
    assert (found["pixel_values"].cpu() - expected["pixel_values"]).abs().max() < 1e-4
