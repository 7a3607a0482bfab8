"""What a patched model does with calls and changes that `patch` did not see: what it did unpatched."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tests.helpers import assert_same_bits, normal
from tests.patch import foreign, published
from tests.patch.foreign import BOUND, each_qwen, largest
from tests.patch.published import FEATURES, GRID, inputs
from vpt_kernels import hub, patch
from vpt_kernels.patch.swap import is_swapped

each_kind = pytest.mark.parametrize("kind", tuple(published.PROJECTORS))


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {kind: foreign.qwen(kind) for kind in foreign.QWEN}


def projection(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A projector of the published model, and a call for three images."""
    given = {"hidden_states": normal(*FEATURES[kind], key="f"), "conditions": normal(3, published.HIDDEN, key="c")}
    return foreign.filled(published.PROJECTORS[kind]()), given | ({"grid_thw": GRID} if kind == "clip" else {})


@each_qwen
def test_positions_of_a_batch_of_one(models, kind) -> None:
    """One row of positions for both rows of the batch, in the prefill and in the steps behind it."""
    text = models[kind].model.language_model
    embeds = normal(2, 7, 64, key="broadcast")

    def run() -> tuple[Tensor, Tensor]:
        cache, positions = DynamicCache(config=text.config), torch.arange(7).view(1, 1, -1).expand(3, 1, 7)
        prefill = text(inputs_embeds=embeds, position_ids=positions, past_key_values=cache)
        step = text(inputs_embeds=embeds[:, :1], position_ids=torch.full((3, 1, 1), 7), past_key_values=cache)
        return prefill.last_hidden_state, step.last_hidden_state

    with torch.no_grad():
        before = run()
        with patch(text) as report:
            after = run()
    assert report.calls == {"append_visual_kv_": 4}
    assert largest(after[0], before[0]) < BOUND and largest(after[1], before[1]) < BOUND


