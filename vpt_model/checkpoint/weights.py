"""Weight files: what they hold, known without reading a weight, and tensors mapped, or streamed in small pieces.

Nothing in a file is executed. Every tensor's place in its file is checked against the file before its first byte is
read, so a broken or hostile file is refused before memory is spent on it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import struct
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CHUNK_BYTES = 1 << 25
"""Weights pass through memory of this size."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of a weight file, not read yet: contiguous, little-endian, `offset` bytes into the file.

    `held` are the weights themselves where the file's format cannot be read in pieces.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    held: Tensor | None = None

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def rows(self, begin: int, end: int) -> Stored:
        """Return rows `begin` to `end` (exclusive) of the first dimension."""
        row = torch.Size(self.shape[1:]).numel() * self.dtype.itemsize
        held = None if self.held is None else self.held[begin:end]
        return Stored(self.file, self.dtype, (end - begin, *self.shape[1:]), self.offset + begin * row, held)

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """Yield the tensor's elements in order, flat, at most `chunk_bytes` at a time in one reused buffer.

        Raises ValueError if the file ends early, as one that shrinks while it is read does.
        """
        step = max(chunk_bytes // self.dtype.itemsize, 1)
        if self.held is not None:
            yield from self.held.flatten().split(step)
            return
        buffer = torch.empty(min(step, self.count), dtype=self.dtype, device="cpu")
        with self.file.open("rb") as file:
            file.seek(self.offset)
            for begin in range(0, self.count, step):
                chunk = buffer[: min(step, self.count - begin)]
                self._fill(chunk, file)
                yield chunk

    def read_into(self, out: Tensor) -> None:
        """Fill the contiguous `out`, of this shape and any floating dtype."""
        flat, begin = out.view(-1), 0
        if out.dtype == self.dtype and self.held is None:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                return self._fill(flat, file)
        for chunk in self.chunks():
            flat[begin : begin + len(chunk)] = chunk
            begin += len(chunk)

    def _fill(self, flat: Tensor, file: BufferedReader) -> None:
        wanted = memoryview(_bytes(flat))
        if len(wanted) and file.readinto(wanted) != len(wanted):
            raise ValueError(f"{self.file} ended while it was read: do not change files that are being loaded")


class Maps:
    """Weight files mapped into memory: tensors in their files' own pages, which no copy is made of.

    A tensor that is written to keeps what was written to itself. The files must not change while a tensor lives.
    """

    def __init__(self) -> None:
        self._files: dict[Path, Tensor] = {}

    def tensor(self, parts: Sequence[Stored]) -> Tensor | None:
        """Return one tensor of all parts, one behind the other along the first dimension, or None where it cannot be
        mapped: they do not lie one behind the other in one file, on their dtype's alignment.

        Raises ValueError if the file has become shorter than it was.
        """
        first, end = parts[0], parts[0].offset
        for part in parts:
            if part.held is not None or (part.file, part.offset, part.dtype) != (first.file, end, first.dtype):
                return None
            end += part.nbytes
        if first.offset % first.dtype.itemsize or end == first.offset:
            return None
        memory = self._mapped(first.file)
        if end > len(memory):
            raise ValueError(f"{first.file} ended while it was read: do not change files that are being loaded")
        rows = sum(part.shape[0] for part in parts) if first.shape else 1
        return memory[first.offset : end].view(first.dtype).view(rows, *first.shape[1:])

    def _mapped(self, path: Path) -> Tensor:
        if path not in self._files:
            with path.open("rb") as file:
                if not os.fstat(file.fileno()).st_size:  # which cannot be mapped
                    return torch.empty(0, dtype=torch.uint8, device="cpu")
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            memory = self._files[path] = torch.frombuffer(pages, dtype=torch.uint8)
            _PAGES[memory.data_ptr()] = pages
        return self._files[path]


_PAGES: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
"""Every mapping in use by its address."""


def release(tensor: Tensor) -> None:
    """Give the pages of a mapped tensor back to the system, which reads them again if anybody does; of no other.

    Nobody may have written to the tensor.
    """
    pages = _PAGES.get(tensor.untyped_storage().data_ptr())
    if pages is None or not hasattr(pages, "madvise"):
        return
    begin = tensor.storage_offset() * tensor.itemsize
    # Pages that hold a part of a neighbour stay.
    first, last = -(-begin // mmap.PAGESIZE), (begin + tensor.nbytes) // mmap.PAGESIZE
    if last > first:
        pages.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def return_free_memory() -> None:
    """Give memory that was freed, but that the allocator keeps between what is in use, back to the system (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor of the `*.safetensors` of a folder or, where it has none, of its `pytorch_model*.bin`.

    An index, where there is one, names the files; beside a whole file of the name without numbers it counts for
    nothing, as in transformers. Raises ValueError naming the file for anything that is missing,
    corrupt, compressed, outside the folder, or more than named tensors.
    """
    for whole, pattern in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model*.bin")):
        index = folder / f"{whole}.index.json"
        if index.exists() and not (folder / whole).exists():
            files = _indexed_files(index)
        else:
            found_files = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
            files = [folder / whole] if index.exists() else found_files
        if files:
            break
    else:
        raise ValueError(f"{folder} has no weights: expected *.safetensors or pytorch_model*.bin")
    found: dict[str, Stored] = {}
    for path in files:
        tensors = _open(path)
        if repeated := sorted(found.keys() & tensors.keys()):
            raise ValueError(
                f"{path} repeats tensors of another file ({', '.join(repeated[:5])}): remove one of the two"
            )
        found |= tensors
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file of a checkpoint holds. Raises ValueError naming the file if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeEncodeError):
        raise ValueError(
            f"{str(path)!a:.200} does not exist: give a checkpoint folder with config.json and weights"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!a:.200} cannot be read ({error}): give a checkpoint folder") from None
    if type(content) is not dict:
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object: download it again")
    return content


@dataclass(frozen=True)
class Written:
    """A tensor that is to be written. chunks: its elements in order, contiguous, in memory no sooner than they are
    asked for.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, Written]) -> Iterator[str]:
    """Write tensors to a new file and yield each one's name when its last byte is written."""
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, one in tensors.items():
        place = [offset, offset + one.nbytes]
        header[name] = {"dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": place}
        offset += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # Mapped, the tensors begin where a vector and a line of the cache begin.
    text += b" " * (-(8 + len(text)) % 64)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, one in tensors.items():
            for chunk in one.chunks():
                file.write(memoryview(_bytes(chunk)))
            yield name


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to file names: download it again")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name or "\\" in name]
    if outside:
        raise ValueError(f"{index} names files outside its folder ({', '.join(outside)}): do not trust this checkpoint")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index} names files that are not in its folder: {', '.join(missing)}; download them")
    return [index.parent / name for name in names]


