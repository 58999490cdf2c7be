"""Whether a `.bin` still holds the bytes that were written: hashes of its stretches, and holes.

`PREFIX.side/hashes.npy` is written with each pair: uint64 [4 + stretches]. The first four words are the
SHA-256 of the .bin. Each other word is the XXH3-64 of a stretch of 4 KiB, in order. The last may be shorter.

A hole is a range that a file system holds no blocks for and reads as zeros. Interrupted copies leave holes. A
file system that compresses may make one where zeros were written, which the hash of the stretch then shows.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_r1.records import Corpus
from megatron_r1.system.files import sha256
from megatron_r1.system.terminal import say

REDO = "make the pair again with tools/preprocess_data.py, or copy it again from where it is whole"
_STRETCH = 4096
_SAMPLE = 1024
"""Stretches compared of a large .bin. Damage to 1 % of them is found with 99.99 %, to 0.1 % with 64 %."""
_WHOLE = 64 << 20
"""A .bin of up to so many bytes is compared completely."""
_AT_ONCE = 64
"""Stretches read at once: 256 KiB, which stay in the processor's cache."""
_HEAD = 4
_hash = xxhash.xxh3_64_intdigest
_ZEROS = _hash(bytes(_STRETCH))


class DamagedBinError(ValueError):
    """A .bin does not hold the bytes that were written."""


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
        last = [_hash(self._rest)] if self._rest else []
        head = np.frombuffer(self._sha256.digest(), "<u8")
        return np.concatenate([head, np.array([*self._hashes, *last], "<u8")])


def _hashes(view: memoryview) -> list[int]:
    return [_hash(view[at : at + _STRETCH]) for at in range(0, len(view), _STRETCH)]


