"""Pickles, and the archives that torch puts them into, read as data.

Python's reader of pickles makes every object that a pickle names and calls what it says, so it runs whatever
code the maker of a file wants. This reader calls nothing. A class that genuine files name becomes a `Record`,
and every other name is refused. Its cost is bounded by the size of the file: one byte may stand for an object
of 100, so that a third as many objects as bytes are read.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

from megatron_r1.system.errors import shown

ERRORS = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, AssertionError),
    *(RuntimeError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError),
)
"""What reading a damaged or crafted file may end in."""


class Name(str):
    """A class or function that a pickle names."""


class Record:
    """What a pickle says of an object: its class, its arguments, its state."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: Any):
        self.name, self.args, self.state = name, args, None


_MACHINE: Any = pickle._Unpickler  # type: ignore[attr-defined]
"""Python's own in Python, whose operations can be left out."""


_MAKING = b"]})(\x85\x86\x87t\x94qrR\x81"
"""Operations that make or keep an object by a byte or two. In genuine files 4 to 5 bytes come to each."""
_SOME = 1000
"""As many are read of a pickle of any size."""
_MOST_BESIDE = 4 << 20
"""Bytes of the pickle in an archive. Genuine ones have 10 kB."""


def _counted(operation: Any) -> Any:
    def run(reader: _Reader) -> None:
        reader.left -= 1
        if reader.left < 0:
            raise ValueError("it holds more objects than one of its size")
        operation(reader)

    return run


class _Reader(_MACHINE):  # type: ignore[misc]
    # PROTO, FRAME, STOP, MARK, NONE, True, False, integers and a float, texts, tuples, lists, a dictionary,
    # the memo, names, persistent names. Of the rest, genuine files need those below.
    dispatch: ClassVar = {
        code: _MACHINE.dispatch[code]
        for code in b"\x80\x95.(N\x88\x89JKM\x8aG\x8cX)t\x85\x86\x87]ae}hjqr\x94c\x93Q"
    }

    def __init__(self, content: bytes, names: Container[str]):
        super().__init__(io.BytesIO(content))
        self._names = names
        self.left = _SOME + len(content) // 3
        """Objects that may still be made."""

    def find_class(self, module: str, name: str) -> Name:
        if (full := f"{module}.{name}") not in self._names:
            raise ValueError(f"it names {shown(full)}, and may be made to run code")
        return Name(full)

    def persistent_load(self, pid: Any) -> Record:
        return Record("storage", pid)

    def _make(self) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(args) is not tuple:
            raise ValueError("it calls what is no class")
        self.append(args[0] if name == "torch.Size" else Record(name, args))

    def _build(self) -> None:
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is not Record:
            raise ValueError("it gives a state to what is no object")
        record.state = state

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_items(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        # The hash of tuples within tuples may take for ever.
        if type(self.stack[-1]) is not dict or any(type(key) not in (str, int, Record) for key in items[::2]):
            raise ValueError("it has a key that is no name")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    dispatch |= zip(b"R\x81bsu", (_make, _make, _build, _set_item, _set_items), strict=True)


_Reader.dispatch |= {code: _counted(_Reader.dispatch[code]) for code in _MAKING}


def read_pickle(content: bytes, names: Container[str]) -> Any:
    """The value of a pickle that names nothing but `names`, as torch and Python write them ("module.name").

    Raises ValueError for other names, and some `ERRORS` for operations that genuine files do without.
    """
    return _Reader(content, names).load()


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

    Raises some `ERRORS` for what is no such archive. Nothing is unpacked: genuine ones are not compressed.
    """
    with zipfile.ZipFile(_Part(file, span)) as archive:  # type: ignore[arg-type]
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        if any(entry.compress_type or entry.file_size > span.length for entry in entries.values()):
            raise ValueError("its archive is compressed")
        if entries["data.pkl"].file_size > _MOST_BESIDE:
            raise ValueError("its pickle is too long")
        content = archive.read(entries["data.pkl"])
    places = {}
    for name, entry in entries.items():
        if name.startswith("data/"):
            file.seek(span.start + entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            if entry.header_offset < 0 or start + entry.file_size > span.length:
                raise ValueError("its archive ends too early")
            places[name[5:]] = Span(span.file, span.start + start, entry.file_size)
    return read_pickle(content, names), places
