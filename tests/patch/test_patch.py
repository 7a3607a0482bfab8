"""A patched model of transformers says what it said before, through the kernels; unpatched it is as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from tests.helpers import assert_same_bits, noise, normal
from tests.patch import foreign
from tests.patch.foreign import BOUND, each_qwen, largest
from vpt_kernels import (
    PatchReport,
    fold_patch_weight,
    patch,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patches,
)
from vpt_kernels.patch.supported import NORMALISATION

each_cache = pytest.mark.parametrize("cache", (None, "static"), ids=("dynamic", "static"))
each_prompt = pytest.mark.parametrize("rows", foreign.PROMPTS.values(), ids=foreign.PROMPTS)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {kind: foreign.qwen(kind) for kind in foreign.QWEN}


@each_qwen
@each_cache
@each_prompt
def test_qwen_says_the_same(models, kind, cache, rows) -> None:
    model = models[kind]
    given = foreign.prompt(model, rows)
    before_ids, before = foreign.generate(model, given, cache)
    assert 0.3 < before.std() < 3
    with patch(model) as report:
        ids, logits = foreign.generate(model, given, cache)
    after_ids, after = foreign.generate(model, given, cache)
    assert largest(logits, before) < BOUND and torch.equal(ids, before_ids)
    assert_same_bits(after, before, "logits of the unpatched model")
    assert torch.equal(after_ids, before_ids)
    layers = 2 * foreign.NEW_TOKENS
    assert report.calls == {"linear": 1, "append_visual_kv_": layers}


@each_qwen
def test_a_wrong_kernel_is_noticed(models, kind, monkeypatch) -> None:
    """The bound is tight enough: positions off by one in the kernel's table move the logits beyond it."""
    from vpt_kernels.patch.angles import Angles

    model = models[kind]
    given = foreign.prompt(model, foreign.ONE)
    before = foreign.generate(model, given)[1]
    right = Angles.of

    def shifted(self: Angles, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        table, positions = right(self, *shape)
        return table, (positions + 1).clamp(max=table.shape[0] - 1)

    monkeypatch.setattr(Angles, "of", shifted)
    with patch(model):
        assert largest(foreign.generate(model, given)[1], before) > 100 * BOUND


@pytest.mark.parametrize("layout", ("a view of the projection", "heads first"))
def test_queries_of_any_layout(layout: str) -> None:
    """What the attention holds as q is rotated in place, wherever it lies."""
    from vpt_kernels.patch.angles import Angles
    from vpt_kernels.patch.rotary import AppendingCache, HeldQuery, hold

    q, k, v = (normal(2, 3, heads, 16, key=("layout", heads)) for heads in (4, 2, 2))
    angles = normal(2, 3, 8, key="angles").repeat(1, 1, 2)
    query = q.clone().transpose(1, 2)
    if layout == "heads first":
        query = query.contiguous()
    held = HeldQuery()
    append = AppendingCache(DynamicCache(), DynamicLayer(), Angles(angles.cos(), angles.sin()), held)
    assert hold(query, k, held, held)[0] is query
    append.update(k.transpose(1, 2), v.transpose(1, 2), 0)
    low, high = q.chunk(2, -1)
    expected = q * angles.cos()[:, :, None] + torch.cat([-high, low], -1) * angles.sin()[:, :, None]
    assert held.query is None and largest(query.transpose(1, 2), expected) < 1e-6


@each_qwen
def test_unpatching_gives_the_same_objects(models, kind) -> None:
    model = models[kind]
    state = {name: id(tensor) for name, tensor in model.named_parameters()}
    own = {name: dict(vars(module)) for name, module in model.named_modules()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    report = patch(model)
    assert isinstance(report, PatchReport) and len(report.replaced) == 3
    assert {r.op for r in report.replaced} == {"roi_patch_embed", "append_visual_kv"}
    assert all(type(r.module) is not kinds[r.name] and isinstance(r.module, kinds[r.name]) for r in report.replaced)
    assert all(r.module.forward.__func__ is not kinds[r.name].forward for r in report.replaced)
    report.unpatch()
    report.unpatch()
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == state
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == own
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_dinov2_and_sam_say_the_same() -> None:
    for model, size, op in (
        (foreign.dinov2(), 56, "dinov2"),
        (foreign.dinov2(), 83, "dinov2"),
        (foreign.sam(), 64, "sam"),
    ):
        pixels = normal(2, 3, size, size, key=(op, size))
        with torch.no_grad():
            before = model(pixels).last_hidden_state
            with patch(model) as report:
                assert largest(model(pixels).last_hidden_state, before) < BOUND
            assert_same_bits(model(pixels).last_hidden_state, before)
        assert report.calls == {"linear": 1}
    with patch(model), pytest.raises(ValueError, match="the model takes"), torch.no_grad():
        model(normal(1, 3, 32, 32, key="small"))


@each_qwen
def test_uint8_patches_and_embeddings(models, kind) -> None:
    """A patched patch embedding also takes uint8 patches of `roi_patches`, and embeddings of `roi_patch_embed`."""
    embed = models[kind].model.visual.patch_embed
    image, p = noise(70, 90, kind), embed.patch_size
    plan = plan_regions([(70, 90)], [(0, 0, 0, 90, 70)], qwen2_vl_policy(patch_size=p))
    mean, std = NORMALISATION[type(embed).__name__]
    with torch.no_grad():
        bias = None if embed.proj.bias is None else embed.proj.bias
        tokens = roi_patch_embed([image], plan, fold_patch_weight(embed.proj.weight, mean, std, bias))
        with patch(embed) as report:
            found = embed(roi_patches([image], plan))
            assert_same_bits(found, tokens)
            assert embed(tokens) is tokens
            embed.proj.weight.mul_(2)
            doubled = embed(roi_patches([image], plan))
            embed.proj.weight.mul_(0.5)
    assert report.calls == {"roi_patch_embed": 2, "embedded already": 1}
    assert largest(doubled - (0 if bias is None else bias), 2 * (tokens - (0 if bias is None else bias))) < 1e-4
    with patch(embed), pytest.raises(ValueError, match="uint8 patches have shape"):
        embed(torch.zeros(3, 5, dtype=torch.uint8))


def halved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


@each_qwen
def test_a_copy_of_a_patched_model_is_independent(models, kind) -> None:
    model = models[kind]
    given = foreign.prompt(model, foreign.ONE)
    before = foreign.generate(model, given)[1]
    plain = halved(copy.deepcopy(model))
    with patch(model):
        other = halved(copy.deepcopy(model))
        changed = foreign.generate(other, given)[1]
        assert largest(foreign.generate(model, given)[1], before) < BOUND < largest(changed, before)
    assert largest(changed, foreign.generate(plain, given)[1]) < BOUND


def test_calls_that_the_kernels_cannot_serve_take_the_old_way(models) -> None:
    model = models["qwen2_vl"]
    given = foreign.prompt(model, foreign.ONE)
    with torch.no_grad():
        before = model(**given.inputs).logits
    with patch(model) as report:
        trained = model(**given.inputs).logits
        trained.sum().backward()
        model.zero_grad()
        assert report.calls["original: gradients are enabled"] == 2
        with torch.no_grad():
            uncached = model(**given.inputs, use_cache=False).logits
        assert report.calls["original: no cache"] == 2 and not report.calls["append_visual_kv_"]
        assert largest(uncached, before) < BOUND and largest(trained, before) < BOUND
        sliding = DynamicCache(config=model.config.get_text_config())
        sliding.layers[0].__class__ = type("DynamicSlidingWindowLayer", (type(sliding.layers[0]),), {})
        with torch.no_grad():
            model(**given.inputs, past_key_values=sliding)
        assert report.calls["original: DynamicSlidingWindowLayer stores other rows"] == 1
        assert report.calls["append_visual_kv_"] == 1
        assert "original: no cache" in str(report)


def test_a_compiled_model_takes_the_old_way(models) -> None:
    text = models["qwen2_vl"].model.language_model
    embeds = normal(1, 7, 64, key="compiled")
    with torch.no_grad(), patch(text) as report:
        before = text(inputs_embeds=embeds).last_hidden_state
        compiled = torch.compile(text, backend="eager")(inputs_embeds=embeds).last_hidden_state
    assert largest(compiled, before) < BOUND
    assert report.calls == {"append_visual_kv_": 2}


def test_caches_made_by_hand(models) -> None:
    """A cache without a configuration grows its layers; a full static one raises before it is written."""
    model = models["qwen2_vl"]
    given = foreign.prompt(model, foreign.ONE)
    length = given.ids.shape[1]
    with patch(model) as report, torch.no_grad():
        growing = DynamicCache()
        model(**given.inputs, past_key_values=growing)
        assert growing.get_seq_length() == length and report.calls["append_visual_kv_"] == 2
        short = StaticCache(config=model.config.get_text_config(), max_cache_len=length - 1)
        with pytest.raises(ValueError, match=f"max_cache_len ≥ {length}"):
            model(**given.inputs, past_key_values=short)
        assert short.get_seq_length() == 0


def test_what_is_asked_for(models) -> None:
    model = models["qwen2_vl"]
    with patch(model, ops=["append_visual_kv"]) as report:
        assert {r.op for r in report.replaced} == {"append_visual_kv"}
        assert report.skipped["model.visual.patch_embed"] == "PatchEmbed: roi_patch_embed was not asked for"
        with pytest.raises(ValueError, match="replaced before"):
            patch(model, ops=["append_visual_kv"])
        again = patch(model, ops=["append_visual_kv"], strict=False)
        assert not again.replaced and "replaced before" in str(again)
    for wrong in (["roi"], "append_visual_kv"):
        with pytest.raises(ValueError, match="ops is"):
            patch(model, ops=wrong)
    with pytest.raises(TypeError, match="torch.nn.Module"):
        patch("model")
    with pytest.raises(ValueError, match="known classes: Dinov2PatchEmbeddings"):
        patch(nn.Linear(2, 2))
    assert str(patch(nn.Linear(2, 2), strict=False)) == "nothing to replace"


def test_report_names_everything(models) -> None:
    with patch(models["qwen3_vl"]) as report:
        text = str(report)
    for line in (
        "model.visual.patch_embed (Qwen3VLVisionPatchEmbed) replaced [roi_patch_embed], calls: none yet",
        "model.language_model.layers.*.self_attn (Qwen3VLTextAttention ×2) replaced [append_visual_kv], calls:",
        "model.visual.blocks.*.attn ×2 not replaced: Qwen3VLVisionAttention: it rotates without a cache",
        "model.visual.deepstack_merger_list.* ×2 not replaced: Qwen3VLVisionPatchMerger",
    ):
        assert line in text


def test_modules_that_only_look_right_are_refused() -> None:
    for change, reason in (
        (lambda m: setattr(m.proj, "stride", (2, 7, 7)), "stride"),
        (lambda m: setattr(m, "proj", nn.Linear(3, 3)), "not a plain Conv3d"),
        (lambda m: setattr(m, "patch_size", (14, 14)), "not integers"),
        (lambda m: delattr(m, "embed_dim"), "no attribute embed_dim"),
    ):
        module = copy.deepcopy(foreign.qwen("qwen2_vl").model.visual.patch_embed)
        change(module)
        with pytest.raises(ValueError, match=reason):
            patch(module)
    attention = foreign.qwen("qwen2_vl").model.language_model.layers[0].self_attn
    attention.layer_idx = None
    with pytest.raises(ValueError, match="no place in a cache"):
        patch(attention)
    attention.layer_idx = 0
    attention.__class__ = type("Qwen2VLAttention", (type(attention),), {"forward": lambda self, x: x})
    with pytest.raises(ValueError, match="does not rotate"):
        patch(attention)


def test_unpatch_leaves_a_later_change_alone(models) -> None:
    model = models["qwen2_vl"]
    report = patch(model)
    attention = model.model.language_model.layers[0].self_attn
    mine = attention.forward
    attention.forward = lambda *_, **__: None
    with pytest.raises(ValueError, match="undo that change first"):
        report.unpatch()
    assert all(type(r.module).forward.__wrapped__ for r in report.replaced)
    attention.forward = mine
    report.unpatch()
