"""Inputs of preprocessing: documents in pieces of about a megabyte, and the faults that reject a document.

    FILE.jsonl, also .gz, .zst      a document a line
    FILE.parquet                    a document a row
    DIR                             a dataset written by `datasets.Dataset.save_to_disk`
    hf:NAME[:SPLIT]                 a dataset by name or folder (`datasets.load_dataset`), by default split
    hf:NAME:CONFIGURATION:SPLIT     "train"; it is brought to the Hugging Face cache first, then read there

A part of an input is a range of its bytes. A line or row belongs to the part in which it begins. A packed
file cannot be read from the middle, so it belongs whole to the part that has its first byte.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_r1.system.errors import require, suggest_path
from megatron_r1.system.files import sha256

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment,unused-ignore]

PIECE_BYTES = 1 << 20
PIECE_DOCUMENTS = 4096
_ROWS_AT_ONCE = 1024
_KEYS_SHOWN = 8


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

    def pieces(self, number: int, keys: Sequence[str], lo: int, hi: int) -> Iterator[Piece]:
        """Documents that begin in bytes [lo, hi), in order, cut by a rule that depends on the data alone."""
        raise NotImplementedError


def open_input(name: str | Path) -> Input:
    """Errors: FileNotFoundError, ValueError for a dataset that cannot be had or needs a library."""
    path = Path(name)
    if str(name).startswith("hf:"):
        return Dataset(str(name), _load_dataset(str(name)))
    if path.is_dir():
        return Dataset(str(name), _load_saved(path))
    if not path.is_file():
        raise FileNotFoundError(f"input {path} does not exist{suggest_path(path)}")
    kind = Parquet if path.suffix == ".parquet" else Lines
    return kind(str(path), [path])


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

    def pieces(self, number: int, keys: Sequence[str], lo: int, hi: int) -> Iterator[Piece]:
        packed = self.name.endswith((".gz", ".zst"))
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
                try:
                    # The lines up to the one that brings them to `want` bytes; 0 would mean all.
                    rows = stream.readlines(want - 1) if want > 1 else [stream.readline()]
                except (EOFError, OSError, zlib.error) as error:
                    raise ValueError(f"{self.name} is damaged after line {first - 1}: {error}") from None
                read = b"".join(rows)
                if not read:
                    break
                if whole:
                    seen.update(read)
                at += len(read)
                if first == 1 and not lo:
                    rows[0] = rows[0].removeprefix(b"\xef\xbb\xbf")
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

    def pieces(self, number: int, keys: Sequence[str], lo: int, hi: int) -> Iterator[Piece]:
        (columns, rows), total = self._open(), max(1, self.size)
        if missing := [key for key in keys if key not in columns]:
            has = ", ".join(columns)
            raise ValueError(f"{self.name} has no column {missing[0]!r}; it has {has}: see --json-keys")
        start, end = (-(-byte * rows // total) for byte in (lo, hi))
        first = 1
        for table in self._tables(keys, start, end) if start < end else ():
            step = max(1, PIECE_BYTES * table.num_rows // max(1, table.nbytes))
            for at in range(0, table.num_rows, step):
                part = _rows(table.slice(at, step))
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
    def _open(self) -> tuple[list[str], int]:
        with self._file() as file:
            return file.schema_arrow.names, file.metadata.num_rows

    def _tables(self, keys: Sequence[str], start: int, end: int) -> Iterator[Any]:
        with self._file() as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
            befores = [sum(sizes[:g]) for g in range(len(sizes))]
            groups = [g for g, n in enumerate(sizes) if befores[g] < end and befores[g] + n > start]
            at = befores[groups[0]] if groups else 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=list(keys)):
                lo, hi = max(start - at, 0), min(end - at, batch.num_rows)
                at += batch.num_rows
                if lo < hi:
                    yield batch.slice(lo, hi - lo)

    def _file(self) -> Any:
        library = require("pyarrow.parquet", f"reading {self.name}")
        try:
            return library.ParquetFile(self.name)
        except ValueError as error:
            raise ValueError(f"{self.name} is damaged: {error}") from None


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
            yield dataset[lo : min(end, lo + _ROWS_AT_ONCE)]


def _load_saved(path: Path) -> Any:
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
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
    return _loaded("load_dataset", name, parts[0], configuration, split=split)


def _loaded(function: str, name: str, *args: Any, **options: Any) -> Any:
    library = require("datasets", f"reading {name}")
    try:
        return getattr(library, function)(*args, **options)
    except (OSError, ValueError) as error:
        # Its messages name neither what was asked for nor a way out.
        raise ValueError(f"input {name} cannot be had from datasets: {error}") from None


def _rows(table: Any) -> list[dict[str, Any]]:
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        arrow = require("pyarrow", "reading a table")
        # One broken text must not reject its neighbours: as bytes, each is checked by itself.
        as_bytes = {arrow.string(): arrow.binary(), arrow.large_string(): arrow.large_binary()}
        fields = [field.with_type(as_bytes.get(field.type, field.type)) for field in table.schema]
        return table.cast(arrow.schema(fields)).to_pylist()


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


def parse(row: bytes | dict[str, Any]) -> dict[str, Any]:
    """A JSON line as an object. Raises ValueError that says why a line is none."""
    if isinstance(row, dict):
        return row
    if orjson is not None:
        # Twice as fast, and stricter: the standard library decides about lines that it refuses.
        try:
            record = orjson.loads(row)
        except ValueError:
            record = None
        if isinstance(record, dict):
            return record
    try:
        record = json.loads(row.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start}: {error.reason}") from None
    except RecursionError:
        raise ValueError("bad JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"bad JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"bad JSON: a {type(record).__name__} where an object is expected")
    return record


def text_of(record: dict[str, Any], key: str) -> tuple[str, bytes]:
    """The text under a key, and its UTF-8. Raises ValueError that says why there is none."""
    if key not in record:
        names = [repr(name) for name in record][:_KEYS_SHOWN] or ["none"]
        raise ValueError(f"missing key {key!r}: there {'are' if len(names) > 1 else 'is'} {', '.join(names)}")
    text = record[key]
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"invalid UTF-8 at byte {error.start} of {key!r}: {error.reason}") from None
    if not isinstance(text, str):
        raise ValueError(f"non-string text: {key!r} is {type(text).__name__}")
    if not text:
        raise ValueError(f"empty document: {key!r} is ''")
    try:
        return text, text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"invalid UTF-8: lone surrogate at character {error.start} of {key!r}") from None


def reject(path: str, line: int, reason: str, row: bytes | dict[str, Any]) -> dict[str, Any]:
    """The record of a row that became no document."""
    quoted = row if isinstance(row, bytes) else repr(row).encode("utf-8", "backslashreplace")
    excerpt = quoted[:200].decode("utf-8", "backslashreplace").rstrip("\r\n")
    return {"file": path, "line": line, "reason": reason, "excerpt": excerpt}
