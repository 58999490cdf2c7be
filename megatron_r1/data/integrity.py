"""Whether a `.bin` still holds the bytes that were written: hashes of its stretches, and holes.

`PREFIX.side/hashes.npy` is written with each pair: uint64 [4 + stretches]. The first four words are the
SHA-256 of the .bin. Each other word is the XXH3-64 of a stretch of 4 KiB, in order. The last may be shorter.

A hole is a range that a file system holds no blocks for and reads as zeros. Interrupted copies leave holes. A
file system that compresses may make one where zeros were written, which the hash of the stretch then shows.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import xxhash

from megatron_r1.data.npy import read_array
from megatron_r1.records import Corpus
from megatron_r1.system.errors import rewording, some
from megatron_r1.system.files import sha256
from megatron_r1.system.terminal import say

REDO = "make the pair again with tools/preprocess_data.py, or copy it again from where it is whole"
_STRETCH = 4096
_SAMPLE = 1024
"""Stretches compared of a large .bin. Damage to 1 % of them is found with 99.99 %, to 0.1 % with 64 %."""
_WHOLE = 64 << 20
"""A .bin of up to so many bytes is compared completely."""
_AT_ONCE = 32
"""Stretches read at once: 128 KiB, which stay in the processor's cache."""
_HEAD = 4
_hash = xxhash.xxh3_64_intdigest
_ZEROS = _hash(bytes(_STRETCH))


class DamagedBinError(ValueError):
    """A .bin, or a file beside it, does not hold the bytes that were written."""


def side_file(prefix: str | Path, name: str) -> Path:
    """A file beside a pair that Megatron's tools do not know: they pass over folders."""
    return Path(f"{prefix}.side", name)


