"""A peer's process: a call goes in as one line, its answer comes back as one. Both ends import nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class PeerError(RuntimeError):
    """A peer could not do what it was asked; the message is its own."""


class Peer:
    """A running peer; `close` it, or use it as a context."""

    def __init__(self, python: Path, *arguments: str) -> None:
        # A file: what a library says there may be more than a pipe holds.
        self._said = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [str(python), *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Return what the method returned; raises PeerError with the peer's words where it failed or is gone."""
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps([method, *arguments]), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # what it said last is read below
        while line := self._process.stdout.readline():
            # A library may print beside the answers.
            if line.startswith("{"):
                answer = json.loads(line)
                if "error" in answer:
                    raise PeerError(f"{method}: {answer['error']}")
                return answer["result"]
        self._said.seek(0)
        said = self._said.read().strip().splitlines()
        raise PeerError(f"{method}: the process has ended; {said[-1] if said else 'it said nothing'}")


def serve(peer: object) -> None:
    """Answer the lines of the input, in the process of a peer: a JSON list each, a method and its arguments."""
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer: dict[str, Any] = {"result": getattr(peer, method)(*arguments)}
        except Exception as error:  # noqa: BLE001  (whoever asked says what to do about it)
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
