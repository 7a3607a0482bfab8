"""Every Python example of the README runs, and every file it links to exists."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    photo = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(photo).save("photo.jpg")
    with torch.inference_mode():
        exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})  # noqa: S102
    printed = capsys.readouterr().out
    if "engine.stream" in EXAMPLES[number]:
        assert "Region(" in printed and "Look(" in printed and "Done(" in printed


def test_examples_exist() -> None:
    """They call every operator that has a kernel on each device, `patch` and the engine."""
    shown = ("roi_patch_embed", "control_cross_attention", "append_visual_kv_", "patch", "engine.stream")
    assert not [name for name in shown if f"{name}(" not in "".join(EXAMPLES)]


def test_it_is_one_screen_and_a_half() -> None:
    assert len(TEXT.splitlines()) <= 120


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?://)([^)#]+)\)", TEXT))
def test_links(target: str) -> None:
    assert (ROOT / target).exists(), f"README links to {target}, which does not exist"
