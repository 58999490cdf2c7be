"""The content of a checkpoint by megatron-core's `.metadata`: which tensors it holds, and where.

Nothing of the files is believed before it is compared: names, places within the files, shapes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_r1.checkpoint.files import FileFacts, difference, raise_corrupt, read_verified
from megatron_r1.checkpoint.pickles import ERRORS, Record, Span, read_archive, read_pickle
from megatron_r1.system.errors import shown
from megatron_r1.system.json_io import parse_json

_OVERHEAD = 64 << 10
"""Bytes of an archive beside a tensor's numbers, and of a small object. Genuine ones have 2 kB."""

# torch's names of the types of numbers that this program saves, and of a storage of them.
ITEMSIZE = {"float32": 4, "bfloat16": 2, "uint8": 1}
_STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "uint8": "ByteStorage"}
_DCP = "torch.distributed.checkpoint."
_TENSOR, _BYTES = f"{_DCP}metadata.TensorStorageMetadata", f"{_DCP}metadata.BytesStorageMetadata"
_INDEX, _PLACE = f"{_DCP}metadata.MetadataIndex", f"{_DCP}filesystem._StorageInfo"
_CHUNK, _PROPERTIES = f"{_DCP}metadata.ChunkStorageMetadata", f"{_DCP}metadata.TensorProperties"
_METADATA = f"{_DCP}metadata.Metadata"
_IN_METADATA = {
    *(_METADATA, _TENSOR, _BYTES, _INDEX, _PLACE, _CHUNK, _PROPERTIES),
    *(f"{_DCP}metadata.StorageMeta", f"{_DCP}metadata._MEM_FORMAT_ENCODING"),
    *(f"{_DCP}planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *("torch.Size", "torch.serialization._get_layout", "pathlib.PosixPath", "pathlib._local.PosixPath"),
    *(f"torch.{name}" for name in ITEMSIZE),
}
_REBUILD = "torch._utils._rebuild_tensor_v2"
_IN_ARCHIVE = {_REBUILD, "collections.OrderedDict", *(f"torch.{name}" for name in _STORAGES.values())}
# megatron-core 0.19 keeps here what earlier versions keep in common.pt.
_COMMON, _COMMON_FILE = "common_state/shard_0_1", "common.pt"


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and the archive that holds its numbers."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    archive: Span


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    dtype: str
    size: tuple[int, ...]
    pieces: dict[tuple[int, ...], Piece]
    """By their offset."""


@dataclass(frozen=True)
class Contents:
    path: Path
    tensors: dict[str, Stored]
    common: dict[str, Any]
    """What is no tensor: the optimizer's settings. Plain values only."""

    def numbers(self, file: BinaryIO, dtype: str, piece: Piece) -> Span:
        """Where the numbers of a piece lie in its `file`, in C order. Raises ValueError where they do not."""
        with _reading(self.path / piece.archive.file):
            if piece.archive.length > math.prod(piece.size) * ITEMSIZE[dtype] + _OVERHEAD:
                raise ValueError(f"{piece.archive.length} bytes hold a tensor of {piece.size}")
            tensor, places = read_archive(file, piece.archive, _IN_ARCHIVE)
            if not isinstance(tensor, Record) or tensor.name != _REBUILD:
                raise ValueError("there is no tensor where one should be")
            storage, offset, size, strides = tensor.args[:4]
            _, kind, key, _, _ = storage.args
            same, step = (kind, offset, size) == (f"torch.{_STORAGES[dtype]}", 0, piece.size), 1
            for length, stride in zip(reversed(piece.size), reversed(strides), strict=True):
                same, step = same and (stride == step or length == 1), step * length
            if not same or places[key].length != step * ITEMSIZE[dtype]:
                raise ValueError(f"there is another tensor than {dtype} of {piece.size}")
            return places[key]


def read_contents(path: Path, files: FileFacts) -> Contents:
    """The content of the checkpoint at `path`, whose description lists `files`.

    Reads the small files only, and compares their checksums with those of `files` first. Raises ValueError
    for what this program does not write, naming the file. No code of the checkpoint runs.
    """
    content = read_verified(path, "metadata.json", files)
    with _reading(path / "metadata.json"):
        if parse_json(content, "JSON").get("sharded_backend") != "torch_dist":
            raise ValueError("it names another format than torch_dist")
    content = read_verified(path, ".metadata", files)
    with _reading(path / ".metadata"):
        tensors, objects = _index(read_pickle(content, _IN_METADATA), files)
    named = {archive.file for archive in objects.values()}
    raise_corrupt(path, [why for name in named if (why := difference(path / name, files[name][0]))])
    common: Any = None
    for name, archive in objects.items():
        with open(path / archive.file, "rb") as file, _reading(path / archive.file):
            value, _ = read_archive(file, archive, _IN_ARCHIVE)
            if name == _COMMON:
                common = value[0]
    if _COMMON not in objects:
        content = read_verified(path, _COMMON_FILE, files)
        with _reading(path / _COMMON_FILE):
            archive = Span(_COMMON_FILE, 0, len(content))
            common, _ = read_archive(io.BytesIO(content), archive, ())
    with _reading(path / (_COMMON_FILE if _COMMON not in objects else objects[_COMMON].file)):
        if not isinstance(common, dict):
            raise ValueError("it holds no settings")
    return Contents(path, tensors, common)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Name the file that an error is about, and the way out."""
    try:
        yield
    except ERRORS as error:
        why = str(error) if isinstance(error, ValueError) else f"it is damaged ({type(error).__name__})"
        way_out = "do not use the checkpoint, and ask whoever made it for another"
        raise ValueError(f"{file} is not of a checkpoint that this program wrote: {why}; {way_out}") from None


def _index(metadata: Any, files: FileFacts) -> tuple[dict[str, Stored], dict[str, Span]]:
    """Tensors by name, and the archives of all that is no tensor."""
    known = _state(metadata, _METADATA)
    spans = {}
    for index, place in known["storage_data"].items():
        at, where = _state(index, _INDEX), _state(place, _PLACE)
        key = _name(at["fqn"]), None if at.get("offset") is None else _integers(at["offset"])
        start, length = _integers((where["offset"], where["length"]))
        file = where["relative_path"]
        if type(file) is not str or file not in files:
            place = f"{shown(file)}, which the description does not list"
            raise ValueError(f"it keeps {shown(key[0])} in {place}")
        if start + length > files[file][0]:
            raise ValueError(f"it keeps {shown(key[0])} behind the end of {file}")
        if where.get("transform_descriptors"):
            raise ValueError(f"it keeps {shown(key[0])} transformed")
        spans[key] = Span(file, start, length)
    if sum(span.length for span in spans.values()) > sum(size for size, _ in files.values()):
        raise ValueError("it keeps several tensors in one place")
    tensors, objects = {}, {}
    for name, held in known["state_dict_metadata"].items():
        if isinstance(held, Record) and held.name == _BYTES:
            objects[_name(name)] = span = spans[name, None]
            if span.length > 256 * _OVERHEAD:
                raise ValueError(f"{shown(name)} has {span.length} bytes")
            continue
        state = _state(held, _TENSOR)
        size, dtype = _integers(state["size"]), state["properties"].state[0].removeprefix("torch.")
        if state["properties"].name != _PROPERTIES or dtype not in ITEMSIZE:
            raise ValueError(f"{shown(name)} has no type of numbers")
        pieces = {}
        for chunk in state["chunks"]:
            box = _state(chunk, _CHUNK)
            offset, lengths = _integers(box["offsets"]), _integers(box["sizes"])
            ends = [o + n for o, n in zip(offset, lengths, strict=True)]
            if any(end > whole for end, whole in zip(ends, size, strict=True)):
                raise ValueError(f"a piece of {shown(name)} lies outside of it")
            pieces[offset] = Piece(offset, lengths, spans[name, offset])
        tensors[_name(name)] = Stored(dtype, size, pieces)
    return tensors, objects


def _state(record: Any, name: str) -> dict[str, Any]:
    """The fields of a record of class `name`."""
    if type(record) is not Record or record.name != name or type(record.state) is not dict:
        raise ValueError(f"there is no {name.rpartition('.')[2]} where one should be")
    return record.state


def _name(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("a tensor's name is no text")
    return value


def _integers(values: Any) -> tuple[int, ...]:
    """Lengths or offsets."""
    if type(values) is not tuple or any(type(n) is not int or not 0 <= n < 1 << 62 for n in values):
        raise ValueError("a shape or place is not of whole numbers")
    return values
