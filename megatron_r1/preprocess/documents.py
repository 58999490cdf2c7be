"""Inputs of preprocessing and of tokenizer training: documents in pieces of about a megabyte.

    FILE.jsonl, also .gz, .zst      a document a line
    FILE.parquet                    a document a row
    DIR                             a dataset written by `datasets.Dataset.save_to_disk`
    hf:NAME[:SPLIT]                 a dataset by folder or ORG/NAME@COMMIT (`load_dataset`), by default split
    hf:NAME:CONFIGURATION:SPLIT     "train"; it is brought to the Hugging Face cache first, then read there

A part of an input is a range of its bytes. A line or row belongs to the part in which it begins. A packed
file cannot be read from the middle, so it belongs whole to the part that has its first byte.

A bad line or value costs one document (`rows.py`). A file that cannot be read on is an `InputError`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from megatron_r1.preprocess.rows import MARK, rows_of, text_bytes
from megatron_r1.run.stage import read
from megatron_r1.system.errors import hub_name, require, require_utf8, suggest_path
from megatron_r1.system.files import sha256

PIECE_BYTES = 1 << 20
PIECE_DOCUMENTS = 4096
_ROWS_AT_ONCE = 1024
_BEGINNING = 512
"""Bytes of a file that show its kind."""
_PACKED = (b"BZh", b"\xfd7zXZ", b"\x04\x22\x4d\x18", b"PK\x03\x04")
_OTHERS = dict.fromkeys(
    _PACKED, "is packed in a way that is not read; unpack it, or pack it as .gz or .zst"
) | {
    b"version https://git-lfs": "is a git-lfs pointer; fetch the file by git lfs pull",
    b"\x1f\x8b": "is packed by gzip; name it .gz",
    b"\x28\xb5\x2f\xfd": "is packed by zstd; name it .zst",
    b"PAR1": "is a parquet file; name it .parquet",
    b"PARE": "is an encrypted parquet file; write it without encryption",
    b"ARROW1": "is an Arrow file; give the folder of Dataset.save_to_disk, or a parquet file",
}
"""First bytes of files that are no JSON lines -> what they are, with the ending under which they are read."""


_TAR = slice(257, _BEGINNING)
"""The place of an archive's name for itself. Nearly all lines between the headers would become documents."""


class InputError(ValueError):
    """An input cannot be read, or not to its end."""


def piece_rule() -> list[int]:
    """The limits of a piece. A journal that was kept under other limits cannot be continued."""
    return [PIECE_BYTES, PIECE_DOCUMENTS]


@dataclass(frozen=True)
class Piece:
    """Consecutive documents of one input, as read: raw lines, or for tables a row each."""

    path: str
    input: int
    """Number of the input, from 0."""
    first: int
    """Line (or row) number of the first, from 1 at the beginning of the part that is read."""
    rows: Sequence[bytes | dict[str, Any]]
    position: int
    """Bytes of the input consumed so far (compressed bytes where compressed)."""


class Input:
    """`name`: as the user wrote it. `files`: all that it is read from."""

    def __init__(self, name: str, files: list[Path]):
        self.name, self.files = name, files

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.files)

    def check(self, keys: Sequence[str]) -> None:
        """Raise InputError where the first bytes or the columns show that it cannot be read."""
        raise NotImplementedError

    def pieces(self, number: int, keys: Sequence[str], lo: int, hi: int) -> Iterator[Piece]:
        """Documents that begin in bytes [lo, hi), in order, cut by a rule that depends on the data alone."""
        raise NotImplementedError

    def _check_beginning(self, first: bytes, ending: str) -> None:
        for beginning, other in _OTHERS.items():
            if first.startswith(beginning) and not (ending and other.endswith(f" {ending}")):
                raise InputError(f"{self.name} {other}")
        if first[_TAR].startswith(b"ustar"):
            raise InputError(f"{self.name} is a tar archive; unpack it and name its files")

    @contextmanager
    def _reading(self, where: Callable[[], str] = str) -> Iterator[None]:
        """Name the file, and the place in it, in whatever error its reader raises."""
        try:
            yield
        except Exception as error:
            # A file that is gone or closed to us has a message of its own.
            if isinstance(error, InputError) or (isinstance(error, OSError) and error.filename is not None):
                raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"{self.name} is damaged{where()}: {reason}; mend it or leave it out") from None


def open_input(name: str | Path) -> Input:
    """Errors: FileNotFoundError; ValueError for a dataset that cannot be had or needs a library, for a pipe,
    for a name that is not UTF-8."""
    require_utf8(str(name))
    path = Path(name)
    if str(name).startswith("hf:"):
        return Dataset(str(name), _load_dataset(str(name)))
    if path.is_dir():
        return Dataset(str(name), _load_saved(path))
    if not path.exists():
        raise FileNotFoundError(f"input {path} does not exist{suggest_path(path)}")
    if not path.is_file():
        raise ValueError(f"input {path} is a pipe or a device, and inputs are read twice; write it to a file")
    kind = Parquet if path.suffix == ".parquet" else Lines
    return kind(str(path), [path])


