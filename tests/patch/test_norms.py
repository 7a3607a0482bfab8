"""Norms of heads: done with the rotation where their calls would do no more, else called as ever; and counted."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tests.helpers import assert_same_bits, normal
from tests.patch import foreign
from tests.patch.foreign import BOUND, largest
from tests.patch.layer_changes import CHANGES, hook, offload, weight_subclass
from vpt_kernels import caches, patch
from vpt_kernels.append_visual_kv.reference import _normalise
from vpt_kernels.patch.norms import STAND_IN, head_norms
from vpt_kernels.patch.supported import CENTRED_NORMS, HEAD_NORMS

FUSED, OWN = "append_visual_kv_", "append_visual_kv_ behind its own norms: "
FAMILIES = {"qwen3_vl": "Qwen3VLText", "qwen3_vl_moe": "Qwen3VLMoeText"}
FAMILIES |= {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}
"""transformers' models with norms of heads, and how their classes begin."""
CENTRED = ("qwen3_5", "qwen3_5_moe")
LAYERS, ROTATED = dict.fromkeys(CENTRED, 1), dict.fromkeys(CENTRED, 4)
"""Layers with keys and values, of two; half of the channels that are rotated, of eight."""
LENGTH = 7
each_family = pytest.mark.parametrize("kind", FAMILIES)
each_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)


@functools.cache
def made(kind: str) -> nn.Module:
    """A language model of two layers (of Qwen3.5: a linear attention and one of ours, rotated in part)."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_parameters": rope}
    if kind.endswith("moe"):
        config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        config |= {"shared_expert_intermediate_size": 32} if kind in CENTRED else {}
    if kind in CENTRED:
        config |= {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
        config |= {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
        config |= {"rope_parameters": rope | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}
    name = FAMILIES[kind]
    name += "" if name.endswith("Text") else "Text"
    return foreign.filled(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config)))


def text(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return copy.deepcopy(made(kind)).to(dtype)


def attention(model: nn.Module) -> Any:
    return model.layers[1].self_attn


@torch.no_grad()
def run(model: nn.Module, steps: int = 3) -> Tensor:
    """Hidden states of a prefill of two rows and of tokens behind it, each at its own positions on three axes."""
    dtype, cache, out = attention(model).q_proj.weight.dtype, DynamicCache(config=model.config), []
    for step in range(steps + 1):
        count, start = (LENGTH, 0) if step == 0 else (1, LENGTH + step - 1)
        positions = torch.arange(start, start + count) + torch.arange(3).view(3, 1, 1) * torch.arange(2).view(1, 2, 1)
        embeds = normal(2, count, 64, key=("norms", step)).to(dtype)
        out.append(model(inputs_embeds=embeds, position_ids=positions, past_key_values=cache).last_hidden_state)
    return torch.cat(out, 1)


def served(report: Any) -> dict[str, int]:
    return {way: count for way, count in report.calls.items() if "append" in way}


@pytest.fixture
def appended(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every append, as they come to the operator."""
    options: list[dict[str, Any]] = []
    own = caches.append_visual_kv_

    def spy(*given: Any, **named: Any) -> None:
        options.append(named)
        own(*given, **named)

    monkeypatch.setattr(caches, "append_visual_kv_", spy)
    return options


@each_family
@torch.no_grad()
def test_norms_are_done_with_the_rotation(kind: str, appended: list[dict[str, Any]]) -> None:
    """Prefill and steps; both layers of Qwen3-VL, one of Qwen3.5, whose other has no keys; also after a change."""
    model = text(kind)
    want, layers = run(model), LAYERS.get(kind, 2)
    with patch(model) as report:
        assert largest(run(model), want) < BOUND
        assert served(report) == {FUSED: 4 * layers}
        assert all(given["q_norm"].dim() == given["k_norm"].dim() == 1 for given in appended)
        for name in ("q_norm", "k_norm"):
            getattr(attention(model), name).weight.mul_(1.5)
        changed = run(model)
        assert served(report) == {FUSED: 8 * layers}
    assert len(appended) == 8 * layers and {given["norm_eps"] for given in appended} == {1e-6}
    assert largest(changed, run(model)) < BOUND < largest(changed, want)


