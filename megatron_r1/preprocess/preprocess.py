"""Documents to indexed datasets: JSONL, parquet or Hugging Face datasets in, Megatron's `.bin`/`.idx` out.

Two passes. The first encodes in input order into `PREFIX.partial/`, by worker processes that are handed
pieces of about a megabyte; a journal there says how far it got, so that a killed run goes on from its last
commit. The second copies the documents in a shuffled order (by seed and document number alone) into the
final pair, with the origin of each beside it (`provenance.py`); without a shuffle there is nothing to copy,
and the tokens of the first pass become the `.bin`. Neither workers nor interruptions change a
byte of the result, and memory does not grow with the input, but for 40 bytes a document.

What cannot become a document (bad JSON, no such key, no string, broken UTF-8, no tokens) is written with
file and line to `PREFIX_KEY_rejects.jsonl`; more than `reject_limit` of them stop the run.

Across nodes, shard i of n encodes an equal range of the inputs' bytes, in input order, into a pair of its
own (`PREFIX_shard-i-of-n_KEY_document`). `merge` then makes the second pass over all of them: the result is
that of one run without shards, byte for byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_r1.data.indexed import best_dtype, with_suffix
from megatron_r1.preprocess.documents import (
    Input,
    Piece,
    cut,
    digest,
    identity,
    open_input,
    parse,
    piece_rule,
    text_of,
)
from megatron_r1.preprocess.encoder import choose
from megatron_r1.preprocess.store import Stored, alone, finish, finished, refuse_empty, shard_prefix
from megatron_r1.preprocess.tokenizer import Tokenizer, build_tokenizer
from megatron_r1.preprocess.workers import Encoded, Job, encode_in_order
from megatron_r1.system.files import naming
from megatron_r1.system.terminal import Progress, say

FORMAT = 1
"""Goes up when the same input and options would give other bytes."""
COMMIT_BYTES, COMMIT_SECONDS = 1 << 23, 1.0
_JOURNAL = 2
"""Goes up when a journal of before could not be continued."""
_KINDS = ("tokens", "lengths", "origins", "rejects")
_SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS = 64, 1 << 19


class TooManyRejectsError(ValueError):
    """More documents are bad than was said to be tolerated."""


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_type: str,
    tokenizer_model: str | Path,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
    seed: int | None = 1234,
    reject_limit: int = 100,
    encoder: str = "auto",
    shard: tuple[int, int] | None = None,
    check: bool = False,
    log: Callable[[str], None] = say,
) -> dict[str, dict[str, Any]]:
    """Write `{output_prefix}_{key}_document.{bin,idx,docs.npy,json}` for each key; returns the sidecars by
    prefix.

    seed: of the document shuffle; None keeps the input order, which gives the very bytes of Megatron's own
    tool. reject_limit: documents of one key that may be rejected. encoder: "auto" or "reference". shard:
    (i, n) encodes the i-th of n parts for `merge`, with line numbers counted from where the part begins.
    Outputs that match the inputs and options are left as they are. check: only log what would be done; the
    sidecars are those that are there. Errors: ValueError, also where no
    document is left (but for a shard); FileNotFoundError; OSError where the disk is full.
    """
    if workers < 1 or reject_limit < 0 or not inputs or not json_keys or encoder not in ("auto", "reference"):
        raise ValueError(
            f"workers={workers}, reject_limit={reject_limit}, {len(inputs)} inputs, {len(json_keys)} keys, "
            f"encoder={encoder}: take at least one worker, input and key, no negative limit, and as encoder "
            f"auto or reference"
        )
    began = time.monotonic()
    sources = [open_input(name) for name in inputs]
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model)
    about = _about(tokenizer, append_eod, seed)
    if shard is not None:
        if not 0 <= shard[0] < shard[1]:
            raise ValueError(f"shard {shard[0]} of {shard[1]}: the first is 0, the last {shard[1] - 1}")
        if len({source.name for source in sources}) < len(sources):
            raise ValueError("an input is given twice, which shards cannot tell apart")
        about |= {"seed": None, "shard": list(shard), "merged_seed": seed}
        output_prefix = shard_prefix(output_prefix, *shard)
    prefixes = {key: with_suffix(output_prefix, f"_{key}_document") for key in json_keys}
    work = with_suffix(output_prefix, ".partial")
    if check:
        there = {p: finished(p, {**about, "key": k}, sources) for k, p in prefixes.items()}
        for line in _told(sources, tokenizer, there, work):
            log(line)
        return {str(prefix): sidecar for prefix, sidecar in there.items() if sidecar}
    with alone(work, log):
        done = {key: finished(prefix, {**about, "key": key}, sources) for key, prefix in prefixes.items()}
        if all(done.values()):
            log(f"already done: {', '.join(f'{p}.bin' for p in prefixes.values())}")
            # Of a run that was killed at its very end.
            shutil.rmtree(work, ignore_errors=True)
            return {str(prefixes[key]): sidecar for key, sidecar in done.items() if sidecar}
        for prefix in prefixes.values():
            ours = with_suffix(prefix, ".json").exists() or (work / "journal").exists()
            if with_suffix(prefix, ".bin").exists() and not ours:
                raise ValueError(
                    f"{prefix}.bin is there without {prefix.name}.json, so another tool made it; "
                    f"remove it or choose another --output-prefix"
                )
        try:
            stats = [identity(source) for source in sources]
            ranges = cut(sources, shard)
            sample = _sample(sources, ranges, json_keys)
            chosen, why = choose(tokenizer, sample, encoder)
            log(f"encoder: {why}")
            job = Job(tokenizer_model, chosen, json_keys, append_eod, workers, reject_limit)
            header = {
                **about,
                "inputs": stats,
                "keys": list(json_keys),
                "pieces": piece_rule(),
            }
            # Unshuffled, the tokens are in their final order: they become the .bin as they are.
            with contextlib.closing(_Journal(work, json_keys, header, about["seed"] is None)) as journal:
                lines = _encode_all(job, journal, sources, ranges, log)
                journal.commit()
            # Those of shards are hashed once, when they are merged.
            digests = [digest(source) if shard is None else None for source in sources]
            if [identity(source) for source in sources] != stats:
                raise ValueError("an input changed while it was read; run again when it is complete")
            about["inputs"] = [{**stat, "sha256": d} for stat, d in zip(stats, digests, strict=True)]
            if shard is not None:
                about["lines"] = lines
            dtype = np.dtype(about["dtype"])
            stored = {
                key: Stored.of_journal(work / str(k), dtype, journal.sha256(key))
                for k, key in enumerate(json_keys)
            }
            rejects = {key: with_suffix(output_prefix, f"_{key}_rejects.jsonl") for key in json_keys}
            if shard is None:
                for key in json_keys:
                    refuse_empty([stored[key]], key, rejects[key], about["inputs"])
            sidecars = {}
            for key, prefix in prefixes.items():
                said = {**about, "key": key, "encoder": chosen.name}
                sidecars[str(prefix)] = finish([stored[key]], prefix, rejects[key], said, began, log)
            shutil.rmtree(work)
            return sidecars
        except ChildProcessError:
            # What is encoded is good: the next run goes on from there.
            raise
        except (TooManyRejectsError, OSError):
            # Hours of encoding may be in it: with room made or the limit raised, the next run goes on.
            raise
        except ValueError:
            shutil.rmtree(work, ignore_errors=True)
            raise


def _told(
    sources: Sequence[Input], tokenizer: Tokenizer, there: dict[Path, dict[str, Any] | None], work: Path
) -> Iterator[str]:
    """What a run would do, a line each for inputs, tokenizer and every output."""
    for source in sources:
        yield f"input {source.name}: {source.size:,} bytes"
    dtype = best_dtype(tokenizer.vocab_size)
    fingerprint = tokenizer.fingerprint()[:12]
    yield f"tokenizer {tokenizer.kind} {fingerprint}: {tokenizer.vocab_size:,} tokens, stored as {dtype}"
    for prefix, sidecar in there.items():
        if sidecar:
            said = f"done before, {sidecar['documents']:,} documents, {sidecar['tokens']:,} tokens"
        elif with_suffix(prefix, ".bin").exists():
            made = with_suffix(prefix, ".json").exists()
            said = "of other inputs or options: is replaced" if made else "another tool's: is refused"
        else:
            said = "begun, goes on" if (work / "journal").exists() else "is written"
        yield f"output {prefix}.bin: {said}"


def _about(tokenizer: Tokenizer, append_eod: bool, seed: int | None) -> dict[str, Any]:
    """What decides the bytes, beside the inputs."""
    return {
        "format": FORMAT,
        "tokenizer_type": tokenizer.kind,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "append_eod": append_eod,
        "dtype": best_dtype(tokenizer.vocab_size).name,
        "seed": seed,
    }


def _sample(sources: Sequence[Input], ranges: Sequence[tuple[int, int]], keys: Sequence[str]) -> list[str]:
    """Documents from the beginning of each of the first inputs, to try an encoder on."""
    found: list[str] = []
    for number, (source, (lo, hi)) in enumerate(zip(sources[:8], ranges, strict=False)):
        piece = next(source.pieces(number, keys, lo, hi), None)
        rows = piece.rows if piece else []
        for row in rows[:: max(1, 8 * len(rows) // _SAMPLE_DOCUMENTS)]:
            with contextlib.suppress(ValueError):
                record = parse(row)
                found += [text_of(record, key)[0][:65536] for key in keys]
    ends = np.cumsum([len(text) for text in found])
    return found[: int(np.searchsorted(ends, _SAMPLE_CHARACTERS)) + 1]


class _Journal:
    """`PREFIX.partial/`: for each key tokens, lengths, origins and rejects; a line a commit.

    Pieces are committed together, since the system takes a few large writes in a quarter of the time of
    many small ones; at most COMMIT_SECONDS of work or COMMIT_BYTES of tokens are lost to a kill. Opening it
    again with the same header cuts everything back to the last whole line. hashed: keep a SHA-256 of each
    key's tokens.
    """

    def __init__(self, work: Path, keys: Sequence[str], header: dict[str, Any], hashed: bool):
        self.keys = keys
        self.pieces = 0
        first = json.dumps({"journal": _JOURNAL, **header})
        path = work / "journal"
        paths = {(key, kind): work / f"{k}.{kind}" for k, key in enumerate(keys) for kind in _KINDS}
        last = self._last_line(path, first, list(paths.values()))
        if last is None:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        self._files = {which: _open(path) for which, path in paths.items()}
        self._log = _open(path)
        sizes = [0] * len(paths)
        if last is None:
            with naming(work):
                self._log.write(first.encode() + b"\n")
                self._log.flush()
        else:
            self.pieces, sizes, kept = last
            for stream, size in zip(self._files.values(), sizes, strict=True):
                stream.truncate(size)
            self._log.truncate(kept)
        self._added, self._committed = (self.pieces, sizes), self.pieces
        self._gathered, self._begun = 0, time.monotonic()
        self._hashes = {}
        if hashed:
            for key in keys:
                with open(paths[key, "tokens"], "rb") as stream:
                    self._hashes[key] = hashlib.file_digest(stream, "sha256")

    @staticmethod
    def _last_line(path: Path, header: str, files: Sequence[Path]) -> tuple[int, list[int], int] | None:
        """Pieces done, file sizes then, and length of the journal up to there."""
        if not path.exists():
            return None
        lines = path.read_bytes().split(b"\n")[:-1]
        if len(lines) < 2 or lines[0] != header.encode():
            return None
        pieces, sizes = json.loads(lines[-1])
        # After a loss of power the system may know less than the journal.
        for file, size in zip(files, sizes, strict=True):
            if not file.is_file() or file.stat().st_size < size:
                return None
        return pieces, sizes, sum(len(line) + 1 for line in lines)

    def rejects(self, key: str) -> int:
        with open(self._files[key, "rejects"].name, "rb") as stream:
            return sum(1 for _ in stream)

    def sha256(self, key: str) -> str | None:
        """Of the key's tokens, where they are hashed."""
        return self._hashes[key].hexdigest() if self._hashes else None

    def add(self, encoded: list[Encoded]) -> None:
        with naming(Path(self._log.name).parent):
            for key, found in zip(self.keys, encoded, strict=True):
                self._files[key, "tokens"].write(found.tokens.data)
                self._files[key, "lengths"].write(found.lengths.data)
                self._files[key, "origins"].write(found.origins.data)
                for rejected in found.rejects:
                    line = json.dumps(rejected, ensure_ascii=False)
                    self._files[key, "rejects"].write(line.encode() + b"\n")
                self._gathered += found.tokens.nbytes
                if self._hashes:
                    self._hashes[key].update(found.tokens.data)
        self.pieces += 1
        # At once, and only now: what an interrupted call has written is cut off again.
        self._added = self.pieces, [stream.tell() for stream in self._files.values()]
        if self._gathered >= COMMIT_BYTES or time.monotonic() - self._begun >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """What has been added stays."""
        pieces, sizes = self._added
        if pieces > self._committed:
            with naming(Path(self._log.name).parent):
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