def open_inputs(names: Sequence[str | Path]) -> list[Input]:
    """`open_input` for each. ValueError for a file that is named twice: its documents would come twice."""
    sources, known = [open_input(name) for name in names], dict[str, Input]()
    for source in sources:
        first = known.setdefault(os.path.realpath(source.name), source)
        if first is not source:
            also = "" if first.name == source.name else f", first as {first.name}"
            raise ValueError(
                f"input {source.name} is given twice{also}: its documents would come twice; name it once, "
                f"or copy it if that is meant"
            )
    return sources


def identity(source: Input) -> dict[str, Any]:
    """The identity of an input, without reading it."""
    newest = max((path.stat().st_mtime_ns for path in source.files), default=0)
    return {"path": source.name, "bytes": source.size, "mtime_ns": newest}


def digest(source: Input) -> str:
    """SHA-256 of its file; of several, SHA-256 of their SHA-256 in order."""
    if isinstance(source, Lines) and source.read_digest:
        return source.read_digest
    hashes = [sha256(path) for path in source.files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


class Lines(Input):
    """JSONL; the ending tells how it is packed."""

    read_digest = ""
    """SHA-256 of a plain file, known once `pieces` has given all of it."""

    @property
    def packed(self) -> bool:
        return self.name.endswith((".gz", ".zst"))

    def check(self, keys: Sequence[str]) -> None:
        with open(self.files[0], "rb") as raw:
            first = raw.read(_BEGINNING)
            self._check_beginning(first, self.files[0].suffix)
            if self.packed:
                raw.seek(0)
                with self._reading(), _unpacked(raw, self.name) as stream:
                    if not first:
                        raise EOFError("it is empty, which no packed file is")
                    first = stream.read(_BEGINNING)
                self._check_beginning(first, "")
        if b"\0" in first[:4]:
            raise InputError(f"{self.name} is no text in UTF-8; its first bytes are {first[:4]!r}")

    def pieces(self, number: int, keys: Sequence[str], lo: int, hi: int) -> Iterator[Piece]:
        packed = self.packed
        if hi <= lo or (packed and lo > 0):
            return
        with open(self.files[0], "rb", buffering=PIECE_BYTES) as raw, _unpacked(raw, self.name) as stream:
            if lo:
                # Whatever line began before belongs to the part before.
                raw.seek(lo - 1)
                raw.readline()
            first, at = 1, raw.tell()
            seen = hashlib.sha256()
            whole = not packed and not lo and hi == self.size
            while packed or at < hi:
                want = PIECE_BYTES if packed else min(PIECE_BYTES, hi - at)
                with self._reading(lambda: f" after line {first - 1}"):  # noqa: B023
                    # The lines up to the one that brings them to `want` bytes; 0 would mean all.
                    rows = stream.readlines(want - 1) if want > 1 else [stream.readline()]
                joined = b"".join(rows)
                if not joined:
                    break
                if whole:
                    seen.update(joined)
                at += len(joined)
                if first == 1 and not lo:
                    rows[0] = rows[0].removeprefix(MARK)
                position = raw.tell() if packed else at
                for some in range(0, len(rows), PIECE_DOCUMENTS):
                    part = rows[some : some + PIECE_DOCUMENTS]
                    yield Piece(self.name, number, first, part, position)
                    first += len(part)
            if whole:
                self.read_digest = seen.hexdigest()


def _unpacked(raw: IO[bytes], path: str) -> IO[bytes]:
    """The lines of a file, unpacked by its ending."""
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.endswith(".zst"):
        # Not the zstandard package: its reader takes a truncated file for a complete one.
        arrow = require("pyarrow", f"reading {path}")
        return io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(raw, "r"), "zstd"), 1 << 20)
    return raw


