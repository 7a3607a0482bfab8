"""An engine whose steps and towers are graphs, emulated on the CPU: replays over the same buffers, and their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vpt_model.engine import Engine
from vpt_model.engine.decoding import Flight
from vpt_model.engine.graphs import Bucket, Graphs, Step
from vpt_model.network.tower_graphs import CapturedTower, PatchStep

NAN = float("nan")
BUCKETS = (
    Bucket(1, 1, False),
    *(Bucket(rows, 1, True, draw) for draw in (False, True) for rows in (1, 2, 4)),
    *(Bucket(1, tokens, True) for tokens in (16, 64, 320)),
)
PATCHES = (64, 512)


class Watched:
    """An engine's steps and its tower as graphs that are replayed over the same buffers, and what is done to them.

    log: "upload n", "replay n" and "read" of steps that decode n rows. launches: the replays of all other steps, by
    name, and between them the names of the operators that were run outside of replays while this was entered.
    """

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, rows: int = 4) -> None:
        self.log: list[str] = []
        self.launches: list[str] = []
        self.replaying = False
        self.graphs = Graphs(engine.model, engine.capacity, rows, BUCKETS)
        for buffer in (*self.graphs.slab, self.graphs.given):
            buffer.fill_(NAN)
        self.tower = CapturedTower(engine.model.vision, PATCHES, self.graphs.given)
        # Recorded pixels take the place of a crop.
        self.tower.embed_plan = engine.model.vision.embed_plan
        with torch.inference_mode():
            for name, step in self.graphs.named().items():
                step.upload(())
                self.capture(step, name, f"replay {step.bucket.rows}" if step.decodes else "")
            for patches, step in self.tower.steps.items():
                step.x.fill_(NAN)
                self.capture(step, f"{patches} patches", "")
        engine.use(replace(engine.model, vision=self.tower), self.graphs)
        upload, tokens = Step.upload, Flight.tokens

        def uploaded(step: Step, *given: Any, **more: Any) -> None:
            if step.decodes:
                self.log.append(f"upload {step.bucket.rows}")
            upload(step, *given, **more)

        monkeypatch.setattr(Step, "upload", uploaded)
        monkeypatch.setattr(Flight, "tokens", lambda flight: self.log.append("read") or tokens(flight))

    def capture(self, step: Step | PatchStep, name: str, logged: str) -> None:
        """As `capture` of either: outputs are the same memory in every replay, and the first ones are overwritten."""
        step.outputs = tuple(output.clone() for output in step.run())

        def replay() -> None:
            (self.log if logged else self.launches).append(logged or name)
            self.replaying = True
            for output, new in zip(step.outputs, step.run(), strict=True):
                output.copy_(new)
            self.replaying = False

        step.graph = SimpleNamespace(replay=replay)

    @property
    def replays(self) -> int:
        return sum("replay" in entry for entry in self.log)

    def operators(self) -> Operators:
        """Return a context in which operators outside of replays are noted."""
        return Operators(self)


class Operators(TorchDispatchMode):
    """Notes what would be launched on a GPU: all but views and allocations."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result: Tensor | Callable[..., Any] = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not (self.watched.replaying or function.is_view or name.startswith(("empty", "new_empty", "detach"))):
            self.watched.launches.append(f"operator {name}")
        return result
