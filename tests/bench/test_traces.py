"""The written trace set: complete, and its stand-alone references are what our operators compute."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from bench.cases import require_close
from bench.traces import definitions, write
from bench.workloads import MEGAPIXEL
from vpt_kernels import (
    append_visual_kv,
    control_cross_attention,
    fold_patch_weight,
    fold_projector,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
)

NAMES = [definition.name for definition in definitions()]


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    return folder, {path.stem: json.loads(path.read_text()) for path in write(folder)}


def _run(definition):
    scope = {}
    exec(definition["reference"], scope)  # noqa: S102  (as a trace runner does)
    return scope["run"]


def _inputs(folder, definition, line):
    """Tensors of one workload as a trace runner makes them."""
    workload = json.loads(line)["workload"]
    sizes = {name: axis.get("value") for name, axis in definition["axes"].items()} | workload["axes"]
    torch.manual_seed(0)
    made = {}
    for name, spec in definition["inputs"].items():
        shape, dtype, source = [sizes[axis] for axis in spec["shape"]], getattr(torch, spec["dtype"]), None
        if workload["inputs"][name]["type"] == "safetensors":
            source = workload["inputs"][name]
            made[name] = load_file(folder / source["path"])[source["tensor_key"]]
        elif dtype == torch.int8:
            made[name] = torch.randint(-128, 128, shape, dtype=dtype)
        else:
            made[name] = torch.randn(shape).to(dtype)
        assert list(made[name].shape) == shape and made[name].dtype == dtype, name
    # Semantics are compared in float32, where rounding hides nothing.
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in made.items()}


def _lines(folder, definition):
    return (folder / "workloads" / definition["op_type"] / f"{definition['name']}.jsonl").read_text().splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_definitions_are_complete(traces, name):
    folder, found = traces
    definition = found[name]
    bound = {axis for spec in definition["inputs"].values() for axis in spec["shape"]}
    named = bound | {axis for spec in definition["outputs"].values() for axis in spec["shape"]}
    assert named == definition["axes"].keys()
    assert {axis for axis, spec in definition["axes"].items() if spec["type"] == "var"} <= bound
    assert not definition["inputs"].keys() & definition["outputs"].keys()
    lines = _lines(folder, definition)
    assert len({json.loads(line)["workload"]["uuid"] for line in lines}) == len(lines) >= 3


def _check(definition, inputs, ours):
    outputs = _run(definition)(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for name, theirs, own in zip(definition["outputs"], outputs, ours, strict=True):
        require_close(name, own, theirs, 1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("append")])
def test_append(traces, name):
    folder, found = traces
    for line in _lines(folder, found[name])[:3]:
        inputs = _inputs(folder, found[name], line)
        k_cache, v_cache = inputs["k_cache"].clone(), inputs["v_cache"].clone()
        names = ("q", "k", "v", "cos_sin", "positions", "slots")
        q = append_visual_kv(*(inputs[n] for n in names), k_cache, v_cache)
        _check(found[name], inputs, (q, k_cache, v_cache))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("control")])
def test_control(traces, name):
    folder, found = traces
    inputs = _inputs(folder, found[name], _lines(folder, found[name])[-1])
    # The scale of trained weights: with random ones f·k would drown f.
    inputs["feature_weight"] /= 32
    inputs["control_weight"] /= inputs["control_weight"].shape[0]
    pairs = {key: (inputs[f"{key}_weight"], inputs[f"{key}_bias"]) for key in ("feature_norm", "feature")}
    projector = fold_projector(
        "linear",
        condition_norm=(inputs["control_norm_weight"], inputs["control_norm_bias"]),
        condition=(inputs["control_weight"], inputs["control_bias"]),
        **pairs,
    )
    ours = control_cross_attention(inputs["features"], inputs["control"], projector, inputs["cu_seqlens"])
    _check(found[name], inputs, (ours,))


@pytest.mark.parametrize("workload", (0, 1))
def test_roi(traces, workload):
    folder, found = traces
    definition = found["roi_patch_embed_p14_e1280"]
    inputs = _inputs(folder, definition, _lines(folder, definition)[workload])
    image = inputs["image"].view(torch.uint8)
    left, top, right, bottom = inputs["box"].tolist()
    rows, columns = inputs["size"].tolist()
    policy = qwen2_vl_policy(max_pixels=MEGAPIXEL // (4 if workload else 1))
    plan = plan_regions([tuple(image.shape[:2])], [(0, left, top, right, bottom)], policy)
    assert plan.grids == ((rows // 14, columns // 14),)
    embed = fold_patch_weight(torch.randn(1280, 3, 2, 14, 14) / 34, (0.5,) * 3, (0.25,) * 3)
    inputs["weight"], inputs["bias"] = embed.weight, embed.bias[0, -1]
    _check(definition, inputs, (roi_patch_embed([image], plan, embed),))
