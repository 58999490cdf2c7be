"""Megatron's `.bin`/`.idx` pairs, byte for byte. Opening a pair checks it completely.

Layout of an index, little endian, no padding:

    offset  bytes  content
    0       9      "MMIDIDX" and two zero bytes
    9       8      version, 1
    17      1      code of the token type (Megatron's own table)
    18      8      S, number of sequences
    26      8      E, number of document entries (documents + 1)
    34      4 S    tokens of each sequence, int32
    ...     8 S    byte offset of each sequence in the .bin, int64
    ...     8 E    number of sequences before each document, int64; the first 0, the last S

The `.bin` holds the tokens of all sequences, one after the other. In our own pairs a document is one
sequence. Pairs from elsewhere may have several sequences a document, and can be read as well.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import struct
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from megatron_r1.data.integrity import REDO, BinHashes, check_bin, check_file, side_file
from megatron_r1.data.npy import write_array
from megatron_r1.data.sidecar import gold_of, read_sidecar
from megatron_r1.records import Corpus
from megatron_r1.system.errors import closest, shown
from megatron_r1.system.files import (
    naming,
    on_disk,
    open_exclusive,
    regular,
    remove_if_empty,
    replacing,
    sha256,
    sync,
)

HEADER = b"MMIDIDX\x00\x00"
INDEX_START = 34
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Megatron's codes of integer types. 6 and 7 are floats, which are no tokens."""
_CODES = {np.dtype(name): code for code, name in DTYPES.items()}
_CHECKED_AT_ONCE = 1 << 22
_WRITTEN_AT_ONCE = 1 << 15
_COMPARED = 64 << 20
"""An index of up to so many bytes is compared with its hash when a pair is opened."""


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """The token type Megatron picks: uint16 for a vocabulary below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def with_suffix(prefix: str | Path, suffix: str) -> Path:
    """PREFIX + suffix; a dot within the prefix is part of its name."""
    return Path(f"{prefix}{suffix}")


class IndexedDataset:
    """A pair on disk, memory-mapped.

    Raises FileNotFoundError where a file is missing. Raises ValueError, with file, offset and a way out,
    where the files contradict each other or themselves. Slices keep the mapping alive after this object.
    """

    tokens: np.ndarray
    """The whole stream, [T], of `dtype`; read-only."""
    lengths: np.ndarray
    """Tokens of each sequence, [S], int32."""
    pointers: np.ndarray
    """Byte offset of each sequence in the .bin, [S], int64."""
    documents: np.ndarray
    """Sequences before each document, [documents + 1], int64: Megatron's document_indices."""
    dtype: np.dtype[Any]

    def __init__(self, prefix: str | Path, share: tuple[int, int] | None = (0, 1)):
        """`share`: (rank, ranks) of the processes that open the pair together. Each checks a part of the
        index. None: the index was checked before."""
        self.prefix = Path(prefix)
        self._idx, self._bin = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
        for path in (self._idx, self._bin):
            if not path.exists():
                way_out = f"a prefix is the path of a pair without .bin or .idx{_suggest_prefix(self.prefix)}"
                raise FileNotFoundError(f"{path} does not exist; {way_out}")
            open(path, "rb", opener=regular).close()
        self._read_index()
        if share is not None:
            self._check_index(*share)
        self.tokens = map_array(self._bin, self.dtype, 0, self._bin.stat().st_size // self.dtype.itemsize)

    def __len__(self) -> int:
        """Number of sequences (as Megatron counts), which in our own pairs are the documents."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of one sequence, without a copy."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {self.prefix}, which has {len(self)}")
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    def tokens_before(self, document: int) -> int:
        """Tokens of the documents before this one; `tokens_before(num_documents)` counts them all."""
        if not 0 <= document <= self.num_documents:
            raise ValueError(f"{self.prefix} has {self.num_documents} documents, not {document}")
        return self._end(int(self.documents[document])) // self.dtype.itemsize

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document (all its sequences), without a copy."""
        return self.tokens[self.tokens_before(index) : self.tokens_before(index + 1)]

    def _read_index(self) -> None:
        with open(self._idx, "rb") as stream:
            head, status = stream.read(INDEX_START), os.fstat(stream.fileno())
        size = status.st_size
        if len(head) < INDEX_START:
            self._raise_damaged(len(head), f"the header needs {INDEX_START} bytes and {size} are there")
        if head[:9] != HEADER:
            self._raise_damaged(0, f"it starts with {head[:9]!r} and not with {HEADER!r}")
        version, code, sequences, entries = struct.unpack("<QBQQ", head[9:])
        if version != 1:
            self._raise_damaged(9, f"version {version}, where only 1 is known")
        if code not in DTYPES:
            self._raise_damaged(17, f"token type code {code} is not an integer type of Megatron's table")
        self.dtype = np.dtype(DTYPES[code])
        if entries < 1:
            self._raise_damaged(26, "no document entry, where even an empty dataset has one")
        expected = INDEX_START + 12 * sequences + 8 * entries
        if size != expected:
            needs = f"{sequences} sequences and {entries} document entries need {expected} bytes"
            multimodal = size == expected + sequences
            also = " (multimodal pairs, with a mode a sequence, are not read)" if multimodal else ""
            self._raise_damaged(min(size, expected), f"{needs} and {size} are there{also}")
        # Each byte takes time to check, also of a hole. No file system packs numbers that rise so tightly.
        if size > _COMPARED and 0 < (held := status.st_blocks * 512) < size // 64:
            self._raise_damaged(0, f"all but {held} of its {size} bytes are a hole")
        self.lengths = map_array(self._idx, np.dtype("<i4"), INDEX_START, sequences)
        self.pointers = map_array(self._idx, np.dtype("<i8"), INDEX_START + 4 * sequences, sequences)
        self.documents = map_array(self._idx, np.dtype("<i8"), INDEX_START + 12 * sequences, entries)

    def _check_index(self, part: int, parts: int) -> None:
        """Lengths against pointers, pointers against the size of the .bin, documents against sequences.

        Every rule looks at neighbours only: the parts together have seen the whole.
        """
        n, item = len(self), self.dtype.itemsize
        lengths_at, pointers_at, documents_at = INDEX_START, INDEX_START + 4 * n, INDEX_START + 12 * n
        # In pieces, so that opening an index of any size takes a few tens of MB.
        for lo, hi in _pieces(n, part, parts):
            lengths = self.lengths[lo:hi].astype(np.int64)
            if lengths.min() < 0:
                i = lo + int(np.argmax(lengths < 0))
                self._raise_damaged(lengths_at + 4 * i, f"sequence {i} has length {self.lengths[i]}")
            # Of each sequence, where the one before it ends.
            ends = np.concatenate(([self._end(lo)], (self.pointers[lo:hi] + item * lengths)[:-1]))
            wrong = np.flatnonzero(self.pointers[lo:hi] != ends)
            if len(wrong):
                i = lo + int(wrong[0])
                start = f"sequence {i} starts at byte {self.pointers[i]} of the .bin"
                end = f"the lengths before it (offset {lengths_at} on) end at byte {ends[i - lo]}"
                self._raise_damaged(pointers_at + 8 * i, f"{start}, but {end}")
        if self.documents[0] != 0 or self.documents[-1] != n:
            span = f"sequences {self.documents[0]} to {self.documents[-1]}"
            self._raise_damaged(documents_at, f"documents span {span}, not 0 to {n}")
        for lo, hi in _pieces(len(self.documents), part, parts):
            falling = np.flatnonzero(np.diff(self.documents[lo : hi + 1]) < 0)
            if len(falling):
                i = lo + int(falling[0]) + 1
                self._raise_damaged(documents_at + 8 * i, f"document entry {i} is below the one before")
        size, expected = self._bin.stat().st_size, self._end(n)
        if size != expected:
            fault = "is truncated" if size < expected else "is longer than its index says"
            sizes = f"{size} bytes, where {self._idx.name} says {expected}"
            self._raise_damaged(min(size, expected), f"it {fault}: {sizes}", self._bin)

    def _end(self, sequences: int) -> int:
        """The byte of the .bin at which its first sequences end."""
        if not sequences:
            return 0
        return int(self.pointers[sequences - 1]) + int(self.lengths[sequences - 1]) * self.dtype.itemsize

    def _raise_damaged(self, offset: int, fault: str, path: Path | None = None) -> NoReturn:
        raise ValueError(f"{path or self._idx} is damaged at offset {offset}: {fault}; {REDO}")


def _pieces(count: int, part: int, parts: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most _CHECKED_AT_ONCE that make up one of `parts` equal parts of range(count)."""
    end = count * (part + 1) // parts
    for lo in range(count * part // parts, end, _CHECKED_AT_ONCE):
        yield lo, min(end, lo + _CHECKED_AT_ONCE)


def _suggest_prefix(prefix: Path) -> str:
    """`; did you mean ...?` with the pairs whose names begin with a wrong prefix's name or resemble it."""
    stems = sorted(path.name.removesuffix(".idx") for path in prefix.parent.glob("*.idx"))
    longer = [stem for stem in stems if stem.startswith(prefix.name)]
    matches = longer or closest(prefix.name, stems)
    paths = " or ".join(str(prefix.parent / stem) for stem in matches[:3])
    return f"; did you mean {paths}?" if paths else ""


def map_array(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> np.ndarray:
    """`count` values of a file from `offset` bytes on, memory-mapped, read-only."""
    # An empty file or range cannot be mapped.
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


class IndexedWriter:
    """Writes a pair document by document, with the hashes of its stretches in `PREFIX.side/hashes.npy`.

    Memory grows by 4 bytes a document and by 8 bytes for 4 KiB of tokens.
    `finalize` gives the files their names: the .bin first, the .idx last, so that a pair with an .idx is
    whole. As a context manager it finalizes on success and leaves nothing after an error.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any] | type[np.generic]):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES:
            raise ValueError(f"dtype {self.dtype} holds no tokens; use one of {', '.join(DTYPES.values())}")
        self._lengths = array("i")
        self._hashes = BinHashes()
        self.num_tokens = 0
        self._partial = self._whole = with_suffix(prefix, ".bin.partial")
        """The file that is written; and the file that becomes the .bin, another one after `adopt`."""
        self._temporary = {self._partial}
        self._stream = open_exclusive(self._partial)

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    @property
    def sha256(self) -> str:
        """Hash of the .bin so far."""
        return self._hashes.sha256

    @property
    def idx_sha256(self) -> str:
        """Hash of the .idx, once all documents are added."""
        digest = hashlib.sha256()
        for part in self._index():
            digest.update(part)
        return digest.hexdigest()

    def add_document(self, tokens: np.ndarray) -> None:
        """Append one document, [T]; ValueError for a token that the dtype cannot hold."""
        self.add_documents(tokens, np.array([np.size(tokens)], dtype=np.int64))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append several documents at once: their tokens, [T], and the length of each, [documents]."""
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
        if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
            given = f"{tokens.dtype} of shape {tokens.shape}"
            raise ValueError(f"tokens must be a 1-D integer array, not {given}")
        if len(lengths) and (lengths.min() < 0 or lengths.max() > 2**31 - 1):
            way_out = f"an index holds up to {2**31 - 1}: split it"
            raise ValueError(f"a document of {lengths.max()} tokens; {way_out}")
        if tokens.size and tokens.dtype != self.dtype:
            low, high, bounds = int(tokens.min()), int(tokens.max()), np.iinfo(self.dtype)
            if low < bounds.min or high > bounds.max:
                token, first = low if low < bounds.min else high, self.num_documents
                where = f"documents {first} to {first + len(lengths) - 1} of {self.prefix}"
                fault = f"token {token} in {where} does not fit {self.dtype}"
                raise ValueError(f"{fault}; take the dtype from best_dtype(vocab_size)")
        assert int(lengths.sum()) == tokens.size
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data
        with naming(self._partial):
            self._stream.write(data)
        self._hashes.update(data)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.num_tokens += tokens.size

    def adopt(self, path: Path, lengths: np.ndarray, hashes: BinHashes) -> bool:
        """Take a file with all the tokens, in order, as the .bin, without a copy.

        The file stays, as a second name (hard link) of the .bin; `path` must be on the same file system.
        lengths: [documents]. hashes: of the file. Returns False, with nothing changed, where the file system
        has no hard links.
        """
        assert not self.num_documents
        tokens = int(lengths.sum(dtype=np.int64))
        assert path.stat().st_size == tokens * self.dtype.itemsize
        link = with_suffix(path, ".link")
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
                raise
            return False
        self._whole, self._hashes = link, hashes
        self._temporary.add(link)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.num_tokens = tokens
        return True

    def finalize(self, changing: Callable[[], None] = lambda: None) -> None:
        """Write the index, call `changing`, and give both files their names.

        Before the call every earlier file is as it was. After it nothing can fail for want of space.
        """
        assert not self._stream.closed
        idx = with_suffix(self.prefix, ".idx")
        try:
            with naming(self._whole):
                self._stream.flush()
                sync(self._whole)
            with replacing(idx) as stream:
                for part in self._index():
                    stream.write(part)
                with replacing(side_file(self.prefix, "hashes.npy")) as hashes:
                    write_array(hashes, self._hashes.words())
                    # Written for certain before the first name changes.
                    on_disk(hashes)
                    on_disk(stream)
                    changing()
                    # The old index goes before the new .bin comes: at no moment do two halves of different
                    # pairs stand together.
                    idx.unlink(missing_ok=True)
                    os.replace(self._whole, with_suffix(self.prefix, ".bin"))
                    self._temporary.remove(self._whole)
        finally:
            self.close()

    def _index(self) -> Iterator[bytes | memoryview]:
        """The bytes of the index, in parts that stay in the processor's cache."""
        lengths = np.asarray(self._lengths, dtype=np.int32)
        n = len(lengths)
        yield HEADER + struct.pack("<QBQQ", 1, _CODES[self.dtype], n, n + 1)
        yield lengths.astype("<i4", copy=False).data
        end = 0
        for lo in range(0, n, _WRITTEN_AT_ONCE):
            some = lengths[lo : lo + _WRITTEN_AT_ONCE]
            ends = end + np.cumsum(some, dtype="<i8")
            end = int(ends[-1])
            yield ((ends - some) * self.dtype.itemsize).data
        for lo in range(0, n + 1, _WRITTEN_AT_ONCE):
            yield np.arange(lo, min(n + 1, lo + _WRITTEN_AT_ONCE), dtype="<i8").data

    def close(self) -> None:
        """Delete what was written and not finalized."""
        # Once closed, their names are free for another process.
        for path in () if self._stream.closed else self._temporary:
            path.unlink(missing_ok=True)
        remove_if_empty(side_file(self.prefix, ""))
        # A disk that is full is so when the buffer goes, too; the first error has said it.
        with contextlib.suppress(OSError):
            self._stream.close()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._stream.closed:
            self.finalize()
        self.close()


def identity_of(prefix: str | Path) -> str:
    """The identity of a pair: its sidecar's hash of the tokens, or else the hash of its index."""
    return stored_sha256(prefix) or sha256(with_suffix(prefix, ".idx"))


def stored_sha256(prefix: str | Path) -> str | None:
    """The SHA-256 of the .bin in the sidecar of a pair, if it has one."""
    return (read_sidecar(prefix) or {}).get("bin_sha256")


def open_corpus(
    name: str, prefix: str | Path, documents: int | None = None, share: tuple[int, int] = (0, 1)
) -> Corpus:
    """Check a pair against itself and its sidecar, and describe it (or its leading `documents`).

    share: as of IndexedDataset. Errors: FileNotFoundError, ValueError for a damaged pair, for a sidecar of
    another pair, and for more documents than there are.
    """
    dataset, sidecar = IndexedDataset(prefix, share), read_sidecar(prefix)
    if sidecar is not None:
        facts = ("documents", dataset.num_documents), ("tokens", len(dataset.tokens))
        for key, value in (*facts, ("dtype", dataset.dtype.name)):
            if sidecar.get(key) != value:
                raise ValueError(
                    f"{with_suffix(prefix, '.json')} belongs to another pair: it says {key} "
                    f"{shown(sidecar.get(key))}, and {with_suffix(prefix, '.idx').name} says {value}; {REDO}"
                )
        # A document of our own is one sequence.
        for lo, hi in _pieces(len(dataset.documents), *share):
            wrong = np.flatnonzero(dataset.documents[lo:hi] != np.arange(lo, hi))
            if len(wrong):
                entry = lo + int(wrong[0])
                at = INDEX_START + 12 * len(dataset) + 8 * entry
                dataset._raise_damaged(at, f"document entry {entry} is {dataset.documents[entry]}")
        if dataset._idx.stat().st_size <= _COMPARED:
            check_file(dataset._idx, sidecar, "idx_sha256", share)
    doubt = check_bin(prefix, sidecar or {}, share)
    documents = dataset.num_documents if documents is None else documents
    if not 0 <= documents <= dataset.num_documents:
        way_out = "leave documents out to use them all"
        raise ValueError(f"documents={documents}, but {prefix} has {dataset.num_documents}; {way_out}")
    tokens = dataset.tokens_before(documents)
    made_with = None if sidecar is None else sidecar.get("tokenizer_fingerprint")
    aside = len(dataset.tokens) - tokens
    gold = gold_of(prefix, sidecar, dataset.lengths)
    return Corpus(name, Path(prefix), documents, tokens, dataset.dtype.name, made_with, aside, doubt, gold)


def document_starts(corpus: Corpus) -> np.ndarray:
    """First token of each of the corpus's documents, and the end of the last: int64 [documents + 1]."""
    dataset = IndexedDataset(corpus.prefix, share=None)
    token_S = np.append(dataset.pointers // dataset.dtype.itemsize, len(dataset.tokens))
    return token_S[dataset.documents[: corpus.documents + 1]]
