"""Slots of static cache layers whose lengths lie on a device: once per forward call, right in every layer, no wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from tests.helpers import assert_same_bits, normal
from tests.patch import foreign
from vpt_kernels import caches
from vpt_kernels.patch import angles as shared
from vpt_kernels.patch.angles import Angles
from vpt_kernels.patch.api import patch


@pytest.fixture
def computed(monkeypatch) -> list[torch.Size]:
    """The lengths that slots were computed of; a static layer's length is not read, as on a device."""
    found, right, check = [], caches.page_slots, caches._check_capacity

    def counted(batch: int, start: int | Tensor, *place: Any) -> Tensor:
        found.append(start.shape)
        return right(batch, start, *place)

    def unread(layer: Any, k: Tensor, v: Tensor) -> Tensor:
        check(layer, k, v)
        return layer.cumulative_length

    monkeypatch.setattr(caches, "_check_capacity", unread)
    for module in (caches, shared):
        monkeypatch.setattr(module, "page_slots", counted)
    return found


@pytest.mark.parametrize("rows", (foreign.ONE, foreign.PADDED), ids=("one", "ragged"))
@pytest.mark.parametrize("inference", (False, True), ids=("no_grad", "inference_mode"))
def test_once_per_forward_call(computed, rows, inference) -> None:
    """All layers but in the call that makes their buffers, which comes before there is anything to compute ahead."""
    model = foreign.qwen("qwen2_vl")
    given = foreign.prompt(model, rows)
    with torch.inference_mode(inference):
        before_ids, before = foreign.generate(model, given, "static")
        with patch(model):
            ids, logits = foreign.generate(model, given, "static")
    assert torch.equal(ids, before_ids) and (logits - before).abs().max() < 1e-4
    assert computed == [torch.Size([1, 1])] * 2 + [torch.Size([2, 1])] * (foreign.NEW_TOKENS - 1)


def layers_of(*lengths: int, page: int = 16, device: str = "cpu") -> list[SimpleNamespace]:
    """What stands for the layers of a static cache: a class of that name, with a length on a device."""
    made = type("StaticLayer", (SimpleNamespace,), {})
    return [
        made(is_initialized=True, max_cache_len=page, cumulative_length=torch.tensor(n, device=device)) for n in lengths
    ]


def slots(angles: Angles, layers: list, index: int, batch: int = 1, count: int = 1, page: int = 16) -> Tensor:
    length = layers[index].cumulative_length
    found = angles.slots(layers[index + 1 :], batch, length, count, page, length.device)
    length.add_(count)
    return found


def angles(*shape: int) -> Angles:
    values = normal(*shape, 8, key="angles").repeat(1, 1, 2)
    return Angles(values.cos(), values.sin())


@pytest.mark.parametrize("batch, count", ((1, 1), (1, 3), (3, 1), (2, 4)))
def test_layers_of_different_lengths_each_get_their_own(computed, batch, count) -> None:
    layers, one_call = layers_of(3, 5, 0, 15), angles(batch, count)
    for index, layer in enumerate(layers):
        expected = caches.page_slots(batch, layer.cumulative_length.clone(), count, 16, torch.device("cpu"))
        found = slots(one_call, layers, index, batch, count)
        assert_same_bits(found, expected)
        assert found.is_contiguous() and found.data_ptr() % 16 == 0
    assert computed.count(torch.Size([4, 1])) == 1 and len(computed) == 5


def test_a_length_that_changes_meanwhile_is_read_again(computed) -> None:
    layers, one_call = layers_of(4, 4, 4), angles(1, 1)
    assert slots(one_call, layers, 0).tolist() == [4]
    layers[1].cumulative_length.fill_(9)
    assert slots(one_call, layers, 1).tolist() == [9]
    layers[2].cumulative_length = torch.tensor(7)
    assert slots(one_call, layers, 2).tolist() == [7]
    assert len(computed) == 3


def test_a_layer_takes_its_slots_once(computed) -> None:
    """The same angles again: another call that somebody gives the same tensors, or one that an error has ended."""
    layers, one_call = layers_of(4, 4, 4), angles(1, 1)
    with torch.inference_mode():  # lengths made here cannot say that they have changed
        layers = layers_of(4, 4, 4)
        assert [slots(one_call, layers, index).item() for index in (0, 1, 0, 1, 2, 0, 1, 2)] == [4, 4, 5, 5, 4, 6, 6, 5]
    assert [tuple(shape) for shape in computed] == [(3, 1)] * 3


@pytest.mark.parametrize("change", ("page", "device", "kind", "not initialized"))
def test_other_layers_are_left_out(computed, change) -> None:
    layers, one_call = layers_of(4, 5, 6), angles(1, 1)
    if change == "page":
        layers[1].max_cache_len = 32
    elif change == "device":
        layers[1].cumulative_length = torch.tensor(5, device="meta")
    elif change == "kind":
        layers[1] = SimpleNamespace(**vars(layers[1]))
    else:
        layers[1].is_initialized = False
    assert slots(one_call, layers, 0).tolist() == [4] and slots(one_call, layers, 2).tolist() == [6]
    assert computed == [torch.Size([2, 1])]


def test_another_number_of_tokens_is_computed_anew(computed) -> None:
    layers, one_call = layers_of(4, 4), angles(1, 1)
    assert slots(one_call, layers, 0).tolist() == [4]
    assert slots(one_call, layers, 1, count=2).tolist() == [4, 5]
    assert len(computed) == 2


def test_no_value_is_read() -> None:
    """A meta tensor has none: what would wait for a device raises."""
    layers, one_call = layers_of(4, 4, device="meta"), angles(2, 3)
    assert [slots(one_call, layers, index, 2, 3).shape for index in (0, 1)] == [(6,), (6,)]


def test_a_cache_that_is_used_again(computed) -> None:
    """Reset to nothing, as `generate` does it: one computation per call from then on, and the same keys."""
    model = foreign.qwen("qwen3_vl")
    given = foreign.prompt(model, foreign.ONE)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with patch(model), torch.no_grad():
        model(**given.inputs, past_key_values=cache)
        before = [layer.keys.clone() for layer in cache.layers]
        cache.reset()
        computed.clear()
        model(**given.inputs, past_key_values=cache)
    assert computed == [torch.Size([2, 1])]
    for layer, keys in zip(cache.layers, before):
        assert_same_bits(layer.keys, keys)
