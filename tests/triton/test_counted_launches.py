"""What `bench launches` counts is what Triton is asked to launch, kernel by kernel."""

from __future__ import annotations

import pytest
import torch

from bench.launches.kernels import OPERATORS
from bench.launches.pretended import DEVICE, Pretended
from tests.helpers import noise, normal
from tests.kernels.append_inputs import make
from tests.kernels.control_inputs import fold
from tests.model.attention_inputs import make as make_attention
from tests.triton.watch import Launches
from vpt_kernels import append_visual_kv, plan_regions, qwen2_vl_policy, roi_patch_embed, roi_patches
from vpt_kernels.control_cross_attention import triton as _control  # noqa: F401  (registers the implementation)
from vpt_kernels.roi_patch_embed.api import FoldedPatchEmbed
from vpt_model.network import attention_triton


def append(place) -> None:
    call = make(7)
    append_visual_kv(*map(place, call.tensors()), **call.options(), backend="triton")


def control(place) -> None:
    projector = fold("identity", 24)
    arguments = [None if tensor is None else place(tensor) for tensor in projector.tensors()]
    features, state = place(normal(2, 5, 24, key="f")), place(normal(2, 24, key="c"))
    torch.ops.vpt_kernels.control_cross_attention.triton(features, state, None, *arguments)


def embed(place) -> None:
    plan = plan_regions([(60, 90)], [(0, 0, 0, 90, 60), (0, 3, 4, 50, 60)], qwen2_vl_policy())
    folded = FoldedPatchEmbed(place(normal(8, 588, key="w")), place(normal(2, 15, 8, key="b")), 14)
    roi_patch_embed([place(noise(60, 90, "launches"))], plan, folded, backend="triton")


def patches(place) -> None:
    plan = plan_regions([(60, 90)], [(0, 0, 0, 90, 60)], qwen2_vl_policy())
    roi_patches([place(noise(60, 90, "launches"))], plan, backend="triton")


CALLS = {
    "append_visual_kv": append,
    "control_cross_attention": control,
    "roi_patch_embed": embed,
    "roi_patches": patches,
}


def attend(place) -> None:
    call = make_attention([5, 3], [9, 0], 8, heads=(6, 2), dim=24, capacity=150, dtype=torch.float32)
    given = {k: place(x) if isinstance(x, torch.Tensor) else x for k, x in vars(call).items()}
    attention_triton.attend(**given, tickets=place(torch.zeros(64, dtype=torch.int32)))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("call", [*CALLS.values(), attend], ids=lambda call: call.__name__)
def test_the_count_is_what_was_launched(call):
    with Launches() as launched:
        call(lambda tensor: tensor)
    with Pretended() as gpu:
        call(lambda tensor: tensor.to(DEVICE))
    ours = [name for name in gpu.tally.launches.elements() if name.endswith("_kernel")]
    assert sorted(ours) == sorted(name for name, _ in launched.grids) and ours
    # Beside them nothing but the copies that bring the inputs.
    assert len(ours) == gpu.tally.kernels


@pytest.mark.parametrize("name", CALLS)
def test_operators_launch_what_they_declare(name):
    with Launches() as launched:
        CALLS[name](lambda tensor: tensor)
    assert len(launched.grids) == OPERATORS[name]
