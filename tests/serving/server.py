"""`vllm serve` in processes of its own, as its module: the command asks for metadata that builds for the CPU lack."""

from __future__ import annotations

import base64
import io
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.serving.engines import SETTINGS

START_SECONDS = 400
"""A busy machine takes minutes for what an idle one does in twenty seconds."""


@contextmanager
def vllm_server(folder: Path, log: Path, *flags: str) -> Iterator[str]:
    """The address of a server of `folder`, stopped at the end; what it prints goes to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = [
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "1024",
        "--max-num-seqs",
        "8",
        "--block-size",
        "32",
    ]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    environment = os.environ | SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen([*command, *small, *flags], stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            wait(address, process, log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers. Raises RuntimeError with the end of its log if it ends or takes too long."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"no server: {log.read_text()[-3000:]}")


def data_url(pixels: np.ndarray) -> str:
    """The picture as clients send it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def message(text: str, *pictures: np.ndarray) -> dict[str, Any]:
    """A user's message: pictures first."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(pixels)}} for pixels in pictures]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def metric(address: str, name: str) -> dict[str, float]:
    """The values of a metric, by their labels."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    return {labels: float(value) for labels, value in re.findall(rf"^{name}(\{{.*\}})? (\S+)$", text, re.MULTILINE)}
