"""Compiled: equal shapes never compile twice, whatever of ours is inside, and nothing is lost by being patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import noise, normal
from tests.patch import foreign, published
from vpt_kernels import backends, fold_projector, hub, patch, qwen2_vl_policy, rotary_table
from vpt_kernels.layers import AppendVisualKV, ControlCrossAttention, RoiPatchEmbed

BOUND = 1e-4
CALLS = 10
GRIDS = torch.tensor([[1, 4, 4], [1, 4, 6], [1, 2, 2]])
FEATURES = {"detection": (3, 5, 48), "seg": (3, 16, 8, 8), "clip": (11, published.HIDDEN)}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Callable) -> tuple[Callable, list]:
    """The function in one graph, and a list that grows by each compilation."""
    graphs: list = []
    backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    return torch.compile(function, backend=backend, fullgraph=True), graphs


def projector(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    given = [normal(*FEATURES[kind], key="f"), normal(3, published.HIDDEN, key="c")]
    return foreign.filled(published.PROJECTORS[kind]()), (*given, *([False, GRIDS] if kind == "clip" else []))


def encoder(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model, size = (foreign.dinov2(), 56) if kind == "dinov2" else (foreign.sam(), 64)
    return model, (normal(2, 3, size, size, key=kind),)


def embedding(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    embed = foreign.qwen(kind).model.visual.patch_embed
    return embed, (normal(6, embed.proj.weight[0].numel(), key=kind),)


WHOLE = {kind: encoder for kind in ("dinov2", "sam")} | dict.fromkeys(foreign.QWEN, embedding)
WHOLE |= dict.fromkeys(published.PROJECTORS, projector)


@pytest.mark.parametrize("kind", WHOLE)
@torch.no_grad()
def test_equal_shapes_compile_once(kind: str) -> None:
    model, given = WHOLE[kind](kind)
    first = lambda out: out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", out)  # noqa: E731
    want = first(model(*given))
    with patch(model) as report:
        call, graphs = compiled(model)
        for _ in range(CALLS):
            got = first(call(*given))
        assert (got - want).abs().max() < BOUND * want.abs().max()
        assert len(graphs) == 1 and not report.calls
        first(model(*given))
        first(call(*given))
        assert len(graphs) == 1 and sum(report.calls.values()) == 1


def test_a_compiled_patch_embedding_is_one_product() -> None:
    """No convolution whose stride is its kernel, which is the slow one, in the graph."""
    for kind in ("dinov2", "qwen2_vl"):
        model, given = WHOLE[kind](kind)
        with patch(model), torch.no_grad():
            call, graphs = compiled(model)
            call(*given)
        assert not any("conv" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("kind", foreign.QWEN)
@torch.no_grad()
def test_generate_with_a_static_cache_in_one_graph(kind: str) -> None:
    """As transformers' own tests: a second and a shorter `generate` compile nothing."""
    from transformers import CompileConfig

    model = foreign.qwen(kind)
    longer, shorter = (foreign.prompt(model, rows) for rows in (foreign.THREE, foreign.ONE))
    graphs: list = []
    backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "cache_implementation": "static"}
    plain = [model.generate(**given.inputs, **options, disable_compile=True) for given in (longer, shorter)]
    config = CompileConfig(fullgraph=True, backend=backend, mode=None, dynamic=None)
    config._compile_all_devices = True
    options["compile_config"] = config

    def run() -> list[int]:
        vars(model).pop("_compiled_call", None)
        torch.compiler.reset()
        graphs.clear()
        counted = []
        for given, want in zip((longer, longer, shorter, longer), (plain[0], plain[0], plain[1], plain[0])):
            assert torch.equal(model.generate(**given.inputs, **options), want)
            counted.append(len(graphs))
        return counted

    unpatched = run()
    with patch(model) as report:
        assert run() == unpatched
        assert report.calls["append_visual_kv_"] == 4 * len(model.model.language_model.layers)
    assert unpatched[0] > 0 and unpatched[1] == unpatched[0]


