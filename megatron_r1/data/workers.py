"""The first pass for one piece: its texts become tokens, in this process or in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data.documents import Piece, parse, reject, text_of
from megatron_r1.data.encoder import COMPARED, Encoder, Gigatoken
from megatron_r1.data.indexed import best_dtype
from megatron_r1.data.provenance import ORIGIN, text_hash
from megatron_r1.data.tokenizer import Tokenizer, build_tokenizer

LONGEST = 2**31 - 1
"""Tokens of one document that an index can say."""


@dataclass(frozen=True)
class Encoded:
    """What one key of a piece became."""

    tokens: np.ndarray
    lengths: np.ndarray
    """[documents] int32."""
    origins: np.ndarray
    """[documents] of provenance.ORIGIN."""
    rejects: list[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """What stays the same from piece to piece."""

    tokenizer: Tokenizer
    model: str | Path
    encoder: Encoder
    keys: Sequence[str]
    append_eod: bool
    workers: int
    reject_limit: int


def encode_piece(
    tokenizer: Tokenizer, encoder: Encoder, piece: Piece, keys: Sequence[str], append_eod: bool
) -> list[Encoded]:
    """Tokens of each document of a piece, for each key. What is wrong with a document is a reject.

    Raises ValueError only where the encoder's tokens are not the reference's.
    """
    texts: list[list[str]] = [[] for _ in keys]
    origins: list[list[tuple[bytes, int, int]]] = [[] for _ in keys]
    rejects: list[list[dict[str, Any]]] = [[] for _ in keys]
    for number, row in enumerate(piece.rows, piece.first):
        try:
            record = parse(row)
        except ValueError as error:
            for into in rejects:
                into.append(reject(piece.path, number, str(error), row))
            continue
        for k, key in enumerate(keys):
            try:
                text, data = text_of(record, key)
            except ValueError as error:
                rejects[k].append(reject(piece.path, number, str(error), row))
                continue
            texts[k].append(text)
            origins[k].append((text_hash(data), piece.input, number))
    dtype = best_dtype(tokenizer.vocab_size)
    found = []
    for k in range(len(keys)):
        end = np.array([tokenizer.eod], dtype=np.uint32)
        lengths = np.zeros(len(texts[k]), dtype=np.int64)
        flat: list[np.ndarray] = []
        for i, tokens in enumerate(encoder.encode_batch(texts[k])):
            name, _, number = origins[k][i]
            if isinstance(encoder, Gigatoken) and int.from_bytes(name[:4], "little") % COMPARED == 0:
                _compare(tokenizer, encoder, texts[k][i], tokens, f"{piece.path}:{number}")
            length = len(tokens) + append_eod if len(tokens) else 0
            if not length or length > LONGEST:
                reason = "no tokens" if not length else f"{length} tokens, more than an index can say"
                rejects[k].append(reject(piece.path, number, reason, texts[k][i][:200].encode()))
                continue
            lengths[i] = length
            flat += (tokens, end) if append_eod else (tokens,)
        stream = np.concatenate(flat) if flat else np.empty(0, np.int64)
        # A tokenizer that gives a token beyond its vocabulary is broken: say so, never wrap around.
        assert not stream.size or 0 <= stream.min() <= stream.max() < tokenizer.vocab_size
        rejects[k].sort(key=lambda rejected: rejected["line"])
        kept = np.flatnonzero(lengths)
        records = np.zeros(len(kept), dtype=ORIGIN)
        if len(kept):
            hashes, records["file"], records["line"] = zip(*(origins[k][i] for i in kept), strict=True)
            records["hash"] = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 16)
        counts = lengths[kept].astype(np.int32)
        # Same bits: what int32 could not hold has been refused above.
        stream = (
            stream.view(dtype) if stream.dtype == np.uint32 and dtype == np.int32 else stream.astype(dtype)
        )
        found.append(Encoded(stream, counts, records, rejects[k]))
    return found


def _compare(tokenizer: Tokenizer, encoder: Encoder, text: str, tokens: np.ndarray, place: str) -> None:
    if tokens.tolist() != tokenizer.encode(text):
        raise ValueError(
            f"{place}: {encoder.name} and {tokenizer.library} give other tokens; "
            f"take --encoder reference for this input"
        )


_worker: tuple[Tokenizer, Encoder, Sequence[str], bool] | None = None


def _start_worker(
    kind: str, model: str | Path, fast_model: str | None, keys: Sequence[str], append_eod: bool
) -> None:
    global _worker
    # Ctrl-C is for the main process; and when that is killed, its workers must not stay behind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A process a core already: no threads of the tokenizer's own.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = build_tokenizer(kind, model)
    encoder = Encoder(tokenizer) if fast_model is None else Gigatoken(tokenizer, fast_model)
    _worker = tokenizer, encoder, keys, append_eod


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Unlike the parent's number, this also tells of a parent that was gone before we asked.
    parent.join()
    os._exit(1)


def _work(piece: Piece) -> list[Encoded]:
    assert _worker is not None
    tokenizer, encoder, keys, append_eod = _worker
    return encode_piece(tokenizer, encoder, piece, keys, append_eod)


def encode_in_order(job: Job, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, list[Encoded]]]:
    """Encode by worker processes; results come in the order of the pieces, a few at a time in memory."""
    if job.workers == 1:
        for piece in pieces:
            yield piece, encode_piece(job.tokenizer, job.encoder, piece, job.keys, job.append_eod)
        return
    # Spawned, not forked: the caller may hold threads or a device. Workers import no torch.
    context = multiprocessing.get_context("spawn")
    waiting: deque[tuple[Piece, Future[list[Encoded]]]] = deque()
    fast_model = job.encoder.model if isinstance(job.encoder, Gigatoken) else None
    start = job.tokenizer.kind, job.model, fast_model, job.keys, job.append_eod
    pool = ProcessPoolExecutor(job.workers, context, _start_worker, start)
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(_work, piece)))
            if len(waiting) > 3 * job.workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process died, most often for want of memory; run again with fewer --workers to go on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
