"""Files that appear whole: a crash leaves the old file or the new one, never a half."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_r1.system.errors import shown


def open_exclusive(path: Path, waiting: Callable[[], None] = lambda: None) -> IO[bytes]:
    """Open an empty file to write, once no other process has it so; `waiting` is called before a wait.

    A process that is killed, or whose parent was and that still runs, thus never shares a file with its
    successor. The lock ends with the stream. File systems without locks do without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        stream = open(path, "ab", buffering=1 << 20)  # noqa: SIM115
        try:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                stream.close()
                raise
        # By the time of the lock its holder may have renamed or removed the file: then the name is free.
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(stream.fileno()).st_ino:
                stream.truncate(0)
                return stream
        stream.close()


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name only when the block ends well; on any error nothing is left.

    Two writers of one file take turns. OSError for a full disk names the file.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    stream = open_exclusive(partial)
    try:
        with naming(path):
            yield stream
            on_disk(stream)
        os.replace(partial, path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        # On a full disk flushing the buffer fails, too; the first error is the one that is raised.
        with suppress(OSError):
            stream.close()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a failed write the name of its file, which the system's error does not carry."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_text(path: str | Path, text: str) -> None:
    """Replace a file's contents, whole or not at all."""
    with replacing(path) as stream:
        stream.write(text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Replace a file's contents by indented JSON."""
    with replacing(path) as stream:
        stream.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that a failed write has left without a file."""
    with suppress(OSError):
        folder.rmdir()


def on_disk(stream: IO[bytes]) -> None:
    """Everything written to an open file reaches the disk, or it raises."""
    stream.flush()
    os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain_name(name: Any) -> bool:
    """Whether a name that stands in a file is one of a file in the same folder: one part of a path."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\0"}


def beside(described: Path, name: Any) -> Path:
    """The file `name` in the folder of `described`, a file that names it.

    Raises ValueError for a name that could lead out of the folder.
    """
    if not plain_name(name):
        raise ValueError(f"{described} names {shown(name)}, which is no name of a file in its own folder")
    return described.with_name(name)


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
