"""Pickles, and the archives that torch puts them into, read as data.

Python's reader of pickles makes every object that a pickle names and calls what it says, so it runs whatever
code the maker of a file wants. This reader calls nothing. A class that genuine files name becomes a `Record`,
and every other name is refused. Its cost is bounded by the size of the file. No torch.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_r1.system.errors import shown

# Operation -> what it stands for: a value, the form of a number, the length of a tuple, the bytes of a length
# or of a place in the memo.
_VALUES: dict[int, Any] = {pickle.NONE[0]: None, pickle.NEWTRUE[0]: True, pickle.NEWFALSE[0]: False}
_VALUES[pickle.EMPTY_TUPLE[0]] = ()
_NUMBERS = {
    pickle.BININT1[0]: "<B",
    pickle.BININT2[0]: "<H",
    pickle.BININT[0]: "<i",
    pickle.BINFLOAT[0]: ">d",
}
_TUPLES = {pickle.TUPLE1[0]: 1, pickle.TUPLE2[0]: 2, pickle.TUPLE3[0]: 3}
_TEXTS = {pickle.SHORT_BINUNICODE[0]: 1, pickle.BINUNICODE[0]: 4}
_GETS = {pickle.BINGET[0]: 1, pickle.LONG_BINGET[0]: 4}
_PUTS = {pickle.BINPUT[0]: 1, pickle.LONG_BINPUT[0]: 4}
_SKIPPED = {pickle.PROTO[0]: 1, pickle.FRAME[0]: 8}
_MEMOIZE, _MARK, _EMPTY_DICT = pickle.MEMOIZE[0], pickle.MARK[0], pickle.EMPTY_DICT[0]


class Name(str):
    """A class or function that a pickle names."""


class Record:
    """What a pickle says of an object: its class, its arguments, its state."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: Any):
        self.name, self.args, self.state = name, args, None


_KEYS = (str, int, Record)
_LONGEST = 256
"""Characters of a module and a name."""


def read_pickle(content: bytes, names: Container[str]) -> Any:
    """The value of a pickle that names nothing but `names`, as torch and Python write them ("module.name").

    Raises ValueError for other names, and for operations that genuine files do without.
    """
    try:
        return _run(content, names)
    except (IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"it is no pickle of a checkpoint ({type(error).__name__})") from None


def _run(content: bytes, names: Container[str]) -> Any:
    """Behind the end of `content` the next operation is an IndexError."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    at = 0

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    while True:
        operation = content[at]
        at += 1
        if operation == _MEMOIZE:
            memo[len(memo)] = stack[-1]
        elif size := _GETS.get(operation):
            stack.append(memo[int.from_bytes(content[at : at + size], "little")])
            at += size
        elif form := _NUMBERS.get(operation):
            stack += struct.unpack_from(form, content, at)
            at += struct.calcsize(form)
        elif operation == _MARK:
            marks.append(len(stack))
        elif operation in _VALUES:
            stack.append(_VALUES[operation])
        elif operation in b"R\x81":
            args, name = stack.pop(), stack.pop()
            if type(name) is not Name or type(args) is not tuple:
                raise ValueError("it calls what is no class")
            stack.append(args[0] if name == "torch.Size" else Record(name, args))
        elif operation == pickle.BUILD[0]:
            state = stack.pop()
            if type(stack[-1]) is not Record:
                raise ValueError("it gives a state to what is no object")
            stack[-1].state = state
        elif operation == _EMPTY_DICT:
            stack.append({})
        elif operation in b"us":
            items = since_mark() if operation == b"u"[0] else [stack.pop(-2), stack.pop()]
            # The hash of tuples within tuples may take for ever.
            if type(stack[-1]) is not dict or any(type(key) not in _KEYS for key in items[::2]):
                raise ValueError("it has a key that is no name")
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif count := _TUPLES.get(operation):
            stack[-count:] = [tuple(stack[-count:])]
        elif operation == pickle.TUPLE[0]:
            stack.append(tuple(since_mark()))
        elif size := _TEXTS.get(operation):
            end = at + size + int.from_bytes(content[at : at + size], "little")
            stack.append(content[at + size : end].decode("utf-8", "surrogatepass"))
            at = end
        elif operation == pickle.EMPTY_LIST[0]:
            stack.append([])
        elif operation in b"ea":
            items = since_mark() if operation == b"e"[0] else [stack.pop()]
            if type(stack[-1]) is not list:
                raise ValueError("it adds to what is no list")
            stack[-1] += items
        elif operation in b"c\x93":
            if operation == b"c"[0]:
                module, name, _ = content[at : at + _LONGEST].decode("utf-8", "replace").split("\n", 2)
                at += len(f"{module}\n{name}\n".encode())
            else:
                name, module = stack.pop(), stack.pop()
            full = f"{module}.{name}" if type(module) is type(name) is str else ""
            if full not in names:
                raise ValueError(f"it names {shown(full)}, and may be made to run code")
            stack.append(Name(full))
        elif size := _PUTS.get(operation):
            memo[int.from_bytes(content[at : at + size], "little")] = stack[-1]
            at += size
        elif operation == pickle.BINPERSID[0]:
            stack.append(Record("storage", stack.pop()))
        elif operation == pickle.LONG1[0]:
            end = at + 1 + content[at]
            stack.append(int.from_bytes(content[at + 1 : end], "little", signed=True))
            at = end
        elif operation in _SKIPPED:
            at += _SKIPPED[operation]
        elif operation == pickle.STOP[0]:
            return stack.pop()
        else:
            raise ValueError(f"it has the operation {operation:#x}, which no checkpoint needs")


@dataclass(frozen=True)
class Span:
    """Bytes [start, start + length) of a file."""

    file: str
    start: int
    length: int


class _Part:
    """The bytes of a span as a file for `zipfile`."""

    def __init__(self, file: BinaryIO, span: Span):
        self._file, self._span, self._at = file, span, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._span.length)[whence])
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._span.length - self._at)
        self._file.seek(self._span.start + self._at)
        content = self._file.read(left if count < 0 else min(count, left))
        self._at += len(content)
        return content


def read_archive(file: BinaryIO, span: Span, names: Container[str]) -> tuple[Any, dict[str, Span]]:
    """The value of the pickle in one of torch's archives, and where its numbers lie: name -> bytes in `file`.

    Raises ValueError for what is no such archive. Nothing is unpacked: genuine ones are not compressed.
    """
    try:
        with zipfile.ZipFile(_Part(file, span)) as archive:  # type: ignore[arg-type]
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if any(entry.compress_type or entry.file_size > span.length for entry in entries.values()):
                raise ValueError("its archive is compressed")
            content = archive.read(entries["data.pkl"])
    except (zipfile.BadZipFile, KeyError, RuntimeError, EOFError, struct.error, NotImplementedError) as error:
        raise ValueError(f"it is no archive of a tensor ({type(error).__name__})") from None
    places = {}
    for name, entry in entries.items():
        if name.startswith("data/"):
            file.seek(span.start + entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            if entry.header_offset < 0 or start + entry.file_size > span.length:
                raise ValueError("its archive ends too early")
            places[name[5:]] = Span(span.file, span.start + start, entry.file_size)
    return read_pickle(content, names), places
