"""A row becomes a text, or a fault says why it does not: JSON lines and rows of Arrow tables."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from megatron_r1.system.arrow_io import text_bytes
from megatron_r1.system.errors import shown

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment,unused-ignore]

MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""
BLANK, MARKED = "blank line", "byte order mark"
"""Names of bytes that are skipped."""
DEEPEST = 1024
"""Levels of nesting that a JSON line may have: orjson's limit."""
_KEYS_SHOWN, _KEY_BYTES = 8, 100
_EXCERPT = 200
_MOST_VALUES = 1 << 20
"""Values of a JSON line: Python takes 100 bytes and more for one that takes three in the line."""


@dataclass(frozen=True)
class Refused:
    """A row that is not read, because it would take too much memory. It becomes a reject."""

    reason: str
    excerpt: bytes


Row = bytes | dict[str, Any] | Refused


def refused_line(line: bytes, size: int, most: int) -> bytes | Refused:
    """A JSON line, or why it is not read. size: bytes of the whole line. most: bytes of a document."""
    if size > most:
        return too_long(size, most, line)
    # Counted fast first: prose has a comma in 50 characters, and they are within its texts.
    if size > _MOST_VALUES < sum(map(line.count, _BEFORE_VALUES)):
        structure = _structure(line)
        if (values := sum(map(structure.count, _BEFORE_VALUES))) > _MOST_VALUES:
            return Refused(f"too many values: {values:,}, more than {_MOST_VALUES:,}", line[:_EXCERPT])
    return line


def too_long(size: int, most: int, beginning: bytes) -> Refused:
    limit = f"--max-document-megabytes {most / 1e6:g}"
    return Refused(f"document too long: {size:,} bytes, more than {limit}", beginning[:_EXCERPT])


def parse(row: Row, skipped: Counter[str] | None = None) -> dict[str, Any] | None:
    """A JSON line as an object; None for a line without content.

    Counts such lines in `skipped`, and byte order marks before a line, which cat leaves within a file.
    Raises ValueError that says why a line is no object.
    """
    if isinstance(row, dict):
        return row
    if isinstance(row, Refused):
        raise ValueError(row.reason)
    skipped = Counter() if skipped is None else skipped
    if row.isspace():
        # Asked first: nothing is smaller when packed.
        skipped[BLANK] += 1
        return None
    if orjson is not None:
        # Twice as fast, and stricter: the standard library decides about lines that it refuses.
        try:
            record = orjson.loads(row)
        except ValueError:
            record = None
        if isinstance(record, dict):
            return record
    line = row
    while line.startswith(MARK):
        line = line[len(MARK) :]
    skipped[MARKED] += len(line) < len(row)
    if not line.strip():
        skipped[BLANK] += 1
        return None
    # The standard library's limit is another one in each release of Python.
    if line.count(b"{") + line.count(b"[") > DEEPEST and _depth(line) > DEEPEST:
        raise ValueError(f"bad JSON: nested too deep, more than {DEEPEST} levels")
    limit = sys.getrecursionlimit()
    # It counts the calls around the library, too.
    sys.setrecursionlimit(limit + 2 * DEEPEST)
    try:
        record = _JSON.decode(line.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start}: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"bad JSON: {error}") from None
    finally:
        sys.setrecursionlimit(limit)
    if not isinstance(record, dict):
        raise ValueError(f"bad JSON: a {_kind(record)} where an object is expected")
    return record


# Not int, which refuses numbers of more than 4,300 digits.
_JSON = json.JSONDecoder(parse_int=float)
_BEFORE_VALUES = b",", b"[", b"{"
_STRUCTURE = np.isin(np.arange(256), list(b"{}[],"))
_LEVELS = np.array([(chr(byte) in "[{") - (chr(byte) in "]}") for byte in range(256)], np.int8)
"""What each byte adds to the depth."""
_AT_ONCE = 1 << 20


def _structure(line: bytes) -> bytes:
    """Brackets and commas of a line that are not within a text."""
    # Without escapes each quote begins or ends a text.
    line = line.replace(b"\\\\", b"").replace(b'\\"', b"")
    found, quotes = [], 0
    for at in range(0, len(line), _AT_ONCE):
        some = np.frombuffer(line[at : at + _AT_ONCE], np.uint8)
        within = np.cumsum(some == ord('"'), dtype=np.int64) + quotes
        found.append(some[(within % 2 == 0) & _STRUCTURE[some]].tobytes())
        quotes = int(within[-1])
    return b"".join(found)


def _depth(line: bytes) -> int:
    """Levels of nesting of a line."""
    levels = _LEVELS[np.frombuffer(_structure(line), np.uint8)]
    return int(np.cumsum(levels, dtype=np.int32).max(initial=0))


def _kind(value: Any) -> str:
    """The name of a value's type. Parsers differ in which numbers are int."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "number" if number else type(value).__name__


def check_keys(keys: Sequence[str]) -> None:
    """ValueError for keys of which a dataset each cannot be made, since file names hold them."""
    for key in keys:
        if not key or "/" in key or not key.isprintable() or len(key.encode()) > _KEY_BYTES:
            rule = f"it has 1 to {_KEY_BYTES} bytes, all printable, and no '/'; rename it in the input"
            raise ValueError(f"--json-keys {key!r}: file names hold the key, so {rule}")
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise ValueError(f"--json-keys: {twice[0]!r} is given twice; each key makes one dataset")


def text_of(record: dict[str, Any], key: str) -> tuple[str, bytes]:
    """The text under a key, and its UTF-8. Raises ValueError that says why there is none."""
    if key not in record:
        names = [shown(name) for name in islice(record, _KEYS_SHOWN)] or ["none"]
        raise ValueError(f"missing key {key!r}: there {'are' if len(names) > 1 else 'is'} {', '.join(names)}")
    text = record[key]
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"invalid UTF-8 at byte {error.start} of {key!r}: {error.reason}") from None
    if not isinstance(text, str):
        raise ValueError(f"non-string text: {key!r} is {_kind(text)}")
    if not text:
        raise ValueError(f"empty document: {key!r} is ''")
    try:
        return text, text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"invalid UTF-8: lone surrogate at character {error.start} of {key!r}") from None


def reject(path: str, line: int, reason: str, row: Row) -> dict[str, Any]:
    """The record of a row that became no document."""
    quoted = row.excerpt if isinstance(row, Refused) else row
    if isinstance(quoted, dict):
        quoted = shown(quoted).encode("utf-8", "backslashreplace")
    excerpt = quoted[:_EXCERPT].decode("utf-8", "backslashreplace").rstrip("\r\n")
    return {"file": path, "line": line, "reason": reason, "excerpt": excerpt}


def rows_of(table: Any) -> list[dict[str, Any]]:
    """The rows of an Arrow table or batch."""
    try:
        return table.to_pylist()
    except Exception:
        # One broken value must not reject its neighbours.
        columns = [_values(table.column(name)) for name in table.schema.names]
        return [dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: Any) -> list[Any]:
    """The values of a column: the bytes of texts; for values that Python cannot hold, the column's type."""
    texts = text_bytes(column)
    try:
        return (column if texts is None else texts).to_pylist()
    except Exception:
        return [column.type] * len(column)
