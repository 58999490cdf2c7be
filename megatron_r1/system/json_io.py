"""The one reader of JSON. Content of any size, depth or kind gives a value or one ValueError.

Python's own reader ends in a RecursionError for deep content, and reads a file of any size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_r1.system.errors import shown
from megatron_r1.system.files import regular

MOST_BYTES = 256 << 20
"""Bytes of a JSON text. The largest genuine ones are tokenizers, of about 30 MB."""
MOST_DEPTH = 64
"""Lists and mappings within one another. Genuine files have about ten."""


class JsonError(ValueError):
    """Text that is no JSON, or more than a file of ours or of a model holds, in one line with its name."""


def read_json(path: str | Path, most: int = MOST_BYTES) -> Any:
    """The value in a file of at most `most` bytes. Raises OSError, and JsonError for its content."""
    with open(path, "rb", opener=regular) as file:
        return parse_json(file.read(most + 1), str(path), most)


def read_object(path: str | Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """The mapping in a file; errors as of `read_json`."""
    value = read_json(path, most)
    if not isinstance(value, dict):
        raise JsonError(f"{path}: no JSON mapping, {{name: value}}")
    return value


def parse_json(content: bytes | str, name: str, most: int = MOST_BYTES) -> Any:
    """The value of a text. JsonError begins with `name`."""
    if len(content) > most:
        raise JsonError(f"{name}: more than {most:,} bytes of JSON")
    try:
        value = json.loads(content)
    except RecursionError:
        raise JsonError(f"{name}: nested deeper than {MOST_DEPTH}") from None
    except ValueError as error:
        raise JsonError(f"{name}: no JSON ({error})") from None
    # Most texts have too few brackets to be deep. Looking at each value takes as long as reading it.
    text = isinstance(content, str)
    brackets = (content.count(one) for one in (("[", "{") if text else (b"[", b"{")))  # type: ignore[arg-type]
    if sum(brackets) > MOST_DEPTH and any(depth > MOST_DEPTH for depth, _ in enumerate(_levels(value), 1)):
        raise JsonError(f"{name}: nested deeper than {MOST_DEPTH}")
    return value


_NESTED = frozenset((dict, list))


def _levels(value: Any) -> Iterator[list[Any]]:
    """The lists and mappings of each level, from the outermost on."""
    level = [value] if isinstance(value, (dict, list)) else []
    while level:
        yield level
        inside = chain.from_iterable([part.values() if type(part) is dict else part for part in level])
        level = [part for part in inside if part.__class__ in _NESTED]


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on that 63 bits hold."""
    return type(value) is int and 0 <= value < 2**63


def mistake(value: Any, kind: Any) -> str:
    """Where a value is not of a kind, as `.phases[0].start is 'x'`; empty where it is.

    A kind is a type, of which `float` takes whole numbers, too; a value that is meant itself; a tuple of
    kinds, of which any will do; [kind], a list; {str: kind}, a mapping; {"name": kind}, a mapping with at
    least these names, of which "name?" may be absent. Whole numbers are below 2^63.
    """
    if isinstance(kind, tuple):
        return min((mistake(value, one) for one in kind), key=len)
    if isinstance(kind, list) and isinstance(value, list):
        for number, item in enumerate(value):
            if wrong := mistake(item, kind[0]):
                return f"[{number}]{wrong}"
    elif isinstance(kind, dict) and isinstance(value, dict):
        every = str in kind
        if missing := [] if every else [name for name in kind if name[-1:] != "?" and name not in value]:
            return f" lacks {', '.join(missing)}"
        for name in value if every else kind:
            key = name if every else name.rstrip("?")
            if key in value and (wrong := mistake(value[key], kind[str if every else name])):
                return f".{key:.100}{wrong}"
    elif (kind not in (value, type(value)) and (kind, type(value)) != (float, int)) or (
        type(value) is int and abs(value) >= 2**63
    ):
        return f" is {shown(value)}"
    return ""
