"""Documents to indexed datasets: JSONL, parquet or Hugging Face datasets in, Megatron's `.bin`/`.idx` out.

Two passes. The first encodes in input order into `PREFIX.partial/`, by worker processes that are handed
pieces of about a megabyte; a journal there says how far it got, so that a killed run goes on from its last
piece. The second copies the documents in a shuffled order (by seed and document number alone) into the
final pair, with the origin of each beside it (`provenance.py`). Neither workers nor interruptions change a
byte of the result, and memory does not grow with the input, but for 40 bytes a document.

What cannot become a document (bad JSON, no such key, no string, broken UTF-8, no tokens) is written with
file and line to `PREFIX_KEY_rejects.jsonl`; more than `reject_limit` of them stop the run.

Across nodes, shard i of n encodes an equal range of the inputs' bytes, in input order, into a pair of its
own (`PREFIX_shard-i-of-n_KEY_document`). `merge` then makes the second pass over all of them: the result is
that of one run without shards, byte for byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_r1.data.documents import (
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
from megatron_r1.data.encoder import choose
from megatron_r1.data.indexed import best_dtype, with_suffix
from megatron_r1.data.store import Stored, alone, finish, finished, say, shard_prefix
from megatron_r1.data.tokenizer import Tokenizer, build_tokenizer
from megatron_r1.data.workers import Encoded, Job, encode_in_order
from megatron_r1.progress import Progress
from megatron_r1.run_dir import naming

FORMAT = 1
"""Goes up when the same input and options would give other bytes."""
_SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS = 64, 1 << 19


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
    log: Callable[[str], None] = say,
) -> dict[str, dict[str, Any]]:
    """Write `{output_prefix}_{key}_document.{bin,idx,docs.npy,json}` for each key; returns the sidecars by
    prefix.

    seed: of the document shuffle; None keeps the input order, which gives the very bytes of Megatron's own
    tool. reject_limit: documents of one key that may be rejected. encoder: "auto" or "reference". shard:
    (i, n) encodes the i-th of n parts for `merge`, with line numbers counted from where the part begins.
    Outputs that match the inputs and options are left as they are. Errors: ValueError, FileNotFoundError;
    OSError where the disk is full.
    """
    if workers < 1 or reject_limit < 0 or not inputs or not json_keys or encoder not in ("auto", "reference"):
        raise ValueError(
            f"workers={workers}, reject_limit={reject_limit}, {len(inputs)} inputs, {len(json_keys)} keys, "
            f"encoder={encoder}: take at least one worker, input and key, no negative limit, and as encoder "
            f"auto or reference"
        )
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
    with alone(work, log):
        done = {key: finished(prefix, {**about, "key": key}, sources) for key, prefix in prefixes.items()}
        if all(done.values()):
            log(f"already done: {', '.join(f'{p}.bin' for p in prefixes.values())}")
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
            job = Job(tokenizer, tokenizer_model, chosen, json_keys, append_eod, workers, reject_limit)
            header = {
                **about,
                "inputs": stats,
                "keys": list(json_keys),
                "pieces": piece_rule(),
            }
            with contextlib.closing(_Journal(work, json_keys, header)) as journal:
                lines = _encode_all(job, journal, sources, ranges, log)
            # Those of shards are hashed once, when they are merged.
            digests = [digest(source) if shard is None else None for source in sources]
            if [identity(source) for source in sources] != stats:
                raise ValueError("an input changed while it was read; run again when it is complete")
            about["inputs"] = [{**stat, "sha256": d} for stat, d in zip(stats, digests, strict=True)]
            if shard is not None:
                about["lines"] = lines
            sidecars = {}
            for k, (key, prefix) in enumerate(prefixes.items()):
                rejects = with_suffix(output_prefix, f"_{key}_rejects.jsonl")
                stored = Stored.of_journal(work / str(k), np.dtype(about["dtype"]))
                said = {**about, "key": key, "encoder": chosen.name}
                sidecars[str(prefix)] = finish([stored], prefix, rejects, said, log)
            shutil.rmtree(work)
            return sidecars
        except ChildProcessError:
            # What is encoded is good: the next run goes on from there.
            raise
        except (ValueError, OSError):
            shutil.rmtree(work, ignore_errors=True)
            raise


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


# The first pass: encoded documents in input order, and how far it got


class _Journal:
    """`PREFIX.partial/`: for each key tokens, lengths, origins and rejects; a line a finished piece.

    Opening it again with the same header cuts everything back to the last whole line.
    """

    def __init__(self, work: Path, keys: Sequence[str], header: dict[str, Any]):
        self.keys = keys
        self.pieces = 0
        first = json.dumps(header)
        path = work / "journal"
        last = self._last_line(path, first)
        if last is None:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        self._files = {
            (key, kind): _open(work / f"{k}.{kind}")
            for k, key in enumerate(keys)
            for kind in ("tokens", "lengths", "origins", "rejects")
        }
        if last is not None:
            self.pieces, sizes, kept = last
            for stream, size in zip(self._files.values(), sizes, strict=True):
                stream.truncate(size)
            os.truncate(path, kept)
        self._log = _open(path)
        if last is None:
            with naming(work):
                self._log.write(first.encode() + b"\n")
                self._log.flush()

    @staticmethod
    def _last_line(path: Path, header: str) -> tuple[int, list[int], int] | None:
        """Pieces done, file sizes then, and length of the journal up to there."""
        if not path.exists():
            return None
        lines = path.read_bytes().split(b"\n")[:-1]
        if len(lines) < 2 or lines[0] != header.encode():
            return None
        return len(lines) - 1, json.loads(lines[-1]), sum(len(line) + 1 for line in lines)

    def rejects(self, key: str) -> int:
        self._files[key, "rejects"].flush()
        with open(self._files[key, "rejects"].name, "rb") as stream:
            return sum(1 for _ in stream)

    def add(self, encoded: list[Encoded]) -> None:
        with naming(Path(self._log.name).parent):
            for key, found in zip(self.keys, encoded, strict=True):
                self._files[key, "tokens"].write(found.tokens.data)
                self._files[key, "lengths"].write(found.lengths.data)
                self._files[key, "origins"].write(found.origins.data)
                for rejected in found.rejects:
                    line = json.dumps(rejected, ensure_ascii=False)
                    self._files[key, "rejects"].write(line.encode() + b"\n")
            # The order matters: what a journal line speaks of is already with the system.
            for stream in self._files.values():
                stream.flush()
            self._log.write(json.dumps([s.tell() for s in self._files.values()]).encode() + b"\n")
            self._log.flush()
        self.pieces += 1

    def close(self) -> None:
        for stream in (*self._files.values(), self._log):
            # After a failed write its buffer fails again; the first error has said it.
            with contextlib.suppress(OSError):
                stream.close()


def _open(path: Path) -> IO[bytes]:
    return open(path, "ab")


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
                    raise ValueError(
                        f"more than {job.reject_limit} documents rejected for key {key!r}, the last {last}; "
                        f"mend the input or raise --reject-limit"
                    )
    return lines
