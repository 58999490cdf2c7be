"""Small files that stand for a lot, each opened with little memory: `python -m tests.data.bombs FOLDER`.

Prints a line for each: its name, seconds, and how it ended.
"""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.data import hostile

ROOM = 100 << 20
"""Bytes of memory for all that a bomb makes."""


def header(descr: str, shape: str, version: int = 1, length: int | None = None) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = len(text) if length is None else length
    return b"\x93NUMPY" + bytes((version, 0)) + size.to_bytes(2 if version == 1 else 4, "little") + text


def archive(folder: Path, pack: int = zipfile.ZIP_STORED, extra: int = 0, **members: bytes) -> bytes:
    """The genuine mask with other members."""
    out = io.BytesIO()
    with zipfile.ZipFile(folder / "keep.npz") as genuine, zipfile.ZipFile(out, "w", pack) as made:
        for name in genuine.namelist():
            made.writestr(name, members.get(name.removesuffix(".npy"), genuine.read(name)))
        for number in range(extra):
            made.writestr(f"x{number}", b"")
    return out.getvalue()


def sparse(path: Path, start: bytes, size: int, end: bytes = b"") -> None:
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)
        file.seek(size - len(end))
        file.write(end)


def with_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def folder_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


def lie(content: bytes, size: int) -> bytes:
    """An archive whose second member claims another size than it has."""
    at = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)
    return content[: at + 24] + struct.pack("<I", size) + content[at + 28 :]


def encrypted(content: bytes) -> bytes:
    at = content.index(b"PK\x01\x02")
    return content[: at + 8] + b"\x01" + content[at + 9 :]


def bombs(folder: Path) -> dict[str, tuple[str, Callable[[Path], Any]]]:
    """Name -> the reader, and how its first file (or the path given) is replaced."""
    huge, wide_huge = "(1125899906842624,)", "(1125899906842624, 2)"
    wide = header("'<i8'", "(8000000, 2)") + bytes(128_000_000)
    scored = folder / "run/influence/step_00000004/web"

    def put(content: bytes) -> Callable[[Path], Any]:
        return lambda path: path.write_bytes(content)

    def other(place: str, change: Callable[[Path], Any]) -> Callable[[Path], Any]:
        return lambda _: change(folder / place)

    origin = "[('hash', '|u1', (16,)), ('file', '<u4'), ('line', '<u8')]"
    n = 3 * 10**8
    head, far = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, n, n + 1), b"MMIDIDX\0\0"
    far += struct.pack("<QBQQ", 1, 8, 2**60, 2**60 + 1)

    def hollow(start: bytes, size: int, end: bytes = b"") -> Callable[[Path], Any]:
        return lambda path: sparse(path, start, size, end)

    def planned(**parts: Any) -> Callable[[Path], Any]:
        return put(json.dumps({**plan, **parts}).encode())

    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    late = {**plan["phases"][0], "start": 2**61}
    out = {
        "mask: packed stretches": ("mask", put(archive(folder, zipfile.ZIP_DEFLATED, stretches=wide))),
        "mask: packed windows": ("mask", put(archive(folder, zipfile.ZIP_DEFLATED, windows=wide))),
        "mask: packed by bzip2": ("mask", put(archive(folder, zipfile.ZIP_BZIP2))),
        "mask: windows of 2^50": ("mask", put(archive(folder, windows=header("'|u1'", huge)))),
        "mask: stretches of 2^50": ("mask", put(archive(folder, stretches=header("'<i8'", wide_huge)))),
        "mask: count of 2^50": ("mask", put(archive(folder, count=header("'<i8'", huge)))),
        "mask: text of 2^30": ("mask", put(archive(folder, corpus=header("'<U1073741824'", "()")))),
        "mask: objects": ("mask", put(archive(folder, count=header("'|O'", "()") + b"\x80\x04."))),
        "mask: 100,000 members": ("mask", put(archive(folder, extra=100_000))),
        "mask: a size that lies": ("mask", put(lie((folder / "keep.npz").read_bytes(), 2**32 - 2))),
        "mask: encrypted": ("mask", put(encrypted((folder / "keep.npz").read_bytes()))),
        "mask: sparse": ("mask", hollow(b"PK\x03\x04", 1 << 42)),
        "mask: header of 4 GB": ("plain mask", put(header("'|u1'", "(9,)", 2, 2**32 - 1))),
        "mask: of 2^50": ("plain mask", put(header("'|b1'", huge))),
        "mask: sparse, plain": ("plain mask", hollow(header("'|b1'", "(4398046511022,)"), 1 << 42)),
        "hashes of 2^50": ("pair", other("web.side/hashes.npy", put(header("'<u8'", huge)))),
        "origins of 2^50": ("origins", put(header(origin, huge))),
        "scores of 2^50": ("scores", put(header("'<f4'", wide_huge))),
        "examples, sparse": (
            "scores",
            other(f"{scored}/examples.npy", hollow(header("'<i8'", "(549755813888,)"), 1 << 42)),
        ),
        "manifest, deep": ("manifest", put(b'{"x":' * 100_000)),
        "manifest of lists": ("manifest", put(b"[" + b"[]," * (7 << 20) + b"[]]")),
        "manifest, sparse": ("manifest", hollow(b"[", 1 << 42)),
        "sidecar, sparse": ("sidecar", hollow(b"[", 1 << 42)),
        "index of 2^60": ("pair", put(far)),
        "index, sparse": ("pair", hollow(head, 34 + 20 * n + 8, struct.pack("<q", n))),
        "plan that begins late": ("plan", planned(order="megatron", phases=[*plan["phases"][:1], late])),
        "plan of many phases": ("plan", planned(phases=[{**late, "start": k} for k in range(50_000)])),
        "plan, deep": ("plan", put(b'{"x":' * 100_000)),
    }
    for place in ("web.bin", "web.idx", "web.json", "web.side/hashes.npy"):
        for change in (with_pipe, endless, folder_of):
            out[f"{place} {change.__name__}"] = "pair", other(place, change)
    for kind in ("origins", "mask", "plain mask", "scores", "manifest"):
        for change in (with_pipe, endless, folder_of):
            out[f"{kind} {change.__name__}"] = kind, change
    return out


def main(folder: Path) -> None:
    files = hostile.make(folder)
    for _, read in files.values():
        read()
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    made = bombs(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for name, (kind, change) in made.items():
        paths, read = files[kind]
        change(paths[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
        start, end = time.monotonic(), "read"
        try:
            read()
        except (ValueError, OSError) as error:
            end = f"refused: {error}"
        except BaseException as error:
            end = f"{error!r}"
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(f"{name} | {time.monotonic() - start:.2f} | {end:.2000}", flush=True)
        for path, content in kept.items():
            if path.is_symlink() or not path.is_file():
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            if not path.exists() or path.stat().st_size != len(content) or path in paths:
                path.write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
