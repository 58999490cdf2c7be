"""Writing a teacher's cache: records of documents, in parts that appear whole.

A writer passes over documents that are in the folder, so a launch that was killed loses the part under way and
no more. The records of a document depend neither on the number of writers nor on the documents beside it, up to
the rounding of the teacher's own products. This file imports torch only to draw.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_r1.config import ObjectiveConfig
from megatron_r1.data.indexed import identity_of
from megatron_r1.distill.cache import BLOCK, Cache, Drawn, Header, draw, merge, pack, write_part
from megatron_r1.distill.describe import Described
from megatron_r1.distill.documents import Documents
from megatron_r1.distill.vocabulary import identity
from megatron_r1.run import ledger, stage
from megatron_r1.system.errors import rewording
from megatron_r1.system.terminal import Progress, say

if TYPE_CHECKING:
    from megatron_r1.distill.teacher import Teacher

PART = 1 << 17
"""Tokens of a part, about. A longer document is a part by itself."""
BYTES = 46
"""Of a token's record of 50 draws, at most about, before any is measured."""
CONTEXT = 8192
"""Of a cache, tokens, where the teacher's is longer."""


def pieces(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of the pieces of a document: the teacher reads tokens [begin, end), and the records
    of offsets [first, end) are of this piece.

    A piece has `context` tokens, and begins a quarter of that before the end of the one before.
    """
    begin, first, end = 0, 0, min(length, context)
    yield begin, first, end
    while end < length:
        begin += context - context // 4
        first, end = end, min(length, begin + context)
        yield begin, first, end


def groups(length_D: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers of the documents of each part, in order: whole documents that begin within `PART` tokens."""
    part_D = (np.cumsum(length_D) - length_D) // PART
    if len(part_D):
        yield from np.split(np.arange(len(part_D)), np.flatnonzero(np.diff(part_D)) + 1)


def records(
    teacher: Teacher, header: Header, documents: Documents, numbers: np.ndarray
) -> Iterator[tuple[bytes, int, int, bytes]]:
    """Blocks of all records of some documents, as `write_part` takes them, by document and offset.

    ValueError, which names document and source, for logits that are not finite.
    """
    length = documents.length_D
    parts = [(d, *piece) for d in numbers.tolist() for piece in pieces(int(length[d]), header.context)]
    streams = dict(zip(numbers.tolist(), documents.tokens(numbers), strict=True))
    found: dict[tuple[int, int], dict[int, Drawn]] = defaultdict(dict)
    for n, at, logits_NV in teacher.logits([streams[d][begin:end] for d, begin, _, end in parts]):
        d, begin, first, _ = parts[n]
        at += begin
        lo, hi = max(first, at), at + len(logits_NV)
        with rewording(lambda error, d=d: f"{documents.name(d)}: {error}"):
            while lo < hi:
                to = min(hi, (lo // BLOCK + 1) * BLOCK)
                key = documents.hash_D16[d].tobytes()
                found[d, lo // BLOCK][lo] = draw(logits_NV[lo - at : to - at], header, key, lo)
                lo = to
    for (d, block), drawn in sorted(found.items()):
        joined = Drawn(*(np.concatenate(of) for of in zip(*(drawn[lo] for lo in sorted(drawn)), strict=True)))
        yield documents.hash_D16[d].tobytes(), block * BLOCK, int(length[d]), pack(header, joined)


def require_space(folder: Path, tokens: int, each: float) -> None:
    """OSError where the disk of a folder has no room for the records of so many tokens, of `each` bytes."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    status = os.statvfs(there)
    needed, free = tokens * each / 1e9, status.f_bavail * status.f_frsize / 1e9
    if free < needed:
        fault = f"{folder}: {tokens:,} tokens of {each:.1f} bytes need {needed:.4g} GB, and {free:.4g} GB are free"
        raise OSError(f"{fault}; make room and run this again, name another folder, or take fewer --draws")


def expected(draws: int | None, top_k: int | None) -> float:
    """Bytes of a token's record before any is measured: at most about."""
    return BYTES * draws / 50 if draws else 2 + 4.2 * (top_k or 0)


def write(
    documents: Documents, teacher: Teacher, header: Header, folder: Path, ranks: int = 1, show: bool = True
) -> None:
    """Write the records of this writer's documents that the folder lacks, part by part.

    ranks: writers of this launch, for the space that is needed. Raises OSError for a full disk before a part
    is begun, and ValueError as `records`; the parts before stay.
    """
    left = documents.only(~covered(Cache(folder), documents))
    size, each = 0, expected(header.draws, header.top_k)
    with Progress("teacher cache", documents.total, "tokens", documents.total - left.total, show) as progress:
        done = 0
        for numbers in groups(left.length_D):
            require_space(folder, (left.total - done) * ranks, each)
            path = write_part(folder, header, records(teacher, header, left, numbers))
            tokens = int(left.length_D[numbers].sum())
            done, size = done + tokens, size + path.stat().st_size
            each = size / done
            progress.advance(tokens, f"{each:.1f} bytes a token")


def covered(cache: Cache, documents: Documents) -> np.ndarray:
    """Whether all records of each document are there, bool [D]."""
    return cache.has(documents.hash_D16, documents.length_D) >= documents.length_D


def header_of(
    teacher: Described, asked: ObjectiveConfig, draws: int | None, top_k: int | None, seed: int, context: int | None
) -> Header:
    """The header of a cache of this teacher. context: None is the teacher's, at most `CONTEXT`.

    ValueError for a context that the teacher has not.
    """
    longest = teacher.longest - (teacher.bos is not None)
    if context is not None and context > longest:
        fault = f"--context {context:,}: the context of {teacher.model} is {teacher.longest:,} tokens"
        lead = ", one of them before each text" if teacher.bos is not None else ""
        raise ValueError(f"{fault}{lead}; lower it to {longest:,}, or leave it out")
    context = context or int(min(CONTEXT, longest))
    vocabulary = identity(teacher.vocabulary)
    return Header(teacher.identity, vocabulary, teacher.tokens, asked.temperature, draws, top_k, seed, teacher.bos, context)


def finish(
    documents: Documents, model: str, folder: Path, tokens: int, devices: int, shard: tuple[int, int] | None
) -> None:
    """Say which of the documents are covered, and add the launch's line to the folder's ledger.

    Without `shard`, one index is written first, and the shards' lines are inputs of this one. tokens: written
    by this launch. model: the teacher's name.
    """
    if shard is None:
        merge(folder)
    cache = Cache(folder)
    there_D = covered(cache, documents)
    lacking = documents.only(~there_D).by_source()
    for name, of in documents.by_source().items():
        say(f"{name}: {of - lacking.get(name, 0):,} of {of:,} tokens are covered", result=True)
    there = documents.only(there_D)
    say(f"{folder}: records of {there.total:,} of {documents.total:,} tokens, {len(there):,} documents", result=True)
    pairs = [documents.corpora[k].prefix for k in np.unique(documents.source_D)]
    inputs = {model: cache.header.teacher} | {str(prefix): identity_of(prefix) for prefix in pairs}
    outputs, name = {str(folder): cache.identity}, "cache teacher"
    if shard is not None:
        outputs, name = {f"{folder} {shard[0]}/{shard[1]}": cache.identity}, "cache teacher shard"
    else:
        shards = (line for line in ledger.read(folder) if line["stage"] == "cache teacher shard")
        inputs |= {path: value for line in shards for path, value in line["outputs"].items()}
    if tokens or shard is None:
        stage.finish(folder, name, inputs=inputs, outputs=outputs, tokens=tokens, devices=devices)
