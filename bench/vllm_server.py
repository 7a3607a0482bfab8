"""A server of vLLM as a process of its own, and messages as its clients write them; for the benchmark and the tests."""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Small, quiet and offline."""
START_SECONDS = 600
"""A busy machine takes minutes for what an idle one does in twenty seconds."""
SERVE = """
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser

cli_env_setup()
command, parser = ServeSubcommand(), FlexibleArgumentParser()
command.subparser_init(parser.add_subparsers())
arguments = parser.parse_args()
command.validate(arguments)
command.cmd(arguments)
"""
"""What `vllm serve` runs: the command `vllm` itself asks for metadata that builds of vLLM for the CPU lack."""


@contextmanager
def served(folder: Path, log: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """Yield address and process id of `vllm serve folder`, which ends with the context; it prints to `log`.

    All that it has started ends with it, also what does not end by itself.
    """
    from psutil import Process, wait_procs  # vLLM brings it

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--block-size", "32", *flags]
    environment = os.environ | SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, process, log)
            yield address, process.pid
        finally:
            family = [process, *Process(process.pid).children(recursive=True)] if process.poll() is None else [process]
            process.terminate()
            _, alive = wait_procs(family, timeout=60)
            for each in alive:
                each.kill()


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server answers; raise RuntimeError with the end of its log if it ends or takes too long."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise RuntimeError(f"no server within {START_SECONDS} seconds: {log.read_text()[-3000:]}")


def picture_url(pixels: np.ndarray) -> str:
    """Return the picture as clients send it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def user(text: str, *pictures: np.ndarray) -> dict[str, Any]:
    """Return a message of the user's."""
    shown = [{"type": "image_url", "image_url": {"url": picture_url(pixels)}} for pixels in pictures]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
