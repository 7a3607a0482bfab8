"""Rows that run side by side: each until it needs the model; then what all of them ask for is run together."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from vpt_model.engine.events import Event
from vpt_model.engine.executor import Executor
from vpt_model.engine.requests import Output, Request

Row = Generator[Event | Request, Any, None]
"""A question as a coroutine: it yields events and requests, and is sent an `Output` for each request."""


class Scheduler:
    """Runs rows by one executor until all have ended."""

    def __init__(self, executor: Executor, rows: Sequence[Row]) -> None:
        self.executor = executor
        self.rows = dict(enumerate(rows))
        self.requests: dict[int, Request] = {}
        self.outputs: dict[int, Output] = {}

    @torch.inference_mode()
    def events(self) -> Generator[tuple[int, Event], None, None]:
        """Yield every event with the number of its row. Closing the iterator closes the rows."""
        with ExitStack() as stack:
            for row in self.rows.values():
                stack.callback(row.close)
            while self.rows:
                yield from self.step()

    def step(self) -> Iterator[tuple[int, Event]]:
        """Collect a request of every row, run them, and keep the outputs for the next step."""
        for number, row in list(self.rows.items()):
            if number not in self.requests:
                yield from self._advance(number, row)
        if self.requests:
            requests, self.requests = list(self.requests.items()), {}
            results = self.executor.run([request for _, request in requests])
            for (number, _), result in zip(requests, results, strict=True):
                if isinstance(result, Output):
                    self.outputs[number] = result
                else:
                    self.requests[number] = result

    def _advance(self, number: int, row: Row) -> Iterator[tuple[int, Event]]:
        """Yield the events of a row up to its next request or its end."""
        try:
            step = row.send(self.outputs.pop(number, None))
            while not isinstance(step, Request):
                yield number, step
                step = next(row)
            self.requests[number] = step
        except StopIteration:
            del self.rows[number]
