"""The operators as PyTorch sees them: schemas, fakes, mutation, torch.compile, inference mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import (
    assert_same_bits,
    each_backend,
    each_dtype,
    normal,
)
from tests.kernels.append_inputs import make
from tests.kernels.operator_calls import (
    FUNCTIONS,
    cases,
    compare_compiled,
    overload,
)
from vpt_kernels import (
    append_visual_kv,
    append_visual_kv_,
)
from vpt_kernels.library import BACKENDS as ALL_BACKENDS

pytestmark = pytest.mark.unpoisoned

MUTATED = {
    "roi_patches": (),
    "roi_patch_embed": (),
    "roi_patch_embed_into": ("out",),
    "control_cross_attention": (),
    "control_cross_attention_into": ("out",),
    "append_visual_kv": ("k_cache", "v_cache"),
    "append_visual_kv_": ("q", "k_cache", "v_cache"),
    "cached_attention": (),
    "packed_linear": (),
    "packed_linear_into": ("out",),
}
"""Every form of every operator, and the arguments it writes."""

each_form = pytest.mark.parametrize("form", MUTATED)


def test_every_operator_is_listed_here():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vpt_kernels::")}
    assert names == {f"vpt_kernels::{form}.{backend}" for form in MUTATED for backend in ALL_BACKENDS}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@each_form
def test_schemas(backend, form):
    """What is written is marked, nothing else; nothing returned is an input."""
    schema = overload(form, backend)._schema
    written = [argument.name for argument in schema.arguments if argument.alias_info is not None]
    assert tuple(sorted(written)) == tuple(sorted(MUTATED[form]))
    assert all(a.alias_info.is_write for a in schema.arguments if a.alias_info is not None)
    sets = [tuple(a.alias_info.before_set) for a in schema.arguments if a.alias_info is not None]
    assert len(set(sets)) == len(sets)
    returned = 0 if form.endswith(("_into", "_")) else 2 if form == "cached_attention" else 1
    assert len(schema.returns) == returned
    assert all(value.alias_info is None for value in schema.returns)
    assert str(overload(form, "reference")._schema).replace(".reference", "") == str(schema).replace(f".{backend}", "")


@each_backend
@each_form
@each_dtype
def test_opcheck(backend, form, dtype):
    """Schema, autograd registration, fake tensors, ahead-of-time dispatch with dynamic shapes."""
    for arguments in cases(form, dtype)[:: 1 if dtype == torch.float32 else 7]:
        results = torch.library.opcheck(overload(form, backend), arguments)
        assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


@each_backend
@pytest.mark.parametrize(
    "form", [form for form, written in MUTATED.items() if "out" not in written and form[-1] != "_"]
)
def test_results_are_new_tensors(backend, form):
    for arguments in cases(form, torch.float32):
        result = overload(form, backend)(*arguments)
        inputs = [*arguments[0], *arguments[1:]] if isinstance(arguments[0], list) else arguments
        storages = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor) and t.numel()}
        for one in result if isinstance(result, tuple) else (result,):
            assert one.untyped_storage().data_ptr() not in storages or not one.numel()
            assert one.is_contiguous()


@each_backend
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_equals_eager(backend, name):
    with torch.no_grad():
        compare_compiled(*FUNCTIONS[name], backend, "aot_eager")


@each_backend
def test_compiled_append_in_a_model(backend):
    """Inductor: the projection before and the use of the cache after, in one graph, the caches mutated in place."""
    call = make(6, (4, 2), 16, capacity=9, table_rows=64, key="inductor")
    weight = normal(8 * 16, 8 * 16, key="qkv", scale=0.1)

    def layer(x, k_cache, v_cache, backend):
        q, k, v = (x @ weight).view(-1, 8, 16).split([4, 2, 2], 1)
        append_visual_kv_(
            q, k, v, call.cos_sin, call.positions, call.slots, k_cache, v_cache, (2, 3, 3), backend=backend
        )
        return q.sum(0) + k_cache.sum() + v_cache[3].sum()

    def inputs() -> list[Tensor]:
        return [normal(6, 8 * 16, key="x"), torch.zeros(9, 2, 16), torch.zeros(9, 2, 16)]

    eager, compiled = [t.clone() for t in inputs()], [t.clone() for t in inputs()]
    torch._dynamo.reset()
    with torch.no_grad():
        want = layer(*eager, backend)
        actual = torch.compile(layer, fullgraph=True)(*compiled, backend)
    torch.testing.assert_close(actual, want)
    torch.testing.assert_close(compiled[1], eager[1])
    torch.testing.assert_close(compiled[2], eager[2])


@each_backend
def test_compiled_with_dynamic_tokens(backend):
    """One graph for every length."""
    frames = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()

    def step(q, k, v, positions, slots, k_cache, v_cache):
        return append_visual_kv(q, k, v, call.cos_sin, positions, slots, k_cache, v_cache, (2, 3, 3), backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=frames)
    with torch.no_grad():
        for tokens in (5, 9, 14, 3):
            call = make(tokens, capacity=20, table_rows=64)
            inputs = [call.q, call.k, call.v, call.positions, call.slots, call.k_cache, call.v_cache]
            other = call.fresh()
            want = other.run(backend)
            assert_same_bits(compiled(*inputs), want)
            assert_same_bits(call.k_cache, other.k_cache)
    assert frames.frame_count == 1


@each_backend
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("mode", (torch.inference_mode, torch.no_grad))
def test_without_autograd(backend, name, mode):
    """In inference mode, on tensors made there; under no_grad, on tensors that require grad."""
    function, inputs = FUNCTIONS[name]
    eager = [t.clone() for t in inputs()]
    want = function(*eager, backend=backend)
    with mode():
        given = [t.clone() for t in inputs()]
        if mode is torch.no_grad:
            given = [t.requires_grad_() if t.is_floating_point() and t.itemsize > 1 else t for t in given]
        actual = function(*given, backend=backend)
    if want is not None:
        assert_same_bits(actual.clone(), want)
        assert not actual.requires_grad
    for ours, theirs in zip(given, eager, strict=True):
        assert_same_bits(ours, theirs, "an argument")
