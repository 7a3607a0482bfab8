"""What `vpt app` does: load a model, bind a socket, say where the page is, and serve it."""

from __future__ import annotations

import os
import sys
import webbrowser

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from vpt_model.app.page.server import Page, bind, serve
from vpt_model.app.page.turns import Answerer
from vpt_model.app.terminal import MINI, load_model
from vpt_model.checkpoint import random_state
from vpt_model.checkpoint.load import moved
from vpt_model.config import ModelConfig
from vpt_model.network.state import rounded


def run(model: str, device: torch.device, weights: str, host: str, port: int, browser: bool) -> None:
    """Serve a model (as `load_model` names it and its precision) until Ctrl-C.

    Raises ValueError where that is not possible.
    """
    bound, local = bind(host, port)  # before the weights are loaded
    with bound:
        answerer = make_answerer(model, device, weights)
        address = _address(bound.getsockname())
        console = Console(soft_wrap=True)
        if answerer.warmed:
            console.print(Text(f"warmed up on {device} in {sum(answerer.warmed.values()):.1f} s", style="dim"))
        if not local:
            warning = "everybody who reaches this address may use the page, and nothing is encrypted on the way"
            console.print(Text(f"note: {warning}", style="yellow"))
        console.print(Text.assemble("The page is at ", (address, "bold"), ". Ctrl-C ends it."))
        sys.stdout.flush()
        if browser and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform == "darwin"):
            webbrowser.open(address)
        serve(Page(answerer, "vpt-mini" if model == MINI else model, model == MINI, local), bound)


def make_answerer(model: str, device: torch.device, weights: str = "auto") -> Answerer:
    """Return what answers with the model, and knows where the published procedure finds the same numbers again."""
    loaded, tokenizer, checkpoint = load_model(model, device, weights=weights)
    config = loaded.config
    if device.type == "cpu" and config.hidden_size < 1024:
        torch.set_num_threads(1)  # so little work that threads would wait for each other

    def state() -> tuple[ModelConfig, dict[str, Tensor]]:
        if checkpoint is None:
            stored = random_state(config, dtype=torch.bfloat16)
        else:
            stored = checkpoint.load(torch.float32 if model == MINI or checkpoint.weights else None)
        return config, moved(stored if weights == "auto" else rounded(stored, weights), device)

    return Answerer(loaded, tokenizer, state)


def _address(name: tuple[str, int]) -> str:
    host, port = name[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}/"
