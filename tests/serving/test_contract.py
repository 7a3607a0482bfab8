"""What is used of vLLM beyond its documented interfaces; a version in which it differs fails with one sentence."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import tests.serving.engines  # noqa: F401  (settings that vLLM reads when it is imported)
from tests.serving.folders import folder_of
from vpt_model.vllm import contract
from vpt_model.vllm.options import LOOKS, MAX_LOOKS, SLOT, read_options

pytestmark = pytest.mark.unpoisoned


def test_the_installed_version_keeps_the_contract():
    contract.check()


@pytest.mark.parametrize("version", ["0.31.1", "0.34.0", "1.0"])
def test_another_version_is_refused_by_name(version):
    with mock.patch("vllm.__version__", version), pytest.raises(ValueError, match=rf"0\.32, 0\.33, not with {version}"):
        contract.check()


def test_whatever_is_missing_is_named():
    import vllm.v1.core.sched.scheduler as module

    with mock.patch.object(module.Scheduler, "_handle_stopped_request", lambda self, other: True):
        assert contract.missing() == [f"{contract.SCHEDULER}._handle_stopped_request(request)"]
    lists = {f"{contract.REQUEST}.gone": ("x",)}
    with mock.patch.object(contract, "PARAMETERS", lists), pytest.raises(ValueError, match=r"it lacks .*Request\.gone"):
        contract.check()


def overrides(own, kind):
    """Functions of vLLM that `own` replaces in `kind`; each as the names under which a list may have it."""
    for name, value in vars(own).items():
        bases = [base for base in kind.__mro__[1:] if base.__module__.startswith("vllm.") and name in vars(base)]
        if bases and callable(getattr(value, "__func__", value)) and name not in vars(object).keys() - {"__init__"}:
            yield [f"{base.__qualname__}.{name}" for base in bases]


def test_every_function_that_is_overridden_is_listed():
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    from vpt_model.vllm import capture, defaults, metrics, model, processor, reasoning, scheduler

    subclasses = (capture.ControlCapture, model.VPTQwen2VL, model.EmbeddedPatches, processor.Info, processor.Dummies)
    subclasses += (processor.Processor, reasoning.LookParser, metrics.LookMetrics)
    defaulted = type("Defaulted", (defaults.LookDefaults, VerifyAndUpdateConfig), {})
    mixed = [(scheduler.Looks, scheduler.SyncLookScheduler), (scheduler.Looks, scheduler.AsyncLookScheduler)]
    pairs = [*((kind, kind) for kind in subclasses), *mixed, (defaults.LookDefaults, defaulted)]
    listed = {name.partition(":")[2] for name in contract.PARAMETERS}
    found = [names for pair in pairs for names in overrides(*pair)]
    assert len(found) > 40 and not [names for names in found if listed.isdisjoint(names)]


@pytest.mark.parametrize("encoder", ["clip", "dino", "sam", ""])
def test_both_model_runners_load_the_capture(encoder):
    from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
    from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_by_fqcns

    from vpt_model.vllm.capture import CAPTURES

    for load in (_load_logitsprocs_by_fqcns, _load_v2_logitsprocs_by_fqcns):
        (found,) = load([CAPTURES[encoder]])
        assert found.encoder == encoder


def parameters(slot=None):
    from vllm import SamplingParams

    return SamplingParams(extra_args=None if slot is None else {SLOT: slot})


@pytest.fixture
def capture():
    """A capture, and the slots of its model."""
    from vpt_model.vllm.capture import ClipCapture, Controls

    config = SimpleNamespace(instance_id="test", scheduler_config=SimpleNamespace(max_num_seqs=4))
    controls = Controls(config, 4)
    yield ClipCapture(config), controls


def stored(processor, controls, rows, context=None):
    """Slots that a step changes, by the row that they then hold."""
    before = controls.states.clone()
    controls.sampled = torch.randn(rows, 4)
    processor.apply(torch.zeros(rows, 9), *(() if context is None else (context,)))
    changed = (controls.states != before).any(1).nonzero().flatten().tolist()
    return {slot: controls.sampled.eq(controls.states[slot]).all(1).nonzero().item() for slot in changed}


def test_rows_of_the_first_runner_come_go_and_move(capture):
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    processor, controls = capture
    added = [(0, parameters(), [1], []), (1, parameters(5), [1], []), (2, parameters(0), [1], [])]
    processor.update_state(BatchUpdate(3, [], added, []))
    assert stored(processor, controls, 3) == {5: 1, 0: 2}
    processor.update_state(BatchUpdate(2, [0], [], [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert stored(processor, controls, 2) == {0: 0, 5: 1}
    processor.update_state(BatchUpdate(2, [], [(i, parameters(), [1], []) for i in range(2)], []))
    assert stored(processor, controls, 2) == {}


def test_rows_of_the_second_runner_are_found_in_every_order(capture):
    processor, controls = capture

    def order(*indices):
        return SimpleNamespace(idx_mapping_np=np.array(indices))

    assert processor.add_request(3, parameters(2)) and not processor.add_request(1, parameters())
    assert stored(processor, controls, 2, order(1, 3)) == {2: 1}
    assert stored(processor, controls, 2, order(3, 1)) == {2: 0}
    assert not processor.add_request(3, parameters())
    assert stored(processor, controls, 1, order(3)) == {}


@pytest.mark.parametrize(
    "bad",
    [
        {LOOKS: "region:x9,y1,x2,y3"},
        {LOOKS: "dino"},
        {LOOKS: ["clip", "clip"]},
        {LOOKS: 3},
        {LOOKS: [3]},
        {LOOKS: "clip", MAX_LOOKS: 0},
        {MAX_LOOKS: -1},
        {MAX_LOOKS: 9},
        {MAX_LOOKS: 1.5},
        {MAX_LOOKS: "one"},
        {MAX_LOOKS: True},
        {SLOT: 1},
        {LOOKS: ""},
        {LOOKS: 0},
        {LOOKS: "region:x1,y1,x2,y8"},
        {LOOKS: "region:x1,y1,x2"},
        {LOOKS: "region:" + "+".join(["x0,y0,x1,y1"] * 65)},
        {LOOKS: ["clip", "sam"], MAX_LOOKS: 2},
        {"vpt_look": "clip"},
    ],
)
def test_a_bad_option_is_refused(bad):
    with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
        read_options(bad, "clip")


def test_a_vocabulary_without_looks_refuses_them_all():
    for look in ("clip", "region:x1,y2,x4,y5"):
        with pytest.raises(ValueError, match=rf"{look}.* no tokens of looks: leave vpt_looks out"):
            read_options({LOOKS: look}, "")
    assert read_options({MAX_LOOKS: 2}, "") == (2, ())


def test_good_options():
    assert read_options(None, "sam") == (1, ())
    assert read_options({LOOKS: "region:x1,y2,x4,y5+x0,y0,x1,y1"}, "sam").looks == ("region:x1,y2,x4,y5+x0,y0,x1,y1",)
    assert read_options({LOOKS: (many := "region:" + "+".join(["x0,y0,x1,y1"] * 64))}, "sam").looks == (many,)
    assert read_options({LOOKS: ["sam", "sam"], MAX_LOOKS: 3}, "sam") == (3, ("sam", "sam"))


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("--pipeline-parallel-size", {"parallel_config.pipeline_parallel_size": 2}),
        ("--speculative-config", {"speculative_config": object()}),
        ("--scheduler-cls", {"scheduler_config.scheduler_cls": "another.Scheduler"}),
        ("--mm-processor-cache-type", {"cache_type": "shm"}),
    ],
)
def test_what_looks_exclude_is_refused_at_the_start(flag, change, tmp_path):
    from vpt_model.vllm.defaults import LookDefaults

    folder = folder_of("clip", tmp_path)
    cache = SimpleNamespace(mm_processor_cache_type=change.pop("cache_type", "lru"))
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder), revision=None, logits_processors=None, get_multimodal_config=lambda: cache
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=None),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        load_config=SimpleNamespace(load_format="auto"),
        structured_outputs_config=SimpleNamespace(enable_in_reasoning=False),
        speculative_config=None,
    )
    for name, value in change.items():
        *path, last = name.split(".")
        setattr(getattr(config, path[0]) if path else config, last, value)
    with pytest.raises(ValueError, match=flag):
        LookDefaults.verify_and_update_config(config)
