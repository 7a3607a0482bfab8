"""Several people on `vpt app` at once: how long they wait, what goes wrong, and what memory the server takes."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

KINDS = 4
"""Of questions about an example; every visitor asks them in turn, about a new example each round."""
VISIT = 2 * KINDS
"""Questions of a visitor, by themselves in the first round, as a conversation in the second; then another one comes."""


@dataclass
class Load:
    """What happened. waited, answered: seconds of each question, before the model began and until the answer was there.

    ahead: the longest line that anybody saw. resident: MiB of the server after each answer.
    """

    people: int
    right: int = 0
    problems: list[str] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    ahead: int = 0
    resident: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """Return the findings as sentences."""
        quarter = max(1, len(self.resident) // 4)
        parts = [max(self.resident[at : at + quarter]) for at in range(0, 4 * quarter, quarter)]
        waited, answered = (statistics.quantiles(times, n=20) for times in (self.waited, self.answered))
        return [
            f"{self.people} people at once, {len(self.answered)} questions in {self.seconds:.0f} s, "
            f"{len(self.problems)} errors, {self.right} answers right, at most {self.ahead} questions ahead",
            f"until the model began: median {waited[9]:.2f} s, 95 % {waited[18]:.2f} s; until the answer was there: "
            f"median {answered[9]:.2f} s, 95 % {answered[18]:.2f} s",
            f"server's resident memory, the largest of each quarter: {', '.join(f'{part:.0f}' for part in parts)} MiB",
            *self.problems[:5],
        ]


class Person:
    """One visitor, who speaks HTTP as the page does."""

    def __init__(self, address: str) -> None:
        self.address, self.secret = address, ""
        self.secret = self.call("session")["session"]

    def call(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        return json.loads(b"".join(self.stream(path, body, method)) or b"null")

    def stream(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Iterator[bytes]:
        headers = {"X-VPT-Session": self.secret, "Content-Type": "application/json"}
        data = json.dumps(body or {}).encode() if method == "POST" else None
        with urlopen(Request(f"{self.address}api/{path}", data, headers, method=method), timeout=600) as answer:
            yield from answer

    def ask(self, load: Load, questions: int, seed: int, resident: Callable[[], float]) -> None:
        """Ask so many questions and leave; seed: of the first example."""
        for index in range(questions):
            if index % KINDS == 0:
                picture = self.call("examples", {"seed": seed + index})
            asked = picture["scene"]["questions"][index % KINDS]["text"]
            body = {"question": asked, "picture": picture["id"], "remember": index > KINDS}
            begun, last = time.perf_counter(), {}
            for line in self.stream("turns", body):
                last = json.loads(line)
                if last["event"] == "queued":
                    load.ahead = max(load.ahead, last["ahead"])
                elif last["event"] == "started":
                    load.waited.append(time.perf_counter() - begun)
            load.answered.append(time.perf_counter() - begun)
            load.resident.append(resident())
            if last.get("event") == "done":
                load.right += last["turn"]["right"]
            else:
                load.problems.append(f"{asked}: {last}")
        self.call("session", method="DELETE")


def measure(people: int, questions: int) -> Load:
    """Start the page for vpt-mini, let people ask `questions` in all side by side, and end it."""
    command = [sys.executable, "-m", "vpt_model.app.cli", "app", "--port", "0", "--no-browser"]
    load = Load(people)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+/", server.stdout.readline())
            assert found, "the server did not say where it is"
            threads = []
            for number in range(people):
                share = questions // people + (number < questions % people)
                threads.append(threading.Thread(target=_visit, args=(found[0], load, share, number, server.pid)))
            begun = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            load.seconds = time.perf_counter() - begun
        finally:
            server.terminate()
    return load


def _visit(address: str, load: Load, questions: int, number: int, pid: int) -> None:
    try:
        for first in range(0, questions, VISIT):
            seed = 1000 * number + first
            Person(address).ask(load, min(VISIT, questions - first), seed, lambda: _resident(pid))
    except Exception as error:  # whatever ends a visit is what this looks for
        load.problems.append(f"visitor {number}: {error!r}")


def _resident(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024
