"""Keep masks (Eq. 6): the windows of a source that may be drawn, and the labels in them that count.

A mask over windows is a `.npy` file: bool [windows], or packed to uint8 [ceil(windows / 8)] with window 0 in
the lowest bit. A mask over documents is a `.npz` file that `save_documents` writes, for one sequence length:

    windows      uint8 [ceil(windows / 8)]: windows with at least one label in a kept document
    stretches    int64 [n, 2]: the kept documents as tokens [begin, end), ascending, neighbours joined
    seq_length   int64
    count        int64: windows
    corpus       text: `indexed.identity_of` of the pair

A dropped document's tokens carry no loss wherever a window that is drawn crosses it, and a window that
has no label left is never drawn. Window w's labels are tokens wS + 1 to wS + S.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1._csrc import Keep
from megatron_r1.data.indexed import document_starts, identity_of
from megatron_r1.data.npy import MOST_HEADER, read_stream, require_memory
from megatron_r1.records import Corpus
from megatron_r1.system.errors import rewording, shown
from megatron_r1.system.files import regular, replacing

Mask = np.ndarray | str | Path
"""A mask over windows in memory, or the path of either kind of file."""
_MEMBERS = ("windows", "stretches", "seq_length", "count", "corpus")
_MOST_MEMBERS = 64
_UNPACKED = 16 << 20
"""Bytes that a member may unpack to; more where it is stored as it is, as `save_documents` does."""


@dataclass(frozen=True)
class KeptWindows:
    """A keep mask and where it came from."""

    bitmap: Any
    packed: np.ndarray
    """The same as uint8 [ceil(windows / 8)], window 0 in the lowest bit."""
    sha256: str
    path: str | None
    stretch_N2: np.ndarray | None = None
    """Of a mask over documents: tokens whose labels count, int64 [n, 2], begin and end."""
    seq_length: int | None = None
    corpus: str | None = None
    """Of a mask over documents: what it was made for."""


def load_mask(name: str, windows: int, mask: Mask) -> KeptWindows:
    """Read and check the mask of a source that has so many windows. Raises ValueError, OSError."""
    path = None if isinstance(mask, np.ndarray) else str(mask)
    where = f"keep mask of '{name}'" + (f" ({path})" if path else "")
    seq_length: Any = None
    stretch_N2 = corpus = archive = None
    size = (windows + 7) // 8
    try:
        if isinstance(mask, np.ndarray):
            bits = mask
        elif (content := _load(name, Path(mask), windows))[:2] == b"PK":
            archive = _Archive(content)
            seq_length, count = (archive.read(of, np.int64, ()).item() for of in ("seq_length", "count"))
            corpus = archive.read("corpus", str, ()).item()
            where += f", for {count} windows of {seq_length} tokens,"
        else:
            bits = read_stream(io.BytesIO(content), len(content), (bool, (windows,)), (np.uint8, (size,)))
    except OSError:
        raise
    except Exception as error:  # zipfile names none: BadZipFile, zlib.error, RuntimeError and others
        raise ValueError(
            f"{where} cannot be read ({error!s:.200}; the source has {windows} windows); make it with "
            f"np.save from a bool array over windows, or with megatron_r1.data.keep.save_documents"
        ) from None
    if archive is not None:
        if count != windows:
            raise ValueError(f"{where} does not fit: the source has {windows} windows; make the mask again")
        with rewording(lambda error: f"{where} is damaged: {error!s:.200}; make it again", Exception):
            bits = archive.read("windows", np.uint8, (size,))
            stretch_N2 = archive.read("stretches", np.int64, (None, 2))
            _check_stretches(stretch_N2, bits, windows, seq_length)
    if bits.dtype == np.bool_ and bits.shape == (windows,):
        packed = np.packbits(bits, bitorder="little")
    elif bits.dtype == np.uint8 and bits.shape == (size,):
        packed = bits.copy()
        if windows % 8:
            packed[-1] &= (1 << windows % 8) - 1
    else:
        way_out = f"the source has {windows} windows, so use bool [{windows}] or packed uint8 [{size}]"
        raise ValueError(f"{where} is {bits.dtype} {list(bits.shape)}; {way_out}")
    stretches = b"" if stretch_N2 is None else stretch_N2.tobytes()
    digest = hashlib.sha256(windows.to_bytes(8, "little") + packed.tobytes() + stretches).hexdigest()
    return KeptWindows(Keep(windows, packed), packed, digest, path, stretch_N2, seq_length, corpus)


def _load(name: str, path: Path, windows: int) -> bytes:
    """The content of a mask's file. Raises ValueError where its name, SOURCE-HASH, is not true, and for
    more bytes than such a mask has."""
    with open(path, "rb", opener=regular) as stream:
        size = os.fstat(stream.fileno()).st_size
        if stream.peek(2)[:2] == b"PK":
            require_memory(size)
        elif size > windows + 2 * MOST_HEADER:
            raise ValueError(f"it has {size:,} bytes, which is more than a truth value for each window")
        content = stream.read(size)
    named = re.fullmatch(r"(.+)-([0-9a-f]{16})\.np[yz]", path.name)
    if named and hashlib.sha256(content).hexdigest()[:16] != named[2]:
        raise ValueError("damaged: its name holds another hash")
    if named and named[1] != name:
        raise ValueError(f"its name says that it was made for '{named[1]}'")
    return content


class _Archive:
    """The arrays of a mask over documents. Nothing is unpacked before its size is known."""

    def __init__(self, content: bytes):
        # Each record in an archive's list takes some hundred bytes of memory.
        if content.count(b"PK\x01\x02") > _MOST_MEMBERS:
            raise ValueError(f"it has more members than {', '.join(_MEMBERS)}")
        self._zip, self._most = zipfile.ZipFile(io.BytesIO(content)), max(len(content), _UNPACKED)
        if sorted(names := self._zip.namelist()) != sorted(f"{name}.npy" for name in _MEMBERS):
            raise ValueError(f"its members are {shown(names)}, not {', '.join(_MEMBERS)}")

    def read(self, name: str, dtype: Any, shape: tuple[int | None, ...]) -> np.ndarray:
        member = self._zip.getinfo(f"{name}.npy")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is packed in another way than NumPy packs")
        if member.file_size > self._most:
            raise ValueError(f"{name} would unpack to {member.file_size:,} bytes; store it as np.savez does")
        with self._zip.open(member) as stream:
            return read_stream(stream, member.file_size, (dtype, shape))


def _check_stretches(stretch_N2: np.ndarray, bits: np.ndarray, windows: int, seq_length: int) -> None:
    """Raise ValueError where stretches do not lie apart, in order and in the source, and where the windows
    with a label in them are not those of the mask."""
    end_M = stretch_N2.ravel()
    if seq_length < 1 or (len(end_M) and not 0 <= end_M.min() <= end_M.max() <= (windows + 1) * seq_length):
        raise ValueError(f"its stretches are not of tokens of {windows} windows")
    if not (end_M[1:] > end_M[:-1]).all():
        raise ValueError("its stretches do not ascend, each apart from the one before")
    kept = np.packbits(kept_windows(stretch_N2, windows, seq_length), bitorder="little")
    if not np.array_equal(kept, bits):
        raise ValueError("its windows are not those of its stretches")


def require_made_for(mask: KeptWindows, prefix: str | Path, seq_length: int) -> None:
    """Raise ValueError for a mask over documents that was made for another pair, or another length."""
    other = ""
    if mask.seq_length not in (None, seq_length):
        other = f"windows of {mask.seq_length} tokens, not data.seq_length={seq_length}"
    elif mask.corpus is not None and mask.corpus != identity_of(prefix):
        other = f"another dataset than {prefix}"
    if other:
        raise ValueError(f"{mask.path} was made for {other}; make it again")


def save_documents(path: str | Path, corpus: Corpus, kept_D: np.ndarray, seq_length: int) -> None:
    """Write the mask that keeps these documents of a corpus, for `PhaseConfig.keep`: `documents_mask`."""
    if Path(path).suffix != ".npz":
        raise ValueError(f"{path}: a mask over documents is a .npz file; name it so")
    content = documents_mask(corpus, kept_D, seq_length)
    with replacing(path) as stream:
        stream.write(content)


def documents_mask(corpus: Corpus, kept_D: np.ndarray, seq_length: int) -> bytes:
    """The file of the mask that keeps these documents of a corpus, bool [documents].

    ValueError where `kept_D` is not over the corpus's documents, or leaves no label to train on.
    """
    if kept_D.dtype != np.bool_ or kept_D.shape != (corpus.documents,):
        kinds = f"bool [{corpus.documents}], not {kept_D.dtype} {list(kept_D.shape)}"
        raise ValueError(
            f"source '{corpus.name}' has {corpus.documents} documents, so kept_D must be {kinds}"
        )
    stretch_N2 = kept_stretches(corpus, kept_D)
    windows = kept_windows(stretch_N2, corpus.windows(seq_length), seq_length)
    if not windows.any():
        raise ValueError(
            f"the mask of source '{corpus.name}' leaves no label within its windows of {seq_length} tokens; "
            f"give the source weight 0 instead"
        )
    return mask_file(corpus, windows, stretch_N2, seq_length)


def mask_file(corpus: Corpus, windows: np.ndarray, stretch_N2: np.ndarray | None, seq_length: int) -> bytes:
    """The bytes of a mask's file: `.npz` of one over documents, whose stretches are given, else `.npy`."""
    packed = np.packbits(windows, bitorder="little")
    # An archive goes back to its headers, which a file that only grows does not allow.
    stream = io.BytesIO()
    if stretch_N2 is None:
        np.save(stream, packed)
    else:
        made_for: dict[str, Any] = {"seq_length": np.int64(seq_length), "count": np.int64(len(windows))}
        made_for["corpus"] = np.array(identity_of(corpus.prefix))
        np.savez(stream, windows=packed, stretches=stretch_N2, **made_for)
    return stream.getvalue()


