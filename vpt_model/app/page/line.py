"""The line before the model: jobs run one after the other in a thread of their own, and each can be stopped."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

_log = logging.getLogger(__name__)

Message = dict[str, Any]
Sent = Message | Callable[[], Message]
"""What a job tells: a message, or what makes one (a picture is encoded where no model waits for it)."""


class Stopped(Exception):
    """A job ends before it is done; the argument says why: "cancelled" or "time"."""


class Full(Exception):
    """The line is full: no further job is taken."""


class Job:
    """One thing to do with the model.

    work: does it, calls `check` between two steps and `tell` with what has happened. seconds: after which `check`
    stops it, from the time that it begins. finished: called at its end, in whichever thread that is.
    """

    def __init__(
        self, work: Callable[[Job], None], seconds: float, finished: Callable[[], None] = lambda: None
    ) -> None:
        self._work, self.seconds, self._finished = work, seconds, finished
        self._loop, self._why = asyncio.get_running_loop(), ""
        self._deadline = float("inf")
        self.done = False
        self.outbox: asyncio.Queue[Sent | None] = asyncio.Queue()

    def begin(self) -> None:
        """Start the clock, for a further part anew."""
        self._deadline = time.monotonic() + self.seconds

    def check(self) -> None:
        """Raise `Stopped` if somebody wants this job to end, or its time is over."""
        if self._why or time.monotonic() > self._deadline:
            raise Stopped(self._why or "time")

    def stop(self) -> None:
        """Let the next `check` end the job."""
        self._why = "cancelled"

    def tell(self, message: Sent | None) -> None:
        """Send a message to whoever reads the job, from any thread; None is the end."""
        try:
            self._loop.call_soon_threadsafe(self.outbox.put_nowait, message)
        except RuntimeError:  # the server has ended, and nobody listens
            pass

    def run(self) -> None:
        try:
            self.begin()
            self.check()
            self._work(self)
        except Stopped as stopped:
            self.tell({"event": "stopped", "why": str(stopped), "seconds": self.seconds})
        except (ValueError, TypeError) as error:
            self.tell({"event": "error", "message": str(error)})
        except Exception:
            _log.exception("an answer failed")
            self.tell({"event": "error", "message": "The model failed; what went wrong is in the server's log."})
        finally:
            self.done = True
            self._finished()
            self.tell(None)


class Line:
    """Runs jobs in the order in which they come. limit: jobs that may wait."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._open = True
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="vpt-line", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Wait for the model. Raises `Full` if too many do."""
        with self._changed:
            if len(self._waiting) >= self.limit or not self._open:
                raise Full
            self._waiting.append(job)
            self._changed.notify()

    def ahead(self, job: Job) -> int:
        """Return how many jobs run before this one; 0 if it runs, or has."""
        with self._changed:
            if job not in self._waiting:
                return 0
            return self._waiting.index(job) + (self._running is not None and not self._running.done)

    def stop(self, job: Job) -> None:
        """End a job: at once if it waits, else between two of its steps."""
        job.stop()
        with self._changed:
            waiting = job in self._waiting
            if waiting:
                self._waiting.remove(job)
        if waiting:
            job.run()  # which ends at its first check

    def close(self) -> None:
        """End all jobs and the thread."""
        with self._changed:
            self._open = False
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            self._changed.notify()
        for job in jobs:
            self.stop(job)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or not self._open)
                if not self._waiting:
                    return
                self._running = self._waiting.popleft()
            self._running.run()
            with self._changed:
                self._running = None
