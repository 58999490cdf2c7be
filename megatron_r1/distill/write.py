"""Writing a teacher's cache: records of documents, in parts that appear whole.

A writer passes over documents that are in the folder, so a launch that was killed loses the part under way
and no more. The records of a document depend neither on the number of writers nor on the documents beside
it, up to the rounding of the teacher's own products. This file imports torch only to draw.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_r1.config import ObjectiveConfig
from megatron_r1.data.indexed import identity_of
from megatron_r1.distill.cache import BLOCK, Cache, merge, write_part
from megatron_r1.distill.describe import Described
from megatron_r1.distill.documents import Documents
from megatron_r1.distill.draws import Drawn, Header, draw, pack
from megatron_r1.run import ledger, stage
from megatron_r1.system.errors import rewording
from megatron_r1.system.terminal import Progress, say

if TYPE_CHECKING:
    from megatron_r1.distill.teacher import Teacher

PART = 1 << 17
"""Tokens of a part, about. A longer document is a part by itself."""
BYTES = 46
"""Of a token's record of 50 draws on text, about the most, before any is measured."""
CONTEXT = 8192
"""Of a cache, tokens, where the teacher's is longer."""
_SHARD = "cache teacher shard"


def header_of(
    teacher: Described,
    asked: ObjectiveConfig,
    draws: int | None,
    top_k: int | None,
    seed: int,
    context: int | None,
) -> Header:
    """The header of a cache of this teacher. context: None is the teacher's, at most `CONTEXT`.

    ValueError for a context that the teacher has not.
    """
    longest = teacher.longest - (teacher.bos is not None)
    if context is not None and context > longest:
        lead = ", one of them before each text" if teacher.bos is not None else ""
        fault = f"--context {context}: the context of {teacher.model} is {teacher.longest} tokens{lead}"
        raise ValueError(f"{fault}; lower it to {longest}, or leave it out")
    kind = (asked.temperature, draws, top_k, seed, teacher.bos, context or int(min(CONTEXT, longest)))
    return Header(teacher.identity, teacher.vocabulary_identity, teacher.tokens, *kind)


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
    found: dict[tuple[int, int], dict[int, Drawn]] = defaultdict(dict)
    whole = dict(zip(numbers.tolist(), documents.tokens(numbers), strict=True))
    parts = [(d, *piece) for d in whole for piece in pieces(len(whole[d]), header.context)]
    for n, offset, logits_NV in teacher.logits([whole[d][begin:end] for d, begin, _, end in parts]):
        d, begin, first, _ = parts[n]
        lo, hi = begin + offset, begin + offset + len(logits_NV)
        # A block's records come together, whatever the pieces and the teacher's batches.
        edges = [max(first, lo), *range(max(first, lo) // BLOCK * BLOCK + BLOCK, hi, BLOCK), hi]
        for at, to in pairwise(edges):
            if at < to:
                rows = logits_NV[at - lo : to - lo]
                with rewording(lambda error: f"{documents.name(d)}: {error}", ValueError):  # noqa: B023
                    found[d, at // BLOCK][at] = draw(rows, header, documents.hash_DH[d].tobytes(), at)
    for (d, block), drawn in sorted(found.items()):
        joined = Drawn(*map(np.concatenate, zip(*(drawn[at] for at in sorted(drawn)), strict=True)))
        yield documents.hash_DH[d].tobytes(), block * BLOCK, len(whole[d]), pack(header, joined)


def expected(draws: int | None, top_k: int | None) -> float:
    """Bytes of a token's record on text, about the most, before any is measured."""
    return BYTES * draws / 50 if draws else 2 + 4.2 * (top_k or 0)


def require_space(folder: Path, tokens: int, each: float) -> None:
    """OSError where the disk of a folder has no room for the records of so many tokens, of `each` bytes."""
    status = os.statvfs(next(path for path in (folder, *folder.absolute().parents) if path.exists()))
    needed, free = tokens * each / 1e9, status.f_bavail * status.f_frsize / 1e9
    if free < needed:
        fault = f"{tokens:,} tokens of {each:.1f} bytes take {needed:.4g} GB, and {free:.4g} GB are free"
        raise OSError(f"{folder}: {fault}; make room and go on, name another folder, or take fewer --draws")


def covered(folder: Path, documents: Documents) -> np.ndarray:
    """Whether all records of each document are there, bool [D]. Raises as `Cache` and `Cache.has`."""
    if not (folder / "header.json").exists():
        return np.zeros(len(documents), bool)
    return Cache(folder).has(documents.hash_DH, documents.length_D) >= documents.length_D


def write(
    documents: Documents, teacher: Teacher, header: Header, folder: Path, ranks: int = 1, show: bool = True
) -> None:
    """Write the records of this writer's documents that the folder lacks, part by part.

    ranks: writers of this launch, for the space that is needed. Raises OSError for a full disk before a part
    is begun, and ValueError as `records`. The parts before stay.
    """
    left, size, done = documents.only(~covered(folder, documents)), 0, 0
    name = f"teacher cache, 1 of {ranks} ranks" if ranks > 1 else "teacher cache"
    with Progress(name, left.total, "tokens", show=show) as progress:
        for numbers in groups(left.length_D):
            each = size / done if done else expected(header.draws, header.top_k)
            require_space(folder, (left.total - done) * ranks, each)
            size += write_part(folder, header, records(teacher, header, left, numbers)).stat().st_size
            done += (tokens := int(left.length_D[numbers].sum()))
            progress.advance(tokens, f"{size / done:.1f} bytes a token")


def finish(
    documents: Documents, model: str, folder: Path, tokens: int, devices: int, shard: tuple[int, int] | None
) -> None:
    """Say which of the documents are covered, and add the launch's line to the folder's ledger.

    Without `shard` one index is written first, and the outputs of the shards' lines are inputs of this one.
    tokens: written by this launch. model: the teacher's name.
    """
    if shard is None:
        merge(folder)
    cache, there_D, wanted = Cache(folder), covered(folder, documents), documents.by_source()
    for name, there in documents.by_source(documents.length_D * there_D).items():
        say(f"{name}: records of {there:,} of {wanted[name]:,} tokens", result=True)
    say(f"{folder}: records of {int(there_D.sum()):,} of {len(documents):,} documents", result=True)
    pairs = [documents.corpora[k].prefix for k in np.unique(documents.source_D)]
    inputs = {model: cache.header.teacher} | {str(prefix): identity_of(prefix) for prefix in pairs}
    name, output = ("cache teacher", f"{folder}") if shard is None else (_SHARD, f"{folder} {shard}")
    for line in ledger.read(folder) if shard is None else ():
        inputs |= line["outputs"] if line["stage"] == _SHARD else {}
    made = {output: cache.identity}
    stage.finish(folder, name, inputs=inputs, outputs=made, tokens=tokens, devices=devices)