@torch.no_grad()
def test_uint8_patches_compile_once() -> None:
    embed = foreign.qwen("qwen2_vl").model.visual.patch_embed
    patches = noise(6, 196, "bytes").flatten().view(6, 588)
    with patch(embed):
        want = embed(patches)
        call, graphs = compiled(embed)
        for _ in range(CALLS):
            assert (call(patches) - want).abs().max() < BOUND
        assert len(graphs) == 1


def ours(kind: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A layer of `vpt_kernels.layers` and its arguments."""
    if kind == "embed":
        weight = normal(32, 3, 14, 14, key="weight", scale=0.05)
        layer = RoiPatchEmbed(weight, (0.5,) * 3, (0.5,) * 3, qwen2_vl_policy())
        return layer, ([noise(56, 84, "layer")],)
    if kind == "control":
        made = foreign.filled(published.PROJECTORS["detection"]())
        pairs = {
            name: (getattr(made, part).weight.detach(), getattr(made, part).bias.detach())
            for name, part in (
                ("condition_norm", "layernorm_condition"),
                ("condition", "linear_condition"),
                ("feature_norm", "layernorm_feature"),
                ("feature", "linear_feature"),
            )
        }
        layer = ControlCrossAttention(fold_projector("linear", **pairs))
        return layer, (normal(3, 5, 48, key="f"), normal(3, published.HIDDEN, key="c"))
    q, k, v = (normal(5, heads, 16, key=heads) for heads in (4, 2, 2))
    caches = torch.zeros(8, 2, 16), torch.zeros(8, 2, 16)
    return AppendVisualKV(rotary_table(64, 16), (2, 3, 3)), (
        q,
        k,
        v,
        torch.arange(15).view(3, 5),
        torch.arange(5),
        *caches,
    )


@pytest.mark.parametrize("kind", ("embed", "control", "append"))
@torch.no_grad()
def test_layers_compile_once(kind: str) -> None:
    layer, given = ours(kind)
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    want = first(layer(*given))
    call, graphs = compiled(layer)
    for _ in range(CALLS):
        assert (first(call(*given)) - want).abs().max() < BOUND
    assert len(graphs) == 1


@torch.no_grad()
def test_a_compiled_layer_follows_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its score is folded: a graph has no part in that, because nothing would tell it of a change."""
    monkeypatch.setitem(backends.CAPABILITIES["control_cross_attention"], "triton", backends._CPP)
    layer, given = ours("control")
    assert layer.projector.score_weight is not None
    monkeypatch.undo()
    call, graphs = compiled(layer)
    for _ in range(3):
        layer.condition_weight.mul_(1.5)
        want = layer(*given)
        assert (call(*given) - want).abs().max() < BOUND * want.abs().max()
    assert len(graphs) == 1
    (op,) = (node for node in graphs[0].graph.nodes if "control_cross_attention" in str(node.target))
    assert op.args[-2:] == (None, None)


@pytest.mark.parametrize("kind", ("qwen2_vl", "dinov2", "sam", "detection", "seg", "clip"))
@torch.no_grad()
def test_hub_layers_compile_once(kind: str) -> None:
    """Bound as `kernelize` binds them: the layer's forward on the module that it is mapped to."""
    from types import MethodType

    module, given = (embedding if kind == "qwen2_vl" else WHOLE[kind])(kind)
    part = module.get_input_embeddings() if kind in ("dinov2", "sam") else module
    names = {"qwen2_vl": "QwenVLPatchEmbed", "dinov2": "Dinov2PatchEmbed", "sam": "SamPatchEmbed"}
    layer = getattr(hub, names.get(kind, type(part).__name__))
    want = part(*given)
    part.forward = MethodType(layer.forward, part)
    hub.CALLS.clear()
    call, graphs = compiled(part)
    for _ in range(CALLS):
        got = call(*given)
    pairs = zip(want, got) if isinstance(want, tuple) else [(want, got)]
    assert all(a is b is None or (a - b).abs().max() < BOUND * a.abs().max() for a, b in pairs)
    assert len(graphs) == 1 and not hub.CALLS
