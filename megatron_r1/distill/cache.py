"""A teacher's distributions, kept by document: header, records, parts, index.

The record at offset o of a document is the teacher's distribution behind tokens 0 to o. The document is known
by the hash of its text (data/provenance.py). So a record serves any mixture, batch, layout and packing.

A sampled record is `draws` points of the distribution: ids with counts. Counts over `draws` are an unbiased
estimate of every probability, so the gradient of the KL is unbiased too. The points are (u + j) / draws of
the cumulated distribution, with one uniform u a record (systematic sampling). On encyclopedia, code and
mathematics (SmolLM2-135M) their squared error is 3.1 to 5.6 times smaller than that of as many independent
draws, with a tenth more ids. u is a hash of seed, document and offset: batches, ranks and threads do not
change it. A top-k record is the k largest probabilities, and the mass of all other tokens is one outcome.

The folder of a cache:

    header.json         what decides the bytes; the cache of another header is refused
    part-DIGEST.kd      blocks of records, up to 1,024 of one document each, and their index
    index-DIGEST.kd     one index over parts, where `merge` has made it

A file is a front, blocks, an index sorted by key, and a tail. A block's checksum covers its key, too. DIGEST
is of all but the blocks. Files appear whole by rename. Two parts of one content are one file.

    front    MAGIC; 16 bytes, the header's hash; uint32 and so many bytes of JSON, names of an index's parts
    block    records as streams, see `pack`
    index    keys, 20 bytes each: hash of the document, number of the block (big-endian); then their PLACEs
    tail     uint64 number of keys, uint64 where the index begins, END

This file imports torch only to draw.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import xxhash
from pydantic import TypeAdapter

from megatron_r1._csrc import draw as draw_on_cpu
from megatron_r1.config import NaturalInt, PositiveFloat, PositiveInt, Section, Seed, Text, limit
from megatron_r1.run.stage import standing
from megatron_r1.system.errors import brief, rewording
from megatron_r1.system.files import json_bytes, make_folder, regular, replacing, write_json
from megatron_r1.system.json_io import parse_json, read_object

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024
"""Most records of a block. Block b of a document has the records from 1,024 b on."""
PLACE = np.dtype([("part", "<u4"), ("begin", "<u8"), ("bytes", "<u4"), ("tokens", "<u4"), ("check", "<u8")])
"""Of a block: its part in an index over parts, its bytes there, tokens of its document, XXH3-64."""
MAGIC, END = b"r1 teacher kd 1\n", b"\nr1 teacher end\n"
_KEY = np.dtype("S20")
_NATS = 32.0
"""Largest -ln p of a top-k record."""
_AT_ONCE = 1 << 24
"""Logits that are cumulated at once where there is no C++."""
_OPEN = 256
"""Most parts that are open at once."""
_MOST = limit(lambda v: 1 <= v <= 256, "must be from 1 to 256")
REDO = "remove it and run tools/cache_teacher.py again, which writes what is lacking"


@dataclass(frozen=True)
class Header(Section):
    """All that decides the bytes of a cache."""

    teacher: Text
    """Its identity (distill/teacher.py)."""
    vocabulary: Text
    """Identity of its tokenizer's ids (distill/vocabulary.py)."""
    tokens: Annotated[int, limit(lambda v: 2 <= v <= 1 << 24, "must be from 2 to 2^24")]
    """Ids of the vocabulary without padding."""
    temperature: PositiveFloat
    draws: Annotated[int, _MOST] | None
    """Points of a sampled record; None: top-k records."""
    top_k: Annotated[int, _MOST] | None
    seed: Seed
    bos: NaturalInt | None
    """Token before each document for the teacher."""
    context: PositiveInt
    """Most tokens that the teacher sees at once."""
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        if (self.draws is None) == (self.top_k is None):
            raise ValueError("give draws, or top_k, and not both")

    @property
    def most(self) -> int:
        """Most ids of a record."""
        return min(self.draws or self.top_k or 0, self.tokens)

    @property
    def digest(self) -> bytes:
        return xxhash.xxh3_128_digest(json.dumps(asdict(self), sort_keys=True).encode())

    @classmethod
    def read(cls, folder: Path) -> Header:
        """The header of a folder. FileNotFoundError without one, ValueError for a damaged one."""
        path = folder / "header.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no teacher cache; tools/cache_teacher.py writes one")
        content = read_object(path, 1 << 16)
        way_out = "restore it, or write the cache anew"
        with rewording(lambda error: f"{path} is damaged: {brief(str(error))}; {way_out}"):
            return TypeAdapter(cls).validate_python(content)

    def write(self, folder: Path) -> None:
        """Make the folder this header's. ValueError where it is another's, with what differs."""
        make_folder(folder)
        theirs = asdict(Header.read(folder)) if (folder / "header.json").exists() else None
        refusal = f"{folder} is a cache of another header"
        standing(theirs, asdict(self), lambda: True, refusal, "name another folder")
        if theirs is None:
            write_json(folder / "header.json", asdict(self))


