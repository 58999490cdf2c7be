"""Results of the first pass, committed in steps: a killed run goes on from the last commit.

`PREFIX.partial/` holds four files a key, by the key's number, and the journal:

    0.tokens  0.lengths  0.origins  0.rejects    documents in input order, rejects as JSON lines
    journal                                      the request; then a line a commit: pieces, sizes of all files

Pieces are committed together, since the system takes a few large writes in a quarter of the time of many
small ones. A kill loses at most COMMIT_SECONDS of work or COMMIT_BYTES of tokens.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_r1.data.indexed import map_array
from megatron_r1.data.integrity import BinHashes
from megatron_r1.data.provenance import ORIGIN
from megatron_r1.preprocess.store import Stored, reject_line
from megatron_r1.preprocess.workers import Encoded
from megatron_r1.system.files import naming

COMMIT_BYTES, COMMIT_SECONDS = 1 << 23, 1.0
_FORMAT = 2
"""Goes up when a journal of before could not be continued."""
_KINDS = ("tokens", "lengths", "origins", "rejects")


class Journal:
    """Files of the first pass. Opened again with the same request, a journal cuts every file back to the last
    commit; with another request it begins anew. hashed: keep the hashes of each key's tokens."""

    def __init__(self, work: Path, keys: Sequence[str], request: dict[str, Any], hashed: bool):
        self.work, self.keys, self.pieces = work, keys, 0
        header = json.dumps({"journal": _FORMAT, **request}).encode()
        paths = {(key, kind): work / f"{k}.{kind}" for k, key in enumerate(keys) for kind in _KINDS}
        sizes, kept = [0] * len(paths), 0
        last = _last_commit(work / "journal", header, list(paths.values()))
        if last is None:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        else:
            self.pieces, sizes, kept = last
        self._files = {which: _open(path) for which, path in paths.items()}
        self._log = _open(work / "journal")
        for stream, size in zip((*self._files.values(), self._log), (*sizes, kept), strict=True):
            stream.truncate(size)
        if last is None:
            with naming(work):
                self._log.write(header + b"\n")
                self._log.flush()
        self._added, self._committed = (self.pieces, sizes), self.pieces
        self._gathered, self._begun = 0, time.monotonic()
        self._hashes = {key: BinHashes().update_from(paths[key, "tokens"]) for key in keys if hashed}

    def rejects(self, key: str) -> int:
        """Number of rejects committed."""
        with open(self._files[key, "rejects"].name, "rb") as stream:
            return sum(1 for _ in stream)

    def stored(self, key: str, dtype: np.dtype[Any]) -> Stored:
        """The documents of a key, once all are committed."""
        path = {kind: Path(self._files[key, kind].name) for kind in _KINDS}
        lengths = np.fromfile(path["lengths"], dtype=np.int32)
        tokens = map_array(path["tokens"], dtype, 0, int(lengths.sum(dtype=np.int64)))
        origins = map_array(path["origins"], ORIGIN, 0, len(lengths))
        whole = (path["tokens"], self._hashes[key]) if self._hashes else None
        return Stored(tokens, lengths, origins, path["rejects"], None, whole)

    def add(self, encoded: list[Encoded]) -> None:
        """Write a piece: the documents of every key."""
        with naming(self.work):
            for key, column in zip(self.keys, encoded, strict=True):
                self._files[key, "tokens"].write(column.tokens.data)
                self._files[key, "lengths"].write(column.lengths.data)
                self._files[key, "origins"].write(column.origins.data)
                self._files[key, "rejects"].writelines(map(reject_line, column.rejects))
                self._gathered += column.tokens.nbytes
                if self._hashes:
                    self._hashes[key].update(column.tokens.data)
        self.pieces += 1
        # At once, and only now: what an interrupted call has written is cut off again.
        self._added = self.pieces, [stream.tell() for stream in self._files.values()]
        if self._gathered >= COMMIT_BYTES or time.monotonic() - self._begun >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Keep all that has been added, whatever happens to this process."""
        pieces, sizes = self._added
        if pieces > self._committed:
            with naming(self.work):
                # The order matters: what a journal line speaks of is already with the system.
                for stream in self._files.values():
                    stream.flush()
                self._log.write(json.dumps([pieces, sizes]).encode() + b"\n")
                self._log.flush()
            self._committed = pieces
        self._gathered, self._begun = 0, time.monotonic()

    def close(self) -> None:
        # After a failed write the buffers fail again; the first error has said it.
        with contextlib.suppress(OSError):
            self.commit()
        for stream in (*self._files.values(), self._log):
            with contextlib.suppress(OSError):
                stream.close()


def _last_commit(journal: Path, header: bytes, files: Sequence[Path]) -> tuple[int, list[int], int] | None:
    """Pieces done, file sizes then, and length of the journal up to there; None for another request's."""
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    if len(lines) < 2 or lines[0] != header:
        return None
    pieces, sizes = json.loads(lines[-1])
    # After a loss of power the system may know less than the journal.
    if any(not f.is_file() or f.stat().st_size < size for f, size in zip(files, sizes, strict=True)):
        return None
    return pieces, sizes, sum(len(line) + 1 for line in lines)


def _open(path: Path) -> IO[bytes]:
    # Room for what is gathered and one piece more, so that a commit is one write.
    return open(path, "ab", buffering=2 * COMMIT_BYTES)
