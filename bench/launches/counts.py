"""What one image, one decoded token and one look of each path ask of a GPU: the engine itself, on a pretended one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.launches.pretended import Pretended, Tally
from vpt_model.checkpoint.shapes import expected_shapes
from vpt_model.config import ENCODERS, PRESETS
from vpt_model.engine import Engine, Sampling
from vpt_model.engine.events import Look, Token
from vpt_model.network.cache import KVCache
from vpt_model.network.model import Model
from vpt_model.network.tower_graphs import captured
from vpt_model.text.tokens import Tokenizer

PRESETS_COUNTED = ("2b", "7b")
LOOKS = {
    "clip": {"look, clip": "clip", "look, 54 tokens": "region:x3,y3,x3,y3", "look, 252 tokens": "region:x2,y1,x5,y4"},
    "dino": {"look, dino": "dino"},
    "sam": {"look, sam": "sam"},
}
"""Of each re-encoder's model: what is looked at again, and the answer of the first round that asks for it."""
SAMPLED = Sampling(0.7, top_k=20, top_p=0.8)
"""Any settings that draw: all are the same kernels."""
PHOTO, LONGEST_EDGE, CAPACITY = (872, 1000, 3), 512, 2048
"""Height, width and channels of the benchmark's photo, and the engine's limits."""


def counts(preset: str) -> dict[str, Tally]:
    """Return for "image", "decoded token", "sampled token" and every look what it asked of the device.

    image: crop, embedding and tower, once its graph is there. decoded, sampled token: the second one behind a clip
    look, the most probable one or drawn. look: from the token that ends the round to the first answer token. Everything
    in bfloat16, one conversation, 2,048 slots.
    """
    found: dict[str, Tally] = {}
    for encoder, looks in LOOKS.items():
        with Pretended() as gpu:
            model = _model(gpu, preset, ENCODERS[encoder])
            if encoder == "clip":
                found["image"] = _image(gpu, model)
            tokenizer = Tokenizer.byte_level(model.config.vocab_size, ENCODERS[encoder])
            engine = Engine(model, tokenizer, longest_edge=LONGEST_EDGE, capacity=CAPACITY)
            engine.warm_up()
            _watch_caches(gpu)
            for name, answer in looks.items():
                for _ in range(2):  # what is recorded or compiled at its first use does not count
                    marks = _marks(engine, gpu, answer)
                found[name] = marks[1] - marks[0]
                if "decoded token" not in found:
                    found["decoded token"] = marks[3] - marks[2]
                    for _ in range(2):
                        marks = _marks(engine, gpu, answer, SAMPLED)
                    found["sampled token"] = marks[3] - marks[2]
    return found


def _model(gpu: Pretended, preset: str, kind: str) -> Model:
    """Return a model of true shapes whose weights have no values."""
    config = replace(PRESETS[preset], kind=kind)
    shapes = expected_shapes(config).items()
    return Model.from_state(config, {name: gpu.empty(shape, torch.bfloat16) for name, shape in shapes})


def _image(gpu: Pretended, model: Model) -> Tally:
    towered, _ = captured(model)
    policy = Engine(model, Tokenizer.byte_level(model.config.vocab_size, "clip"), longest_edge=LONGEST_EDGE).policy
    photo, box = gpu.empty(PHOTO, torch.uint8), (0, 0, 0, PHOTO[1], PHOTO[0])
    for _ in range(2):
        before = gpu.tally.copy()
        towered.vision.look([photo], [box], policy)
    return gpu.tally - before


def _watch_caches(gpu: Pretended) -> None:
    """Watch the caches that are there, of which only the slots of the running conversation are read."""
    caches = [x for x in gc.get_objects() if type(x) is KVCache and gpu.owns(x.keys)]
    slab = max((cache.slab for cache in caches), key=lambda buffers: buffers[0].numel())
    gpu.watch_cache(*slab)
    own = [cache for cache in caches if cache.slab[0] is slab[0]]
    gpu.share = lambda: sum(cache.length for cache in own) / slab[0].shape[1]


def _marks(engine: Engine, gpu: Pretended, answer: str, sampling: Sampling | None = None) -> list[Tally]:
    """Return the tally at the token that ends the first round, then at every answer token."""
    marks: list[Tally] = []
    looked = False
    for event in _ask(engine, answer, sampling):
        looked |= isinstance(event, Look)
        if isinstance(event, Token):
            marks = [*(marks if looked else ()), gpu.tally.copy()]
    return marks


def _ask(engine: Engine, answer: str, sampling: Sampling | None) -> Iterator[object]:
    photo = torch.zeros(PHOTO, dtype=torch.uint8)
    # With logits kept, forced tokens are fed one by one, as those that a model chooses are.
    options = {"looks": [answer], "max_new_tokens": 5, "keep_logits": True, "sampling": sampling}
    return engine.stream(photo, "What is in the picture?", **options)
