"""The page served on a free port of this machine by a thread, and a visitor who speaks to it by HTTP alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image

from vpt_model.app.page.command import make_answerer
from vpt_model.app.page.server import Page, bind
from vpt_model.app.page.sessions import Limits
from vpt_model.app.page.turns import Answerer
from vpt_model.app.terminal import MINI
from vpt_model.engine.executor import Executor
from vpt_model.engine.requests import Output, Request

SEED = 3
TAG = "What is on the tag of the red triangle?"
COUNT = "How many objects are purple?"


@lru_cache
def answerer() -> Answerer:
    """vpt-mini, shared by the tests, as are the caches that it keeps."""
    return make_answerer(MINI, torch.device("cpu"))


class Paced:
    """An executor that waits before every step until the test lets it, and counts the steps."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.steps = executor, 0
        self.allowed, self.waits = threading.Semaphore(0), threading.Event()

    def run(self, requests: Sequence[Request]) -> list[Output | Request]:
        self.waits.set()
        assert self.allowed.acquire(timeout=60), "nobody let the model go on"
        self.steps += 1
        return self.executor.run(requests)

    def allow(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.allowed.release()


@contextmanager
def paced(answerer: Answerer) -> Iterator[Paced]:
    """The answerer's model at a pace that the test sets; afterwards freely again."""
    watched = answerer.watched
    watched.executor = pace = Paced(watched.executor)
    try:
        yield pace
    finally:
        pace.allow(10_000)
        watched.executor = pace.executor


@contextmanager
def served(limits: Limits | None = None, local: bool = True) -> Iterator[tuple[Page, str]]:
    """A page around vpt-mini, and its address."""
    bound, _ = bind("127.0.0.1", 0)
    page = Page(answerer(), "vpt-mini", True, local, limits)
    server = uvicorn.Server(uvicorn.Config(page.app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield page, f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        bound.close()
    assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait for something to become true, and return it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not become true in time"
        time.sleep(0.01)
    return found


class Visitor:
    """One person on the page."""

    def __init__(self, address: str) -> None:
        self.client = httpx.Client(base_url=address, timeout=120)
        self.secret = self.client.post("/api/session").json()["session"]
        self.client.headers["X-VPT-Session"] = self.secret

    def example(self, seed: int = SEED) -> dict[str, Any]:
        return self.client.post("/api/examples", json={"seed": seed}).json()

    def upload(self, picture: np.ndarray | bytes, **save: Any) -> httpx.Response:
        return self.client.post(
            "/api/pictures", content=picture if isinstance(picture, bytes) else png(picture, **save)
        )

    def ask(self, question: str, picture: dict[str, Any] | None = None, **options: Any) -> list[dict[str, Any]]:
        """All messages of one answer."""
        return list(self.stream("/api/turns", self.asked(question, picture, **options)))

    def asked(self, question: str, picture: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        return {"question": question, "picture": picture and picture["id"], "remember": False, **options}

    def stream(self, path: str, body: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Messages as they come."""
        with self.client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise AssertionError(f"{response.status_code}: {response.text}")
            for line in response.iter_lines():
                yield json.loads(line)

    def turn(self, question: str, picture: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        """What an answer ended with."""
        last = self.ask(question, picture, **options)[-1]
        assert last["event"] == "done", last
        return last["turn"]


def png(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def events(messages: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [message for message in messages if message["event"] == name]
