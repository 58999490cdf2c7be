"""Tables of others, in Arrow's formats and in Parquet: what of them can be read within bounds.

pyarrow takes the memory that a file says it needs. A page of a parquet file, or a record batch of Arrow's
IPC format, can say gigabytes in a few bytes. A dictionary holds a text once for any number of rows.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_r1.system.errors import require

_EXCERPT = 200
_MOST_FOOTER = 1 << 24
"""Bytes of a parquet file's description. pyarrow takes up to 300 times as many."""
_BYTES_A_VALUE = 16
"""Memory that pyarrow takes at once for each value of a page."""


class BoundError(ValueError):
    """A file says that it needs more memory than is given to it."""


def stand_in(kind: Any) -> Any:
    """What stands for each value of a column in which no row has a text; None for a column that is read.

    Lists, structs and the like are not read: a few bytes of a file can be a list of any length.
    """
    types = require("pyarrow.types", "reading a table")
    kind = _stored(kind)
    if types.is_struct(kind):
        return {}
    if types.is_nested(kind):
        return [] if "List" in type(kind).__name__ else kind
    return None if _stored(kind) == kind else kind


def _stored(kind: Any) -> Any:
    """The type of the values of a column that is an extension, a dictionary or both."""
    arrow, types = require("pyarrow", "reading a table"), require("pyarrow.types", "reading a table")
    kind = kind.storage_type if isinstance(kind, arrow.BaseExtensionType) else kind
    return kind.value_type if types.is_dictionary(kind) else kind


def with_fields(schema: Any) -> Any:
    """A table's schema, and `a.b` for each field of a struct `a`."""
    for field in schema.empty_table().flatten().schema:
        schema = schema if field.name in schema.names else schema.append(field)
    return schema


def flat(rows: Any, keys: Sequence[str]) -> Any:
    """The columns `keys` of an Arrow table or batch, of which some may be fields of structs."""
    if all(key in rows.schema.names for key in keys):
        return rows
    arrow = require("pyarrow", "reading a table")
    rows = arrow.Table.from_batches([rows]) if isinstance(rows, arrow.RecordBatch) else rows
    fields = rows.flatten()
    return arrow.table({key: (rows if key in rows.schema.names else fields)[key] for key in keys})


