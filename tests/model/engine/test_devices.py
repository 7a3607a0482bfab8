"""What only a GPU would show, as far as stand-ins for torch.cuda show it: streams, current devices, precision."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from bench.launches.pretended import Pretended
from tests.model.inputs import tiny_config, tiny_model, tiny_state
from vpt_model.engine import Engine, graphs, perception
from vpt_model.engine.events import Clock
from vpt_model.engine.graphs import Bucket, Step
from vpt_model.network import capture, tower_graphs
from vpt_model.network.cache import KVCache
from vpt_model.network.model import Model
from vpt_model.network.tower_graphs import CapturedEncoder, PatchStep
from vpt_model.text.tokens import Tokenizer


@pytest.fixture(autouse=True)
def _made():
    """The shared models, whose weights other tests use too: not made in inference mode, nor on a pretended device."""
    for kind in ("clip", "detection", "seg"):
        tiny_model(kind)


class Cuda:
    """Stands for torch.cuda where graphs are captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made, self.captured_on, self.warmed_on = [], [], []
        capture._warm_up_stream.cache_clear()
        self.main = self.stream()
        for name, value in {
            "Stream": self.stream,
            "current_stream": lambda device=None: self.main,
            "stream": self.inside,
            "graph": self.graph,
            "CUDAGraph": SimpleNamespace,
            "current_device": lambda: 0,
            "graph_pool_handle": object,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def stream(self, device: object = None) -> SimpleNamespace:
        made = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
        self.made.append(made)
        return made

    @contextlib.contextmanager
    def inside(self, stream):
        self.warmed_on.append(stream)
        yield

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None):
        self.captured_on.append(stream)
        yield


@pytest.fixture
def cuda(_made, monkeypatch):
    yield Cuda(monkeypatch)
    capture._warm_up_stream.cache_clear()


def test_all_warm_ups_share_one_stream(cuda):
    for _ in range(3):
        capture.record(lambda: (), None)
    assert len(cuda.made) == 2 and cuda.warmed_on == [cuda.made[1]] * 3


@torch.inference_mode()
def test_the_re_encoder_is_captured_on_a_stream_of_its_own(cuda):
    """Graphs of one stream share cuBLAS's workspace, and this one may run beside the others."""
    model, _ = tower_graphs.captured(tiny_model("detection"))
    *towers, own = cuda.captured_on
    assert len(towers) == len(model.vision.steps) and set(towers) == {None}
    assert own is not None and own is not cuda.warmed_on[0]


def watched(monkeypatch, module, run) -> list[str]:
    """What `run` does inside and outside of the guard of `module`."""
    seen, inside = [], [False]

    @contextlib.contextmanager
    def guard(tensor):
        inside[0] = True
        yield
        inside[0] = False

    monkeypatch.setattr(module, "on_device", guard)
    run(lambda name: seen.append(f"{name} {'inside' if inside[0] else 'outside'}"))
    return seen


def test_a_step_keeps_to_its_device_s_stream(monkeypatch):
    """Copy, event and replay must not part where another device is current."""
    language = tiny_model().language
    (cache,) = KVCache.side_by_side(1, language.config, 64, torch.float32, "cpu")
    step = Step(Bucket(1, 1, True), language, cache.slab, 64)

    def run(note, copied=False):
        step.copied = SimpleNamespace(
            query=lambda: copied, synchronize=lambda: note("wait"), record=lambda: note("record")
        )
        step.graph = SimpleNamespace(replay=lambda: note("replay"))
        step([])

    assert watched(monkeypatch, graphs, run) == ["wait inside", "record inside", "replay inside"]
    # What has been copied already is not waited for.
    assert watched(monkeypatch, graphs, lambda note: run(note, True)) == ["record inside", "replay inside"]


def test_stages_are_timed_on_the_stream_and_waited_for_when_they_are_asked_for(monkeypatch):
    seen, stream = [], object()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at = None

        def record(self, on):
            assert on is stream
            self.at = len(seen)
            seen.append("record")

        def query(self):
            return False

        def synchronize(self):
            seen.append("wait")

        def elapsed_time(self, end):
            return 10.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    clock = Clock(torch.device("cuda", 0))
    for name in ("ViT", "append", "append"):
        with clock(name, tokens=2):
            pass
    assert seen == ["record"] * 6
    expected = [("ViT", 10.0, {"tokens": 2}), ("append", 20.0, {"tokens": 4})]
    for _ in range(2):
        assert [(stage.name, stage.milliseconds, stage.work) for stage in clock.stages] == expected
    assert seen == ["record"] * 6 + ["wait"] * 3


@torch.inference_mode()
def test_towers_keep_to_their_device_s_stream(monkeypatch):
    model = tiny_model("detection")
    tower, encoder = PatchStep(model.vision, 16), CapturedEncoder(model.encoder)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_event=lambda event: None))

    def run(note):
        tower.outputs, encoder.outputs = tower.run(), encoder.run()
        encoder.free = SimpleNamespace(record=lambda: note("record"))
        tower.graph = encoder.graph = SimpleNamespace(replay=lambda: note("replay"))
        tower(torch.zeros(16, model.vision.config.embed_dim), [(4, 4)])
        encoder(encoder.patches.clone())

    assert watched(monkeypatch, tower_graphs, run) == ["replay inside", "replay inside", "record inside"]


def test_an_image_on_a_device_is_not_pinned():
    class Image:
        device = torch.device("cuda:0")

        def pin_memory(self):
            raise RuntimeError("only dense CPU tensors can be pinned")

        def to(self, device, **how):
            return self

    image = Image()
    assert perception.upload(image, torch.device("cuda:0")) is image


@torch.inference_mode()
def test_the_neck_of_sam_multiplies_float32_as_float32():
    model, seen = tiny_model("seg"), []
    convolutions = torch.backends.cudnn.conv
    handle = model.encoder.neck.register_forward_pre_hook(lambda *_: seen.append(convolutions.fp32_precision))
    before = convolutions.fp32_precision
    model.encoder(torch.zeros(model.encoder.grid[0] * model.encoder.grid[1], model.encoder.width))
    handle.remove()
    assert seen == ["ieee"] and convolutions.fp32_precision == before


@pytest.mark.parametrize("kind, kernel", [("clip", "identity_kernel"), ("detection", "project_kernel")])
def test_nothing_is_compiled_inside_a_first_look(kind, kernel):
    config, shapes = tiny_config(kind), {name: x.shape for name, x in tiny_state(kind).items()}
    with Pretended() as gpu:
        state = {name: gpu.empty(shape, torch.bfloat16) for name, shape in shapes.items()}
        engine = Engine(Model.from_state(config, state), Tokenizer.byte_level(320, kind), capacity=512)
        seconds = engine.warm_up()
        assert {"resample_kernel", "embed_kernel", "condition_kernel", kernel} <= set(gpu.tally.launches)
    assert "crop, embedding and projector" in seconds
