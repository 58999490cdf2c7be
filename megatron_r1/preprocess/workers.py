"""The first pass for one piece: its texts become tokens, in this process or in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data.indexed import best_dtype
from megatron_r1.data.provenance import ORIGIN, text_hashes
from megatron_r1.preprocess.documents import Piece
from megatron_r1.preprocess.encoder import COMPARED, Encoder, Gigatoken
from megatron_r1.preprocess.rows import parse, reject, text_of
from megatron_r1.preprocess.tokenizer import build_tokenizer

LONGEST = 2**31 - 1
"""Tokens of one document that an index can say."""


@dataclass(frozen=True)
class Encoded:
    """The documents and rejects of one key of a piece."""

    tokens: np.ndarray
    lengths: np.ndarray
    """[documents] int32."""
    origins: np.ndarray
    """[documents] of provenance.ORIGIN."""
    rejects: list[dict[str, Any]]
    skipped: Counter[str]
    """Of the piece, whatever the key."""


@dataclass(frozen=True)
class Job:
    """The settings of the first pass."""

    model: str | Path
    encoder: Encoder
    keys: Sequence[str]
    append_eod: bool
    workers: int
    reject_limit: int


def encode_piece(encoder: Encoder, piece: Piece, keys: Sequence[str], append_eod: bool) -> list[Encoded]:
    """Tokens of each document of a piece, for each key. A faulty document becomes a reject.

    Raises ValueError where the encoder's tokens are not the reference's.
    """
    skipped: Counter[str] = Counter()
    columns = [_Column(key, skipped) for key in keys]
    for number, row in enumerate(piece.rows, piece.first):
        try:
            record = parse(row, skipped)
        except ValueError as error:
            for column in columns:
                column.rejects.append(reject(piece.path, number, str(error), row))
            continue
        if record is None:
            continue
        for column in columns:
            try:
                text, data = text_of(record, column.key)
            except ValueError as error:
                column.rejects.append(reject(piece.path, number, str(error), row))
                continue
            column.texts.append(text)
            column.utf8.append(data)
            column.lines.append(number)
    return [_encode_column(encoder, piece, column, append_eod) for column in columns]


@dataclass
class _Column:
    """The texts and rejects of one key of a piece."""

    key: str
    skipped: Counter[str]
    texts: list[str] = field(default_factory=list)
    utf8: list[bytes] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)


def _encode_column(encoder: Encoder, piece: Piece, column: _Column, append_eod: bool) -> Encoded:
    tokenizer = encoder.tokenizer
    flat, counts = encoder.encode_batch(column.texts, column.utf8)
    origins = np.zeros(len(counts), dtype=ORIGIN)
    origins["hash"], origins["file"], origins["line"] = text_hashes(column.utf8), piece.input, column.lines
    if isinstance(encoder, Gigatoken):
        compared = origins["hash"][:, :4].copy().view("<u4").ravel() % COMPARED == 0
        ends = np.cumsum(counts)
        for i in np.flatnonzero(compared):
            if flat[ends[i] - counts[i] : ends[i]].tolist() != tokenizer.encode(column.texts[i]):
                raise ValueError(
                    f"{piece.path}:{column.lines[i]}: {encoder.name} and {tokenizer.library} give other "
                    f"tokens; take --encoder reference for this input"
                )
    lengths = np.where(counts, counts + append_eod, 0)
    good = (lengths > 0) & (lengths <= LONGEST)
    # Only where the end token also stands for what the vocabulary lacks: such a document would end itself.
    ended = np.searchsorted(np.cumsum(counts), np.flatnonzero(flat == tokenizer.eod), side="right")
    good[ended] = False
    if not good.all():
        for i in np.flatnonzero(~good):
            reason = f"{lengths[i]} tokens, more than an index can say" if lengths[i] else "no tokens"
            if i in ended:
                reason = f"text that becomes the end token, {tokenizer.eod}"
            excerpt = column.texts[i][:200].encode()
            column.rejects.append(reject(piece.path, column.lines[i], reason, excerpt))
        column.rejects.sort(key=lambda rejected: rejected["line"])
        flat = flat[np.repeat(good, counts)]
        origins, lengths = origins[good], lengths[good]
    if flat.dtype == np.uint32:
        # The same bits, or negative, which is caught next.
        flat = flat.view(np.int32)
    # A tokenizer that gives a token beyond its vocabulary is broken: say so, never wrap around.
    assert not flat.size or 0 <= flat.min() <= flat.max() < tokenizer.vocab_size
    flat = flat.astype(best_dtype(tokenizer.vocab_size), copy=False)
    if append_eod:
        flat = np.insert(flat, np.cumsum(lengths - 1), tokenizer.eod)
    return Encoded(flat, lengths.astype(np.int32), origins, column.rejects, column.skipped)


_worker: Callable[[Piece], list[Encoded]]
"""`encode_piece` of a worker process."""


def _start_worker(
    kind: str, model: str | Path, fast_model: str | None, keys: Sequence[str], append_eod: bool
) -> None:
    global _worker
    follow_parent()
    # A process a core already: no threads of the tokenizer's own.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = build_tokenizer(kind, model)
    encoder = Encoder(tokenizer) if fast_model is None else Gigatoken(tokenizer, fast_model)
    _worker = partial(encode_piece, encoder, keys=keys, append_eod=append_eod)


def follow_parent() -> None:
    """Make this a worker process: Ctrl-C is for its parent, and it ends when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Unlike the parent's number, this also tells of a parent that was gone before we asked.
    parent.join()
    os._exit(1)


def _work(piece: Piece) -> list[Encoded]:
    return _worker(piece)


def _until_mistake(pieces: Iterable[Piece], mistakes: list[Exception]) -> Iterator[Piece]:
    """The pieces that can be read. The pool's own are not lost with an input that cannot be read on."""
    try:
        yield from pieces
    except (ValueError, OSError) as error:
        mistakes.append(error)


def encode_in_order(job: Job, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, list[Encoded]]]:
    """Encode by worker processes; results come in the order of the pieces, a few at a time in memory."""
    if job.workers == 1:
        for piece in pieces:
            yield piece, encode_piece(job.encoder, piece, job.keys, job.append_eod)
        return
    # Spawned, not forked: the caller may hold threads or a device. Workers import no torch.
    context = multiprocessing.get_context("spawn")
    fast_model = job.encoder.model if isinstance(job.encoder, Gigatoken) else None
    start = job.encoder.tokenizer.kind, job.model, fast_model, job.keys, job.append_eod
    pool = ProcessPoolExecutor(job.workers, context, _start_worker, start)
    mistakes: list[Exception] = []
    submitted = ((piece, pool.submit(_work, piece)) for piece in _until_mistake(pieces, mistakes))
    try:
        waiting = deque(islice(submitted, 3 * job.workers))
        while waiting:
            waiting.extend(islice(submitted, 1))
            piece, future = waiting.popleft()
            yield piece, future.result()
        if mistakes:
            raise mistakes[0]
    except BrokenProcessPool:
        way_out = "run again with fewer --workers to go on"
        raise ChildProcessError(f"a worker process died, most often for want of memory; {way_out}") from None
    finally:
        pool.shutdown(cancel_futures=True)
