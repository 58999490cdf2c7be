"""Inputs of preprocessing and of tokenizer training: documents in pieces of about a megabyte.

    FILE.jsonl, also .gz, .zst      a document a line
    FILE.parquet                    a document a row
    DIR                             a dataset written by `datasets.Dataset.save_to_disk`
    hf:NAME[:SPLIT]                 a dataset by folder or ORG/NAME@COMMIT (`load_dataset`), by default split
    hf:NAME:CONFIGURATION:SPLIT     "train"; it is brought to the Hugging Face cache first, then read there

A part of an input is a range of its bytes. A line or row belongs to the part in which it begins. A packed
file cannot be read from the middle, so it belongs whole to the part that has its first byte.

A bad line or value costs one document (`rows.py`), and so does a line or row of more than `MOST_BYTES`. A
file that cannot be read on is an `InputError`. Memory is bounded whatever a file says of itself: packed files
are unpacked a piece at a time, and of a table only as many rows are unpacked as fit.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from megatron_r1.preprocess.rows import MARK, Row, refused_line, rows_of, too_long
from megatron_r1.system.arrow_io import (
    BoundError,
    beginning,
    check_stream,
    flat,
    largest_page,
    open_parquet,
    slices,
    stand_in,
    text_bytes,
    with_fields,
)
from megatron_r1.system.errors import hub_name, require, require_utf8, shown, suggest_path
from megatron_r1.system.files import beside, plain_name, sha256
from megatron_r1.system.json_io import read_object

PIECE_BYTES = 1 << 20
PIECE_DOCUMENTS = 4096
MOST_BYTES = 16_000_000
"""Bytes of a document, by default. Tokenizers take 250 times the memory of a text, and books have 1 MB."""
_MOST_PAGE = 32
"""Bytes of a parquet file's page, unpacked, as a multiple of a document's. Writers put 1,024 rows in one."""
_MOST_LINE = 64
"""Bytes of a line that is passed over, as a multiple of a document's: JSONL has line ends."""
_ROWS_AT_ONCE = 1024
_BEGINNING = 512
"""Bytes of a file that show its kind."""
_PACKED = (b"BZh", b"\xfd7zXZ", b"\x04\x22\x4d\x18", b"PK\x03\x04")
_OTHERS = {
    **dict.fromkeys(_PACKED, "is packed in a way that is not read; unpack it, or pack it as .gz or .zst"),
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


def piece_rule(most_bytes: int) -> list[int]:
    """The limits of a piece. A journal that was kept under other limits cannot be continued."""
    return [PIECE_BYTES, PIECE_DOCUMENTS, most_bytes]


@dataclass(frozen=True)
class Piece:
    """Consecutive documents of one input, as read: raw lines, or for tables a row each.

    Its size is about PIECE_BYTES, or that of its longest document.
    """

    path: str
    input: int
    """Number of the input, from 0."""
    first: int
    """Line (or row) number of the first, from 1 at the beginning of the part that is read."""
    rows: Sequence[Row]
    position: int
    """Bytes of the input consumed so far (compressed bytes where compressed)."""


class Input:
    """`name`: as the user wrote it. `files`: all that it is read from. `most`: bytes of a document."""

    def __init__(self, name: str, files: list[Path], most: int):
        self.name, self.files, self.most = name, files, most

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
        for start, other in _OTHERS.items():
            if first.startswith(start) and not (ending and other.endswith(f" {ending}")):
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
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:_BEGINNING]
            fault = "takes too much" if isinstance(error, BoundError | MemoryError) else "is damaged"
            raise InputError(f"{self.name} {fault}{where()}: {reason}; mend it or leave it out") from None


def open_input(name: str | Path, longest: int = MOST_BYTES) -> Input:
    """Errors: FileNotFoundError; ValueError for a dataset that cannot be had or needs a library, for a pipe,
    for a name that is not UTF-8. longest: bytes of a document; what is longer is refused in its place."""
    require_utf8(str(name))
    path = Path(name)
    if str(name).startswith("hf:"):
        return Dataset(str(name), _load_dataset(str(name)), longest)
    if path.is_dir():
        return Dataset(str(name), _load_saved(path), longest)
    if not path.exists():
        raise FileNotFoundError(f"input {path} does not exist{suggest_path(path)}")
    if not path.is_file():
        raise ValueError(f"input {path} is a pipe or a device, and inputs are read twice; write it to a file")
    kind = Parquet if path.suffix == ".parquet" else Lines
    return kind(str(path), [path], longest)


def most_bytes(megabytes: float) -> int:
    """The argument of --max-document-megabytes in bytes."""
    if not 1 <= megabytes * 1e6 < 2**31:
        raise ValueError(f"--max-document-megabytes {megabytes:g}: take a number above 0 and below 2147")
    return int(megabytes * 1e6)


