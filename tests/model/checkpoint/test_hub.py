"""Hub names: the cache's layout is honoured, nothing is fetched offline, revisions pin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.checkpoints import write_variant
from vpt_model.checkpoint.hub import model_folder

ROOT = Path(__file__).resolve().parents[3]
NAME, COMMIT, OTHER = "someone/Qwen2-VL-2b-VPT-CLIP", "a" * 40, "b" * 40

_OPEN = """
import sys
from vpt_model.checkpoint import Checkpoint
from vpt_model.checkpoint.hub import model_folder
checkpoint = Checkpoint.open(model_folder(sys.argv[1]))
print(checkpoint.folder.name, checkpoint.config.kind)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What huggingface_hub leaves behind a download: files by content, two snapshots of links, one branch."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / f"models--{NAME.replace('/', '--')}"
    for commit, variant in ((COMMIT, "Qwen2-VL-2b-VPT-CLIP"), (OTHER, "Qwen2-VL-2b-VPT-Seg")):
        source, snapshot = home / commit, repository / "snapshots" / commit
        write_variant(source, variant)
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir(exist_ok=True)
        for path in source.iterdir():
            blob = repository / "blobs" / f"{commit[0]}-{path.name}"
            path.rename(blob)
            (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return home


def opened(model: str, home: Path, **settings: str) -> str:
    """huggingface_hub reads its environment when it is imported, so this runs in a process of its own."""
    environment = {"HF_HOME": str(home), "PYTHONPATH": str(ROOT)} | (settings or {"HF_HUB_OFFLINE": "1"})
    arguments = [sys.executable, "-c", _OPEN, model]
    child = subprocess.run(arguments, cwd=home, env=environment, capture_output=True, text=True)
    return child.stdout.strip() or child.stderr.strip().splitlines()[-1]


def test_the_cache_is_used_offline(cache: Path) -> None:
    assert opened(NAME, cache) == f"{COMMIT} clip"


def test_a_revision_pins(cache: Path) -> None:
    assert opened(f"{NAME}@{OTHER}", cache) == f"{OTHER} seg"


def test_the_cache_is_used_where_the_hub_does_not_answer(cache: Path) -> None:
    assert opened(f"{NAME}@{OTHER}", cache, HF_ENDPOINT="http://127.0.0.1:9") == f"{OTHER} seg"


def test_what_the_cache_lacks_is_an_error_offline(cache: Path) -> None:
    message = opened(f"{NAME}@{'c' * 40}", cache)
    assert f"revision {'c' * 40}" in message and "cannot be fetched" in message and message.startswith("ValueError")


def test_folders_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_folder("owner/name") == Path("owner/name")
    for wrong in ("nowhere", "./owner/nowhere", "a/b/c", "/nowhere/at/all", "owner/na me", "owner/name@", ""):
        with pytest.raises(ValueError, match="give a checkpoint folder or a hub model as owner/name@revision"):
            model_folder(wrong)


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        model_folder("owner/name")


def test_the_hub_is_imported_where_it_is_used() -> None:
    code = "import sys, vpt_model.app.cli; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
