"""Weights are read only where calling their layer would do exactly that: every way to make it do more, call by call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tests.helpers import assert_same_bits, normal, require
from tests.patch import foreign
from tests.patch.layer_changes import CHANGES, adapt, hook, offload, parametrise, replace_forward, weight_subclass
from tests.patch.subjects import RUN, SUBJECTS, embedding, run
from vpt_kernels import hub, patch
from vpt_kernels.guard import why_called
from vpt_kernels.patch.swap import is_swapped

BOUND = 1e-4
LAYERS = [(kind, name) for kind in SUBJECTS for name in SUBJECTS[kind](kind)[1]]
each_layer = pytest.mark.parametrize("kind, name", LAYERS, ids=lambda value: value)


@each_layer
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ("before", "after"))
@torch.no_grad()
def test_what_a_layer_does_beyond_its_weight_is_done(kind, name, change, when) -> None:
    """Changed before or after patching; the own forward runs, is counted with a reason, and ours again afterwards."""
    module, _, given = SUBJECTS[kind](kind)
    plain = copy.deepcopy(module)
    if when == "before":
        change(module, name)
        want = run(module, given)
        report = patch(module, strict=False)
    else:
        want = copy.deepcopy(module)
        change(want, name)
        want = run(want, given)
        report = patch(module)
        change(module, name)
    assert_same_bits(run(module, given), want)
    assert not any(way in report.calls for way in ("linear", "control_cross_attention"))
    if report.replaced:
        (way,) = report.calls
        assert way.startswith("original: its ") and name.removeprefix("proj") in way or "projection" in way
    else:
        assert "not a plain" in str(report)
    if change not in (offload, weight_subclass):
        assert (want - run(plain, given)).abs().max() > BOUND


@pytest.mark.parametrize("kind", ("qwen2_vl", "dinov2", "detection"))
@pytest.mark.parametrize("change", (offload, replace_forward), ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_a_layer_does_is_in_a_graph_compiled_after_it(kind, change) -> None:
    module, names, given = SUBJECTS[kind](kind)
    patch(module)
    change(module, names[-1])
    want = run(module, given)
    torch.compiler.reset()
    assert_same_bits(run(torch.compile(module, backend="eager"), given), want)


@pytest.mark.parametrize("kind", SUBJECTS)
@torch.no_grad()
def test_transforms_of_torch_func_reach_the_layers(kind) -> None:
    """An ensemble over stacked weights: the operators know no batching rule."""
    module, _, given = SUBJECTS[kind](kind)
    stacked = {name: torch.stack([value, 1.5 * value]) for name, value in module.named_parameters()}
    ensemble = torch.func.vmap(lambda weights: torch.func.functional_call(module, weights, given)[0])
    want = ensemble(stacked)
    with patch(module) as report:
        assert_same_bits(ensemble(stacked), want)
    assert report.calls == {"original: a transform of torch.func": 1}


@pytest.mark.parametrize("kind", SUBJECTS)
@torch.no_grad()
def test_inputs_with_functions_of_their_own_meet_the_layers(kind) -> None:
    """Sharded, nested and traced tensors are subclasses, which may know a convolution and no product, or count both."""
    names: list[str] = []

    class Counted(Tensor):
        @classmethod
        def __torch_function__(cls, function: Callable, types: Any, args: Any = (), named: Any = None) -> Any:
            names.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, named or {})

    module, _, (x, *others) = SUBJECTS[kind](kind)
    want = run(module, (x.as_subclass(Counted), *others))
    before = [name for name in names if name in RUN.values()]
    names.clear()
    with patch(module) as report:
        assert_same_bits(run(module, (x.as_subclass(Counted), *others)), want)
    assert report.calls == {"original: its input is a Counted": 1}
    assert before == [name for name in names if name in RUN.values()]


@pytest.mark.parametrize("kind", SUBJECTS)
@torch.no_grad()
def test_what_every_layer_calls_may_be_replaced(kind, monkeypatch) -> None:
    """As a profiler or a library of faster kernels replaces `torch.nn.functional.conv3d` for everyone."""
    module, names, given = SUBJECTS[kind](kind)
    function = RUN[type(getattr(module, names[-1]))]
    own = getattr(nn.functional, function)
    with patch(module) as report:
        monkeypatch.setattr(nn.functional, function, lambda *x, **named: 1.5 * own(*x, **named))
        found = run(module, given)
    assert_same_bits(found, run(module, given))
    assert report.calls == {
        f"original: the forward of every {type(getattr(module, names[-1])).__name__} was replaced": 1
    }


@pytest.mark.parametrize("kind", SUBJECTS)
@torch.no_grad()
def test_hooks_for_all_modules_see_every_layer(kind) -> None:
    module, names, given = SUBJECTS[kind](kind)
    seen: list[nn.Module] = []
    with patch(module) as report:
        for register in ("forward_hook", "forward_pre_hook"):
            handle = getattr(nn.modules.module, f"register_module_{register}")(lambda part, *_: seen.append(part))
            run(module, given)
            handle.remove()
            assert {id(getattr(module, name)) for name in names} <= {id(part) for part in seen}
            seen.clear()
        assert report.calls == {"original: there are hooks for all modules": 2}
        run(module, given)
    assert sum(report.calls.values()) == 3 and len(report.calls) == 2


@pytest.mark.parametrize("kind", SUBJECTS)
@torch.no_grad()
def test_the_class_of_a_layer_may_be_changed(kind, monkeypatch) -> None:
    """As a profiler or another library replaces `nn.Conv3d.forward` for everyone."""
    module, names, given = SUBJECTS[kind](kind)
    cls = type(getattr(module, names[-1]))
    own = cls.forward
    with patch(module) as report:
        monkeypatch.setattr(cls, "forward", lambda self, x: 1.5 * own(self, x))
        found = run(module, given)
    assert_same_bits(found, run(module, given))
    assert report.calls == {f"original: the forward of every {cls.__name__} was replaced": 1}


@pytest.mark.parametrize("kind", SUBJECTS)
@torch.no_grad()
def test_a_traced_module_is_the_module_traced(kind) -> None:
    module, _, given = SUBJECTS[kind](kind)
    holder = nn.Module()
    holder.part, holder.forward = module, lambda *x: run(module, x)
    given = given[:1] if kind == "clip" else given
    with patch(module) as report:
        traced = torch.jit.trace(holder, given, check_trace=False)
    assert_same_bits(traced(*given), run(module, given))
    assert len(report.calls) == 1 and next(iter(report.calls)).startswith("original: ")


def replica(module: nn.Module, scale: float) -> nn.Module:
    """As `nn.DataParallel` copies a module to another device."""
    made = module._replicate_for_data_parallel()
    made._modules = {name: None if part is None else replica(part, scale) for name, part in module._modules.items()}
    for name, value in module._parameters.items():
        setattr(made, name, None if value is None else value * scale)
    return made


def shared_dict(module: nn.Module, scale: float) -> nn.Module:
    made = type(module).__new__(type(module))
    vars(made).update(vars(module))
    made._modules = {name: copy.deepcopy(part) for name, part in module._modules.items()}
    for parameter in made.parameters():
        parameter.mul_(scale)
    return made


def shallow(module: nn.Module, scale: float) -> nn.Module:
    made = copy.copy(module)
    made._modules = {name: copy.deepcopy(part) for name, part in module._modules.items()}
    for parameter in made.parameters():
        parameter.mul_(scale)
    return made


@pytest.mark.parametrize("kind", SUBJECTS)
@pytest.mark.parametrize("copied", (replica, shared_dict, shallow), ids=lambda copied: copied.__name__)
@torch.no_grad()
def test_a_copy_computes_with_its_own_weights(kind, copied) -> None:
    module, _, given = SUBJECTS[kind](kind)
    want = run(copied(module, 1.25), given)
    with patch(module) as report:
        found = run(copied(module, 1.25), given)
        assert (found - want).abs().max() <= BOUND * want.abs().max()
        run(module, given)
    assert not any(way.startswith("original") for way in report.calls if "replica" not in way)
    assert (want - run(module, given)).abs().max() > BOUND


@torch.no_grad()
def test_a_copy_of_an_attention_fills_its_own_layer() -> None:
    text = foreign.qwen("qwen2_vl").model.language_model
    attention, hidden = text.layers[0].self_attn, normal(1, 5, 64, key="hidden")
    angles = text.rotary_emb(hidden, torch.arange(5).view(1, 1, 5).expand(3, 1, 5))
    with patch(text):
        for copied in (copy.copy, copy.deepcopy, lambda module: shared_dict(module, 1)):
            other, cache = copied(attention), DynamicCache()
            other.layer_idx = 1
            other(hidden_states=hidden, attention_mask=None, position_embeddings=angles, past_key_values=cache)
            assert [layer.get_seq_length() for layer in cache.layers] == [0, 5]
            assert copied is copy.deepcopy or not is_swapped(copy.copy(attention))


def test_what_removed_hooks_leave_behind_hides_nothing() -> None:
    """accelerate's `remove_hook_from_module` leaves the class's forward on the instance."""
    module, _, given = embedding("qwen2_vl")
    module.forward = module.forward
    module.proj.forward = module.proj.forward
    with torch.no_grad(), patch(module) as report:
        run(module, given)
        module.forward = module.forward
    assert report.calls == {"linear": 1} and not is_swapped(module) and "forward" not in vars(module)


@pytest.mark.parametrize("kind", SUBJECTS)
@pytest.mark.parametrize("change", (offload, replace_forward, hook, adapt, parametrise), ids=lambda c: c.__name__)
@torch.no_grad()
def test_hub_layers_ask_the_same_question(kind, change) -> None:
    """Bound as `kernelize` binds them: the class's own forward runs; a layer that has none raises."""
    from types import MethodType

    module, names, given = SUBJECTS[kind](kind)
    embeddings = {"dinov2": "Dinov2PatchEmbed", "sam": "SamPatchEmbed"} | dict.fromkeys(
        foreign.QWEN, "QwenVLPatchEmbed"
    )
    layer = getattr(hub, embeddings.get(kind, type(module).__name__))
    change(module, names[0])
    want = run(module, given)
    hub.CALLS.clear()
    module.forward = MethodType(layer.forward, module)
    assert_same_bits(run(module, given), want)
    assert len(hub.CALLS) == 1 and next(iter(hub.CALLS)).startswith("original: its ")
    bare = layer()
    vars(bare).update({name: value for name, value in vars(module).items() if name != "forward"})
    with pytest.raises(ValueError, match="cannot be computed: its .* no forward of its own"):
        bare(*given)