class Drawn(NamedTuple):
    """Records of consecutive offsets. Axis N: records, E: entries of all of them, ids of each ascending."""

    id_E: np.ndarray
    count_E: np.ndarray
    """Points that fell on the id; of a top-k record -ln p in the 65,535 steps of `_decoded`."""
    distinct_N: np.ndarray
    """Entries of each record."""
    entropy_N: np.ndarray
    """Of the whole distribution, nats, float32."""


def draw(logits_NV: Tensor, header: Header, document: bytes, first: int) -> Drawn:
    """Records from the teacher's logits at offsets [first, first + N) of the document with this hash.

    Logits of float32 or bfloat16. Columns from `header.tokens` on are padding, and not read. ValueError for
    logits that are not finite.
    """
    import torch

    logits_NV = logits_NV[:, : header.tokens]
    if header.draws is None:
        id_NK, nats_NK, entropy_N = _largest(logits_NV, header)
    else:
        uniform_N = uniforms(header.seed, document, first, len(logits_NV))
        if logits_NV.device.type == "cpu":
            logits_NV = logits_NV.contiguous()
            bits = logits_NV.view(torch.uint16) if logits_NV.dtype == torch.bfloat16 else logits_NV.float()
            sizes = header.tokens, 1 / header.temperature, uniform_N, header.draws
            id_NK, entropy_N = draw_on_cpu(bits.numpy().ravel(), *sizes)
        else:
            id_NK, entropy_N = draw_on_device(logits_NV, header.temperature, uniform_N, header.draws)
    if not np.isfinite(entropy_N).all():
        offset = first + int(np.argmin(np.isfinite(entropy_N)))
        fault = f"the teacher's logits behind token {offset} of document {document.hex()} are not finite"
        raise ValueError(f"{fault}; run it with --precision fp32, or take another teacher")
    if header.draws is None:
        step_NK = _coded(nats_NK, _NATS, 16, np.ceil)
        return Drawn(id_NK.ravel(), step_NK.ravel(), np.full(len(id_NK), header.most), entropy_N)
    new_NK = np.ones(id_NK.shape, bool)
    new_NK[:, 1:] = id_NK[:, 1:] != id_NK[:, :-1]
    at_E = np.flatnonzero(new_NK)
    return Drawn(id_NK.ravel()[at_E], np.diff(np.append(at_E, id_NK.size)), new_NK.sum(1), entropy_N)


def uniforms(seed: int, document: bytes, first: int, count: int) -> np.ndarray:
    """u of [0, 1) for offsets [first, first + count): Philox, the offset being its counter. float64."""
    key = xxhash.xxh3_128_intdigest(seed.to_bytes(8, "little") + document)
    raw_N = np.random.Philox(key=key, counter=first).random_raw(4 * count)[::4]
    return (raw_N >> np.uint64(11)) * 2.0**-53


