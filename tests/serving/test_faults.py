"""One-line faults in the serving code, each of which the simulation or the rows of the capture must notice."""

from __future__ import annotations

import importlib
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.serving.folders import folder_of
from tests.serving.simulation import Setting, assert_right, simulate
from vpt_model.vllm.options import SLOT

pytestmark = pytest.mark.unpoisoned
# Name: the module, what stands there once, and what takes its place.
FAULTS = {
    "slots of a finished request are kept": (
        "scheduler",
        "self.free_slots += [slot for _, slot in conversation.slots]",
        "pass",
    ),
    "features behind a rewind are kept": ("scheduler", "if f.mm_position.offset < keep]", "]"),
    "blocks behind a rewind are written to": ("scheduler", "elif keep < session.num_computed_tokens:", "elif False:"),
    "features of live pictures are evicted in turn": ("scheduler", "self._keep_features()", "pass"),
    "requests that wait never give back": ("scheduler", "if self.starved:", "if False:"),
    "a stale token is told": ("scheduler", "if is_stale and not", "if False and not"),
    "the limit is that of one round": ("scheduler", "max(1, conversation.left)", "max(1, conversation.streamed)"),
    "every action has one name": ("conversation", "first, uuid.uuid4().hex, pixels", 'first, "action", pixels'),
    "a slot is free before its image is encoded": ("conversation", "if place > keep]", "if place >= keep]"),
    "text before an action stays": ("conversation", "keep, count = self.round_start,", "keep, count = keep,"),
    "a token that was sampled behind a capture stays": (
        "conversation",
        "len(all_token_ids) - 1)",
        "len(all_token_ids))",
    ),
    "pixels may be stripped": ("items", "keep_on_cpu=True", "keep_on_cpu=False"),
}
# Seeds that are known to meet each fault; `test_simulation` draws others.
SETTINGS = (
    Setting(0, False, False, 400, 2048, 8, 0, 16),
    Setting(0, True, False, 400, 2048, 8, 0.15, 16),
    Setting(2, False, False, 80, 300, 6, 0.1, 16),
    Setting(1, True, True, 66, 1100, 4, 0.1, 16),
    Setting(2, False, False, 48, 2048, 3, 0, 16),
)
ROOM = "vpt_model.vllm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of("dino", tmp_path_factory.mktemp("checkpoints"))


@contextmanager
def faulty(name, old, new):
    """The room with the fault in one of its modules, and those that import it made anew; until the end as it was."""
    order = ("conversation", "items", "capture", "scheduler")
    originals = {f"{ROOM}.{each}": importlib.import_module(f"{ROOM}.{each}") for each in order}
    try:
        for full in [f"{ROOM}.{each}" for each in order[order.index(name) :]]:
            source = Path(originals[full].__file__).read_text()
            if full == f"{ROOM}.{name}":
                assert source.count(old) == 1, f"{old} stands {source.count(old)} times in {name}"
                source = source.replace(old, new)
            module = sys.modules[full] = types.ModuleType(full)
            exec(compile(source, originals[full].__file__, "exec"), module.__dict__)
        yield
    finally:
        sys.modules.update(originals)


def noticed(folder, setting):
    try:
        assert_right(simulate(folder, setting))
    except Exception:
        return True
    return False


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, folder):
    with faulty(*FAULTS[fault]):
        assert any(noticed(folder, setting) for setting in SETTINGS)


def test_without_a_fault_nothing_is_noticed(folder):
    with faulty("conversation", "def take(", "def take("):
        assert not any(noticed(folder, setting) for setting in SETTINGS)


@pytest.mark.parametrize("fault", ["", "self.sampled[: len(marked)]"], ids=["none", "the first rows"])
def test_a_capture_of_another_row_is_noticed(fault):
    from vllm import SamplingParams

    taken = "self.sampled.index_select(0, places[0])"
    config = SimpleNamespace(instance_id="fault", scheduler_config=SimpleNamespace(max_num_seqs=4))
    with faulty("capture", taken, fault or taken):
        module = sys.modules[f"{ROOM}.capture"]
        controls, processor = module.Controls(config, 4), module.ClipCapture(config)
    controls.sampled = torch.randn(3, 4)
    processor.add_request(7, SamplingParams(extra_args={SLOT: 5}))
    processor.apply(torch.zeros(3, 9), SimpleNamespace(idx_mapping_np=np.array([2, 7, 1])))
    right = torch.zeros_like(controls.states)
    right[5] = controls.sampled[1]
    assert torch.equal(controls.states, right) == (not fault)
