"""What sees or replaces every function of torch meets the functions that an unpatched model calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from tests.helpers import assert_same_bits, normal
from tests.patch import foreign
from tests.patch.subjects import RUN, SUBJECTS, run
from vpt_kernels import patch

each_subject = pytest.mark.parametrize("kind", SUBJECTS)


class Scaling(TorchFunctionMode):
    """As a mode that quantises or replaces layers for a whole program: it changes the functions that layers call."""

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), named: Any = None) -> Any:
        out = function(*args, **(named or {}))
        return 1.5 * out if getattr(function, "__name__", "") in RUN.values() else out


class ScalingOperators(TorchDispatchMode):
    """The same below autograd, where simulated and counted tensors are made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), named: Any = None) -> Any:
        self.seen.append(str(function))
        out = function(*args, **(named or {}))
        layer = str(function).startswith(("aten.convolution", "aten.addmm", "aten.native_layer_norm"))
        return 1.5 * out if layer and isinstance(out, Tensor) else out


@each_subject
@pytest.mark.parametrize("mode", (Scaling, ScalingOperators), ids=lambda mode: mode.__name__)
@torch.no_grad()
def test_modes_meet_the_layers(kind, mode) -> None:
    module, _, given = SUBJECTS[kind](kind)
    plain = run(module, given)
    with mode():
        want = run(module, given)
    assert (want - plain).abs().max() > 1e-3
    with patch(module) as report:
        with mode(), torch.device("cpu"):
            assert_same_bits(run(module, given), want)
        (way,) = report.calls
        assert way.startswith(f"original: the mode {mode.__name__} sees every ")
        run(module, given)
    assert sum(report.calls.values()) == 2 and len(report.calls) == 2


@each_subject
@torch.no_grad()
def test_a_default_device_is_no_such_mode(kind) -> None:
    module, _, given = SUBJECTS[kind](kind)
    with patch(module) as report, torch.device("cpu"):
        run(module, given)
    (way,) = report.calls
    assert not way.startswith("original")


@each_subject
@torch.no_grad()
def test_tangents_pass(kind) -> None:
    """Forward-mode differentiation, which needs no gradients to be enabled: the operators know no such rule."""
    module, _, given = SUBJECTS[kind](kind)
    directions = [normal(*x.shape, key=("t", n)) if x.is_floating_point() else None for n, x in enumerate(given[:2])]

    def tangent() -> Tensor:
        with forward_ad.dual_level():
            dual = [x if t is None else forward_ad.make_dual(x, t) for x, t in zip(given, directions)]
            found = forward_ad.unpack_dual(run(module, (*dual, *given[2:]))).tangent
            assert found is not None
            return found

    want = tangent()
    with patch(module) as report:
        assert_same_bits(tangent(), want)
    assert report.calls == {"original: forward-mode differentiation": 1}


@pytest.mark.parametrize("kind", ("detection", "clip"))
@pytest.mark.parametrize("when", ("before", "after"))
@torch.no_grad()
def test_sparse_weights_are_multiplied_by_their_layer(kind, when) -> None:
    """A plain parameter of another layout, which only the layer's own function understands."""
    module, names, given = SUBJECTS[kind](kind)
    name = next(name for name in names if isinstance(getattr(module, name), nn.Linear))
    layer = getattr(module, name)
    pruned = nn.Parameter(layer.weight.relu().to_sparse_csr(), requires_grad=False)
    if when == "before":
        layer.weight = pruned
    with patch(module) as report:
        layer.weight = pruned
        found = run(module, given)
    assert_same_bits(found, run(module, given))
    assert report.calls == {f"original: its {name}'s weight is torch.sparse_csr": 1}


@pytest.mark.parametrize("kind", foreign.QWEN)
@pytest.mark.parametrize("mode", (Scaling, ScalingOperators), ids=lambda mode: mode.__name__)
@torch.no_grad()
def test_modes_see_an_attention_rotate(kind, mode) -> None:
    text = foreign.qwen(kind).model.language_model
    attention, hidden = text.layers[0].self_attn, normal(1, 5, 64, key="hidden")
    angles = text.rotary_emb(hidden, torch.arange(5).view(1, 1, 5).expand(3, 1, 5))

    def attended() -> Tensor:
        given = {"attention_mask": None, "position_embeddings": angles, "past_key_values": DynamicCache()}
        with mode() as watching:
            out = attention(hidden_states=hidden, **given)[0]
        seen.append(getattr(watching, "seen", []))
        return out

    seen: list[list[str]] = []
    want = attended()
    with patch(text) as report:
        assert_same_bits(attended(), want)
    assert seen[0] == seen[1]
    assert [way for way in report.calls if way.startswith(f"original: the mode {mode.__name__}")]