@each_family
@each_dtype
@torch.no_grad()
def test_rounded_like_the_module(kind: str, dtype: torch.dtype) -> None:
    """What the operator is told computes the norm bit for bit; where it would not, the module is called."""
    part = attention(text(kind, dtype))
    x = normal(50, 4, 16, key=("rounding", kind)).to(dtype) * torch.logspace(-3, 2, 50)[:, None, None].to(dtype)
    options, reason = head_norms(part, x)
    if kind in CENTRED and dtype != torch.float32:
        assert not options and reason == f"its q_norm rounds otherwise in {dtype}"
        once = _normalise(x, 1 + part.q_norm.weight, 1e-6)
        assert (once != part.q_norm(x)).any(), "it rounds alike: the norm could be done with the rotation"
        return
    assert reason is None
    for name in ("q_norm", "k_norm"):
        norm = getattr(part, name)
        assert_same_bits(_normalise(x, options[name], options["norm_eps"]), norm(x))
        assert (norm.weight.std() > 0.01) and largest(options[name], torch.ones(16)) > 0.01


@each_family
@each_dtype
@torch.no_grad()
def test_as_exact_as_unpatched(kind: str, dtype: torch.dtype) -> None:
    """Of q, and of the keys that lie in the cache: at most twice the module's error against float64."""
    part = attention(text(kind, dtype))
    exact = copy.deepcopy(part).double()
    hidden = 4 * normal(2, 40, 64, key=("exact", kind)).to(dtype)
    angle = normal(2, 40, ROTATED.get(kind, 8), key="angles").repeat(1, 1, 2)

    def call(module: nn.Module) -> Tensor:
        x, cache = hidden.to(module.q_proj.weight.dtype), DynamicCache()
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        module.layer_idx = 0
        out = module(hidden_states=x, attention_mask=None, position_embeddings=(cos, sin), past_key_values=cache)
        return torch.cat([out[0].double().flatten(), cache.layers[0].keys.double().flatten()])

    expected = call(exact)
    before = (call(part) - expected).abs()
    with patch(part) as report:
        after = (call(part) - expected).abs()
    (way,) = report.calls
    assert (way == FUSED) == (kind not in CENTRED or dtype == torch.float32)
    assert 0 < after.max() <= 2 * before.max() or dtype == torch.float32
    assert after.square().mean() <= 4 * before.square().mean() and after.max() <= 10 * before.max()


@pytest.mark.parametrize("kind", ("qwen3_vl", "qwen3_5"))
@pytest.mark.parametrize("name", ("q_norm", "k_norm"))
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ("before", "after"))
@torch.no_grad()
def test_what_a_norm_does_beyond_its_weight_is_done(kind: str, name: str, change: Any, when: str) -> None:
    """Changed before or after patching: both norms are called, which is counted; the rest stays one kernel."""
    change = hook if change is weight_subclass else change
    model, plain = text(kind), run(text(kind))
    if when == "before":
        change(attention(model), name)
        want, report = run(model), patch(model)
    else:
        changed = text(kind)
        change(attention(changed), name)
        want, report = run(changed), patch(model)
        change(attention(model), name)
    assert largest(run(model), want) < BOUND
    others = {FUSED: 4} if kind not in CENTRED else {}
    (way,) = set(served(report)) - {FUSED}
    assert way.startswith(f"{OWN}its {name}") and served(report) == {way: 4} | others
    if change is not offload:
        assert largest(want, plain) > BOUND


def test_tensors_that_compute_otherwise_are_called() -> None:
    """A weight with a function of its own, as quantised and sharded weights have it."""
    model = text("qwen3_vl")
    weight_subclass(attention(model), "k_norm")
    with patch(model) as report:
        run(model, 0)
    assert served(report) == {FUSED: 1, f"{OWN}its k_norm has a Scaled as weight and a NoneType as bias": 1}


