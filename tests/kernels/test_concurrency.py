"""Numbers of threads, several callers at once, and processes that fork."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.helpers import CLIP_MEAN, CLIP_STD, assert_same_bits, each_backend, noise, normal
from tests.kernels.append_inputs import make
from tests.kernels.control_inputs import fold
from vpt_kernels import (
    cached_attention,
    control_cross_attention,
    fold_patch_weight,
    pack_weight,
    packed_linear,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patches,
)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@cache
def shared_inputs():
    """Large enough that every operator splits its work."""
    image = noise(500, 700, "threads")
    plan = plan_regions([(500, 700)], [(0, 3, 5, 690, 480), (0, 100, 0, 300, 500)], qwen2_vl_policy())
    embed = fold_patch_weight(normal(64, 3, 14, 14, key="e"), CLIP_MEAN, CLIP_STD)
    linear = normal(600, 96, key="linear"), normal(2, 160, key="c"), fold("linear", 160, 96)
    identity = normal(600, 256, key="identity"), normal(2, 256, key="c"), fold("identity", 256)
    return image, plan, embed, linear, identity, torch.tensor([0, 250, 600])


WORK = ("roi_patches", "roi_patch_embed", "linear", "identity", "append", "cached_attention", "packed_linear")


def work(name: str, backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    image, plan, embed, linear, identity, cu = shared_inputs()
    if name == "roi_patches":
        return [roi_patches([image], plan, backend=backend)]
    if name == "roi_patch_embed":
        given = replace(embed, weight=embed.weight.to(dtype))
        return [roi_patch_embed([image], plan, given, backend=backend)]
    if name == "cached_attention":
        keys, values = (normal(3000, 2, 64, key=key).bfloat16() for key in "kv")
        return [
            tensor
            for tokens in (1, 60)
            for tensor in cached_attention(normal(tokens, 8, 64, key="q", dtype=dtype), keys, values, backend=backend)
        ]
    if name == "packed_linear":
        x = normal(90, 700, key="packed", dtype=dtype)
        weights = [pack_weight(normal(1000, 700, key="packed"), stored) for stored in ("bfloat16", "int8")]
        return [packed_linear(x, weight, backend=backend) for weight in weights]
    if name == "append":
        call = make(1000, capacity=1000, dtype=dtype, key="threads")
        return [call.run(backend), call.k_cache, call.v_cache]
    features, control, projector = linear if name == "linear" else identity
    projector = replace(projector, **{k: v.to(dtype) for k, v in vars(projector).items() if isinstance(v, Tensor)})
    return [control_cross_attention(features.to(dtype), control.to(dtype), projector, cu, backend=backend)]


@each_backend
@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_the_number_of_threads_changes_no_bit(backend, name, dtype, threads):
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(work(name, backend, dtype))
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert_same_bits(ours, theirs)


@each_backend
@pytest.mark.parametrize("name", WORK)
def test_two_callers_at_once(backend, name):
    """Two Python threads on their own outputs: each gets what it gets alone."""
    want = work(name, backend)
    failures: list[BaseException] = []
    start = threading.Barrier(2)

    def caller() -> None:
        try:
            start.wait()
            for _ in range(6):
                for ours, theirs in zip(work(name, backend), want, strict=True):
                    assert_same_bits(ours, theirs)
        except BaseException as error:  # handed to the test's own thread
            failures.append(error)

    callers = [threading.Thread(target=caller) for _ in range(2)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not failures, failures[0]


@each_backend
def test_different_calls_at_once(backend):
    """Scratch memory of one operator, or of one size, is not another's."""
    want = {name: work(name, backend) for name in WORK}
    failures: list[str] = []

    def caller(names: tuple[str, ...]) -> None:
        for name in names * 3:
            got = work(name, backend)
            if any(not torch.equal(ours.nan_to_num(), theirs.nan_to_num()) for ours, theirs in zip(got, want[name])):
                failures.append(name)

    callers = [threading.Thread(target=caller, args=(order,)) for order in (WORK, WORK[::-1])]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not failures


@each_backend
@pytest.mark.parametrize("name", WORK)
def test_small_after_large(backend, name):
    """Scratch memory that a larger call left behind does not reach a later result."""
    before = work(name, backend)
    image = noise(1200, 900, "large")
    plan = plan_regions([(1200, 900)], [(0, 0, 0, 900, 1200)], qwen2_vl_policy())
    embed = fold_patch_weight(normal(96, 3, 14, 14, key="large"), CLIP_MEAN, CLIP_STD)
    roi_patch_embed([image], plan, embed, backend=backend)
    projector = fold("linear", 320, 200)
    control_cross_attention(normal(1500, 200, key="l"), normal(1, 320, key="l"), projector, backend=backend)
    make(3000, (8, 4), 64, capacity=3000).run(backend)
    for ours, theirs in zip(work(name, backend), before, strict=True):
        assert_same_bits(ours, theirs)


@each_backend
def test_fork_after_threads(backend):
    """A child of a process whose thread pool has run calls every operator; it neither hangs nor differs.

    The child uses one thread, as PyTorch's DataLoader workers do: with more, libgomp hangs in PyTorch's own operators.
    """
    program = f"""
import os, signal, sys
import torch
from tests.kernels.test_concurrency import WORK, work
torch.set_num_threads(2)
want = [tensor for name in WORK for tensor in work(name, {backend!r})]
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.set_num_threads(1)
    got = [tensor for name in WORK for tensor in work(name, {backend!r})]
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, want))
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode} (242: the child hung, 3: it differs)\n{done.stderr}"