def draw_on_device(
    logits_NV: Tensor, temperature: float, uniform_N: np.ndarray, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids at the points (u + j) / draws of each row [N, draws], and entropies [N], by torch alone."""
    import torch

    ids, entropies = [], []
    rows = max(1, _AT_ONCE // logits_NV.shape[1])
    uniforms = torch.from_numpy(uniform_N).split(rows)
    for some_NV, uniform in zip(logits_NV.split(rows), uniforms, strict=True):
        share_NV = (some_NV.float() / temperature).softmax(-1)
        sum_NV = share_NV.cumsum(-1, dtype=torch.float64)
        total_N1 = sum_NV[:, -1:]
        place_NK = (uniform[:, None] + torch.arange(draws)).to(total_N1.device) / draws * total_N1
        # Below the total, so that an id with mass holds it.
        place_NK = torch.minimum(place_NK, total_N1.nextafter(torch.zeros_like(total_N1)))
        ids.append(torch.searchsorted(sum_NV, place_NK, right=True).clamp_(max=some_NV.shape[1] - 1))
        entropies.append(torch.special.entr(share_NV).sum(-1))
    return torch.cat(ids).int().cpu().numpy(), torch.cat(entropies).float().cpu().numpy()


def _largest(logits_NV: Tensor, header: Header) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of the k largest logits of each row, ascending, their -ln p, and the row's entropy."""
    import torch

    found = []
    for some_NV in logits_NV.split(max(1, _AT_ONCE // header.tokens)):
        nats_NV = -(some_NV.float() / header.temperature).log_softmax(-1)
        id_NK = nats_NV.topk(header.most, largest=False).indices.sort(-1).values
        entropy_N = torch.special.entr((-nats_NV).exp()).sum(-1)
        found.append((id_NK.int(), nats_NV.gather(-1, id_NK), entropy_N))
    return tuple(torch.cat(some).cpu().numpy() for some in zip(*found, strict=True))  # type: ignore[return-value]


def _coded(value: np.ndarray, most: float, bits: int, rounding: np.ufunc = np.rint) -> np.ndarray:
    """Steps of [0, most], the finer the smaller the value."""
    return rounding(np.sqrt(np.clip(value / most, 0, 1)) * ((1 << bits) - 1)).astype(np.int64)


def _decoded(step: np.ndarray, most: float, bits: int) -> np.ndarray:
    return (most * (step / ((1 << bits) - 1)) ** 2).astype(np.float32)


def _sizes(header: Header) -> tuple[int, int, float]:
    """Bits of an id above 16, bits of an entropy, and the largest entropy."""
    high = max(0, (header.tokens - 1).bit_length() - 16)
    return high, 16 - (header.most - 1).bit_length(), float(np.log(header.tokens))


def pack(header: Header, drawn: Drawn) -> bytes:
    """Records as the body of a block, five streams:

    head     2 bytes a record: entries - 1, and in the bits that are left its entropy
    low      2 bytes an entry: the id's lower 16 bits
    high     the id's other bits, as many as the vocabulary needs, bit by bit
    several  of sampled records, 1 bit an entry: whether its count is above 1
    count    1 byte for each of these: count - 1; of top-k records 2 bytes an entry: -ln p, coded

    The largest entropy is ln(tokens). Values are coded by the square root, so that small ones are precise.
    """
    high, bits, most = _sizes(header)
    head_N = (drawn.distinct_N - 1) | (_coded(drawn.entropy_N, most, bits) << (16 - bits))
    id_E, count_E = drawn.id_E.astype(np.int64), drawn.count_E
    streams = [head_N.astype("<u2"), (id_E & 0xFFFF).astype("<u2")]
    streams.append(np.packbits((id_E[:, None] >> np.arange(16, 16 + high)) & 1))
    if header.draws is None:
        return b"".join(stream.tobytes() for stream in (*streams, count_E.astype("<u2")))
    streams += [np.packbits(count_E > 1), (count_E[count_E > 1] - 1).astype(np.uint8)]
    return b"".join(stream.tobytes() for stream in streams)


def unpack(
    header: Header, body: bytes, records: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids and shares of all entries, number of entries and entropy of each record. ValueError for a body that
    is not of so many records."""
    high, bits, most = _sizes(header)
    fault, at = ValueError(f"{len(body)} bytes are not {records} records"), 0

    def take(count: int, dtype: str = "u1") -> np.ndarray:
        nonlocal at
        begin, at = at, at + count * np.dtype(dtype).itemsize
        if at > len(body):
            raise fault
        return np.frombuffer(body, dtype, count, begin)

    head_N = take(records, "<u2").astype(np.int64)
    distinct_N = (head_N & ((1 << (16 - bits)) - 1)) + 1
    entries = int(distinct_N.sum())
    id_E = take(entries, "<u2").astype(np.int32)
    if high:
        bit_EH = np.unpackbits(take(-(-entries * high // 8)), count=entries * high).reshape(-1, high)
        id_E += bit_EH @ (1 << np.arange(16, 16 + high, dtype=np.int32))
    if header.draws is None:
        share_E = np.exp(-_decoded(take(entries, "<u2"), _NATS, 16))
    else:
        several_E = np.unpackbits(take(-(-entries // 8)), count=entries).view(bool)
        share_E = np.ones(entries, np.float32)
        share_E[several_E] += take(int(several_E.sum()))
        share_E /= header.draws
    if at != len(body):
        raise fault
    return id_E, share_E, distinct_N, _decoded(head_N >> (16 - bits), most, bits)


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
    return _write(folder, "part", front, bodies, begin, np.array(keys, _KEY), place_M)


def merge(folder: Path) -> Path:
    """Write one index over all parts, which lookups then map, and remove earlier ones.

    It takes some 150 bytes of memory a block.
    """
    cache, earlier = Cache(folder, merged=False), list(folder.glob("index-*.kd"))
    front = MAGIC + cache.header.digest + _names([path.name for path in cache.parts])
    ((key_M, place_M),) = cache.tables
    path = _write(folder, "index", front, [], len(front), key_M, place_M)
    for other in earlier:
        if other != path:
            other.unlink()
    return path


def _names(names: list[str]) -> bytes:
    content = json_bytes(names)
    return len(content).to_bytes(4, "little") + content


def _check(key: bytes, tokens: int, body: bytes) -> int:
    return xxhash.xxh3_64_intdigest(key + tokens.to_bytes(4, "little") + body)


def _write(
    folder: Path,
    kind: str,
    front: bytes,
    bodies: Iterable[bytes],
    begin: int,
    key_M: np.ndarray,
    place_M: np.ndarray,
) -> Path:
    tail = len(key_M).to_bytes(8, "little") + begin.to_bytes(8, "little") + END
    digest = xxhash.xxh3_128(front)
    index = [np.ascontiguousarray(array).tobytes() for array in (key_M, place_M)]
    for part in (*index, tail):
        digest.update(part)
    path = folder / f"{kind}-{digest.hexdigest()}.kd"
    if not path.exists():
        with replacing(path) as stream:
            for part in (front, *bodies, *index, tail):
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
    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        os.close(self.number)


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
        rest = sorted(path for path in folder.glob("part-*.kd") if path.name not in set(names))
        self.parts = [*(folder / name for name in names), *rest]
        for path in self.parts[: len(names)]:
            if not path.is_file():
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
        """SHA-256 over the header and the names of the parts, which hold hashes of their content."""
        content = [asdict(self.header), sorted(path.name for path in self.parts)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

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
        # A block has no more bytes, whatever an index says.
        most = BLOCK * (2 + self.header.most * 8)
        body = os.pread(self._open(part).number, min(size, most), begin) if part < len(self.parts) else b""
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
