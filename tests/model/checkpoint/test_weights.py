"""Weight files that are broken or hostile: refused with the file's name, before memory is spent and code is run."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.model.checkpoints import VARIANTS, byte_level, write_variant
from tests.model.inputs import random_image, tiny_config
from vpt_model.app.cli import app
from vpt_model.checkpoint import Checkpoint
from vpt_model.checkpoint.weights import CHUNK_BYTES, Stored, Written, stored_tensors, write_safetensors

ROOT = Path(__file__).resolve().parents[3]
PICKLED, NORM = "pytorch_model.bin", "model.norm.weight"


def repack(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Write torch's archive again, each record as `change` makes it (None: left out)."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            if (changed := change(name, content)) is not None:
                archive.writestr(name, changed)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Hostile:
    """Runs a command when it is unpickled by anything that obeys pickles."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        import os

        return os.system, (f"touch {self.marker}",)


class HostileState:
    """Its instructions name only torch's own functions, then set attributes of what they made."""

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_parameter, (torch.zeros(2), False, {}), {"__class__": int}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_variant(tmp_path / "model", "Qwen2-VL-2b-VPT-CLIP")
    return tmp_path / "model"


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "inside the archive"])
def test_code_in_a_pickle_does_not_run(model: Path, form: str) -> None:
    marker, file = model / "executed", model / PICKLED
    content = {NORM: Hostile(marker)}
    if form == "torch":
        torch.save(content, file)
    elif form == "old torch":
        torch.save(content, file, _use_new_zipfile_serialization=False)
    elif form == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        payload = pickle.dumps(content, protocol=2)
        repack(file, lambda name, old: payload if name.endswith("/data.pkl") else old)
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read as weights"):
        Checkpoint.open(model)
    assert not marker.exists()


def test_attributes_set_by_a_pickle_change_nothing(model: Path) -> None:
    (model / PICKLED).write_bytes(saved({NORM: HostileState()}))
    with pytest.raises(ValueError, match="cannot be read as weights|problems between"):
        Checkpoint.open(model)


def test_compressed_records_are_refused_before_they_grow(model: Path) -> None:
    """A gigabyte of zeros in a megabyte: never decompressed."""
    file = model / PICKLED
    zeros = bytes(1 << 27)
    repack(file, lambda name, old: zeros if name.endswith("/data/0") else old, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 3_000_000
    with pytest.raises(ValueError, match="is compressed, which torch.save never does"):
        Checkpoint.open(model)


def test_tensors_that_lie_about_their_size(model: Path) -> None:
    """Two gigabytes in the pickle, a few bytes in the archive: no memory is asked for."""
    file = model / PICKLED
    file.write_bytes(saved({NORM: torch.zeros(7, dtype=torch.bfloat16)}))
    # The shape and the count of elements, both 7, become 2**30.
    number, larger = b"K\x07", b"J\x00\x00\x00\x40"
    repack(file, lambda name, old: old.replace(number, larger) if name.endswith("/data.pkl") else old)
    with pytest.raises(ValueError, match="reaches beyond its record|cannot be read as weights"):
        stored_tensors(model)


@pytest.mark.parametrize("suffix", ["/data/0", "/data.pkl", "/byteorder"])
def test_missing_and_wrong_records(model: Path, suffix: str) -> None:
    def change(name: str, old: bytes) -> bytes | None:
        return (b"big" if suffix == "/byteorder" else None) if name.endswith(suffix) else old

    repack(model / PICKLED, change)
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read as weights"):
        Checkpoint.open(model)


def test_a_record_cut_short(model: Path) -> None:
    repack(model / PICKLED, lambda name, old: old[:-2] if name.endswith("/data/0") else old)
    with pytest.raises(ValueError, match="reaches beyond its record"):
        Checkpoint.open(model)


def test_tensors_that_share_or_are_not_contiguous(tmp_path: Path) -> None:
    base = torch.arange(60.0).view(6, 10)
    torch.save({"whole": base, "rows": base[2:4], "again": base}, tmp_path / PICKLED)
    for name, tensor in stored_tensors(tmp_path).items():
        out = torch.empty(tensor.shape)
        tensor.read_into(out)
        assert torch.equal(out, base[2:4] if name == "rows" else base)
    torch.save({"columns": base[:, 2:4]}, tmp_path / PICKLED)
    with pytest.raises(ValueError, match="columns is not contiguous"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), [torch.ones(2)], "text"],
    ids=["sparse", "list", "text"],
)
def test_tensors_that_are_no_weights(model: Path, tensor: object) -> None:
    (model / PICKLED).write_bytes(saved({NORM: tensor}))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        Checkpoint.open(model)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_truncated_shard(tmp_path: Path, name: str) -> None:
    write_variant(tmp_path, name)
    file = sorted(tmp_path.glob("*.bin"))[-1]
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size * 2 // 3)
    with pytest.raises(ValueError, match=f"{file.name} cannot be read as weights"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "target", ["../model/pytorch_model-00001-of-00002.bin", "/etc/passwd", "..", "a/b", "a\\b", "."]
)
def test_an_index_that_leaves_its_folder(tmp_path: Path, target: str) -> None:
    write_variant(tmp_path, "Qwen2-VL-2b-VPT-Det")
    path = tmp_path / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = target
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder|not in its folder"):
        Checkpoint.open(tmp_path)