@torch.no_grad()
def test_offloading_by_accelerate() -> None:
    require("accelerate", None if find_spec("accelerate") else "the package `accelerate` is not installed")
    from accelerate import cpu_offload

    for order in ("before", "after"):
        model = foreign.qwen("qwen2_vl")
        given = foreign.prompt(model, foreign.ONE).inputs
        want = model(**given).logits
        if order == "before":
            cpu_offload(model, execution_device=torch.device("cpu"))
        with patch(model, strict=order == "after") as report:
            if order == "after":
                cpu_offload(model, execution_device=torch.device("cpu"))
            assert (model(**given).logits - want).abs().max() < BOUND
        assert report.calls["append_visual_kv_"] == 2 and not report.calls["linear"]


@torch.no_grad()
def test_adapters_by_peft() -> None:
    require("peft", None if find_spec("peft") else "the package `peft` is not installed")
    from peft import LoraConfig, get_peft_model

    for dora in (False, True):
        model = foreign.qwen("qwen2_vl")
        given = foreign.prompt(model, foreign.ONE).inputs
        targets = ["q_proj", "v_proj", "patch_embed.proj"]
        adapted = get_peft_model(
            model, LoraConfig(target_modules=targets, use_dora=dora, init_lora_weights=False)
        ).eval()
        want = adapted(**given).logits
        with pytest.raises(ValueError, match="patch_embed is skipped: PatchEmbed: its projection is a .*Conv3d, not a"):
            patch(adapted)
        with patch(adapted, strict=False) as report:
            assert (adapted(**given).logits - want).abs().max() < BOUND
        assert report.calls == {"append_visual_kv_": 2}
        assert "not replaced: PatchEmbed: its projection is a peft" in str(report).splitlines()[0]


def test_a_plain_layer_is_read() -> None:
    for kind, part in ((nn.Linear, nn.Linear(2, 2)), (nn.LayerNorm, nn.LayerNorm(2)), (nn.Conv3d, nn.Conv3d(3, 2, 2))):
        assert why_called(part, kind, "part", torch.zeros(2)) is None
    assert why_called(nn.Linear(2, 2), nn.Linear, "part", torch.zeros(2, device="meta")) is not None
    part = nn.Linear(2, 2)
    part.bias = nn.Parameter(part.bias.to("meta"))
    assert why_called(part, nn.Linear, "part", torch.zeros(2)) is not None
