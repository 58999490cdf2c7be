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
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1._csrc import Keep
from megatron_r1.data.indexed import document_starts, identity_of
from megatron_r1.records import Corpus
from megatron_r1.system.files import replacing

Mask = np.ndarray | str | Path
"""A mask over windows in memory, or the path of either kind of file."""


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
    """Read and check the mask of a source that has so many windows. Raises ValueError, FileNotFoundError."""
    path = None if isinstance(mask, np.ndarray) else str(mask)
    where = f"keep mask of '{name}'" + (f" ({path})" if path else "")
    stretch_N2 = seq_length = corpus = None
    count = windows
    try:
        bits = mask if isinstance(mask, np.ndarray) else _load(name, Path(mask))
        if not isinstance(bits, np.ndarray):
            with bits as archive:
                bits, stretch_N2 = archive["windows"], archive["stretches"]
                seq_length, count = int(archive["seq_length"]), int(archive["count"])
                corpus = str(archive["corpus"])
                where += f", for {count} windows of {seq_length} tokens,"
    except (ValueError, TypeError, KeyError, EOFError, OverflowError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{where} cannot be read ({error}); make it with np.save from a bool array over windows, or "
            f"with megatron_r1.data.keep.save_documents"
        ) from None
    if count != windows:
        raise ValueError(f"{where} does not fit: the source has {windows} windows; make the mask again")
    if bits.dtype == np.bool_ and bits.shape == (windows,):
        packed = np.packbits(bits, bitorder="little")
    elif bits.dtype == np.uint8 and bits.shape == ((windows + 7) // 8,):
        packed = bits.copy()
        if windows % 8:
            packed[-1] &= (1 << windows % 8) - 1
    else:
        raise ValueError(
            f"{where} is {bits.dtype} {list(bits.shape)}; the source has {windows} windows, so use bool "
            f"[{windows}] or packed uint8 [{(windows + 7) // 8}]"
        )
    if stretch_N2 is not None and seq_length and not _agrees(stretch_N2, packed, windows, seq_length):
        raise ValueError(f"{where} is damaged: its windows are not those of its stretches; make it again")
    digest = hashlib.sha256(windows.to_bytes(8, "little") + packed.tobytes())
    if stretch_N2 is not None:
        digest.update(stretch_N2.tobytes())
    bitmap = Keep(windows, packed)
    return KeptWindows(bitmap, packed, digest.hexdigest(), path, stretch_N2, seq_length, corpus)


def _load(name: str, path: Path) -> Any:
    """The content of a mask's file. Raises ValueError where its name, SOURCE-HASH, is not true."""
    content, named = path.read_bytes(), re.fullmatch(r"(.+)-([0-9a-f]{16})\.np[yz]", path.name)
    if named and hashlib.sha256(content).hexdigest()[:16] != named[2]:
        raise ValueError("damaged: its name holds another hash")
    if named and named[1] != name:
        raise ValueError(f"its name says that it was made for '{named[1]}'")
    return np.load(io.BytesIO(content), allow_pickle=False)


def _agrees(stretch_N2: np.ndarray, packed: np.ndarray, windows: int, seq_length: int) -> bool:
    """Whether the stretches ascend, and the windows with a label in them are the windows of a mask."""
    if stretch_N2.dtype != np.int64 or stretch_N2.shape[1:] != (2,):
        return False
    ascending = (np.diff(stretch_N2.ravel(), prepend=0) >= 0).all()
    bits = np.packbits(kept_windows(stretch_N2, windows, seq_length), bitorder="little")
    return bool(ascending) and np.array_equal(bits, packed)


def save_documents(path: str | Path, corpus: Corpus, kept_D: np.ndarray, seq_length: int) -> None:
    """Write the mask that keeps these documents of a corpus, bool [documents], for `PhaseConfig.keep`.

    ValueError where `kept_D` is not over the corpus's documents, or leaves no label to train on.
    """
    if kept_D.dtype != np.bool_ or kept_D.shape != (corpus.documents,):
        raise ValueError(
            f"source '{corpus.name}' has {corpus.documents} documents, so kept_D must be bool "
            f"[{corpus.documents}], not {kept_D.dtype} {list(kept_D.shape)}"
        )
    stretch_N2 = kept_stretches(corpus, kept_D)
    windows = kept_windows(stretch_N2, corpus.windows(seq_length), seq_length)
    if not windows.any():
        raise ValueError(
            f"the mask of source '{corpus.name}' leaves no label within its windows of {seq_length} tokens; "
            f"give the source weight 0 instead"
        )
    if Path(path).suffix != ".npz":
        raise ValueError(f"{path}: a mask over documents is a .npz file; name it so")
    with replacing(path) as stream:
        stream.write(mask_file(corpus, windows, stretch_N2, seq_length))


def mask_file(corpus: Corpus, windows: np.ndarray, stretch_N2: np.ndarray | None, seq_length: int) -> bytes:
    """The bytes of a mask's file: `.npz` of one over documents, whose stretches are given, else `.npy`."""
    packed = np.packbits(windows, bitorder="little")
    # An archive goes back to its headers, which a file that only grows does not allow.
    stream = io.BytesIO()
    if stretch_N2 is None:
        np.save(stream, packed)
    else:
        length, count = np.int64(seq_length), np.int64(len(windows))
        made_for = np.array(identity_of(corpus.prefix))
        np.savez(
            stream, windows=packed, stretches=stretch_N2, seq_length=length, count=count, corpus=made_for
        )
    return stream.getvalue()


def kept_stretches(corpus: Corpus, kept_D: np.ndarray) -> np.ndarray:
    """The kept documents as tokens [begin, end) of the stream, int64 [n, 2], neighbours joined."""
    start_D = document_starts(corpus)
    # A document without tokens is neither kept nor dropped.
    kept_D, start_D = kept_D[np.diff(start_D) > 0], np.unique(start_D)
    turn = np.flatnonzero(np.diff(np.concatenate(([False], kept_D, [False])).astype(np.int8)))
    return start_D[turn].reshape(-1, 2)


def kept_windows(stretch_N2: np.ndarray, windows: int, seq_length: int) -> np.ndarray:
    """Windows that have a label in a stretch: bool [windows]. Token t is a label of window (t - 1) // S."""
    begin_N, end_N = np.maximum(stretch_N2[:, 0], 1), stretch_N2[:, 1]
    has_label = begin_N < end_N
    first_N, last_N = (begin_N[has_label] - 1) // seq_length, (end_N[has_label] - 2) // seq_length
    opened = np.bincount(np.minimum(first_N, windows), minlength=windows + 1)
    closed = np.bincount(np.minimum(last_N + 1, windows), minlength=windows + 1)
    return np.cumsum(opened - closed)[:windows] > 0


def mask_labels(stretch_N2: np.ndarray, window: int, mask_S: np.ndarray) -> None:
    """Fill a row of the loss mask: 1 where the label lies in a stretch, 0 elsewhere."""
    first = window * len(mask_S) + 1
    lo = int(np.searchsorted(stretch_N2[:, 1], first, side="right"))
    hi = int(np.searchsorted(stretch_N2[:, 0], first + len(mask_S), side="left"))
    mask_S[:] = 0
    for begin, end in (stretch_N2[lo:hi] - first).tolist():
        mask_S[max(begin, 0) : end] = 1