def test_wrong_types_are_listed_by_name(model: Path) -> None:
    state = torch.load(model / PICKLED, weights_only=True)
    state[NORM] = state[NORM].float()
    state["visual.merger.ln_q.bias"] = state["visual.merger.ln_q.bias"].to(torch.int8)
    torch.save(state, model / PICKLED)
    with pytest.raises(ValueError, match="2 problems") as error:
        Checkpoint.open(model)
    assert f"{NORM} is torch.float32; all tensors must share one floating dtype" in str(error.value)
    assert "visual.merger.ln_q.bias is torch.int8" in str(error.value)


@pytest.mark.parametrize(
    "header",
    [
        {NORM: {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}},
        {NORM: {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}},
        {NORM: {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {NORM: {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}},
        {NORM: {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2]}},
        [],
    ],
)
def test_hostile_safetensors_headers(model: Path, header: object) -> None:
    (model / PICKLED).unlink()
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match="model.safetensors cannot be read as weights"):
        Checkpoint.open(model)


@pytest.mark.parametrize("length", [0, 1 << 62, 3])
def test_hostile_safetensors_lengths(model: Path, length: int) -> None:
    (model / PICKLED).unlink()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match="model.safetensors cannot be read as weights"):
        Checkpoint.open(model)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"vision_config": {"depth": 10**12}},
        {"dinov2": {"num_hidden_layers": "24"}},
        {"sam_vision": {"global_attn_indexes": "all"}},
        {"vision_config": [1]},
        {"rope_scaling": {"mrope_section": 3}},
        {"vision_encoder_ls": 7},
        {"hidden_size": 10**30},
    ],
)
def test_hostile_configurations(model: Path, change: dict) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="config.json"):
        Checkpoint.open(model)


