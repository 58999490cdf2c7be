"""A teacher's distributions, kept by document: header, records, parts, index.

The record at offset o of a document is the teacher's distribution behind tokens 0 to o. The document is known
by the hash of its text (data/provenance.py). So a record serves any mixture, batch, layout and packing.

The folder of a cache:

    header.json         what decides the bytes; the cache of another header is refused
    part-DIGEST.kd      blocks of records, up to 1,024 of one document each, and their index
    index-DIGEST.kd     one index over parts, where `merge` has made it

A file is a front, blocks, an index sorted by key, and a tail. A block's checksum covers its key, too. DIGEST
is of all but the blocks. Files appear whole by rename. Two parts of one content are one file.

    front    MAGIC; 16 bytes, the header's hash; uint32 and so many bytes of JSON, names of an index's parts
    block    records as streams, see `draws.pack`
    index    keys, 20 bytes each: hash of the document, number of the block (big-endian); then their PLACEs
    tail     uint64 number of keys, uint64 where the index begins, END

This file imports no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from megatron_r1.distill.draws import Header, unpack
from megatron_r1.system.errors import rewording
from megatron_r1.system.files import beside, json_bytes, naming, regular, replacing
from megatron_r1.system.json_io import parse_json

BLOCK = 1024
"""Most records of a block. Block b of a document has the records from 1,024 b on."""
PLACE = np.dtype([("part", "<u4"), ("begin", "<u8"), ("bytes", "<u4"), ("tokens", "<u4"), ("check", "<u8")])
"""Of a block: its part in an index over parts, its bytes there, tokens of its document, XXH3-64."""
MAGIC, END = b"r1 teacher kd 1\n", b"\nr1 teacher end\n"
_KEY = np.dtype("S20")
_OPEN = 256
"""Most parts that are open at once."""
REDO = "remove it and run tools/cache_teacher.py again, which writes what is lacking"


def block_records(tokens: int, first: int) -> int:
    """Records of the block that begins at an offset, a multiple of BLOCK, of a document of so many tokens."""
    if first % BLOCK or not 0 <= first < tokens:
        raise ValueError(f"no block of a document of {tokens} tokens begins at {first}; blocks have {BLOCK}")
    return min(BLOCK, tokens - first)


def write_part(folder: Path, header: Header, blocks: Iterable[tuple[bytes, int, int, bytes]]) -> Path:
    """Write blocks as one part, whole or not at all: (hash, first offset, tokens of the document, body) each.

    All blocks of a document go to one part. They are held in memory. ValueError for a body that is none.
    """
    found: dict[bytes, tuple[int, bytes]] = {}
    for document, first, tokens, body in blocks:
        unpack(header, body, block_records(tokens, first))
        found.setdefault(document + (first // BLOCK).to_bytes(4, "big"), (tokens, body))
    keys, front = sorted(found), MAGIC + header.digest + _names([])
    place_M, begin = np.zeros(len(keys), PLACE), len(front)
    for n, key in enumerate(keys):
        tokens, body = found[key]
        place_M[n] = 0, begin, len(body), tokens, _check(key, tokens, body)
        begin += len(body)
    bodies = (found[key][1] for key in keys)
    return _write(folder / "part", front, bodies, begin, np.array(keys, _KEY), place_M)


def merge(folder: Path) -> Path:
    """Write one index over all parts, which lookups then map, and remove earlier ones.

    It takes some 150 bytes of memory a block.
    """
    cache, earlier = Cache(folder, merged=False), list(folder.glob("index-*.kd"))
    front = MAGIC + cache.header.digest + _names([path.name for path in cache.parts])
    ((key_M, place_M),) = cache.tables
    path = _write(folder / "index", front, [], len(front), key_M, place_M)
    for other in {*earlier} - {path}:
        other.unlink(missing_ok=True)
    return path


def _names(names: list[str]) -> bytes:
    return len(content := json_bytes(names)).to_bytes(4, "little") + content


def _check(key: bytes, tokens: int, body: bytes) -> int:
    return xxhash.xxh3_64_intdigest(key + tokens.to_bytes(4, "little") + body)


def _write(
    kind: Path, front: bytes, bodies: Iterable[bytes], begin: int, key_M: np.ndarray, place_M: np.ndarray
) -> Path:
    """Write the file `kind`-DIGEST.kd, whose index begins at a byte."""
    tail = len(key_M).to_bytes(8, "little") + begin.to_bytes(8, "little") + END
    digest, index = xxhash.xxh3_128(front), (key_M.tobytes(), place_M.tobytes(), tail)
    for part in index:
        digest.update(part)
    path = kind.with_name(f"{kind.name}-{digest.hexdigest()}.kd")
    if not path.exists():
        with replacing(path) as stream:
            for part in (front, *bodies, *index):
                stream.write(part)
    return path


def _read(path: Path, header: Header) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, keys and places of a file, mapped. ValueError where it is damaged, or of another header."""
    with open(path, "rb", opener=regular) as stream:
        size = os.fstat(stream.fileno()).st_size
        content = np.memmap(stream, np.uint8, "r") if size else np.zeros(0, np.uint8)
    front, tail, row = len(MAGIC) + 20, len(END) + 16, _KEY.itemsize + PLACE.itemsize
    if whole := size >= front + tail:
        names = int.from_bytes(content[front - 4 : front].tobytes(), "little")
        count, begin = np.frombuffer(content[size - tail : size - len(END)].tobytes(), "<u8").tolist()
        front += names
        whole = front <= begin <= size and begin + count * row + tail == size
    if whole:
        digest = xxhash.xxh3_128(content[:front].data)
        digest.update(content[begin:].data)
        whole = digest.hexdigest() == path.stem.partition("-")[2]
    if not whole:
        raise ValueError(f"{path} is truncated, or its index damaged; {REDO}")
    if content[len(MAGIC) : len(MAGIC) + 16].tobytes() != header.digest:
        raise ValueError(f"{path} is of another cache than header.json beside it; {REDO}")
    key_M, place_M = np.split(content[begin : size - tail], [count * _KEY.itemsize])
    named = parse_json(content[front - names : front].tobytes(), str(path))
    return named, key_M.view(_KEY), place_M.view(PLACE)


