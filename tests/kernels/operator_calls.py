"""Arguments for every form of every operator, and the comparison of a compiled call with an eager one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.helpers import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    assert_same_bits,
    noise,
    normal,
)
from tests.kernels.append_inputs import make
from tests.kernels.control_inputs import fold
from vpt_kernels import (
    append_visual_kv,
    append_visual_kv_,
    cached_attention,
    control_cross_attention,
    control_cross_attention_into,
    fold_patch_weight,
    pack_weight,
    packed_linear,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patch_embed_into,
    roi_patches,
    sam_policy,
)


def overload(form: str, backend: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops.vpt_kernels, form), backend)


def roi_cases(form: str, dtype: torch.dtype) -> list[tuple]:
    images = [noise(40, 60, 0), noise(33, 20, 1).transpose(0, 1)]
    sizes = [tuple(image.shape[:2]) for image in images]
    cases = []
    for boxes, policy, mean, std in (
        ([(0, 1, 2, 60, 40), (1, 0, 0, 33, 20)], qwen2_vl_policy(), CLIP_MEAN, CLIP_STD),
        ([(0, 0, 0, 60, 40)], sam_policy(edge=64), IMAGENET_MEAN, IMAGENET_STD),
        ([], qwen2_vl_policy(), CLIP_MEAN, CLIP_STD),
    ):
        plan, patch = plan_regions(sizes, boxes, policy), policy.patch_size
        embed = fold_patch_weight(normal(5, 3, patch, patch, key="opcheck", dtype=dtype), mean, std)
        cases.append(
            {
                "roi_patches": (images, plan.table, plan.rows, 3 * patch * patch),
                "roi_patch_embed": (images, plan.table, plan.rows, embed.weight, embed.bias),
                "roi_patch_embed_into": (
                    images,
                    plan.table,
                    embed.weight,
                    embed.bias,
                    torch.zeros(plan.rows + 3, 5, dtype=dtype),
                    2,
                ),
            }[form]
        )
    return cases


def control_cases(form: str, dtype: torch.dtype) -> list[tuple]:
    control = normal(2, 12, key="control", dtype=dtype)
    cases = []
    for kind, shape, cu in (
        ("linear", (7, 6), torch.tensor([0, 3, 7])),
        ("linear", (2, 5, 6), None),
        ("conv", (2, 6, 8, 4), None),
        ("identity", (7, 12), torch.tensor([0, 7, 7], dtype=torch.int32)),
        ("identity", (2, 0, 12), None),
    ):
        features = normal(*shape, key=kind, dtype=dtype)
        for given in (control, None) if cu is None else (control,):
            arguments = (features, given, cu, *fold(kind, 12, 6, dtype).tensors())
            if form.endswith("_into"):
                tokens = 4 if kind == "conv" else features[..., 0].numel()
                arguments += (torch.zeros(9, 12, dtype=dtype), torch.arange(tokens) - 1)
            cases.append(arguments)
    return cases


def append_cases(form: str, dtype: torch.dtype) -> list[tuple]:
    cases = []
    for tokens in (6, 1, 0):
        call = make(tokens, dtype=dtype, capacity=9, table_rows=64)
        inputs = (call.k, call.v, call.cos_sin, call.positions, call.slots)
        plain = torch.zeros(9, 2, 16, dtype=dtype)
        for cache, interleaved, heads_first in (
            (plain, False, False),
            (plain.view(3, 3, 2, 16), True, False),
            (plain.view(3, 2, 3, 16), False, True),
        ):
            norm = normal(16, key="norm", dtype=dtype)
            norms = (norm, None) if interleaved else (None, None) if heads_first else (norm, norm + 1)
            options = interleaved, heads_first, None, None, *norms, 1e-6
            cases.append((call.q.clone(), *inputs, cache.clone(), cache.clone(), *call.sections, *options))
    return cases


def float8_case() -> tuple:
    call = make(6, capacity=9, table_rows=64)
    caches = [torch.zeros(9, 2, 16).to(torch.float8_e4m3fn) for _ in range(2)]
    scales = torch.tensor(0.5), torch.tensor([0.5, 2.0])
    return (*call.tensors()[:-2], *caches, *call.sections, False, False, *scales, None, torch.ones(16), 1e-6)


def packed_cases(form: str, dtype: torch.dtype) -> list[tuple]:
    cases = []
    for stored, gated, rows in (
        ("float32", False, 3),
        ("bfloat16", True, 40),
        ("int8", False, 2),
        ("int4", True, 5),
        ("w8a8", False, 15),
        ("float16", False, 0),
    ):
        packed = pack_weight(normal(22, 37, key="opcheck"), stored, gated=gated)
        features = packed.out_features
        bias = normal(22, key="bias") if gated else None
        data = (packed.data, packed.scales, packed.minima, features, gated, packed.dynamic)
        residual = normal(rows, features, key="residual", dtype=dtype)
        arguments = (normal(rows, 37, key="x", dtype=dtype), *data, bias, residual, 1 if gated else 0)
        cases.append((*arguments, torch.zeros(rows, features, dtype=dtype)) if form.endswith("_into") else arguments)
    return cases


def attention_cases(dtype: torch.dtype) -> list[tuple]:
    found = []
    for tokens, stored, cached, causal in ((1, 9, dtype, True), (3, 3, torch.bfloat16, True), (2, 5, dtype, False)):
        keys, values = (normal(stored, 2, 16, key=key, dtype=cached) for key in "kv")
        found.append((normal(tokens, 6, 16, key="q", dtype=dtype), keys, values, causal))
    return found


def cases(form: str, dtype: torch.dtype) -> list[tuple]:
    if form == "cached_attention":
        return attention_cases(dtype)
    if form.startswith("roi"):
        return roi_cases(form, dtype)
    if form.startswith("packed"):
        return packed_cases(form, dtype)
    return (append_cases if form.startswith("append") else control_cases)(form, dtype)


IMAGES = [noise(40, 60, "compile"), noise(33, 20, "compile")]
PLAN = plan_regions([(40, 60), (33, 20)], [(0, 1, 2, 60, 40), (1, 0, 0, 20, 33)], qwen2_vl_policy())
EMBED = fold_patch_weight(normal(5, 3, 14, 14, key="compile"), CLIP_MEAN, CLIP_STD)
PROJECTORS = {form: fold(form, 12, 6) for form in ("linear", "conv", "identity")}
CU = torch.tensor([0, 3, 7])
PACKED = (
    pack_weight(normal(22, 37, key="compile"), "bfloat16"),
    pack_weight(normal(22, 37, key="int8"), "int8", gated=True),
)


def append_call() -> list[Tensor]:
    call = make(6, capacity=9, table_rows=64, key="compile")
    return [*call.tensors()[:-2], torch.zeros(9, 2, 16), torch.zeros(9, 2, 16)]


FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    # name: the function of fresh tensors, and those tensors; what it writes are the tensors themselves
    "roi_patches": (lambda a, b, backend: roi_patches([a, b], PLAN, backend=backend), lambda: IMAGES),
    "roi_patch_embed": (lambda a, b, backend: roi_patch_embed([a, b], PLAN, EMBED, backend=backend), lambda: IMAGES),
    "roi_patch_embed_into": (
        lambda a, b, out, backend: roi_patch_embed_into([a, b], PLAN, EMBED, out, 3, backend=backend),
        lambda: [*IMAGES, torch.zeros(PLAN.rows + 4, 5)],
    ),
    "linear": (
        lambda x, c, cu, backend: control_cross_attention(x, c, PROJECTORS["linear"], cu, backend=backend),
        lambda: [normal(7, 6, key="x"), normal(2, 12, key="c"), CU],
    ),
    "conv": (
        lambda x, c, backend: control_cross_attention(x, c, PROJECTORS["conv"], backend=backend),
        lambda: [normal(2, 6, 8, 4, key="x"), normal(2, 12, key="c")],
    ),
    "identity without control": (
        lambda x, backend: control_cross_attention(x, None, PROJECTORS["identity"], backend=backend),
        lambda: [normal(7, 12, key="x")],
    ),
    "control_cross_attention_into": (
        lambda x, c, out, rows, backend: control_cross_attention_into(
            x, c, PROJECTORS["identity"], out, rows, CU, backend=backend
        ),
        lambda: [normal(7, 12, key="x"), normal(2, 12, key="c"), torch.zeros(9, 12), torch.arange(7) - 1],
    ),
    "append_visual_kv": (lambda *t, backend: append_visual_kv(*t, (2, 3, 3), backend=backend), append_call),
    "float8 caches": (
        lambda *t, backend: append_visual_kv(
            *t[:-2], (2, 3, 3), layout="HND", k_scale=t[-2], v_scale=t[-1], backend=backend
        ),
        lambda: [
            *append_call()[:-2],
            *(torch.zeros(2, 9, 16).to(torch.float8_e4m3fn) for _ in range(2)),
            torch.tensor(0.3),
            torch.tensor([0.7, 2.0]),
        ],
    ),
    "append_visual_kv_": (lambda *t, backend: append_visual_kv_(*t, (2, 3, 3), backend=backend), append_call),
    "cached_attention": (
        lambda q, keys, values, backend: cached_attention(q, keys, values, backend=backend)[0],
        lambda: [normal(3, 4, 16, key="q"), normal(7, 2, 16, key="k").bfloat16(), normal(7, 2, 16, key="v").bfloat16()],
    ),
    "packed_linear": (
        lambda x, bias, residual, backend: packed_linear(x, PACKED[0], bias, residual, backend=backend),
        lambda: [normal(3, 5, 37, key="x"), normal(22, key="b"), normal(3, 5, 22, key="r")],
    ),
    "packed_linear into its residual": (
        lambda x, out, backend: packed_linear(x, PACKED[1], None, out, "silu", out=out, backend=backend).sum(),
        lambda: [normal(5, 37, key="x"), normal(5, 11, key="r")],
    ),
    "normalised heads": (
        lambda *t, backend: append_visual_kv_(
            *t[:-2], (2, 3, 3), q_norm=t[-2], k_norm=t[-1], norm_eps=1e-5, backend=backend
        ),
        lambda: [*append_call(), normal(16, key="qn"), normal(16, key="kn")],
    ),
}


def compare_compiled(function: Callable, inputs: Callable, backend: str, compiler: str, **options) -> None:
    eager_inputs, compiled_inputs = ([t.clone() for t in inputs()] for _ in range(2))
    want = function(*eager_inputs, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler, **options)
    actual = compiled(*compiled_inputs, backend=backend)
    assert (actual is None) == (want is None)
    if want is not None:
        assert_same_bits(actual, want)
    for ours, theirs in zip(compiled_inputs, eager_inputs, strict=True):
        assert_same_bits(ours, theirs, "an argument")