def slices(table: Any, most: int) -> Iterator[tuple[Any, int]]:
    """Consecutive rows of an Arrow table or batch, at most `most` bytes of texts or one row, and their bytes.

    A text that a dictionary holds once counts in each of its rows.
    """
    if table.nbytes <= most and all(str(column.type) in _PLAIN for column in table.columns):
        yield table, table.nbytes
        return
    ends, at = np.cumsum(_row_bytes(table)), 0
    while at < len(ends):
        before = int(ends[at - 1]) if at else 0
        until = max(at + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield table.slice(at, until - at), int(ends[until - 1]) - before
        at = until


_PLAIN = ("string", "large_string", "binary", "large_binary")


def _row_bytes(table: Any) -> np.ndarray:
    """Bytes of the texts of each row, [rows] int64."""
    chunks = [getattr(column, "chunks", [column]) for column in table.columns]
    none = np.zeros(0, np.int64)
    return np.sum([np.concatenate([none, *map(_sizes, of_column)]) for of_column in chunks], axis=0)


def _sizes(array: Any) -> np.ndarray:
    """Bytes of each text of an Arrow array, [rows]; 0 for other values."""
    arrow, compute = require("pyarrow", "reading a table"), require("pyarrow.compute", "reading a table")
    if isinstance(array.type, arrow.BaseExtensionType):
        array = array.storage
    if isinstance(array, arrow.DictionaryArray):
        sizes = arrow.array(_sizes(array.dictionary)).take(array.indices)
    elif (texts := text_bytes(array)) is not None:
        sizes = compute.binary_length(texts)
    else:
        return np.zeros(len(array), np.int64)
    return (sizes.fill_null(0) if sizes.null_count else sizes).to_numpy()


def beginning(table: Any) -> bytes:
    """The first bytes of the texts in the first row of a table."""
    slice_ = require("pyarrow.compute", "reading a table").binary_slice
    texts = [text_bytes(column.slice(0, 1)) for column in table.columns]
    return b" ".join(slice_(text, 0, _EXCERPT)[0].as_py() or b"" for text in texts if text is not None)


def text_bytes(column: Any) -> Any:
    """A column of texts, however it is stored, as the bytes of each; None for a column of other values."""
    arrow, types = require("pyarrow", "reading a table"), require("pyarrow.types", "reading a table")
    if isinstance(column.type, arrow.BaseExtensionType):
        column = column.cast(column.type.storage_type)
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kinds = (*_PLAIN, "string_view", "binary_view")
    texts = str(column.type) in kinds or types.is_fixed_size_binary(column.type)
    return column.cast(arrow.large_binary()) if texts else None


def open_parquet(path: str | Path) -> Any:
    """A ParquetFile that reads a page at a time. By default pyarrow reads a whole row group. Raises OSError,
    BoundError, and whatever pyarrow raises for damage."""
    library = require("pyarrow.parquet", f"reading {path}")
    size = os.stat(path).st_size
    with open(path, "rb") as raw:
        raw.seek(max(0, size - 8))
        footer = int.from_bytes(raw.read(4), "little")
    if _MOST_FOOTER < footer < size:
        raise BoundError(f"it describes itself in {footer:,} bytes, and up to {_MOST_FOOTER:,} are read")
    # A checksum of a page is compared where its writer stored one.
    options = {"buffer_size": 1 << 20, "pre_buffer": False, "page_checksum_verification": True}
    return library.ParquetFile(path, **options)


def largest_page(raw: IO[bytes], column: Any, most: int) -> int:
    """Bytes of the largest page, unpacked, of a parquet file's column in a row group, at least 1.

    raw: the file. column: its metadata. Raises BoundError for a page of more than `most` bytes, which pyarrow
    would unpack at once, and ValueError, EOFError for damage.
    """
    at, dictionary = column.data_page_offset, column.dictionary_page_offset
    at = dictionary if column.has_dictionary_page and 0 < dictionary < at else at
    end, seen, largest = at + column.total_compressed_size, 0, 1
    while seen < column.num_values and at < end:
        raw.seek(at)
        page = _thrift_struct(raw)
        size, packed, kind = page.get(2, -1), page.get(3, -1), page.get(1, -1)
        about = page.get({0: 5, 2: 7, 3: 8}.get(kind, 0), {})
        values, at = about.get(1, 0), raw.tell() + packed
        if min(size, packed, values) < 0:
            raise ValueError(f"a page of {size} bytes, {packed} in the file, and {values} values")
        if max(size, values * _BYTES_A_VALUE) > most:
            raise BoundError(
                f"a page of {values:,} values and, unpacked, {size:,} bytes, but at most "
                f"{most // _BYTES_A_VALUE:,} and {most:,} are read: raise --max-document-megabytes, or write "
                f"the file with smaller pages"
            )
        seen, largest = seen + (values if kind != 2 else 0), max(largest, size)
    return largest


def _thrift_struct(raw: IO[bytes], depth: int = 0) -> dict[int, Any]:
    """Whole numbers and structs, by field, of a struct in Thrift's compact protocol, without its texts."""
    fields, field = dict[int, Any](), 0
    while head := _thrift_number(raw, 1):
        kind = head & 15
        field = field + (head >> 4) if head >> 4 else _zigzag(raw)
        if kind in (4, 5, 6):
            fields[field] = _zigzag(raw)
        elif kind == 8:
            raw.seek(_thrift_number(raw), os.SEEK_CUR)
        elif kind == 12 and depth < 4:
            fields[field] = _thrift_struct(raw, depth + 1)
        elif kind not in (1, 2):
            raise ValueError(f"a header of a page has a field of kind {kind}")
    return fields


def _thrift_number(raw: IO[bytes], most_bytes: int = 10) -> int:
    number = 0
    for n in range(most_bytes):
        if not (byte := raw.read(1)):
            raise EOFError("the file ends within a header of a page")
        if most_bytes == 1:
            return byte[0]
        number |= (byte[0] & 127) << 7 * n
        if byte[0] < 128:
            return number
    raise ValueError("a number in a header of a page is too long")


def _zigzag(raw: IO[bytes]) -> int:
    number = _thrift_number(raw)
    return number >> 1 ^ -(number & 1)


def check_stream(path: Path) -> None:
    """ValueError for a file of Arrow's IPC stream format that takes memory when it is opened, or is damaged.

    A plain one is mapped, and takes none.
    """
    arrow = require("pyarrow", f"reading {path}")
    reason = ""
    try:
        with arrow.memory_map(str(path)) as source:
            types = arrow.ipc.open_stream(source).schema.types
            if packed := [kind for kind in types if isinstance(kind, arrow.DictionaryType)]:
                reason = f"it has a column of type {packed[0]}"
            source.seek(0)
            for message in arrow.MessageReader.open_stream(source):
                if message.type == "record batch" and _is_packed(message.metadata.to_pybytes()):
                    reason = "it is packed"
    except (OSError, arrow.ArrowException, struct.error, IndexError) as error:
        reason = f"it is damaged: {error!s:.200}"
    if reason:
        raise ValueError(f"input {path}: {reason}; write it by Dataset.save_to_disk")


def _is_packed(message: bytes) -> bool:
    """Whether a record batch of Arrow's IPC format is compressed: field 3 of the message's field 2."""

    def field(table: int, number: int) -> int:
        vtable = table - struct.unpack_from("<i", message, table)[0]
        size = struct.unpack_from("<H", message, vtable)[0]
        offset = struct.unpack_from("<H", message, vtable + 4 + 2 * number)[0] if size > 4 + 2 * number else 0
        return table + offset if offset else 0

    header = field(struct.unpack_from("<I", message)[0], 2)
    return bool(header and field(header + struct.unpack_from("<I", message, header)[0], 3))