def _open(path: Path) -> IO[bytes]:
    # Room for what is gathered and one piece more, so that a commit is one write.
    return open(path, "ab", buffering=2 * COMMIT_BYTES)


def _encode_all(
    job: Job,
    journal: _Journal,
    sources: Sequence[Input],
    ranges: Sequence[tuple[int, int]],
    log: Callable[[str], None],
) -> list[int]:
    """Returns the number of lines or rows read of each input."""
    lines = [0] * len(sources)
    rejected = Counter({key: journal.rejects(key) for key in journal.keys})
    skipped = journal.pieces
    if skipped:
        log(f"going on after {skipped} pieces of an interrupted run")

    def read() -> Iterator[Piece]:
        for number, (source, (lo, hi)) in enumerate(zip(sources, ranges, strict=True)):
            for piece in source.pieces(number, job.keys, lo, hi):
                lines[number] = piece.first + len(piece.rows) - 1
                yield piece

    pieces = read()
    for _ in range(skipped):
        next(pieces)
    sizes = [hi - lo for lo, hi in ranges]
    with Progress("encode", -(-sum(sizes) // 1_000_000), "MB") as progress:
        for piece, encoded in encode_in_order(job, pieces):
            journal.add(encoded)
            past = sum(sizes[: piece.input]) + min(
                piece.position - ranges[piece.input][0], sizes[piece.input]
            )
            progress.advance(past // 1_000_000 - progress.done)
            for key, found in zip(journal.keys, encoded, strict=True):
                rejected[key] += len(found.rejects)
                if rejected[key] > job.reject_limit:
                    last = "; ".join(f"{r['file']}:{r['line']}: {r['reason']}" for r in found.rejects[-3:])
                    raise TooManyRejectsError(
                        f"more than {job.reject_limit} documents rejected for key {key!r}, the last {last}; "
                        f"mend the input or raise --reject-limit"
                    )
    return lines
