"""Files that appear whole: a crash leaves the old file or the new one, never a half."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_r1.system.errors import shown
from megatron_r1.system.terminal import is_first_rank, say


def ours(path: str, flags: int) -> int:
    """Opener of files that we write, as `open(path, "ab", opener=ours)`: the file of this name and no other.

    Whoever may write in a folder that is shared can lay a link to another file of ours under a name that we
    use, or a pipe that never answers. OSError in one line for a link, of either kind, a folder, a pipe or a
    device. A file that is there is truncated only after that.
    """
    what = ""
    try:
        # Without O_NONBLOCK the opening of a pipe waits for its other end.
        descriptor = os.open(path, flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        kinds = {errno.ELOOP: "a link", errno.EISDIR: "a folder", errno.ENXIO: "a pipe or a device"}
        if error.errno not in kinds:
            raise
        what = kinds[error.errno]
    else:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            what = "a pipe or a device"
        elif status.st_nlink > 1:
            what = "another name (a hard link) of a file"
        elif flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
        if what:
            os.close(descriptor)
    if what:
        raise OSError(f"{path} is {what}, where a file of our own is written; move it away")
    return descriptor


def regular(path: str, flags: int) -> int:
    """Opener of foreign files, as `open(path, "rb", opener=regular)`: OSError for a pipe, which may never
    answer, and for a device, which may never end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file, but a folder, a pipe or a device")
    return descriptor


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there. OSError names a file in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        raise OSError(f"{folder} cannot be made, because {there} is no folder; name another") from None


def open_exclusive(path: Path, waiting: Callable[[], None] = lambda: None) -> IO[bytes]:
    """Open an empty file to write, once no other process has it so; `waiting` is called before a wait.

    A process that is killed, or whose parent was and that still runs, thus never shares a file with its
    successor. The lock ends with the stream. File systems without locks do without. Errors as of `ours`.
    """
    make_folder(path.parent)
    while True:
        stream = open(path, "ab", buffering=1 << 20, opener=ours)  # noqa: SIM115
        try:
            with naming(path):
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
            if os.path.samestat(os.lstat(path), os.fstat(stream.fileno())):
                stream.truncate(0)
                return stream
        stream.close()


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name only when the block ends well; on any error nothing is left.

    Two writers of one file take turns. OSError for a full disk names the file.
    """
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        raise OSError(f"{path} is a folder, where a file is written; name another, or move it away")
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


_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a failed write or read the name of its file, which the system's error does not carry."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _WRITING:
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


_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EISDIR, errno.EACCES, errno.EPERM)
"""Errors of file systems, and of folders that nobody may list, that flush no folders."""
_told: list[Path] = []


def sync(path: Path) -> None:
    """Flush a file or a directory entry to the disk. OSError names it.

    A folder that cannot be flushed is told once a launch: what lies in it is whole all the same.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with naming(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_FLUSH:
            raise
        if not _told and is_first_rank():
            _told.append(path)
            risk = "a power cut may undo names in folders"
            say(f"warning: {path} cannot be flushed ({error.strerror}); {risk}")


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