def test_a_file_that_shrinks_while_it_is_read(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    (model / PICKLED).write_bytes(b"")
    with pytest.raises(ValueError, match="ended while it was read"):
        checkpoint.load()


def test_written_safetensors_read_back(tmp_path: Path) -> None:
    """Pieces of a tensor from several files, in another type, longer and shorter than a chunk."""
    first, second = torch.randn(5, 3), torch.randn(2, 3)
    save_file({"first": first}, tmp_path / "first.safetensors")
    save_file({"second": second}, tmp_path / "second.safetensors")
    parts = stored_tensors(tmp_path)
    target = tmp_path / "out"
    target.mkdir()
    file = target / "model.safetensors"

    def written(shape: tuple[int, ...], *stored: Stored) -> Written:
        return Written(torch.bfloat16, shape, lambda: (chunk.bfloat16() for part in stored for chunk in part.chunks()))

    stacked = {"stacked": written((7, 3), parts["first"], parts["second"])}
    stacked["rows"] = written((2, 3), parts["first"].rows(1, 3))
    assert list(write_safetensors(file, stacked)) == ["stacked", "rows"]
    found = stored_tensors(target)
    out = torch.empty(7, 3, dtype=torch.bfloat16)
    found["stacked"].read_into(out)
    assert torch.equal(out, torch.cat([first, second]).bfloat16())
    for size in (1, 4, 10, CHUNK_BYTES):
        chunks = [chunk.clone() for chunk in found["rows"].chunks(size)]
        assert torch.equal(torch.cat(chunks).view(2, 3), first[1:3].bfloat16())
        assert all(chunk.nbytes <= max(size, 2) for chunk in chunks)
    with pytest.raises(FileExistsError):
        list(write_safetensors(file, stacked))
    assert Stored(file, torch.float16, (3, 4), 0).nbytes == 24


def ask(folder: Path) -> Result:
    Image.fromarray(random_image(40, 50).numpy()).save(folder / "photo.png")
    arguments = ["ask", "--model", str(folder), "--image", str(folder / "photo.png"), "--question", "What?"]
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("kind", "aligned", "message"),
    [
        ("seg", False, "lacks <|clip_image_pad|>, <|clip_action_start|>"),
        (None, False, "lacks <|clip_image_pad|>"),
        ("clip", True, "config.json has clip_action_start_id 268, the tokenizer says None"),
    ],
    ids=["other variant", "plain model", "aligned stage"],
)
def test_a_foreign_tokenizer(model: Path, kind: str | None, aligned: bool, message: str) -> None:
    byte_level(tiny_config(kind), aligned)._backend.save(str(model / "tokenizer.json"))
    result = ask(model)
    assert result.exit_code == 2 and "vocabulary mismatch" in result.stderr
    assert message in " ".join(result.stderr.split()) and not result.stdout


def test_a_tokenizer_larger_than_the_embedding(model: Path) -> None:
    tokenizer = byte_level(tiny_config())
    tokenizer._backend.add_tokens([f"<extra {i}>" for i in range(40)])
    tokenizer._backend.save(str(model / "tokenizer.json"))
    result = ask(model)
    assert result.exit_code == 2 and "the embedding 320 rows" in " ".join(result.stderr.split())


def test_tokenizer_files_that_are_none(model: Path) -> None:
    for content in (b"{}", b"not json", b"\xff\xfe", b'{"model": {"type": "Nothing"}}'):
        (model / "tokenizer.json").write_bytes(content)
        result = ask(model)
        assert result.exit_code == 2 and "tokenizer.json" in result.stderr, result.stderr
        assert "Traceback" not in result.output


_REFUSED = """
import sys
from vpt_model.checkpoint import Checkpoint
try:
    Checkpoint.open(sys.argv[1])
except ValueError as error:
    print("refused", str(error).splitlines()[0])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak)
"""


def test_refusing_costs_no_memory(tmp_path: Path) -> None:
    """A misshapen file of 400 MB is refused from its table of contents, as one of a few bytes is."""
    peaks = []
    for name, size in (("small", 2), ("large", 200_000_000)):
        folder = tmp_path / name
        folder.mkdir()
        write_variant(folder, "Qwen2-VL-2b-VPT-CLIP")
        state = torch.load(folder / PICKLED, weights_only=True)
        torch.save(state | {"visual.extra": torch.zeros(size, dtype=torch.bfloat16)}, folder / PICKLED)
        run = [sys.executable, "-c", _REFUSED, str(folder)]
        child = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
        refused, peak = child.stdout.splitlines()
        assert refused.startswith("refused")
        peaks.append(int(peak))
    assert peaks[1] - peaks[0] < 150_000, peaks
