"""What a patched model leaves behind is what an unpatched one leaves; one call ends the room to grow."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from weakref import ref

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.helpers import assert_same_bits
from tests.patch import foreign, published
from tests.patch.foreign import filled
from vpt_kernels import cache_spare_bytes, compact_cache_, patch
from vpt_kernels.caches import MIN_SPARE, _spare

BOUND = 1e-4
each_qwen = pytest.mark.parametrize("kind", foreign.QWEN)


def filled_cache(kind: str, patched: bool, steps: int = 3) -> tuple[torch.nn.Module, DynamicCache]:
    """A model and its cache after a prompt and some tokens."""
    model = foreign.qwen(kind)
    cache = DynamicCache(config=model.config.get_text_config())
    report = patch(model, ops=["append_visual_kv"]) if patched else None
    with torch.no_grad():
        model(**foreign.prompt(model, foreign.ONE).inputs, past_key_values=cache)
        for token in range(steps):
            model(torch.tensor([[token + 5]]), past_key_values=cache)
    if report is not None:
        report.unpatch()
    return model, cache


def tensors(cache: DynamicCache) -> dict[str, Tensor]:
    return {f"{n}.{name}": getattr(layer, name) for n, layer in enumerate(cache.layers) for name in ("keys", "values")}


@each_qwen
def test_spare_room_is_counted_and_bounded(kind) -> None:
    plain, cache = filled_cache(kind, False)[1], filled_cache(kind, True)[1]
    assert cache_spare_bytes(plain) == 0
    found = tensors(cache).values()
    row = sum(t[:, :, :1].numel() * t.element_size() for t in found)
    length = cache.get_seq_length()
    spare = cache_spare_bytes(cache)
    assert 0 < spare <= max(MIN_SPARE, length // 8) * row
    assert spare == sum(t.untyped_storage().nbytes() - t.nbytes for t in found)
    assert not any(t.untyped_storage().nbytes() > t.nbytes and t._base[:, :, length:].any() for t in found)
    assert compact_cache_(cache) == spare and cache_spare_bytes(cache) == 0 == compact_cache_(cache)


@each_qwen
def test_a_compacted_cache_is_as_an_unpatched_one(kind) -> None:
    """Viewed, saved as safetensors and pickles of the same size, and handed on to a model that is not patched."""
    (model, plain), (_, cache) = filled_cache(kind, False), filled_cache(kind, True)
    shown = {name: tensor.clone() for name, tensor in tensors(cache).items()}
    compact_cache_(cache)
    for (name, tensor), want in zip(tensors(cache).items(), tensors(plain).values()):
        assert tensor.is_contiguous() and tensor.view(-1).shape == want.view(-1).shape
        assert_same_bits(tensor, shown[name])
        assert (tensor - want).abs().max() < BOUND
    restored = load(save(tensors(cache)))
    assert all(torch.equal(restored[name], tensor) for name, tensor in shown.items())
    assert len(pickle.dumps(tensors(cache))) == len(pickle.dumps(tensors(plain)))
    with torch.no_grad():
        follow = [model(torch.tensor([[9]]), past_key_values=c).logits for c in (plain, cache)]
    assert (follow[0] - follow[1]).abs().max() < BOUND


@each_qwen
@pytest.mark.parametrize("way", ("pickle", "torch.save", "deepcopy", "handed on"))
def test_a_cache_goes_on_as_it_is(kind, way) -> None:
    """Without the call too: pickled, copied, continued by a model that is not patched, and patched again."""
    (model, plain), (_, cache) = filled_cache(kind, False), filled_cache(kind, True)
    if way == "pickle":
        cache = pickle.loads(pickle.dumps(cache))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        cache = torch.load(file, weights_only=False)
    elif way == "deepcopy":
        cache = copy.deepcopy(cache)
    with torch.no_grad():
        follow = [model(torch.tensor([[9]]), past_key_values=c).logits for c in (plain, cache)]
        assert (follow[0] - follow[1]).abs().max() < BOUND
        with patch(model) as report:
            follow = [model(torch.tensor([[11]]), past_key_values=c).logits for c in (plain, cache)]
    assert (follow[0] - follow[1]).abs().max() < BOUND and report.calls["append_visual_kv_"] == 4


@pytest.mark.parametrize("way", ("reset", "reorder", "replaced", "compacted", "dropped"))
def test_nothing_is_kept_that_no_layer_holds(way) -> None:
    """The buffers behind a layer's tensors go with them, not with the layer."""
    cache = filled_cache("qwen2_vl", True)[1]
    layer = cache.layers[0]
    base, count = ref(_spare[layer][2]), len(_spare)
    if way == "reset":
        layer.keys = layer.values = None
    elif way == "reorder":
        cache.reorder_cache(torch.tensor([0]))
    elif way == "replaced":
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    elif way == "compacted":
        compact_cache_(cache)
    else:
        del cache, layer
    gc.collect()
    assert base() is None and len(_spare) < count


def test_static_and_old_caches_have_no_spare_room() -> None:
    model = foreign.qwen("qwen2_vl")
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    text, old = filled(published.LanguageModel()), published.DynamicCache()
    with torch.no_grad(), patch(model), patch(text):
        model(**foreign.prompt(model, foreign.ONE).inputs, past_key_values=static)
        text(torch.randn(1, 6, published.HIDDEN), torch.arange(6).repeat(3, 1, 1), old, None)
    before = [layer.keys for layer in static.layers]
    assert cache_spare_bytes(static) == compact_cache_(static) == cache_spare_bytes(old) == compact_cache_(old) == 0
    assert all(layer.keys is keys for layer, keys in zip(static.layers, before))
    assert all(t.is_contiguous() for t in (*old.key_cache, *old.value_cache))


@pytest.mark.parametrize("kind", ("qwen2_vl", "dinov2", "sam"))
@torch.no_grad()
def test_outputs_are_plain_tensors(kind) -> None:
    """They can be viewed, saved and pickled, and hold nothing of the patch."""
    if kind == "qwen2_vl":
        module, x = foreign.qwen(kind).model.visual.patch_embed, torch.randn(6, 1176)
    else:
        model, size = (foreign.dinov2(), 56) if kind == "dinov2" else (foreign.sam(), 64)
        module, x = model.get_input_embeddings(), torch.randn(2, 3, size, size)
    plain = module(x)
    with patch(module):
        found = module(x)
    assert type(found) is Tensor and found.is_contiguous() and not vars(found) and found.shape == plain.shape
    assert found.untyped_storage().nbytes() == found.nbytes
    assert torch.equal(load(save({"x": found}))["x"], found)


def test_angles_that_the_model_gives_away_are_its_own() -> None:
    """A hook on the rotary embedding sees a plain pair of tensors; nothing of it outlives the call."""
    from vpt_kernels.patch import angles

    model, seen = foreign.qwen("qwen2_vl"), []
    model.model.language_model.rotary_emb.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad(), patch(model):
        model(**foreign.prompt(model, foreign.ONE).inputs, past_key_values=DynamicCache())
    (pair,) = seen
    assert type(pair) is tuple and [type(t) for t in pair] == [Tensor, Tensor] and not any(map(vars, pair))
    assert len(angles._angles) == 1
    seen.clear()
    del pair
    gc.collect()
    assert not angles._angles