def open_inputs(names: Sequence[str | Path], longest: int = MOST_BYTES) -> list[Input]:
    """`open_input` for each. `*` in a name stands for files, in the order of their names.

    ValueError for a file that is named twice: its documents would come twice.
    """
    every = [path for name in map(str, names) for path in (("*" in name and sorted(glob(name))) or [name])]
    sources, known = [open_input(name, longest) for name in every], dict[str, Input]()
    for source in sources:
        first = known.setdefault(os.path.realpath(source.name), source)
        if first is not source:
            also = "" if first.name == source.name else f", first as {first.name}"
            fault = f"input {source.name} is given twice{also}: its documents would come twice"
            raise ValueError(f"{fault}; name it once, or copy it if that is meant")
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
                for _ in _rest_of_line(raw):
                    pass
            first, at = 1, raw.tell()
            seen = hashlib.sha256()
            whole = not packed and not lo and hi == self.size
            while packed or at < hi:
                want = PIECE_BYTES if packed else min(PIECE_BYTES, hi - at)
                with self._reading(lambda: f" after line {first - 1}"):  # noqa: B023
                    # The lines up to the one that brings them to `want` bytes.
                    block = stream.read(want)
                    if len(block) == PIECE_BYTES and block.isspace():
                        raise BoundError(f"{PIECE_BYTES:,} bytes of blank lines")
                    rows = io.BytesIO(block).readlines()
                    seen.update(block if whole else b"")
                    at += len(block)
                    line = [block[block.rfind(b"\n", 0, -1) + 1 :]]
                    size = len(line[0])
                    for rest in () if block.endswith(b"\n") else _rest_of_line(stream):
                        seen.update(rest if whole else b"")
                        size, at = size + len(rest), at + len(rest)
                        # Of a line that is too long the beginning is kept.
                        line += [rest] if size <= self.most else []
                        if size > _MOST_LINE * self.most:
                            raise BoundError(f"a line of more than {size:,} bytes")
                if not rows:
                    break
                rows[-1] = b"".join(line)
                if first == 1 and not lo:
                    rows[0] = rows[0].removeprefix(MARK)
                checked: list[Row] = [*rows[:-1], refused_line(rows[-1], size, self.most)]
                if self.most < PIECE_BYTES:
                    checked[:-1] = [refused_line(row, len(row), self.most) for row in rows[:-1]]
                position = raw.tell() if packed else at
                for some in range(0, len(rows), PIECE_DOCUMENTS):
                    part = checked[some : some + PIECE_DOCUMENTS]
                    yield Piece(self.name, number, first, part, position)
                    first += len(part)
            if whole:
                self.read_digest = seen.hexdigest()


