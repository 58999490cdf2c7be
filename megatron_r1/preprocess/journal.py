"""Results of the first pass, committed in steps: a killed run goes on from the last commit.

`PREFIX.partial/` holds four files a key, by the key's number, and the journal:

    0.tokens  0.lengths  0.origins  0.rejects    documents in input order, rejects as JSON lines
    journal                                      the request; then a line a commit: pieces, sizes of all
                                                 files, number of the last piece's input, bytes skipped,
                                                 XXH3-64 of what came to each file

Pieces are committed together, since the system takes a few large writes in a quarter of the time of many
small ones. A kill loses at most COMMIT_SECONDS of work or COMMIT_BYTES of tokens.

The folder may be another's. One with anything else in it, a link too, is left alone and refused. A journal of
other content than a writer's is begun anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from megatron_r1.data.indexed import map_array
from megatron_r1.data.integrity import BinHashes
from megatron_r1.data.provenance import ORIGIN
from megatron_r1.preprocess.store import Stored, reject_line
from megatron_r1.preprocess.workers import Encoded
from megatron_r1.system.errors import shown
from megatron_r1.system.files import naming, remove_if_empty, replacing
from megatron_r1.system.json_io import MOST_BYTES, is_count, mistake, parse_json

COMMIT_BYTES, COMMIT_SECONDS = 1 << 23, 1.0
_FORMAT = 4
"""Goes up when a journal of before could not be continued."""
_KINDS = ("tokens", "lengths", "origins", "rejects")
_OURS = re.compile(rf"journal(\.partial)?|\d+\.({'|'.join(_KINDS)}|tokens\.link)")


class Journal:
    """Files of the first pass. Opened again with the same request, a journal cuts every file back to the last
    commit; with other inputs, to the end of those before the first that differs; with another request it
    begins anew. hashed: keep the hashes of each key's tokens.

    `pieces`: committed before. `skipped`: bytes skipped in all pieces so far, by name.
    """

    def __init__(self, work: Path, keys: Sequence[str], request: dict[str, Any], hashed: bool):
        self.work, self.keys = work, keys
        header = {"journal": _FORMAT, **request}
        paths = {(key, kind): work / f"{k}.{kind}" for k, key in enumerate(keys) for kind in _KINDS}
        if reason := _foreign(work):
            way_out = "move it away, or name another --output-prefix"
            raise ValueError(f"{work} {reason}, so it is not this tool's; {way_out}")
        kept = _commits(work / "journal", header, list(paths.values()))
        if not kept:
            discard(work)
            work.mkdir()
        self.pieces, sizes, self._input, skipped, _ = kept[-1] if kept else (0, [0] * len(paths), 0, {}, [])
        self.skipped = Counter(skipped)
        # First: a file that is shorter than its journal says would end all of it.
        with naming(work), replacing(work / "journal") as stream:
            stream.writelines(json.dumps(line).encode() + b"\n" for line in (header, *kept))
        self._files = {which: _open(path) for which, path in paths.items()}
        self._log = _open(work / "journal")
        for stream, size in zip(self._files.values(), sizes, strict=True):
            stream.truncate(size)
        self._added, self._committed = [self.pieces, sizes, self._input, skipped, []], self.pieces
        self._coming = {which: xxhash.xxh3_64() for which in paths}
        """Of what has been added since the last line of the journal."""
        self._gathered, self._begun = 0, time.monotonic()
        self._hashes = {key: BinHashes().update_from(paths[key, "tokens"]) for key in keys if hashed}

    def rejects(self, key: str) -> int:
        """Number of rejects committed."""
        path = Path(self._files[key, "rejects"].name)
        return sum(block.count(b"\n") for block in _blocks(path, 0, path.stat().st_size))

    def stored(self, key: str, dtype: np.dtype[Any]) -> Stored:
        """The documents of a key, once all are committed. ValueError for files that contradict each other."""
        path = {kind: Path(self._files[key, kind].name) for kind in _KINDS}
        lengths = np.fromfile(path["lengths"], dtype=np.int32)
        sizes = int(lengths.sum(dtype=np.int64)) * dtype.itemsize, len(lengths) * ORIGIN.itemsize
        there = tuple(path[kind].stat().st_size for kind in ("tokens", "origins"))
        if sizes != there or lengths.min(initial=0) < 0:
            raise ValueError(f"{self.work} is damaged and is removed; the same command begins anew")
        tokens = map_array(path["tokens"], dtype, 0, int(lengths.sum(dtype=np.int64)))
        origins = map_array(path["origins"], ORIGIN, 0, len(lengths))
        whole = (path["tokens"], self._hashes[key]) if self._hashes else None
        return Stored(tokens, lengths, origins, path["rejects"], None, whole)

    def begin(self, number: int) -> None:
        """Name the input of the next piece. Where another is mended, all documents before it can stay."""
        if number > self._input:
            self._note()
        self._input = number

    def _note(self) -> None:
        """Add the journal's line of all that was added. It holds once the other files are written, too."""
        if self._added[0] > self._committed:
            self._log.write(json.dumps(self._added).encode() + b"\n")
            self._committed = self._added[0]
            for coming in self._coming.values():
                coming.reset()

    def add(self, encoded: list[Encoded]) -> None:
        """Write a piece: the documents of every key."""
        with naming(self.work):
            for key, column in zip(self.keys, encoded, strict=True):
                rejects = b"".join(map(reject_line, column.rejects))
                arrays = column.tokens, column.lengths, column.origins
                content: list[Any] = [*(array.data for array in arrays), rejects]
                for kind, data in zip(_KINDS, content, strict=True):
                    self._files[key, kind].write(data)
                    self._coming[key, kind].update(data)
                self._gathered += column.tokens.nbytes
                if self._hashes:
                    self._hashes[key].update(column.tokens.data)
        self.pieces += 1
        self.skipped = self.skipped + encoded[0].skipped
        # At once, and only now: what an interrupted call has written is cut off again.
        sizes = [stream.tell() for stream in self._files.values()]
        hashes = [coming.intdigest() for coming in self._coming.values()]
        self._added = [self.pieces, sizes, self._input, self.skipped, hashes]
        if self._gathered >= COMMIT_BYTES or time.monotonic() - self._begun >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Keep all that has been added, whatever happens to this process."""
        with naming(self.work):
            # The order matters: what a journal line speaks of is already with the system.
            for stream in self._files.values():
                stream.flush()
            self._note()
            self._log.flush()
        self._gathered, self._begun = 0, time.monotonic()

    def close(self) -> None:
        # After a failed write the buffers fail again; the first error has said it.
        with contextlib.suppress(OSError):
            self.commit()
        for stream in (*self._files.values(), self._log):
            with contextlib.suppress(OSError):
                stream.close()


def _foreign(work: Path) -> str:
    """Why what has the name of a journal's folder is none; nothing if it is one, or nothing is there."""
    if work.is_symlink() or not work.is_dir():
        return "is no folder" if os.path.lexists(work) else ""
    with os.scandir(work) as entries:
        theirs = (e for e in entries if not (_OURS.fullmatch(e.name) and e.is_file(follow_symlinks=False)))
        return next((f"holds {shown(entry.name)}" for entry in theirs), "")


