"""The engine with the decode layer's kernels in its steps: the recorded answers, and padding that reaches nobody."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import assert_same_bits
from tests.model.engine.recorded import CASES, Recorded, RecordedEngine, image, matches, recorded
from tests.model.inputs import tiny_model
from tests.triton.watch import Launches
from vpt_model.engine.graphs import Bucket, Graphs, Step
from vpt_model.network import decode, fused
from vpt_model.network.decode import products

NAN = float("nan")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and large programs, on a CPU."""
    for module in (decode, fused):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    for name in ("ONE_ROW", "FLOAT32"):
        monkeypatch.setattr(products, name, getattr(products, name)._replace(outputs=256, step=128))


@pytest.mark.parametrize("name", CASES)
def test_the_recorded_answers(name):
    engine = RecordedEngine(name, "fwd", capacity=512)
    steps = [Bucket(1, 1, False), Bucket(1, 1, True)]
    engine.use(engine.model, Graphs(engine.model, engine.capacity, 1, steps))
    engine.executor = Recorded(engine.executor, name, engine.model.vision)
    tokens = recorded(name, "gen")[0].shape[1]
    with Launches() as launches:
        options = {"looks": [engine.recorded_look()], "max_new_tokens": tokens, "keep_logits": True}
        matches([engine.ask(image(0), "0", **options)], name, "gen")
    kernels = [kernel for kernel, _ in launches.grids]
    assert kernels.count("head_kernel") >= tokens - 1
    assert kernels.count("norm_linear_kernel") == kernels.count("decode_attention_kernel") >= 4 * (tokens - 1)


@torch.inference_mode()
def test_rows_of_padding_reach_nobody():
    """Two of four conversations; what is given to the others is NaN, and so are all caches."""
    language = tiny_model().language
    graphs = Graphs(tiny_model(), 64, 4, [Bucket(4, 1, True)])
    (step,) = graphs.steps.values()
    for buffer in graphs.slab:
        buffer.fill_(NAN)
    step.given.fill_(NAN)
    metadata = step.device
    metadata.fill([])
    metadata.tokens[1::2] = torch.tensor([7, 9], dtype=torch.int32)
    metadata.starts[:], metadata.counts[1::2] = torch.tensor([0, 128, 64, 0]), 1
    slots = metadata.slots[1::2] = metadata.starts[1::2].clone()
    hidden, logits, tokens = step.run()
    alone = Step(Bucket(1, 1, True), language, tuple(torch.zeros_like(x) for x in graphs.slab), 64)
    for row, word in ((1, 7), (3, 9)):
        alone.device.fill([])
        alone.device.tokens[0], alone.device.slots[0], alone.device.counts[0] = word, 0, 1
        expected = alone.run()
        assert torch.allclose(hidden[row], expected[0][0], atol=1e-5) and tokens[row] == expected[2][0]
        assert torch.allclose(logits[row], expected[1][0], atol=1e-4)
        place = int(slots[row // 2])
        for ours, theirs in zip(graphs.slab, alone.slab):
            torch.testing.assert_close(ours[:, place], theirs[:, 0], rtol=1e-5, atol=1e-5)
    written = torch.zeros(graphs.slab[0].shape[1], dtype=torch.bool)
    written[slots.long()] = True
    assert all(x[:, ~written].isnan().all() for x in graphs.slab)
    assert_same_bits(step.tickets, torch.zeros_like(step.tickets))