class _Table(Input):
    """Numbered rows. A range of bytes stands for the same share of the rows."""

    def check(self, keys: Sequence[str]) -> None:
        columns, _ = self._open()
        for key in keys:
            if columns.count(key) != 1:
                count = f"{columns.count(key)} columns" if key in columns else "no column"
                has = ", ".join(columns)
                raise InputError(f"{self.name} has {count} {key!r}; it has {has}: see --json-keys")

    def pieces(self, number: int, keys: Sequence[str], lo: int, hi: int) -> Iterator[Piece]:
        self.check(keys)
        (_, rows), total = self._open(), max(1, self.size)
        start, end = (-(-byte * rows // total) for byte in (lo, hi))
        first = 1
        for table in self._tables(keys, start, end) if start < end else ():
            step = max(1, PIECE_BYTES * table.num_rows // max(1, table.nbytes))
            for at in range(0, table.num_rows, step):
                part = rows_of(table.slice(at, step))
                position = total * (start + first - 1 + len(part)) // rows
                yield Piece(self.name, number, first, part, position)
                first += len(part)

    def _open(self) -> tuple[list[str], int]:
        """Columns and number of rows."""
        raise NotImplementedError

    def _tables(self, keys: Sequence[str], start: int, end: int) -> Iterator[Any]:
        """Rows [start, end) as Arrow tables or batches."""
        raise NotImplementedError


class Parquet(_Table):
    def check(self, keys: Sequence[str]) -> None:
        with open(self.files[0], "rb") as raw:
            self._check_beginning(raw.read(_BEGINNING), ".parquet")
        super().check(keys)

    def _open(self) -> tuple[list[str], int]:
        with self._reading(), self._file() as file:
            return file.schema_arrow.names, file.metadata.num_rows

    def _tables(self, keys: Sequence[str], start: int, end: int) -> Iterator[Any]:
        with self._file() as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
            befores = list(accumulate(sizes, initial=0))
            groups = [g for g, n in enumerate(sizes) if befores[g] < end and befores[g] + n > start]
            at = befores[groups[0]] if groups else 0
            batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=list(keys))
            while at < end:
                left = [g for g in groups if befores[g + 1] > at]
                with self._reading(lambda: _damaged_group(file, left, keys)):  # noqa: B023
                    batch = next(batches)
                lo, hi = max(start - at, 0), min(end - at, batch.num_rows)
                at += batch.num_rows
                if lo < hi:
                    yield batch.slice(lo, hi - lo)

    def _file(self) -> Any:
        # A checksum of a page is compared where its writer stored one.
        library = require("pyarrow.parquet", f"reading {self.name}")
        return library.ParquetFile(self.name, page_checksum_verification=True)


def _damaged_group(file: Any, groups: Sequence[int], keys: Sequence[str]) -> str:
    """Where it is that a reader of these row groups has failed."""
    for group in groups:
        try:
            file.read_row_group(group, columns=list(keys))
        except Exception:
            return f" in row group {group}"
    return ""


class Dataset(_Table):
    """A Hugging Face dataset on disk, memory-mapped: rows are read as they are asked for."""

    def __init__(self, name: str, dataset: Any):
        super().__init__(name, [Path(part["filename"]) for part in dataset.cache_files])
        self._dataset = dataset

    def _open(self) -> tuple[list[str], int]:
        return self._dataset.column_names, len(self._dataset)

    def _tables(self, keys: Sequence[str], start: int, end: int) -> Iterator[Any]:
        dataset = self._dataset.select_columns(list(keys)).with_format("arrow")
        for lo in range(start, end, _ROWS_AT_ONCE):
            with self._reading(lambda: f" after row {lo}"):  # noqa: B023
                table = dataset[lo : min(end, lo + _ROWS_AT_ONCE)]
                # It is mapped, so a wrong place of a text would be one anywhere in memory.
                for texts in filter(None, map(text_bytes, table.columns)):
                    texts.validate(full=True)
            yield table


def _load_saved(path: Path) -> Any:
    if (path / "dataset_dict.json").is_file():
        names = (read(path / "dataset_dict.json") or {}).get("splits") or ["SPLIT"]
        splits = ", ".join(str(path / name) for name in names)
        raise ValueError(f"input {path} has several splits; give one of {splits}")
    if not (path / "state.json").is_file():
        raise ValueError(
            f"input {path} is a folder without state.json, so not from Dataset.save_to_disk; name its files, "
            f"or write hf:{path} to let datasets find them"
        )
    return _loaded("load_from_disk", str(path), str(path))


def _load_dataset(name: str) -> Any:
    parts = name.split(":")[1:]
    if not parts[0] or len(parts) > 3:
        raise ValueError(f"input {name}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT")
    saved = Path(parts[0])
    if (saved / "state.json").is_file() and len(parts) == 1:
        return _load_saved(saved)
    if (saved / "dataset_dict.json").is_file() and len(parts) == 2:
        return _load_saved(saved / parts[1])
    configuration = parts[1] if len(parts) == 3 else None
    split = parts[-1] if len(parts) > 1 else "train"
    where, revision = (
        (parts[0], None) if saved.exists() else hub_name(parts[0], f"input {name}: no dataset at")
    )
    return _loaded("load_dataset", name, where, configuration, split=split, revision=revision)


def _loaded(function: str, name: str, *args: Any, **options: Any) -> Any:
    library = require("datasets", f"reading {name}")
    try:
        return getattr(library, function)(*args, **options)
    except Exception as error:
        # Its messages name neither what was asked for nor a way out, and damage leads to errors of any type.
        reason = error if isinstance(error, OSError | ValueError) else repr(error)
        raise ValueError(f"input {name} cannot be had from datasets: {reason}") from None


def cut(inputs: Sequence[Input], shard: tuple[int, int] | None) -> list[tuple[int, int]]:
    """The bytes [lo, hi) of each input that shard (i, n) reads: an equal share of all, in order."""
    index, count = shard or (0, 1)
    sizes = [source.size for source in inputs]
    start, end = sum(sizes) * index // count, sum(sizes) * (index + 1) // count
    ranges = []
    for size in sizes:
        ranges.append((min(max(start, 0), size), min(max(end, 0), size)))
        start, end = start - size, end - size
    return ranges