def kept_stretches(corpus: Corpus, kept_D: np.ndarray) -> np.ndarray:
    """The kept documents as tokens [begin, end) of the stream, int64 [n, 2], neighbours joined."""
    start_D = document_starts(corpus)
    # A document without tokens is neither kept nor dropped.
    kept_D, start_D = kept_D[np.diff(start_D) > 0], np.unique(start_D)
    turn = np.flatnonzero(np.diff(np.concatenate(([False], kept_D, [False])).astype(np.int8)))
    return start_D[turn].reshape(-1, 2)


def kept_windows(stretch_N2: np.ndarray, windows: int, seq_length: int) -> np.ndarray:
    """Windows that have a label in a stretch: bool [windows]. Token t is a label of window (t - 1) // S.

    The stretches ascend.
    """
    begin_N, end_N = np.maximum(stretch_N2[:, 0], 1), stretch_N2[:, 1]
    has_label = begin_N < end_N
    first_N, last_N = (begin_N[has_label] - 1) // seq_length, (end_N[has_label] - 2) // seq_length
    # Runs of windows, neighbours joined, so that a turn into and out of a run has a place of its own.
    apart = first_N[1:] > last_N[:-1] + 1
    into, out = first_N[np.append(True, apart)[: len(first_N)]], last_N[np.append(apart, True)[: len(last_N)]]
    turn = np.zeros(windows + 1, np.int8)
    turn[np.minimum(into, windows)], turn[np.minimum(out + 1, windows)] = 1, -1
    return np.cumsum(turn[:windows], dtype=np.int8) > 0


def mask_labels(stretch_N2: np.ndarray, window: int, mask_S: np.ndarray) -> None:
    """Fill a row of the loss mask: 1 where the label lies in a stretch, 0 elsewhere."""
    first = window * len(mask_S) + 1
    lo = int(np.searchsorted(stretch_N2[:, 1], first, side="right"))
    hi = int(np.searchsorted(stretch_N2[:, 0], first + len(mask_S), side="left"))
    mask_S[:] = 0
    for begin, end in (stretch_N2[lo:hi] - first).tolist():
        mask_S[max(begin, 0) : end] = 1