def discard(work: Path) -> None:
    """Remove the folder of a journal; what is none stays."""
    if not _foreign(work) and work.is_dir():
        for name in os.listdir(work):
            (work / name).unlink(missing_ok=True)
        remove_if_empty(work)


def _commits(journal: Path, header: dict[str, Any], files: Sequence[Path]) -> list[Any]:
    """The commits of a journal that hold: of the same request, and of inputs that are as they were."""
    try:
        with open(journal, "rb") as stream:
            lines = stream.read(MOST_BYTES).split(b"\n")[:-1]
        before, *commits = [parse_json(line, str(journal)) for line in lines]
    except (OSError, ValueError):
        return []
    if mistake(before, {"inputs": list}) or {**before, "inputs": None} != {**header, "inputs": None}:
        return []
    pairs = zip(before["inputs"], header["inputs"], strict=False)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    # After a loss of power the system may know less than the journal.
    there = [path.stat().st_size if path.is_file() else 0 for path in files]
    kept = [
        commit
        for commit in takewhile(lambda commit: _is_commit(commit, len(files)), commits)
        if commit[2] < same and all(size <= length for size, length in zip(commit[1], there, strict=True))
    ]
    before_each = [[0] * len(files), *(commit[1] for commit in kept)]
    sound = takewhile(lambda pair: _holds(files, *pair), zip(before_each, kept, strict=False))
    return [commit for _, commit in sound]


def _is_commit(commit: Any, files: int) -> bool:
    match commit:
        case [pieces, [*sizes], number, {**skipped}, [*hashes]]:
            counts = all(map(is_count, (pieces, number, *sizes, *skipped.values())))
            return counts and len(sizes) == len(hashes) == files
    return False


def _holds(files: Sequence[Path], before: Sequence[int], commit: Sequence[Any]) -> bool:
    """Whether the files hold what a commit added: after a loss of power their sizes may be right all the
    same."""
    for path, lo, hi, stored in zip(files, before, commit[1], commit[4], strict=True):
        digest = xxhash.xxh3_64()
        for block in _blocks(path, lo, hi):
            digest.update(block)
        if lo > hi or (lo < hi and digest.intdigest() != stored):
            return False
    return True


def _blocks(path: Path, lo: int, hi: int) -> Iterator[bytes]:
    """Bytes [lo, hi) of a file, a few at a time."""
    if lo < hi:
        with open(path, "rb", buffering=0) as stream:
            stream.seek(lo)
            while lo < hi and (block := stream.read(min(COMMIT_BYTES, hi - lo))):
                lo += len(block)
                yield block


def _open(path: Path) -> IO[bytes]:
    # Room for what is gathered and one piece more, so that a commit is one write.
    return open(path, "ab", buffering=2 * COMMIT_BYTES, opener=_no_link)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
