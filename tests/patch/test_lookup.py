"""Other libraries' patches, before or after ours, work as they do without it; and `strict` names what stays."""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils.deprecation import deprecate_kwarg

from tests.helpers import assert_same_bits
from tests.patch import foreign
from vpt_kernels import patch
from vpt_kernels.patch.functions import _Names, changed_copy, innermost

BOUND = 1e-4
each_qwen = pytest.mark.parametrize("kind", foreign.QWEN)
each_order = pytest.mark.parametrize("order", ("theirs first", "ours first"))


def home(model: nn.Module) -> Any:
    """The module in which the attention is defined, whose global names other libraries exchange."""
    return sys.modules[type(model.model.language_model.layers[0].self_attn).__module__]


def logits(model: nn.Module, cache: Cache | None = None) -> Tensor:
    given = foreign.prompt(model, foreign.ONE).inputs
    with torch.no_grad():
        return model(**given, **({} if cache is None else {"past_key_values": cache})).logits


def replace_rotation(model: nn.Module, monkeypatch: Any) -> None:
    own = home(model).apply_rotary_pos_emb
    scaled = lambda q, k, *others, **named: own(q * 2, k, *others, **named)  # noqa: E731
    monkeypatch.setattr(home(model), "apply_rotary_pos_emb", scaled)


def wrap_rotation(model: nn.Module, monkeypatch: Any) -> None:
    own = home(model).apply_rotary_pos_emb
    scaled = functools.wraps(own)(lambda q, k, *others, **named: own(q * 2, k, *others, **named))
    monkeypatch.setattr(home(model), "apply_rotary_pos_emb", scaled)


def replace_what_rotates_a_half(model: nn.Module, monkeypatch: Any) -> None:
    """A name that the rotation looks up, and the attention does not."""
    own = home(model).rotate_half
    monkeypatch.setattr(home(model), "rotate_half", lambda x: 2 * own(x))


def replace_torch(model: nn.Module, monkeypatch: Any) -> None:
    """In this one module, as tracers and simulators do it."""

    class Theirs:
        cat = staticmethod(lambda parts, dim=0: (2 if parts[0].dim() == 4 else 1) * torch.cat(parts, dim=dim))

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(home(model), "torch", Theirs())


def replace_attention_function(model: nn.Module, monkeypatch: Any) -> None:
    """A global name that is no part of what we exchange: looked up when the layer is called."""
    own = home(model).ALL_ATTENTION_FUNCTIONS

    class Doubled:
        def get_interface(self, *given: Any) -> Callable:
            function = own.get_interface(*given)

            def doubled(*inputs: Any, **named: Any) -> Any:
                out, weights = function(*inputs, **named)
                return 2 * out, weights

            return doubled

    monkeypatch.setattr(home(model), "ALL_ATTENTION_FUNCTIONS", Doubled())


def replace_class_forward(model: nn.Module, monkeypatch: Any) -> None:
    cls = next(c for c in type(model.model.language_model.layers[0].self_attn).__mro__ if c.__name__ == c.__qualname__)
    cls = next(c for c in cls.__mro__ if c.__module__ == home(model).__name__ and "__init__" in vars(c))
    own = cls.forward

    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        out, weights = own(self, *inputs, **named)
        return 2 * out, weights

    monkeypatch.setattr(cls, "forward", forward)


def replace_code(model: nn.Module, monkeypatch: Any) -> None:
    """Within the function, which stays the same object, as a notebook's autoreload does it."""
    own = home(model).apply_rotary_pos_emb
    scaled = lambda q, k, *others, **named: own(q * 2, k, *others, **named)  # noqa: E731
    monkeypatch.setattr(home(model), "their_rotation", scaled, raising=False)
    cls = type(model.model.language_model.layers[0].self_attn)
    function = innermost(vars(cls).get("_stands_for", cls).forward)
    names = (name.replace("apply_rotary_pos_emb", "their_rotation") for name in function.__code__.co_names)
    monkeypatch.setattr(function, "__code__", function.__code__.replace(co_names=tuple(names)))


def replace_layer_update(model: nn.Module, monkeypatch: Any) -> None:
    own = DynamicLayer.update
    monkeypatch.setattr(DynamicLayer, "update", lambda self, k, v, *o, **n: own(self, 2 * k, v, *o, **n))


def replace_cache_update(model: nn.Module, monkeypatch: Any) -> None:
    own = Cache.update
    monkeypatch.setattr(Cache, "update", lambda self, k, v, *o, **n: own(self, k, 2 * v, *o, **n))


THEIRS = (
    replace_rotation,
    wrap_rotation,
    replace_what_rotates_a_half,
    replace_torch,
    replace_attention_function,
    replace_class_forward,
    replace_code,
    replace_layer_update,
    replace_cache_update,
)


