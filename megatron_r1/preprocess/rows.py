"""A row becomes a text, or a fault says why it does not: JSON lines and rows of Arrow tables."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from megatron_r1.system.errors import require

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


def parse(row: bytes | dict[str, Any], skipped: Counter[str] | None = None) -> dict[str, Any] | None:
    """A JSON line as an object; None for a line without content.

    Counts such lines in `skipped`, and byte order marks before a line, which cat leaves within a file.
    Raises ValueError that says why a line is no object.
    """
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
    line = row
    while line.startswith(MARK):
        line = line[len(MARK) :]
    skipped = Counter() if skipped is None else skipped
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
_LEVEL = {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}


def _depth(row: bytes) -> int:
    """Levels of nesting of a line."""
    # Without escapes each quote begins or ends a string.
    outside = b"".join(row.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    return max(accumulate(_LEVEL[byte] for byte in re.sub(rb"[^][{}]", b"", outside)), default=0)


def _kind(value: Any) -> str:
    """The name of a value's type. Parsers differ in which numbers are int."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "number" if number else type(value).__name__


def check_keys(keys: Sequence[str]) -> None:
    """ValueError for keys of which a dataset each cannot be made, since file names hold them."""
    for key in keys:
        if not key or "/" in key or not key.isprintable() or len(key.encode()) > _KEY_BYTES:
            raise ValueError(
                f"--json-keys {key!r}: file names hold the key, so it has 1 to {_KEY_BYTES} bytes, all "
                f"printable, and no '/'; rename it in the input"
            )
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise ValueError(f"--json-keys: {twice[0]!r} is given twice; each key makes one dataset")


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
        raise ValueError(f"non-string text: {key!r} is {_kind(text)}")
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


def text_bytes(column: Any) -> Any:
    """A column of texts, however it is stored, as the bytes of each; None for a column of other values."""
    arrow, types = require("pyarrow", "reading a table"), require("pyarrow.types", "reading a table")
    if isinstance(column.type, arrow.BaseExtensionType):
        column = column.cast(column.type.storage_type)
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return column.cast(arrow.large_binary()) if texts else None