class BinHashes:
    """SHA-256 of a .bin, and the hash of each of its stretches, gathered while it is written."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._hashes = array("Q")
        self._rest = bytearray()

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def update(self, data: Any) -> None:
        """Add the next bytes: bytes, or a contiguous memoryview."""
        self._sha256.update(data)
        view = memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        if self._rest:
            missing = _STRETCH - len(self._rest)
            self._rest += view[:missing]
            view = view[missing:]
            if len(self._rest) < _STRETCH:
                return
            self._hashes.append(_hash(self._rest))
            self._rest.clear()
        whole = len(view) - len(view) % _STRETCH
        self._hashes.extend(_hashes(view[:whole]))
        self._rest += view[whole:]

    def update_from(self, path: Path) -> BinHashes:
        """Add the bytes of a file. Returns this object."""
        buffer = memoryview(bytearray(_AT_ONCE * _STRETCH))
        with open(path, "rb", buffering=0) as stream:
            while size := stream.readinto(buffer):
                self.update(buffer[:size])
        return self

    def words(self) -> np.ndarray:
        """The content of hashes.npy."""
        head, last = np.frombuffer(self._sha256.digest(), "<u8"), [_hash(self._rest)] if self._rest else []
        return np.concatenate([head, np.array(self._hashes, "<u8"), np.array(last, "<u8")])


def _hashes(view: memoryview) -> list[int]:
    return [_hash(view[at : at + _STRETCH]) for at in range(0, len(view), _STRETCH)]


def check_bin(
    prefix: str | Path, sidecar: Mapping[str, Any], share: tuple[int, int] = (0, 1), whole: bool = False
) -> str:
    """Compare this rank's share of a .bin with the stored hashes, and find holes.

    Compares every stretch up to 64 MiB, and 1,024 evenly spread ones of a larger .bin. A pair of an earlier
    version has no hashes of stretches: up to 64 MiB one rank compares the sidecar's SHA-256.

    share: (rank, ranks). whole: compare all, whatever the size. Returns the reason why damage may have gone
    unseen, or nothing. Raises DamagedBinError.
    """
    path, (part, parts) = Path(f"{prefix}.bin"), share
    stored, digest = read_hashes(prefix, sidecar), sidecar.get("bin_sha256")
    with open(path, "rb", buffering=0) as stream:
        number, status = stream.fileno(), os.fstat(stream.fileno())
        holes, whole = _holes(number, status.st_size), whole or status.st_size <= _WHOLE
        if stored is not None:
            _check_holes(path, holes or [], stored)
            count, at_once = (len(stored), _AT_ONCE) if whole else (_SAMPLE, 1)
            mine: Sequence[int] = range(count * part // parts, count * (part + 1) // parts)
            if not whole:
                mine = [n * (len(stored) - 1) // (_SAMPLE - 1) for n in mine]
            # The stretches at the ends of a hole are partly data.
            ends = [[n] for lo, hi in holes or () for n in (lo // _STRETCH, (hi - 1) // _STRETCH)]
            runs = [*(mine[i : i + at_once] for i in range(0, len(mine), at_once)), *ends]
            _compare(path, number, runs, stored)
            return "" if whole else _untold(holes, status)
    if digest is not None and whole:
        if _differs(path, digest, share):
            raise DamagedBinError(f"{path} is damaged: its SHA-256 is not that of {path.stem}.json; {REDO}")
        return ""
    reasons = "no hashes beside it", *(_hole(*hole) for hole in (holes or [])[:1]), _untold(holes, status)
    return "; ".join(filter(None, reasons))


def check_file(path: Path, sidecar: Mapping[str, Any], field: str, share: tuple[int, int] = (0, 1)) -> None:
    """Raise DamagedBinError where a file beside a .bin has not the SHA-256 in `field`, if that is there.

    One of the ranks of `share` reads the file.
    """
    if field in sidecar and _differs(path, sidecar[field], share):
        raise DamagedBinError(f"{path} is not the file that was written: its SHA-256 is another; {REDO}")


def _differs(path: Path, digest: str, share: tuple[int, int]) -> bool:
    return zlib.crc32(bytes(path)) % share[1] == share[0] and sha256(path) != digest


def read_hashes(prefix: str | Path, sidecar: Mapping[str, Any]) -> np.ndarray | None:
    """Hashes of a pair's stretches, [stretches] uint64, or None where there are none.

    Raises ValueError for a damaged file, and for one of another pair.
    """
    path, size = side_file(prefix, "hashes.npy"), os.stat(f"{prefix}.bin").st_size
    unlike = f"{path} is damaged, or of another pair"
    with suppress(FileNotFoundError), rewording(lambda why: f"{unlike}: {why}; {REDO}, with this folder"):
        words = read_array(path, np.uint64, (_HEAD - -size // _STRETCH,), "r")
        if sidecar.get("bin_sha256", whole_hash(words)) != whole_hash(words):
            raise ValueError(f"its SHA-256 is not that of {Path(prefix).name}.json")
        return words[_HEAD:]
    return None


def sample_hash(prefix: str | Path) -> str:
    """XXH3-128 of the stretches that `check_bin` looks at, for a pair whose sidecar has no hash."""
    digest, size = xxhash.xxh3_128(), os.stat(f"{prefix}.bin").st_size
    count = -(-size // _STRETCH)
    number = range(count) if size <= _WHOLE else [n * (count - 1) // (_SAMPLE - 1) for n in range(_SAMPLE)]
    with open(f"{prefix}.bin", "rb", buffering=0) as stream:
        for n in number:
            digest.update(os.pread(stream.fileno(), _STRETCH, n * _STRETCH))
    return digest.hexdigest()


def whole_hash(words: np.ndarray) -> str:
    """The SHA-256 of the .bin, by the content of hashes.npy."""
    return words[:_HEAD].tobytes().hex()


def _check_holes(path: Path, holes: Sequence[tuple[int, int]], stored: np.ndarray) -> None:
    """Raise where a stretch within a hole was not written as zeros."""
    for lo, hi in holes:
        first = -(-lo // _STRETCH)
        wrong = np.flatnonzero(stored[first : hi // _STRETCH] != _ZEROS)
        if len(wrong):
            _raise_damaged(path, first + int(wrong[0]), _hole(lo, hi))


def _compare(path: Path, number: int, runs: Sequence[Sequence[int]], stored: np.ndarray) -> None:
    """Compare stretches of an open file with the stored hashes. A run is read at once."""
    buffer, read = memoryview(bytearray(_AT_ONCE * _STRETCH)), array("Q")
    for run in runs:
        size = os.preadv(number, [buffer[: len(run) * _STRETCH]], run[0] * _STRETCH)
        read.extend(_hashes(buffer[:size]))
    which = list(itertools.chain(*runs))
    if len(read) != len(which):
        raise DamagedBinError(f"{path} has become shorter while it was read; {REDO}")
    wrong = np.flatnonzero(np.array(read, np.uint64) != stored[which])
    if len(wrong):
        _raise_damaged(path, which[wrong[0]], "these 4 KiB are not those that were written")


def _raise_damaged(path: Path, stretch: int, fault: str) -> NoReturn:
    raise DamagedBinError(f"{path} is damaged at offset {stretch * _STRETCH}: {fault}; {REDO}")


def _hole(lo: int, hi: int) -> str:
    return f"bytes {lo} to {hi - 1} are a hole, which reads as zeros"


def _holes(number: int, size: int) -> list[tuple[int, int]] | None:
    """Ranges without blocks of an open file, or None where the system cannot tell."""
    out, hi = [], 0
    try:
        while hi < size and (lo := os.lseek(number, hi, os.SEEK_HOLE)) < size:
            hi = size
            # ENXIO: no data behind the hole.
            with suppress(OSError):
                hi = os.lseek(number, lo, os.SEEK_DATA)
            out.append((lo, hi))
    except (OSError, AttributeError):
        return None
    return out


def _untold(holes: list[tuple[int, int]] | None, status: os.stat_result) -> str:
    """The reason why holes may have gone unseen, or nothing."""
    if holes is None:
        return "its file system cannot tell holes"
    if not holes and status.st_blocks * 512 < status.st_size - _STRETCH:
        return "its file system holds fewer bytes and names no hole: it compresses, or cannot tell holes"
    return ""


def say_unchecked(corpora: Iterable[Corpus]) -> None:
    """Name the pairs whose bytes could not all be compared, in one line."""
    doubts = [f"{corpus.prefix}.bin ({corpus.doubt})" for corpus in corpora if corpus.doubt]
    if doubts:
        say(f"unchecked, damage to these would not be seen: {some(doubts)}")
