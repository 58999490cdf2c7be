"""Documents to indexed datasets: JSONL, parquet or Hugging Face datasets in, Megatron's `.bin`/`.idx` out.

Two passes. The first encodes in input order into `PREFIX.partial/`, by worker processes that are handed
pieces of about a megabyte; a killed run goes on (`journal.py`). The second copies the documents in a shuffled
order (by seed and document number alone) into the final pair, with the origin of each beside it
(`provenance.py`); without a shuffle there is nothing to copy, and the tokens of the first pass become the
`.bin`. Neither workers nor interruptions change a byte of the result, and memory does not grow with the
input, but for 40 bytes a document.

A reject is a line or row that cannot become a document: bad JSON, no such key, no string, broken UTF-8, no
tokens. Rejects are written with file and line to `PREFIX_KEY_document.side/rejects.jsonl`. More than
`reject_limit` of them stop the run.

Across nodes, shard i of n encodes an equal range of the inputs' bytes, in input order, into a pair of its
own (`PREFIX_shard-i-of-n_KEY_document`). `merge` then makes the second pass over all of them: the result is
that of one run without shards, byte for byte.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data.indexed import best_dtype, with_suffix
from megatron_r1.preprocess.documents import (
    MOST_BYTES,
    Input,
    InputError,
    Piece,
    cut,
    digest,
    identity,
    open_inputs,
    piece_rule,
)
from megatron_r1.preprocess.encoder import choose
from megatron_r1.preprocess.journal import Journal, discard
from megatron_r1.preprocess.rows import check_keys, parse, text_of
from megatron_r1.preprocess.store import (
    MEND,
    Stored,
    add_to_ledger,
    exclusive,
    pair_standing,
    refuse_empty,
    shard_counts,
    shard_prefix,
    write_pair,
)
from megatron_r1.preprocess.tokenizer import build_tokenizer
from megatron_r1.preprocess.workers import Job, encode_in_order
from megatron_r1.run.stage import Standing
from megatron_r1.system.errors import require_utf8
from megatron_r1.system.terminal import Progress, say

FORMAT = 1
"""Goes up when the same input and options would give other bytes."""
_SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS = 64, 1 << 19


class TooManyRejectsError(ValueError):
    """More documents are rejected than `reject_limit` allows."""


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
    overwrite: bool = False,
    check: bool = False,
    max_document_bytes: int = MOST_BYTES,
    log: Callable[[str], None] = say,
) -> dict[str, dict[str, Any]]:
    """Write `{output_prefix}_{key}_document.{bin,idx,json,side}` for each key. Returns sidecars by prefix.

    seed: of the document shuffle; None keeps the input order, which gives the very bytes of Megatron's own
    tool. reject_limit: documents of one key that may be rejected. max_document_bytes: a longer line, or row
    of a table, is a reject. encoder: "auto" or "reference". shard:
    (i, n) encodes the i-th of n parts for `merge`, with line numbers counted from where the part begins.
    Outputs that match the inputs and options are left as they are. Those of the same request are made again
    where an input has changed since. Those of another request are refused, unless `overwrite` is set. check:
    only log what would be done, and return the sidecars that are there. Errors: ValueError, also where no
    document is left (but for a shard); InputError for an input that cannot be read, with the work on those
    before it kept; FileNotFoundError; OSError where the disk is full.
    """
    if workers < 1 or reject_limit < 0 or not inputs or not json_keys or encoder not in ("auto", "reference"):
        raise ValueError(
            f"workers={workers}, reject_limit={reject_limit}, {len(inputs)} inputs, {len(json_keys)} keys, "
            f"encoder={encoder}: take at least one worker, input and key, no negative limit, and as encoder "
            f"auto or reference"
        )
    check_keys(json_keys)
    require_utf8(f"{output_prefix}")
    require_utf8(f"{tokenizer_model}")
    began, output = time.monotonic(), Path(output_prefix)
    sources = open_inputs(inputs, max_document_bytes)
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model)
    if tokenizer.note:
        log(f"tokenizer: {tokenizer.note}")
    # All that decides the bytes, beside the inputs.
    about: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer_type": tokenizer.kind,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "append_eod": append_eod,
        "dtype": best_dtype(tokenizer.vocab_size).name,
        "seed": seed,
        **({"max_document_bytes": max_document_bytes} if max_document_bytes != MOST_BYTES else {}),
    }
    base = output
    if shard is not None:
        if not 0 <= shard[0] < shard[1]:
            raise ValueError(f"shard {shard[0]} of {shard[1]}: the first is 0, the last {shard[1] - 1}")
        if others := [n for key in json_keys for n in shard_counts(output, key) if n != shard[1]]:
            fault = f"{output} has shards of {others[0]}, and a merge takes one kind"
            way_out = "give that number of shards, remove them, or name another --output-prefix"
            raise ValueError(f"--shard {shard[0]}/{shard[1]}: {fault}; {way_out}")
        about |= {"seed": None, "shard": list(shard), "merged_seed": seed}
        base = shard_prefix(output, *shard)
    ranges = cut(sources, shard)
    for source, (lo, hi) in zip(sources, ranges, strict=True):
        if lo < hi or not source.size:
            source.check(json_keys)
    prefixes = {key: with_suffix(base, f"_{key}_document") for key in json_keys}
    work = with_suffix(base, ".partial")
    with contextlib.nullcontext() if check else exclusive(work, log):
        names = [source.name for source in sources]
        done: dict[str, dict[str, Any]] = {}
        states = {}
        for key, prefix in prefixes.items():
            standing, sidecar = pair_standing(prefix, {**about, "key": key}, sources, names, overwrite)
            states[prefix] = _state(prefix, standing, sidecar, work)
            done |= {str(prefix): sidecar} if standing is Standing.DONE else {}
        if check:
            for source in sources:
                log(f"input {source.name}: {source.size:,} bytes")
            tokens = f"{tokenizer.vocab_size:,} tokens, stored as {about['dtype']}"
            log(f"tokenizer {tokenizer.kind} {tokenizer.fingerprint()[:12]}: {tokens}")
            for prefix, state in states.items():
                log(f"output {prefix}.bin: {state}")
            return done
        if foreign := [prefix for prefix, state in states.items() if state == _FOREIGN]:
            fault = f"{foreign[0]}.bin is there without {foreign[0].name}.json, so another tool made it"
            raise ValueError(f"{fault}; remove it or choose another --output-prefix")
        if len(done) == len(prefixes):
            log(f"already done: {', '.join(f'{prefix}.bin' for prefix in done)}")
            # Of a run that was killed at its very end.
            discard(work)
        else:
            try:
                stats = [identity(source) for source in sources]
                chosen, why = choose(tokenizer, _sample(sources, ranges, json_keys), encoder)
                log(f"encoder: {why}")
                job = Job(tokenizer_model, chosen, json_keys, append_eod, workers, reject_limit)
                request = {**about, "keys": list(json_keys), "pieces": piece_rule(max_document_bytes)}
                request["inputs"] = [[stat, *span] for stat, span in zip(stats, ranges, strict=True)]
                stored, lines, skipped = _encode_all(job, work, request, sources, ranges, log)
                # Those of shards are hashed once, when they are merged.
                digests = [digest(source) if shard is None else None for source in sources]
                if [identity(source) for source in sources] != stats:
                    raise InputError("an input changed while it was read; run again when it is complete")
                about["inputs"] = [{**stat, "sha256": d} for stat, d in zip(stats, digests, strict=True)]
                about |= {"skipped": skipped, **({"lines": lines} if shard is not None else {})}
                for key, prefix in prefixes.items() if shard is None else ():
                    refuse_empty([stored[key]], key, prefix, about["inputs"])
                for key, prefix in prefixes.items():
                    described = {**about, "key": key, "encoder": chosen.name}
                    done[str(prefix)] = write_pair([stored[key]], prefix, described, began, log)
                discard(work)
            except (InputError, TooManyRejectsError) as error:
                # Without documents there is nothing to go on from.
                if not any(path.stat().st_size for path in work.glob("*.lengths")):
                    discard(work)
                    raise
                kept = f"{work} keeps the documents before it, and the same command goes on from them"
                raise type(error)(f"{error}; {kept}") from None
            except ValueError:
                # It may be the encoder's, whose tokens must go.
                discard(work)
                raise
        add_to_ledger(output, "preprocess", done, {str(tokenizer_model): tokenizer.fingerprint()})
    return done


_FOREIGN = "another tool's: is refused"


def _state(prefix: Path, standing: Standing, sidecar: dict[str, Any], work: Path) -> str:
    """The state of an output, and the consequence for a run."""
    if standing is Standing.DONE:
        return f"done before, {sidecar['documents']:,} documents, {sidecar['tokens']:,} tokens"
    if standing is Standing.OTHER:
        return "of other inputs or options: is replaced"
    if standing is Standing.GO_ON:
        return "not whole: is written again"
    if (work / "journal").exists():
        return "begun, goes on"
    return _FOREIGN if with_suffix(prefix, ".bin").exists() else "is written"


def _sample(sources: Sequence[Input], ranges: Sequence[tuple[int, int]], keys: Sequence[str]) -> list[str]:
    """Documents from the beginning of each of the first inputs, to try an encoder on."""
    texts: list[str] = []
    for number, (source, (lo, hi)) in enumerate(zip(sources[:8], ranges, strict=False)):
        piece = next(source.pieces(number, keys, lo, hi), None)
        rows = piece.rows if piece else []
        for row in rows[:: max(1, 8 * len(rows) // _SAMPLE_DOCUMENTS)]:
            with contextlib.suppress(ValueError):
                record = parse(row)
                texts += [text_of(record, key)[0][:65536] for key in keys] if record else []
    ends = np.cumsum([len(text) for text in texts])
    return texts[: int(np.searchsorted(ends, _SAMPLE_CHARACTERS)) + 1]


def _encode_all(
    job: Job,
    work: Path,
    request: dict[str, Any],
    sources: Sequence[Input],
    ranges: Sequence[tuple[int, int]],
    log: Callable[[str], None],
) -> tuple[dict[str, Stored], list[int], dict[str, int]]:
    """The first pass: documents of each key, the number of lines or rows read of each input, and what was
    skipped."""
    lines = [0] * len(sources)
    sizes = [hi - lo for lo, hi in ranges]

    def read() -> Iterator[Piece]:
        for number, (source, (lo, hi)) in enumerate(zip(sources, ranges, strict=True)):
            for piece in source.pieces(number, job.keys, lo, hi):
                lines[number] = piece.first + len(piece.rows) - 1
                yield piece

    # Unshuffled, the tokens are in their final order: they become the .bin as they are.
    in_order = request["seed"] is None
    with (
        contextlib.closing(Journal(work, job.keys, request, in_order)) as journal,
        Progress("encode", -(-sum(sizes) // 1_000_000), "MB") as progress,
    ):
        rejected = Counter({key: journal.rejects(key) for key in job.keys})
        if journal.pieces:
            log(f"going on after {journal.pieces} pieces of an interrupted run")
        for piece, encoded in encode_in_order(job, itertools.islice(read(), journal.pieces, None)):
            journal.begin(piece.input)
            journal.add(encoded)
            before, at = sum(sizes[: piece.input]), piece.position - ranges[piece.input][0]
            progress.advance((before + min(at, sizes[piece.input])) // 1_000_000 - progress.done)
            for key, column in zip(job.keys, encoded, strict=True):
                rejected[key] += len(column.rejects)
                if rejected[key] > job.reject_limit:
                    last = "; ".join(f"{r['file']}:{r['line']}: {r['reason']}" for r in column.rejects[-3:])
                    many = f"more than {job.reject_limit} documents rejected for key {key!r}"
                    raise TooManyRejectsError(f"{many}, the last {last}; {MEND}")
        journal.commit()
        if skipped := dict(sorted(journal.skipped.items())):
            log(f"skipped: {', '.join(f'{count} {name}s' for name, count in skipped.items())}")
        stored = {key: journal.stored(key, np.dtype(request["dtype"])) for key in job.keys}
        return stored, lines, skipped