def _open(path: Path) -> dict[str, Stored]:
    try:
        if path.suffix == ".safetensors":
            return _open_safetensors(path)
        return _open_pickle(path) if zipfile.is_zipfile(path) else _read_old_pickle(path)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        struct.error,
        RuntimeError,
        EOFError,
        ValueError,
        OSError,
        # What the unpickler raises where a stream is not what its instructions expect.
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        AssertionError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as weights ({reason}): it is corrupt or not a plain state dict"
        ) from error


def _open_safetensors(path: Path) -> dict[str, Stored]:
    # The library checks the header against the file; it does not tell where the tensors are.
    with safe_open(path, "pt"):
        pass
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    if unknown := {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in _DTYPES}:
        raise ValueError(f"{len(unknown)} tensors are of unsupported types, {', '.join(sorted(set(unknown.values())))}")
    return {
        name: Stored(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _bytes(chunk: torch.Tensor) -> Any:
    """Return the memory of a contiguous tensor."""
    return chunk.view(torch.uint8).numpy()


def _open_pickle(path: Path) -> dict[str, Stored]:
    records = _records(path)
    # Loaded under this mode tensors have shapes, types and places in the file, and no memory.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        content = _state_dict(torch.load(path, weights_only=True))
    found = {}
    for name, tensor in content.items():
        storage, itemsize = tensor.untyped_storage(), tensor.dtype.itemsize
        place: int = getattr(storage, "_checkpoint_offset", -1)
        inside = tensor.storage_offset() * itemsize + tensor.numel() * itemsize <= storage.nbytes()
        if records.get(place) != storage.nbytes() or not inside:
            raise ValueError(f"{name} reaches beyond its record")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: save it as tensor.contiguous()")
        offset = place + int(tensor.storage_offset()) * itemsize
        found[name] = Stored(path, tensor.dtype, tuple(tensor.shape), offset)
    return found


def _records(path: Path) -> dict[int, int]:
    """Return where each record of torch's zip archive begins, and its length; nothing is decompressed."""
    records, size = {}, path.stat().st_size
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError(f"record {info.filename} is compressed, which torch.save never does")
            file.seek(info.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            begin = info.header_offset + 30 + name_length + extra_length
            if begin + info.file_size > size:
                raise ValueError(f"record {info.filename} reaches beyond the file")
            if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
                raise ValueError("the weights are big-endian")
            records[begin] = info.file_size
    return records


def _read_old_pickle(path: Path) -> dict[str, Stored]:
    content = _state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return {
        name: Stored(path, tensor.dtype, tuple(tensor.shape), 0, tensor.detach()) for name, tensor in content.items()
    }


def _state_dict(content: Any) -> dict[str, Tensor]:
    # Exactly these types: a subclass could answer differently from one call to the next.
    if type(content) not in (dict, OrderedDict) or not all(
        type(name) is str and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in content.items()
    ):
        raise ValueError("it is not a state dict of named tensors")
    return dict(content)