@torch.no_grad()
def test_positions_of_a_batch_of_one_for_each_axis() -> None:
    """As before transformers 5: the angles of three axes come to the attention unmixed."""
    text, embeds = foreign.filled(published.LanguageModel()), normal(2, 6, published.HIDDEN, key="axes")
    positions = torch.stack([torch.arange(6), torch.arange(6) // 2, torch.arange(6) % 2])[:, None]
    before, _ = text(embeds, positions, published.DynamicCache(), None)
    with patch(text) as report:
        after, _ = text(embeds, positions, published.DynamicCache(), None)
    assert report.calls["append_visual_kv_"] == 2 and largest(after, before) < BOUND


@each_qwen
def test_autocast_takes_the_old_way(models, kind) -> None:
    model, given = models[kind], foreign.prompt(models[kind], foreign.ONE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(**given.inputs).logits
        with patch(model) as report:
            after = model(**given.inputs).logits
    assert report.calls["original: autocast"] == 2 and not report.calls["append_visual_kv_"]
    assert after.dtype == before.dtype and largest(after, before) < 0.1


def test_a_cache_of_another_dtype_takes_the_old_way(models) -> None:
    text = models["qwen2_vl"].model.language_model
    embeds = normal(1, 7, 64, key="narrow")

    def run() -> Tensor:
        cache = DynamicCache(config=text.config)
        text(inputs_embeds=embeds, past_key_values=cache)
        for layer in cache.layers:
            layer.values = layer.values.bfloat16()
        return text(inputs_embeds=embeds[:, :1], past_key_values=cache).last_hidden_state

    with torch.no_grad():
        before = run()
        with patch(text) as report:
            after = run()
    reason = "original: the cache holds torch.float32 and torch.bfloat16"
    assert report.calls["append_visual_kv_"] == report.calls[reason] == 2 and largest(after, before) < BOUND


@each_kind
def test_a_projector_under_autocast(kind) -> None:
    projector, given = projection(kind)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before, _ = projector(**given)
        with patch(projector) as report:
            after, _ = projector(**given)
    assert_same_bits(after, before)
    assert report.calls == {"original: autocast": 1}


@pytest.mark.parametrize(
    "kind, change, reason",
    [
        ("seg", {"hidden_states": normal(3, 16, 10, 10, key="odd")}, "features have shape (3, 16, 10, 10)"),
        ("detection", {"hidden_states": normal(3, 48, 5, key="turned").transpose(1, 2)}, "features have strides"),
        ("detection", {"conditions": normal(1, published.HIDDEN, key="one")}, "control has shape (1, 64)"),
        ("detection", {"conditions": normal(published.HIDDEN, 3, key="turned").T}, None),
    ],
)
def test_projector_inputs_that_the_operator_does_not_take(kind, change, reason) -> None:
    projector, given = projection(kind)
    given |= change
    with torch.no_grad():
        before, _ = projector(**given)
        with patch(projector) as report:
            after, _ = projector(**given)
    assert largest(after, before) < BOUND
    (way,) = report.calls
    assert way == "control_cross_attention" if reason is None else way.startswith(f"original: {reason}")


class Doubled(nn.Module):
    """As an adapter wraps a layer: it shows the layer's weight and computes something else."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


def embeddings() -> list[tuple[nn.Module, str, Tensor]]:
    """Patch embeddings with the name of their convolution and their input."""
    return [
        (foreign.qwen("qwen2_vl").model.visual.patch_embed, "proj", normal(4, 1176, key="flat")),
        (foreign.dinov2().embeddings.patch_embeddings, "projection", normal(1, 3, 56, 56, key="dinov2")),
        (foreign.sam().vision_encoder.patch_embed, "projection", normal(1, 3, 64, 64, key="sam")),
    ]


@pytest.mark.parametrize("number", range(3), ids=("qwen", "dinov2", "sam"))
def test_a_patch_embedding_that_changes_after_patching(number) -> None:
    module, name, x = embeddings()[number]
    seen = []
    with torch.no_grad(), patch(module) as report:
        plain = module(x)
        hook = getattr(module, name).register_forward_hook(lambda *_: seen.append(1))
        assert largest(module(x), plain) < BOUND and seen == [1]
        hook.remove()
        setattr(module, name, Doubled(getattr(module, name)))
        assert largest(module(x), 2 * plain) < BOUND
    reasons = {"linear": 1, "original: its projection has hooks, which would be skipped": 1}
    kind = type(getattr(module, name).base).__name__
    assert report.calls == reasons | {f"original: its projection is a Doubled, not a plain {kind}": 1}


@each_kind
def test_a_projector_that_changes_after_patching(kind) -> None:
    projector, given = projection(kind)
    seen = []
    with torch.no_grad(), patch(projector) as report:
        projector(**given)
        hook = projector.linear_condition.register_forward_hook(lambda *_: seen.append(1))
        projector(**given)
        hook.remove()
        projector.linear_condition = Doubled(projector.linear_condition)
        after, _ = projector(**given)
    assert seen == [1] and largest(after, projector(**given)[0]) < BOUND
    assert report.calls["control_cross_attention"] == 1 and sum(report.calls.values()) == 3


@each_kind
@pytest.mark.parametrize("way", ("in place", "inference", "data", "assigned"))
def test_weights_that_change_are_folded_anew(kind, way) -> None:
    """At once where autograd or an address tells; after `.data` was written, by patching again."""
    with torch.inference_mode(way == "inference"), torch.no_grad():
        projector, given = projection(kind)
        report = patch(projector)
        projector(**given)
        for parameter in projector.parameters():
            if way == "assigned":
                parameter.data = parameter.data * 1.5
            else:
                (parameter.data if way == "data" else parameter).mul_(1.5)
        if way == "data":
            report.unpatch()
            report = patch(projector)
        after, _ = projector(**given)
        report.unpatch()
        expected, _ = projector(**given)
        assert largest(after, expected) < BOUND * expected.std()
    assert report.calls["control_cross_attention"] == (1 if way == "data" else 2)


@pytest.mark.parametrize("inference", (False, True), ids=("no_grad", "inference_mode"))
def test_angles_that_are_written_anew_are_read_anew(inference) -> None:
    """The same two tensors in every step, as whoever captures the steps of a decoder keeps them."""

    def steps() -> list[Tensor]:
        cos, sin, cache = torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), DynamicCache()
        found = []
        for step in range(3):
            angles = torch.arange(8.0).repeat(2) * (1 + step)
            cos.copy_(angles.cos())
            sin.copy_(angles.sin())
            for layer in layers:
                given = {"position_embeddings": (cos, sin), "past_key_values": cache, "attention_mask": None}
                found.append(layer.self_attn(hidden_states=normal(1, 1, 64, key=step), **given)[0].clone())
        return [*found, *(layer.keys.clone() for layer in cache.layers)]

    layers = foreign.qwen("qwen3_vl").model.language_model.layers
    with torch.inference_mode(inference), torch.no_grad():
        want = steps()
        with patch(layers) as report:
            found = steps()
    assert max(map(largest, found, want)) < BOUND and report.calls == {"append_visual_kv_": 6}


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    (copy.deepcopy, saved, lambda model: pickle.loads(pickle.dumps(model))),
    ids=("deepcopy", "save", "pickle"),
)
@torch.no_grad()
def test_copies_are_not_patched_and_can_be(copied) -> None:
    """The published model: with the package `kernels`, those of transformers cannot be pickled at all."""
    model, given = foreign.filled(published.VPT_Qwen2VLForConditionalGeneration("seg")), inputs("seg")

    def run(other: nn.Module) -> Tensor:
        return other(**given, past_key_values=published.DynamicCache()).logits

    with patch(model) as report:
        before, counted = run(model), report.calls
        other = copied(model)
        plain = run(other)
        assert report.calls == counted and largest(plain, before) < BOUND
        with patch(other) as theirs:
            assert len(theirs.replaced) == len(report.replaced) == 4
            assert_same_bits(run(other), before)
            assert theirs.calls == counted == report.calls
            with pytest.raises(ValueError, match="replaced before"):
                patch(other)
        assert_same_bits(run(other), plain)
        run(model)
        assert report.calls != counted
        again = copied(copied(model))
        with patch(again) as twice:
            assert_same_bits(run(again), before)
            assert twice.calls == counted
    assert not any("forward" in vars(module) or is_swapped(module) for module in model.modules())


def test_a_copy_does_not_keep_its_model() -> None:
    """What the copy took along holds no weights of another model."""
    model = foreign.dinov2()
    report = patch(model)
    other, place = copy.deepcopy(model), ref(model.embeddings.patch_embeddings.projection)
    del report, model
    gc.collect()
    assert place() is None
    patch(other).unpatch()


def test_a_report_that_was_undone(models) -> None:
    model = models["qwen2_vl"]
    report = patch(model)
    report.unpatch()
    with pytest.raises(ValueError, match=r"undone by unpatch\(\); call patch\(model\) again"):
        report.__enter__()
    with patch(model) as other:
        report.unpatch()
        assert other.replaced and all(hasattr(type(r.module).forward, "__wrapped__") for r in other.replaced)


def test_the_hub_layer_asks_for_its_grids() -> None:
    projector, given = projection("clip")
    layer = hub.MinimalCLIPProjector()
    vars(layer).update(vars(projector))
    with torch.no_grad(), pytest.raises(ValueError, match="grid_thw is None; it must be"):
        layer(given["hidden_states"], given["conditions"])