def check_bin(prefix: str | Path, sidecar: Mapping[str, Any], share: tuple[int, int]) -> str:
    """Compare this rank's share of a .bin with the stored hashes, and find holes.

    Compares every stretch up to 64 MiB, and 1,024 evenly spread ones of a larger .bin. A pair of an earlier
    version has no hashes of stretches: up to 64 MiB one rank compares the sidecar's SHA-256.

    share: (rank, ranks). Returns the reason why damage may have gone unseen, or nothing. Raises
    DamagedBinError.
    """
    path, (part, parts) = Path(f"{prefix}.bin"), share
    stored, digest = read_hashes(prefix, sidecar), sidecar.get("bin_sha256")
    with open(path, "rb", buffering=0) as stream:
        number, status = stream.fileno(), os.fstat(stream.fileno())
        holes = _holes(number, status.st_size)
        if stored is not None:
            count, inside = len(stored), []
            for lo, hi in holes or ():
                # The stretches at the ends are partly data, and are read.
                first, last = -(-lo // _STRETCH), hi // _STRETCH
                wrong = np.flatnonzero(stored[first:last] != _ZEROS)
                if len(wrong):
                    _raise_damaged(path, first + int(wrong[0]), _hole(lo, hi))
                inside += [lo // _STRETCH, (hi - 1) // _STRETCH]
            small = status.st_size <= _WHOLE
            which = np.arange(count) if small else np.arange(_SAMPLE) * (count - 1) // (_SAMPLE - 1)
            mine = which[len(which) * part // parts : len(which) * (part + 1) // parts]
            _compare(path, number, np.union1d(mine, np.array(inside, np.int64)), stored)
            return "" if small else _untold(holes, status)
    if digest is not None and status.st_size <= _WHOLE:
        if zlib.crc32(bytes(path)) % parts == part and sha256(path) != digest:
            raise DamagedBinError(f"{path} is damaged: its SHA-256 is not that of {path.stem}.json; {REDO}")
        return ""
    return "; ".join(
        ["no hashes beside it", *(_hole(*hole) for hole in (holes or [])[:1]), _untold(holes, status)]
    ).rstrip("; ")


def verify_bin(prefix: str | Path, sidecar: Mapping[str, Any]) -> str:
    """Compare every byte of a .bin with its hashes. Returns its SHA-256.

    Raises DamagedBinError, and ValueError for a pair without a hash.
    """
    path, stored = Path(f"{prefix}.bin"), read_hashes(prefix, sidecar)
    words = BinHashes().update_from(path).words()
    digest, written = hexdigest(words), sidecar.get("bin_sha256")
    if stored is not None:
        wrong = np.flatnonzero(words[_HEAD:] != stored)
        if len(wrong):
            _raise_damaged(path, int(wrong[0]), f"{len(wrong)} of {len(stored)} stretches of 4 KiB differ")
    elif written is None:
        raise ValueError(f"{path} cannot be verified: no hash beside it tells what was written")
    if written not in (None, digest):
        raise DamagedBinError(f"{path} is damaged: its SHA-256 is not that of {path.stem}.json; {REDO}")
    return digest


def read_hashes(prefix: str | Path, sidecar: Mapping[str, Any]) -> np.ndarray | None:
    """Hashes of a pair's stretches, [stretches] uint64, or None where there are none.

    Raises ValueError for a damaged file, and for one of another pair.
    """
    path, size = side_file(prefix, "hashes.npy"), os.stat(f"{prefix}.bin").st_size
    try:
        words = np.load(path, mmap_mode="r")
        mistake = "" if words.dtype == np.uint64 and words.ndim == 1 else f"it holds {words.dtype}"
    except FileNotFoundError:
        return None
    except (ValueError, EOFError) as error:
        mistake = str(error)
    if not mistake and len(words) != _HEAD - -size // _STRETCH:
        mistake = f"it has {len(words)} words, and {size} bytes of the .bin need {_HEAD - -size // _STRETCH}"
    if not mistake and sidecar.get("bin_sha256", hexdigest(words)) != hexdigest(words):
        mistake = f"its SHA-256 is not that of {Path(prefix).name}.json"
    if mistake:
        raise ValueError(
            f"{path} is damaged, or of another pair: {mistake}; {REDO}, with the folder {path.parent.name}"
        )
    return words[_HEAD:]


def hexdigest(words: np.ndarray) -> str:
    """The SHA-256 of the .bin that hashes.npy tells."""
    return words[:_HEAD].astype("<u8").tobytes().hex()


def _compare(path: Path, number: int, which: np.ndarray, stored: np.ndarray) -> None:
    """Compare these stretches, ascending, of an open file with the stored hashes."""
    buffer = memoryview(bytearray(_AT_ONCE * _STRETCH))
    for run in np.split(which, np.flatnonzero(np.diff(which) > 1) + 1) if len(which) else ():
        for lo in range(int(run[0]), int(run[-1]) + 1, _AT_ONCE):
            hi = min(lo + _AT_ONCE, int(run[-1]) + 1)
            size = os.preadv(number, [buffer[: (hi - lo) * _STRETCH]], lo * _STRETCH)
            read, expected = _hashes(buffer[:size]), stored[lo:hi].tolist()
            if read != expected:
                pairs = enumerate(zip(read, expected, strict=False))
                at = next((n for n, (ours, theirs) in pairs if ours != theirs), len(read))
                _raise_damaged(path, lo + at, "these 4 KiB are not those that were written")


def _raise_damaged(path: Path, stretch: int, fault: str) -> None:
    raise DamagedBinError(f"{path} is damaged at offset {stretch * _STRETCH}: {fault}; {REDO}")


def _hole(lo: int, hi: int) -> str:
    return f"bytes {lo} to {hi - 1} are a hole, which reads as zeros"


def _holes(number: int, size: int) -> list[tuple[int, int]] | None:
    """Ranges without blocks of an open file, or None where the system cannot tell."""
    out, at = [], 0
    try:
        while at < size and (lo := os.lseek(number, at, os.SEEK_HOLE)) < size:
            try:
                at = os.lseek(number, lo, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                at = size
            out.append((lo, at))
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
        more = f" and {len(doubts) - 12} more" if len(doubts) > 12 else ""
        say(f"unchecked, damage to these would not be seen: {', '.join(doubts[:12])}{more}")
