"""Runs parts under limits: each in a process group of its own, of which nothing is left when the part ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu import PART, RESULTS

ROOT = Path(__file__).resolve().parents[2]
TAIL = 12
"""Lines of a part's log that stand in its result."""
LOG_BYTES = 1 << 20
"""Of one part; what is longer loses its middle."""


@dataclass(frozen=True)
class Part:
    """One command, and what it may cost.

    command: its arguments; limit: seconds, after which its processes are killed. group: the row of the plan to which it
    belongs. needs: a part that must have ended before this one begins; until then later ones go first. beside: begin
    with the part before it, without waiting for that one. background: nothing waits for it. environment: beside the
    session's. least: seconds that must be left for it to make sense.
    """

    name: str
    group: str
    command: tuple[str, ...]
    limit: float
    needs: str = ""
    beside: bool = False
    background: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    least: float = 5.0


@dataclass
class _Running:
    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    begun: float
    end: float


class Session:
    """Parts within `seconds`, and their results and logs in `folder`: two files, whatever happens.

    scale: of all limits. after: called with a part's name once it has ended.
    """

    def __init__(
        self, folder: Path, seconds: float, scale: float = 1.0, after: Callable[[str, bool], None] = lambda *_: None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.results, self.logs = folder / "results.jsonl", folder / "logs.txt"
        self.folder, self.scale, self.after = folder, scale, after
        self.begun = time.monotonic()
        self.end = self.begun + seconds
        self.running: dict[str, _Running] = {}
        self.ended: dict[str, bool] = {}

    def run(self, parts: Sequence[Part]) -> dict[str, bool]:
        """Run all; the name of each part that ran, and whether it ended well. Never raises for what a part does."""
        waiting = list(parts)
        signal.signal(signal.SIGTERM, self._terminated)
        try:
            while waiting or self.running:
                while waiting and (ready := self._next(waiting)) is not None:
                    waiting.remove(ready)
                    self._start(ready)
                self._poll()
                time.sleep(0.05)
        finally:
            for running in list(self.running.values()):
                self._finish(running, "stopped: the session ended")
        return self.ended

    def _next(self, waiting: Sequence[Part]) -> Part | None:
        """Return the first part that may begin now."""
        if any(not running.part.background for running in self.running.values()):
            front = waiting[0]
            return front if front.beside and self._is_ready(front) else None
        return next((part for part in waiting if self._is_ready(part) or not self._will_be_ready(part, waiting)), None)

    def _is_ready(self, part: Part) -> bool:
        return not part.needs or part.needs in self.ended

    def _will_be_ready(self, part: Part, waiting: Sequence[Part]) -> bool:
        return part.needs in self.running or any(other.name == part.needs for other in waiting)

    def _start(self, part: Part) -> None:
        left = self.end - time.monotonic()
        if left < part.least * self.scale:
            self._write(part, ok=False, seconds=0.0, summary=f"not run: {left:.0f} s are left")
            self.ended[part.name] = False
            return
        log = self.folder / f".{part.name}.log"
        environment = {**os.environ, **part.environment, PART: part.name, RESULTS: str(self.results)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        begun = time.monotonic()
        self.running[part.name] = _Running(part, process, log, begun, min(begun + part.limit * self.scale, self.end))

    def _poll(self) -> None:
        for running in list(self.running.values()):
            if running.process.poll() is not None:
                self._finish(running, "")
            elif time.monotonic() > running.end:
                self._finish(running, f"stopped after {time.monotonic() - running.begun:.0f} s")

    def _finish(self, running: _Running, stopped: str) -> None:
        part = running.part
        with suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        code = running.process.wait()
        survivors = list(_processes_of(part.name, self.results))
        for process in survivors:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        text = _shortened(running.log)
        running.log.unlink()
        with self.logs.open("a") as logs:
            logs.write(f"===== {part.name}: {' '.join(part.command)}\n{text}\n")
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        ok = code == 0 and not stopped
        summary = stopped or (lines[-1].strip("= ") if lines else "") or f"exit status {code}"
        more = {} if ok else {"status": code, "tail": lines[-TAIL:]}
        if survivors:
            more["left behind"] = len(survivors)
        del self.running[part.name]
        self.ended[part.name] = ok
        self.after(part.name, ok)
        self._write(part, ok=ok, seconds=round(time.monotonic() - running.begun, 1), summary=summary[:200], **more)

    def _write(self, part: Part, **facts: object) -> None:
        """Write the end of a part: a line like those that its processes write."""
        at = round(time.monotonic() - self.begun, 1)
        line = {"part": part.name, "group": part.group, "name": "end", "at": at, **facts}
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{at:6.1f} s  {part.name:<22} {'ok' if facts['ok'] else 'FAILED':<7} {facts['summary']}", flush=True)

    def _terminated(self, *_: object) -> None:
        sys.exit(1)  # through `finally`, which kills what runs


def _processes_of(part: str, results: Path) -> Iterator[int]:
    """Yield the processes that were started by a part of this session, whatever became of their parents and groups."""
    marks = {f"{PART}={part}".encode(), f"{RESULTS}={results}".encode()}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if marks <= set((entry / "environ").read_bytes().split(b"\0")) and "Z" not in _state(entry):
                    yield int(entry.name)


def _state(entry: Path) -> str:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0]


def _shortened(log: Path) -> str:
    content = log.read_bytes()
    if len(content) > LOG_BYTES:
        content = content[: LOG_BYTES // 2] + b"\n[...]\n" + content[-LOG_BYTES // 2 :]
    return content.decode(errors="replace")
