"""`patch` on a model with the names and structure of the authors' own: the same logits, through the kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import assert_same_bits, normal
from tests.patch import published
from tests.patch.foreign import filled
from tests.patch.published import PADS, inputs
from vpt_kernels import patch

BOUND, TOKENS = 1e-4, 16
KINDS = tuple(published.PROJECTORS)
each_kind = pytest.mark.parametrize("kind", KINDS)


@torch.no_grad()
def decode(model: nn.Module, kind: str) -> tuple[list[int], Tensor]:
    """Ids and logits of greedy decoding behind the prompt: the prefill and 15 tokens."""
    given = inputs(kind)
    out = model(**given, past_key_values=published.DynamicCache())
    position, ids, logits = int(given["position_ids"].max()) + 1, [], [out.logits[0, -1]]
    # An action or a pad without its image means nothing to the model.
    special = torch.tensor([published.IMAGE, published.ACTION_START, published.ACTION, published.PAD])
    for step in range(TOKENS - 1):
        ids.append(int(logits[-1].index_fill(0, special, float("-inf")).argmax()))
        fresh = torch.tensor([[ids[-1]]])
        where = torch.full((3, 1, 1), position + step)
        out = model(fresh, where, past_key_values=out.past_key_values)
        logits.append(out.logits[0, -1])
    assert out.past_key_values._seen_tokens == given["input_ids"].shape[1] + TOKENS - 1
    return ids, torch.stack(logits)


@each_kind
def test_it_says_the_same(kind: str) -> None:
    model = filled(published.VPT_Qwen2VLForConditionalGeneration(kind))
    before_ids, before = decode(model, kind)
    with patch(model) as report:
        ids, logits = decode(model, kind)
    assert (logits - before).abs().max() < BOUND < before.std() and ids == before_ids
    assert_same_bits(decode(model, kind)[1], before)
    plain = "original: without a condition there is nothing to compute"
    projector = {"control_cross_attention": 1, plain: 1} if kind == "clip" else {"control_cross_attention": 2}
    passes = 2 * TOKENS
    assert report.calls == {"linear": 1, "append_visual_kv_": 2 * passes, **projector}


def padded(kind: str) -> dict[str, Tensor]:
    """Two rows, the shorter one padded at the left: two images and two looks, one image and one look."""
    looks = [[published.ACTION_START, published.ACTION, 9, *[published.PAD] * pads, 11] for pads in PADS[kind]]
    image = [*[published.IMAGE] * 6, 7]
    texts = [[5, 6, *image, 8, *image, *looks[0], *looks[1]], [5, *image, *looks[2]]]
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts])
    given = inputs(kind) | {"input_ids": ids, "attention_mask": mask, "pixel_values": normal(72, 1176, key="three")}
    return given | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0).repeat(3, 1, 1)}


@each_kind
@torch.no_grad()
def test_a_padded_batch_of_three_images(kind: str) -> None:
    """The prefill and a step behind it; the padding of one row says nothing to the other."""
    model, given = filled(published.VPT_Qwen2VLForConditionalGeneration(kind)), padded(kind)
    mask = given["attention_mask"]

    def run() -> tuple[Tensor, Tensor]:
        out = model(**given, past_key_values=published.DynamicCache())
        longer = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        places = mask.sum(1).repeat(3, 1)[..., None]
        step = model(torch.tensor([[7], [8]]), places, out.past_key_values, attention_mask=longer)
        return out.logits, step.logits

    before = run()
    with patch(model) as report:
        after = run()
    for a, b in zip(after, before):
        assert (a - b).abs().max() < BOUND < b.std()
    assert report.calls["control_cross_attention"] == (1 if kind == "clip" else 2)
    assert report.calls["append_visual_kv_"] == 8


@each_kind
def test_the_condition_matters(kind: str) -> None:
    """The bound is tight enough: a projector without its update moves the logits far beyond it."""
    model = filled(published.VPT_Qwen2VLForConditionalGeneration(kind))
    before = decode(model, kind)[1]
    projector = getattr(model, f"{kind}_projector")
    with torch.no_grad():
        projector.linear_condition.weight.mul_(1.01)
    assert (decode(model, kind)[1] - before).abs().max() > 10 * BOUND


@each_kind
def test_weights_may_change_while_patched(kind: str) -> None:
    model = filled(published.VPT_Qwen2VLForConditionalGeneration(kind))
    with patch(model), torch.no_grad():
        decode(model, kind)
        for parameter in getattr(model, f"{kind}_projector").parameters():
            parameter.mul_(1.1)
        logits = decode(model, kind)[1]
    assert (logits - decode(model, kind)[1]).abs().max() < BOUND


def test_intermediates_and_gradients_take_the_old_way() -> None:
    projector = filled(published.PROJECTORS["detection"]())
    features, control = normal(2, 5, 48, key="f"), normal(2, published.HIDDEN, key="c")
    with patch(projector) as report:
        with torch.no_grad():
            _, intermediate = projector(features, control, output_intermediate=True)
        projector(features, control)[0].sum().backward()
    assert intermediate["attention"].shape == (2, 5) and projector.linear_feature.weight.grad is not None
    assert report.calls == {"original: intermediate outputs are wanted": 1, "original: gradients are enabled": 1}


@pytest.mark.parametrize(
    "kind, change, reason",
    [
        ("detection", lambda m: setattr(m, "projector_scale", 2), "projector_scale is 2"),
        ("detection", lambda m: setattr(m.layernorm_feature, "eps", 1e-6), "eps 1e-06"),
        ("detection", lambda m: setattr(m, "linear_feature", nn.Linear(48, 48)), "feature weight has shape"),
        ("detection", lambda m: delattr(m, "layernorm_condition"), "no attribute layernorm_condition"),
        ("seg", lambda m: delattr(m, "conv_feature"), "no attribute conv_feature"),
        ("seg", lambda m: setattr(m, "conv_feature", nn.Conv2d(16, published.HIDDEN, 2)), "feature weight has shape"),
        ("clip", lambda m: setattr(m, "linear_condition", nn.Identity()), "not a plain Linear"),
        ("clip", lambda m: delattr(m, "spatial_merge_size"), "no attribute spatial_merge_size"),
    ],
)
def test_projectors_that_only_look_right_are_refused(kind, change, reason) -> None:
    projector = copy.deepcopy(published.PROJECTORS[kind]())
    change(projector)
    with pytest.raises(ValueError, match=reason):
        patch(projector)