@pytest.mark.parametrize("kind, method", (("qwen3_vl", "forward"), ("qwen3_5", "forward"), ("qwen3_5", "_norm")))
def test_the_class_of_the_norms_may_be_changed(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a library of faster kernels replaces it for everyone."""
    model = text(kind)
    cls = type(attention(model).q_norm)
    own = getattr(cls, method)
    with patch(model) as report:
        plain = run(model, 0)
        monkeypatch.setattr(cls, method, functools.wraps(own)(lambda self, x: own(self, x).flip(-1)))
        found = run(model, 0)
        assert served(report)[f"{OWN}the forward of every {cls.__name__} was replaced"] == LAYERS.get(kind, 2)
        report.unpatch()
        want = run(model, 0)
    assert largest(found, want) < BOUND < largest(found, plain)


@pytest.mark.parametrize(
    "change, reason",
    (
        (lambda norm: setattr(norm, "variance_epsilon", 0.5), "of two classes, or have two eps"),
        (lambda norm: setattr(norm, "variance_epsilon", float("nan")), "its k_norm has eps nan"),
        (lambda norm: setattr(norm, "weight", nn.Parameter(norm.weight.double())), "is torch.float64"),
        (lambda norm: setattr(norm, "weight", nn.Parameter(norm.weight[:1].clone())), r"torch.float32 \[1\]"),
        (lambda norm: norm.register_full_backward_hook(lambda *_: None), "its k_norm has hooks"),
    ),
)
@torch.no_grad()
def test_norms_that_the_operator_does_not_know(change: Any, reason: str) -> None:
    """Of one attention: q and k of another dtype than the rest of the model are none of this."""
    part = attention(text("qwen3_vl"))
    change(part.k_norm)
    options, why = head_norms(part, normal(1, 2, 64, key="other"))
    assert not options and re.search(reason, why)


@torch.no_grad()
def test_hooks_for_all_modules_see_the_norms() -> None:
    model, seen = text("qwen3_vl"), []
    with patch(model) as report:
        handle = nn.modules.module.register_module_forward_hook(lambda part, *_: seen.append(part))
        run(model, 0)
        handle.remove()
    assert attention(model).q_norm in seen and attention(model).k_norm in seen
    assert served(report) == {f"{OWN}there are hooks for all modules": 2}


@pytest.mark.parametrize("kind", ("qwen2_vl", "qwen3_vl"))
@torch.no_grad()
def test_what_a_hook_keeps_of_a_projection_stays(kind: str) -> None:
    """q is rotated in place: not in what somebody kept of it."""
    model = foreign.qwen(kind).model.language_model if kind == "qwen2_vl" else text(kind)
    kept: list[Tensor] = []
    attention(model).q_proj.register_forward_hook(lambda _, __, out: kept.append(out))
    embeds, others = normal(1, 5, 64, key="kept"), []
    attention(model).q_proj.register_forward_hook(lambda _, __, out: others.append(out.clone()))
    with patch(model) as report:
        model(inputs_embeds=embeds, past_key_values=DynamicCache(config=model.config))
    assert served(report) == {FUSED: 2}
    assert_same_bits(kept[0], others[0])


@each_family
def test_a_norm_that_changes_unseen_is_the_changed_one(kind: str) -> None:
    """Trainers and loaders write through `.data`, which autograd does not count."""
    model = text(kind)
    with patch(model):
        run(model, 0)
        attention(model).q_norm.weight.data.mul_(1.5)
        found = run(model, 0)
    torch.testing.assert_close(found, run(model, 0), rtol=1e-5, atol=1e-5)


class Wrapper(nn.Module):
    """An adapter that is switched off: it returns what the layer inside it does."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


@pytest.mark.parametrize("watched", ["q_norm", "a layer inside q_proj"])
@torch.no_grad()
def test_what_a_hook_keeps_on_the_way_to_the_rotation_stays(watched: str) -> None:
    model = text("qwen3_vl") if watched == "q_norm" else foreign.qwen("qwen2_vl").model.language_model
    part = attention(model)
    if watched == "q_norm":
        kind = part.q_norm
    else:
        kind, part.q_proj = part.q_proj, Wrapper(part.q_proj)
    kept: list[Tensor] = []
    kind.register_forward_hook(lambda _, __, out: kept.extend((out, out.clone())))
    with patch(model) as report:
        model(inputs_embeds=normal(1, 5, 64, key="kept"), past_key_values=DynamicCache(config=model.config))
    assert sum(served(report).values()) == 2
    assert_same_bits(*kept)


@each_family
@torch.no_grad()
def test_copies_and_compiled_models_have_their_own_norms(kind: str) -> None:
    """A copy is not patched; compiled code runs the attention's own forward and is compiled once."""
    model = text(kind)
    want = run(model)
    with patch(model) as report:
        assert_same_bits(run(copy.deepcopy(model)), want)
        assert not report.calls and hasattr(type(attention(model)), STAND_IN)
        graphs: list[Any] = []
        torch.compiler.reset()
        part, hidden = attention(model), normal(1, 5, 64, key="compiled")
        angles = model.rotary_emb(hidden, torch.arange(5).view(1, 1, 5).expand(3, 1, 5))
        backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
        call = torch.compile(lambda: part(hidden, angles, None)[0], backend=backend, fullgraph=True)
        first = call()
        for _ in range(3):
            run(model, 0)
            assert_same_bits(call(), first)
        assert len(graphs) == 1
    torch.compiler.reset()
    assert not hasattr(type(attention(model)), STAND_IN)
    assert largest(part(hidden, angles, None)[0], first) < BOUND


def test_every_norm_of_the_tables_exists() -> None:
    """Under its name, in the module of an attention that has it; and no supported family has norms without an entry."""
    for kind in FAMILIES:
        part = attention(text(kind))
        assert type(part.q_norm).__name__ in HEAD_NORMS | CENTRED_NORMS
        assert type(part.q_norm).__module__ == type(part).__module__
    assert len(HEAD_NORMS | CENTRED_NORMS) == len(FAMILIES)