@each_qwen
@each_order
@pytest.mark.parametrize("theirs", THEIRS, ids=lambda theirs: theirs.__name__)
def test_another_librarys_patch(kind, order, theirs, monkeypatch) -> None:
    model = foreign.qwen(kind)
    plain = logits(model)
    if order == "ours first":
        report = patch(model)
    theirs(model, monkeypatch)
    if order == "theirs first":
        report = patch(model, strict=theirs not in (replace_class_forward, replace_code))
    found, counted = logits(model), report.calls
    monkeypatch.undo()
    back = logits(model)
    report.unpatch()
    theirs(model, monkeypatch)
    want = logits(model)
    assert (want - plain).abs().max() > 0.01, "their patch cannot be seen"
    assert (found - want).abs().max() < BOUND
    assert (back - plain).abs().max() < BOUND
    served = theirs is replace_attention_function
    assert counted["append_visual_kv_"] == (2 if served else 0)
    assert served or order == "theirs first" or any(way.startswith("original: ") for way in counted)


@each_qwen
def test_caches_that_do_something_of_their_own(kind) -> None:
    """A cache or layer whose `update` is somebody else's is updated by that, on the class and on the instance."""

    class Halving(DynamicCache):
        def update(self, k: Tensor, v: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
            return super().update(k, v / 2, *others, **named)

    class DynamicLayer2(DynamicLayer):
        def update(self, k: Tensor, v: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
            return super().update(k, v / 2, *others, **named)

    DynamicLayer2.__name__ = "DynamicLayer"
    model = foreign.qwen(kind)
    text = model.config.get_text_config()

    def on_instance() -> Cache:
        cache = DynamicCache(config=text)
        own = cache.update
        cache.update = lambda k, v, *others, **named: own(k, v / 2, *others, **named)
        return cache

    def of_layers() -> Cache:
        cache = DynamicCache(config=text)
        cache.layers = [DynamicLayer2() for _ in cache.layers]
        return cache

    for make in (lambda: Halving(config=text), on_instance, of_layers):
        want = logits(model, make())
        with patch(model, ops=["append_visual_kv"]) as report:
            assert_same_bits(logits(model, make()), want)
        assert not report.calls["append_visual_kv_"]


def test_every_name_is_looked_up_when_it_is_used() -> None:
    names = {"a": 1, "b": 10, "__builtins__": __builtins__}
    exec("def outer():\n def inner(): return a + b\n return inner() + len([a])", names)
    changed = changed_copy(names["outer"], {"b": 100})
    assert (names["outer"](), changed()) == (12, 102)
    names["a"], names["len"] = 5, lambda _: 1000
    assert (names["outer"](), changed()) == (1015, 1105)
    del names["a"]
    with pytest.raises(NameError, match="'a'"):
        changed()
    with pytest.raises(KeyError):
        _Names(names, {})["missing"]


def test_imports_and_warnings_know_their_module() -> None:
    """The interpreter reads `__name__`, `__package__` and the registry of warnings by itself."""
    code = "def outer(n):\n from . import configuration_qwen2_vl\n warnings.warn('!')\n"
    code += " return configuration_qwen2_vl.__name__, __name__, __spec__.parent"
    theirs = vars(sys.modules[type(foreign.qwen("qwen2_vl")).__module__])
    names = {name: value for name, value in theirs.items() if name.startswith("__")} | {"warnings": warnings}
    exec(code, names)
    for function in (names["outer"], changed_copy(names["outer"], {"n": 1})):
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("error")
            warnings.filterwarnings("always", module=names["__name__"].replace(".", r"\."))
            found = function(0)
        assert found == ("transformers.models.qwen2_vl.configuration_qwen2_vl", names["__name__"], names["__package__"])
        assert len(caught) == 1


@each_qwen
@pytest.mark.parametrize("how", ("transformers' decorator, twice", "another library's"))
def test_decorators(kind, how, monkeypatch) -> None:
    """Those of transformers pass the call on and are looked through; of others nobody knows."""
    model = foreign.qwen(kind)
    cls, want = type(model.model.language_model.layers[0].self_attn), logits(model)
    if how == "another library's":
        own = cls.forward
        monkeypatch.setattr(cls, "forward", functools.wraps(own)(lambda self, *i, **n: own(self, *i, **n)))
        with pytest.raises(
            ValueError, match=r"^model.language_model.layers.0.self_attn is skipped: .*decorator of .*test_lookup"
        ):
            patch(model)
        report = patch(model, strict=False)
        assert str(report).startswith("model.language_model.layers.*.self_attn ×2 not replaced: ")
        assert len(report.stays) == 2
    else:
        once = deprecate_kwarg("old_mask", version="99.0.0", new_name="attention_mask")(cls.forward)
        monkeypatch.setattr(cls, "forward", deprecate_kwarg("other", version="99.0.0")(once))
        report = patch(model)
    assert (logits(model) - want).abs().max() < BOUND
    assert report.calls["append_visual_kv_"] == (0 if how == "another library's" else 2)
    report.unpatch()


def test_both_names_of_the_cache() -> None:
    """The one that the attention has, and the one that its decorator translates."""
    text = foreign.qwen("qwen2_vl").model.language_model
    attention, hidden = text.layers[0].self_attn, torch.randn(1, 5, 64)
    angles = text.rotary_emb(hidden, torch.arange(5).view(1, 1, 5).expand(3, 1, 5))
    code = attention.forward.__func__
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    names = ["cache", "past_key_values"] if "cache" in code.__code__.co_varnames else ["past_key_values"]
    with torch.no_grad(), patch(text) as report:
        for name in names:
            cache = DynamicCache()
            attention(hidden, attention_mask=None, position_embeddings=angles, **{name: cache})
            assert cache.get_seq_length() == 5
    assert report.calls == {"append_visual_kv_": len(names)}


def test_strict_names_what_stays() -> None:
    """Any attention, patch embedding or projector that stays; not those that nobody asked for."""
    model = foreign.qwen("qwen2_vl")
    model.model.language_model.layers[1].self_attn.layer_idx = None
    with pytest.raises(ValueError, match=r"^model.language_model.layers.1.self_attn is skipped: .*no place in a cache"):
        patch(model)
    assert not any("vpt" in repr(type(module)) or hasattr(type(module), "_stands_for") for module in model.modules())
    with patch(model, strict=False) as report:
        assert report.stays == ("model.language_model.layers.1.self_attn",)
        assert str(report).splitlines()[0].startswith("model.language_model.layers.*.self_attn not replaced: ")
    with patch(model, ops=["roi_patch_embed"]) as report:
        assert not report.stays and len(report.replaced) == 1


@pytest.mark.parametrize(
    "name, op, other",
    (
        ("Qwen2VLTextAttention", "append_visual_kv", "roi_patch_embed"),
        ("Qwen2VLPatchEmbedding", "roi_patch_embed", "append_visual_kv"),
    ),
)
def test_a_renamed_class_of_a_supported_family_stays(name, op, other) -> None:
    """What a newer transformers may do: nothing is passed over in silence, and what nobody asked for stays allowed."""
    model = foreign.qwen("qwen2_vl")
    part = model.model.language_model.layers[0].self_attn
    part.__class__ = type(name, (type(part),), {"__module__": type(part).__module__})
    if op == "roi_patch_embed":
        part.__class__ = type(part).__mro__[1]
        part = model.model.visual.patch_embed
        part.__class__ = type(name, (type(part),), {"__module__": type(part).__module__})
    for ops in (None, [op]):
        with pytest.raises(ValueError, match=f"skipped: {name}: a class of a supported family that this version does"):
            patch(model, ops)
    with patch(model, [other]) as report:
        assert not report.stays and f"{name}: {op} was not asked for" in report.skipped.values()


@pytest.mark.parametrize("reason", ("ops", "hooks before", "strict"))
@torch.no_grad()
def test_bytes_are_never_read_as_pixels(reason) -> None:
    """Where `patch` left a patch embedding alone, uint8 patches raise, also cast to floats, as the model does it."""
    model = foreign.qwen("qwen2_vl")
    embed = model.model.visual.patch_embed
    if reason == "hooks before":
        embed.proj.register_forward_hook(lambda *_: None)
    elif reason == "strict":
        embed.proj = nn.Sequential(embed.proj)
        embed.proj.weight = embed.proj[0].weight
    pixels = torch.randn(4, 1176)
    want = embed(pixels)
    given: dict[str, Any] = {"ops": {"ops": ["append_visual_kv"]}, "strict": {"strict": False}}.get(reason, {})
    report = patch(model, **given)
    for patches in (torch.zeros(4, 588, dtype=torch.uint8), torch.zeros(4, 588)):
        with pytest.raises(ValueError, match="uint8 patches cannot be embedded: "):
            embed(patches)
    assert_same_bits(embed(pixels), want)
    if reason == "ops":
        with patch(model, ops=["roi_patch_embed"]) as other:
            assert embed(torch.zeros(4, 588, dtype=torch.uint8)).shape == (4, 32)
            assert other.calls == {"roi_patch_embed": 1}
    report.unpatch()
    assert embed(torch.zeros(4, 588)).shape == (2, 32) and type(copy.copy(embed)) is type(embed)