class _File:
    number = -1

    def __init__(self, path: Path):
        with rewording(lambda error: f"{error}; restore it, or run tools/cache_teacher.py again", OSError):
            self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.number >= 0:
            close(self.number)


class Cache:
    """The records in a folder. Parts that appear later are not seen.

    Parts that no index names are indexed in memory, 48 bytes a block. `merged`: whether an index is read.
    ValueError for a damaged index here, and for a damaged block when it is read.
    """

    def __init__(self, folder: Path, merged: bool = True):
        self.folder, self.header = folder, Header.read(folder)
        indices = sorted(folder.glob("index-*.kd"), key=lambda path: path.stat().st_size) if merged else []
        names, *table = _read(indices[-1], self.header) if indices else ([],)
        self.tables: list[tuple[np.ndarray, np.ndarray]] = [(table[0], table[1])] if table else []
        """Keys, ascending, and places."""
        there = {*folder.glob("part-*.kd")}
        self.parts = [beside(indices[-1], name) for name in names]
        rest = sorted(there.difference(self.parts))
        self.parts += rest
        for path in self.parts:
            if path not in there:
                raise FileNotFoundError(
                    f"{path} does not exist, which {indices[-1].name} names; "
                    "restore it, or remove the index and run tools/cache_teacher.py with --merge"
                )
        keys, places = [np.zeros(0, _KEY)], [np.zeros(0, PLACE)]
        for number, path in enumerate(rest, len(names)):
            _, key_M, place_M = _read(path, self.header)
            keys.append(np.array(key_M))
            places.append(np.array(place_M))
            places[-1]["part"] = number
        key_M, at_M = np.unique(np.concatenate(keys), return_index=True)
        if rest or not table:
            self.tables.append((key_M, np.concatenate(places)[at_M]))
        # Without a reference to this cache, with which the files are closed.
        paths = self.parts
        self._open = lru_cache(_OPEN)(lambda number: _File(paths[number]))

    @property
    def identity(self) -> str:
        """XXH3-128 of the header, "+", SHA-256 of the parts' names, which hold hashes of their content."""
        names = _names(sorted(path.name for path in self.parts))
        return f"{self.header.digest.hex()}+{hashlib.sha256(names).hexdigest()}"

    def has(self, hash_DH: np.ndarray, length_D: np.ndarray) -> np.ndarray:
        """Tokens of each document that have a record, [D] int64. `hash_DH`: uint8 [D, 16].

        ValueError for a document of another length than the one in the cache.
        """
        document_M, number_M = _spans(0 * length_D, length_D)
        found_M, _, _ = self._find(hash_DH[document_M], number_M, length_D[document_M])
        records_M = np.minimum(BLOCK, length_D[document_M] - number_M * BLOCK) * found_M
        return np.bincount(document_M, records_M, len(length_D)).astype(np.int64)

    def read(self, document: bytes, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Records [first, last) of a document: ids and shares [last - first, K], entropies.

        KeyError for records that are not there.
        """
        hash_1H = np.frombuffer(document, np.uint8)[None]
        *records, known_R = self.gather(hash_1H, np.array([first]), np.array([last]))
        if not known_R.all():
            raise KeyError(f"{self.folder}: no records {first} to {last} of document {document.hex()}")
        return records[0], records[1], records[2]

    def gather(
        self, hash_DH: np.ndarray, first_D: np.ndarray, last_D: np.ndarray, length_D: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Records [first, last) of each document, one document after the other.

        Returns ids int32 [R, K] and shares float32 [R, K], filled up with zeros to the largest record,
        entropies float32 [R], and whether each record is there, [R]. `length_D`: tokens of each document.
        ValueError where the cache has another length, and for a damaged block, with its file.
        """
        document_M, number_M = _spans(first_D, last_D)
        lengths = None if length_D is None else length_D[document_M]
        found_M, key_MB, place_M = self._find(hash_DH[document_M], number_M, lengths)
        begin_M = np.maximum(first_D[document_M] - number_M * BLOCK, 0)
        end_M = np.minimum(last_D[document_M] - number_M * BLOCK, BLOCK)
        ids, shares, distinct_R = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
        entropies = [np.zeros(0, np.float32)]
        for m, (begin, end) in enumerate(zip(begin_M.tolist(), end_M.tolist(), strict=True)):
            if found_M[m] and end <= int(place_M[m]["tokens"]) - int(number_M[m]) * BLOCK:
                id_E, share_E, distinct_N, entropy_N = self._block(key_MB[m].tobytes(), place_M[m])
                edge_N = np.append(0, distinct_N.cumsum())
                ids.append(id_E[edge_N[begin] : edge_N[end]])
                shares.append(share_E[edge_N[begin] : edge_N[end]])
            else:
                found_M[m] = False
                distinct_N, entropy_N = np.zeros(end, np.int64), np.zeros(end, np.float32)
            distinct_R.append(distinct_N[begin:end])
            entropies.append(entropy_N[begin:end])
        entries_R = np.concatenate(distinct_R)
        there_RK = np.arange(max(1, entries_R.max(initial=0))) < entries_R[:, None]
        id_RK, share_RK = np.zeros(there_RK.shape, np.int32), np.zeros(there_RK.shape, np.float32)
        id_RK[there_RK], share_RK[there_RK] = np.concatenate(ids), np.concatenate(shares)
        return id_RK, share_RK, np.concatenate(entropies), np.repeat(found_M, end_M - begin_M)

    def _find(
        self, hash_MH: np.ndarray, number_M: np.ndarray, length_M: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whether blocks are there, their keys as uint8 [M, 20] and their places."""
        number_M4 = number_M.astype(">u4").view(np.uint8).reshape(-1, 4)
        key_MB = np.concatenate((hash_MH, number_M4), axis=1)
        key_M = key_MB.view(_KEY).ravel()
        found_M, place_M = np.zeros(len(key_M), bool), np.zeros(len(key_M), PLACE)
        for keys, places in self.tables:
            at_M = np.minimum(np.searchsorted(keys, key_M), len(keys) - 1)
            hit_M = ~found_M & (keys[at_M] == key_M) if len(keys) else found_M & False
            place_M[hit_M] = places[at_M[hit_M]]
            found_M |= hit_M
        if length_M is not None and (wrong_M := found_M & (place_M["tokens"] != length_M)).any():
            m = int(np.argmax(wrong_M))
            fault = f"{length_M[m]} tokens, and {place_M['tokens'][m]} in the cache {self.folder}"
            way_out = "preprocess it as it was for the cache, or write a cache for these tokens"
            raise ValueError(f"the document of hash {hash_MH[m].tobytes().hex()} has {fault}; {way_out}")
        return found_M, key_MB, place_M

    def _block(self, key: bytes, place: np.void) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """A block unpacked, once its checksum is compared."""
        part, begin, size, tokens, check = place.tolist()
        first = int.from_bytes(key[16:], "big") * BLOCK
        # Whatever an index says: a block has no more bytes, and a file is not longer.
        most, part = BLOCK * (2 + self.header.most * 8), min(part, len(self.parts) - 1)
        with naming(self.parts[part]):
            body = os.pread(self._open(part).number, min(size, most), min(begin, 1 << 62))
        if len(body) != size or _check(key, tokens, body) != check:
            where = f"block {first // BLOCK} of document {key[:16].hex()}, {size} bytes at {begin},"
            raise ValueError(f"{self.parts[part]}: {where} is damaged or missing; {REDO}")
        return unpack(self.header, body, block_records(tokens, first))


def _spans(first_D: np.ndarray, last_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Document and number of each block that holds records [first, last) of documents, [M] both."""
    block_D = np.where(last_D > first_D, first_D // BLOCK, 0)
    count_D = np.where(last_D > first_D, -(-last_D // BLOCK) - block_D, 0)
    document_M = np.repeat(np.arange(len(count_D)), count_D)
    before_M = np.repeat(count_D.cumsum() - count_D, count_D)
    return document_M, block_D[document_M] + np.arange(len(document_M)) - before_M