def _rest_of_line(stream: IO[bytes]) -> Iterator[bytes]:
    """The bytes up to the end of a line, a piece at a time: a line may be longer than the memory."""
    part = b""
    while not part.endswith(b"\n") and (part := stream.readline(PIECE_BYTES)):
        yield part


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
        columns = self._open()[0].names
        for key in keys:
            if columns.count(key) != 1:
                count = f"{columns.count(key)} columns" if key in columns else "no column"
                has = ", ".join(columns)
                has = has if len(has) <= _BEGINNING and has.isprintable() else shown(columns)
                raise InputError(f"{self.name} has {count} {key!r}; it has {has}: see --json-keys")

    def pieces(self, number: int, keys: Sequence[str], lo: int, hi: int) -> Iterator[Piece]:
        self.check(keys)
        (_, rows), total = self._open(), max(1, self.size)
        start, end = (-(-byte * rows // total) for byte in (lo, hi))
        first, part, size = 1, list[Row](), 0
        for some, of_texts in self._rows(keys, start, end) if start < end else ():
            part.extend(some)
            size += of_texts
            if size >= PIECE_BYTES or len(part) >= PIECE_DOCUMENTS or start + first - 1 + len(part) >= end:
                position = total * (start + first - 1 + len(part)) // rows
                yield Piece(self.name, number, first, part, position)
                first, part, size = first + len(part), [], 0

    def _rows(self, keys: Sequence[str], start: int, end: int) -> Iterator[tuple[Sequence[Row], int]]:
        """Rows [start, end), at most a piece at a time, and the bytes of their texts."""
        schema, _ = self._open()
        unread = {key: stand_in(schema.field(key).type) for key in keys}
        unread = {key: value for key, value in unread.items() if value is not None}
        if len(unread) == len(keys):
            for at in range(start, end, PIECE_DOCUMENTS):
                yield [unread] * min(end - at, PIECE_DOCUMENTS), 0
            return
        for table in self._tables([key for key in keys if key not in unread], start, end):
            for some, size in slices(table, min(PIECE_BYTES, self.most)):
                if size > self.most:
                    yield [too_long(size, self.most, beginning(some))], 0
                else:
                    rows = rows_of(some)
                    yield [row | unread for row in rows] if unread else rows, size

    def _open(self) -> tuple[Any, int]:
        """The Arrow schema, and the number of rows."""
        raise NotImplementedError

    def _tables(self, keys: Sequence[str], start: int, end: int) -> Iterator[Any]:
        """Rows [start, end) of some columns as Arrow tables or batches that take a bounded memory."""
        raise NotImplementedError


class Parquet(_Table):
    def check(self, keys: Sequence[str]) -> None:
        with open(self.files[0], "rb") as raw:
            self._check_beginning(raw.read(_BEGINNING), ".parquet")
        super().check(keys)

    def _open(self) -> tuple[Any, int]:
        with self._reading(), open_parquet(self.name) as file:
            return with_fields(file.schema_arrow), file.metadata.num_rows

    def _tables(self, keys: Sequence[str], start: int, end: int) -> Iterator[Any]:
        at = 0
        with open_parquet(self.name) as file, open(self.files[0], "rb", buffering=_BEGINNING) as raw:
            described, names = file.metadata, list(keys)
            columns = [c for c in range(described.num_columns) if described.schema.column(c).path in keys]
            for number in range(described.num_row_groups):
                group = described.row_group(number)
                done, lo, hi = 0, max(start - at, 0), min(end - at, group.num_rows)
                at += group.num_rows
                if lo >= hi:
                    continue
                with self._reading(lambda: f" in row group {number}"):  # noqa: B023
                    most = self.most * _MOST_PAGE
                    largest = max(largest_page(raw, group.column(c), most) for c in columns)
                    # Each row may hold the longest text of a page, which may be that of a dictionary.
                    some = min(max(most // 2 // largest, 1), _ROWS_AT_ONCE)
                    batches = file.iter_batches(some, [number], names, use_threads=False)
                while done < hi:
                    with self._reading(lambda: f" in row group {number}"):  # noqa: B023
                        batch = next(batches)
                    done += batch.num_rows
                    if done > lo:
                        before = done - batch.num_rows
                        yield flat(batch.slice(max(lo - before, 0), min(hi, done) - max(lo, before)), keys)
        if at < end:
            raise InputError(f"{self.name} is damaged: {at} of its {end} rows are in row groups; mend it")


class Dataset(_Table):
    """A Hugging Face dataset on disk, memory-mapped: rows are read as they are asked for."""

    def __init__(self, name: str, dataset: Any, most: int):
        super().__init__(name, [Path(part["filename"]) for part in dataset.cache_files], most)
        self._dataset = dataset

    def _open(self) -> tuple[Any, int]:
        return with_fields(self._dataset.data.schema), len(self._dataset)

    def _tables(self, keys: Sequence[str], start: int, end: int) -> Iterator[Any]:
        roots = (key if key in self._dataset.column_names else key.split(".")[0] for key in keys)
        dataset = self._dataset.select_columns([*dict.fromkeys(roots)]).with_format("arrow")
        for lo in range(start, end, _ROWS_AT_ONCE):
            with self._reading(lambda: f" after row {lo}"):  # noqa: B023
                table = flat(dataset[lo : min(end, lo + _ROWS_AT_ONCE)], keys)
                # It is mapped, so a wrong place of a text would be one anywhere in memory.
                table.validate()
                for column in table.columns:
                    texts = text_bytes(column)
                    (column if texts is None else texts).validate(full=True)
            yield table


def _load_saved(path: Path) -> Any:
    if (path / "dataset_dict.json").is_file():
        splits = read_object(path / "dataset_dict.json").get("splits")
        names = [name for name in splits if plain_name(name)][:8] if isinstance(splits, list) else []
        splits = ", ".join(str(path / name) for name in names or ["SPLIT"])
        raise ValueError(f"input {path} has several splits; give one of {splits}")
    if not (path / "state.json").is_file():
        fault = f"input {path} is a folder without state.json, so not from Dataset.save_to_disk"
        raise ValueError(f"{fault}; name its files, or write hf:{path} to let datasets find them")
    state = path / "state.json"
    listed = read_object(state).get("_data_files")
    read_object(path / "dataset_info.json")
    if not isinstance(listed, list) or not all(isinstance(of, dict) for of in listed):
        raise ValueError(f"{state} lists no data files; write the folder again by Dataset.save_to_disk")
    for of in listed:
        check_stream(beside(state, of.get("filename")))
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
    missing = f"input {name}: no dataset at"
    where, revision = (parts[0], None) if saved.exists() else hub_name(parts[0], missing)
    return _loaded("load_dataset", name, where, configuration, split=split, revision=revision)


def _loaded(function: str, name: str, *args: Any, **options: Any) -> Any:
    library = require("datasets", f"reading {name}")
    try:
        return getattr(library, function)(*args, **options)
    except Exception as error:
        # Its messages name neither what was asked for nor a way out, and damage leads to errors of any type.
        reason = " ".join(str(error if isinstance(error, OSError | ValueError) else repr(error)).split())
        raise ValueError(f"input {name} cannot be had from datasets: {reason[:_BEGINNING]}") from None


def cut(inputs: Sequence[Input], shard: tuple[int, int] | None) -> list[tuple[int, int]]:
    """The bytes [lo, hi) of each input that shard (i, n) reads: an equal share of all, in order."""
    index, count = shard or (0, 1)
    sizes = [source.size for source in inputs]
    befores = list(accumulate(sizes, initial=0))
    ends = [befores[-1] * part // count for part in (index, index + 1)]
    clipped = [[min(max(end - b, 0), size) for b, size in zip(befores, sizes, strict=False)] for end in ends]
    return list(zip(*clipped, strict=True))
