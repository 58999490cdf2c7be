"""Documents to indexed datasets: JSONL (also .gz, .zst) and parquet in, Megatron's `.bin`/`.idx` out.

Two passes. The first encodes in input order into `PREFIX.partial/`, by worker processes that are handed
pieces of about a megabyte; a journal there says how far it got, so that a killed run goes on from its last
piece. The second copies the documents in a shuffled order (by seed and document number alone) into the
final pair. Neither workers nor interruptions change a byte of the result, and memory does not grow with
the input, but for 40 bytes a document.

What cannot become a document (bad JSON, no such key, no string, broken UTF-8, no tokens) is written with
file and line to `PREFIX_KEY_rejects.jsonl`; more than `reject_limit` of them stop the run.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_r1.data.indexed import (
    IndexedDataset,
    IndexedWriter,
    best_dtype,
    map_array,
    with_suffix,
)
from megatron_r1.data.tokenizer import Tokenizer, build_tokenizer
from megatron_r1.progress import Progress
from megatron_r1.run_dir import open_alone, replacing, sha256, write_json

FORMAT = 1
"""Goes up when the same input and options would give other bytes."""
PIECE_BYTES = 1 << 20
PIECE_DOCUMENTS = 4096
COPY_TOKENS = 1 << 23


@dataclass(frozen=True)
class Piece:
    """Consecutive documents of one input, as read: raw lines, or for parquet a row each."""

    path: str
    first: int
    """Line (or row) number of the first, from 1."""
    rows: Sequence[bytes | dict[str, Any]]
    position: int
    """Bytes of the input consumed after this piece (compressed bytes where compressed)."""


@dataclass(frozen=True)
class Encoded:
    """What one key of a piece became."""

    tokens: bytes
    lengths: bytes
    """int32, tokens of each document."""
    rejects: list[dict[str, Any]]


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
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, dict[str, Any]]:
    """Write `{output_prefix}_{key}_document.{bin,idx,json}` for each key; returns the sidecars by prefix.

    seed: of the document shuffle; None keeps the input order, which gives the very bytes of Megatron's own
    tool. reject_limit: documents of one key that may be rejected. Outputs that match the inputs and options
    are left as they are. Errors: ValueError, FileNotFoundError; OSError where the disk is full.
    """
    for path in inputs:
        if not Path(path).is_file():
            raise FileNotFoundError(f"input {path} does not exist")
    if workers < 1 or reject_limit < 0 or not inputs or not json_keys:
        raise ValueError(
            f"workers={workers}, reject_limit={reject_limit}, {len(inputs)} inputs, {len(json_keys)} keys: "
            f"take at least one worker, input and key, and no negative limit"
        )
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model)
    dtype = best_dtype(tokenizer.vocab_size)
    request = {
        "format": FORMAT,
        "tokenizer_type": tokenizer_type,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "append_eod": append_eod,
        "dtype": dtype.name,
    }
    prefixes = {key: with_suffix(output_prefix, f"_{key}_document") for key in json_keys}
    work = with_suffix(output_prefix, ".partial")
    with _alone(work, log):
        done = {key: _finished(prefix, key, request, seed, inputs) for key, prefix in prefixes.items()}
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
            stats = [_identity(path) for path in inputs]
            pieces = [PIECE_BYTES, PIECE_DOCUMENTS]
            header = {**request, "inputs": stats, "keys": list(json_keys), "pieces": pieces}
            # Hashing a large input takes about as long as reading it: beside the encoding.
            with (
                ThreadPoolExecutor(1) as hasher,
                contextlib.closing(_Journal(work, json_keys, header)) as journal,
            ):
                hashes = hasher.map(sha256, inputs)
                _encode_all(
                    journal, inputs, tokenizer, tokenizer_model, append_eod, workers, reject_limit, log
                )
                described = [{**stat, "sha256": digest} for stat, digest in zip(stats, hashes, strict=True)]
            if [_identity(path) for path in inputs] != stats:
                raise ValueError("an input changed while it was read; run again when it is complete")
            sidecars = {}
            for k, (key, prefix) in enumerate(prefixes.items()):
                about = {"tool": _tool(), **request, "key": key, "seed": seed, "inputs": described}
                rejects = with_suffix(output_prefix, f"_{key}_rejects.jsonl")
                sidecars[str(prefix)] = _finish(work / str(k), prefix, rejects, about, log)
            shutil.rmtree(work)
            return sidecars
        except ChildProcessError:
            # What is encoded is good: the next run goes on from there.
            raise
        except (ValueError, OSError):
            shutil.rmtree(work, ignore_errors=True)
            raise


def _tool() -> str:
    try:
        return f"megatron_r1 {importlib.metadata.version('megatron-r1')}"
    except importlib.metadata.PackageNotFoundError:
        return "megatron_r1, not installed"


def _identity(path: str | Path) -> dict[str, Any]:
    stat = os.stat(path)
    return {"path": str(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _finished(
    prefix: Path, key: str, request: dict[str, Any], seed: int | None, inputs: Sequence[str | Path]
) -> dict[str, Any] | None:
    """The sidecar, if it says that this request has been answered and the pair is whole."""
    try:
        sidecar = json.loads(with_suffix(prefix, ".json").read_text(encoding="utf-8"))
        dataset = IndexedDataset(prefix)
        if {k: sidecar[k] for k in request} != request or (sidecar["key"], sidecar["seed"]) != (key, seed):
            return None
        if (sidecar["documents"], sidecar["tokens"]) != (dataset.num_documents, len(dataset.tokens)):
            return None
        if len(sidecar["inputs"]) != len(inputs):
            return None
        for path, before in zip(inputs, sidecar["inputs"], strict=True):
            now = _identity(path)
            # Only a file that moved or was touched is read again.
            if now != {k: before[k] for k in now} and (
                now["bytes"] != before["bytes"] or sha256(path) != before["sha256"]
            ):
                return None
        return sidecar
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _alone(work: Path, log: Callable[[str], None]) -> Iterator[None]:
    """One process a prefix; a second one waits, and then finds the work done."""
    lock = work.with_name(work.name + ".lock")
    with open_alone(lock, lambda: log(f"waiting for another process that writes {work.with_suffix('')}")):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


# Reading


def _unpacked(raw: IO[bytes], path: str) -> IO[bytes]:
    """The lines of a file, unpacked by its ending."""
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.endswith(".zst"):
        # Not the zstandard package: its reader takes a truncated file for a complete one.
        arrow = _arrow("pyarrow", path)
        return io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(raw, "r"), "zstd"), 1 << 20)
    return raw


def _arrow(module: str, path: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"reading {path} needs pyarrow ({error}): pip install pyarrow") from None


def read_pieces(path: str, keys: Sequence[str]) -> Iterator[Piece]:
    """The documents of one input, in order, cut by a rule that depends on nothing but the file."""
    if path.endswith(".parquet"):
        yield from _read_parquet(path, keys)
        return
    with open(path, "rb") as raw, _unpacked(raw, path) as stream:
        rows: list[bytes] = []
        first, size = 1, 0
        try:
            for line in stream:
                if first == 1 and not rows:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                rows.append(line)
                size += len(line)
                if size >= PIECE_BYTES or len(rows) >= PIECE_DOCUMENTS:
                    yield Piece(path, first, rows, raw.tell())
                    first, rows, size = first + len(rows), [], 0
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is damaged after line {first + len(rows) - 1}: {error}") from None
        if rows:
            yield Piece(path, first, rows, raw.tell())


def _read_parquet(path: str, keys: Sequence[str]) -> Iterator[Piece]:
    parquet = _arrow("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    with file:
        missing = [key for key in keys if key not in file.schema_arrow.names]
        if missing:
            has = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{path} has no column {missing[0]!r}; it has {has}: see --json-keys")
        first, total, count = 1, os.path.getsize(path), max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=1024, columns=list(keys)):
            step = max(1, PIECE_BYTES * batch.num_rows // max(1, batch.nbytes))
            for lo in range(0, batch.num_rows, step):
                rows = batch.slice(lo, step).to_pylist()
                yield Piece(path, first, rows, total * (first - 1 + len(rows)) // count)
                first += len(rows)


# Encoding, in the workers


def encode_piece(tokenizer: Tokenizer, piece: Piece, keys: Sequence[str], append_eod: bool) -> list[Encoded]:
    """Tokens of each document of a piece, for each key. Nothing raises: what is wrong is rejected."""
    texts: list[list[str]] = [[] for _ in keys]
    numbers: list[list[int]] = [[] for _ in keys]
    rejects: list[list[dict[str, Any]]] = [[] for _ in keys]
    for number, row in enumerate(piece.rows, piece.first):
        try:
            record = _parse(row)
        except ValueError as error:
            for into in rejects:
                into.append(_reject(piece.path, number, str(error), row))
            continue
        for k, key in enumerate(keys):
            try:
                texts[k].append(_text_of(record, key))
                numbers[k].append(number)
            except ValueError as error:
                rejects[k].append(_reject(piece.path, number, str(error), row))
    dtype = best_dtype(tokenizer.vocab_size)
    found = []
    for k in range(len(keys)):
        lengths = np.zeros(len(texts[k]), dtype=np.int64)
        flat: list[np.ndarray] = []
        for i, tokens in enumerate(tokenizer.encode_batch(texts[k])):
            if tokens and append_eod:
                tokens.append(tokenizer.eod)
            if not tokens or len(tokens) > 2**31 - 1:
                reason = "no tokens" if not tokens else f"{len(tokens)} tokens, more than an index can say"
                rejects[k].append(_reject(piece.path, numbers[k][i], reason, texts[k][i].encode()))
                continue
            lengths[i] = len(tokens)
            flat.append(np.array(tokens, dtype=np.int64))
        stream = np.concatenate(flat) if flat else np.empty(0, np.int64)
        # A tokenizer that gives a token beyond its vocabulary is broken: say so, never wrap around.
        assert not stream.size or 0 <= stream.min() <= stream.max() < tokenizer.vocab_size
        rejects[k].sort(key=lambda reject: reject["line"])
        kept = lengths[lengths > 0].astype(np.int32)
        found.append(Encoded(stream.astype(dtype).tobytes(), kept.tobytes(), rejects[k]))
    return found


def _parse(row: bytes | dict[str, Any]) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    try:
        record = json.loads(row.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start}: {error.reason}") from None
    except RecursionError:
        raise ValueError("bad JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"bad JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"bad JSON: a {type(record).__name__} where an object is expected")
    return record


def _text_of(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise ValueError(f"missing key {key!r}")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"non-string text: {key!r} is {type(text).__name__}")
    if not text:
        raise ValueError(f"empty document: {key!r} is ''")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"invalid UTF-8: lone surrogate at character {error.start} of {key!r}") from None
    return text


def _reject(path: str, line: int, reason: str, row: bytes | dict[str, Any]) -> dict[str, Any]:
    quoted = row if isinstance(row, bytes) else repr(row).encode("utf-8", "backslashreplace")
    excerpt = quoted[:200].decode("utf-8", "backslashreplace").rstrip("\r\n")
    return {"file": path, "line": line, "reason": reason, "excerpt": excerpt}


_worker: tuple[Tokenizer, Sequence[str], bool] | None = None


def _start_worker(kind: str, model: str | Path, keys: Sequence[str], append_eod: bool) -> None:
    global _worker
    # Ctrl-C is for the main process; and when that is killed, its workers must not stay behind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A process a core already: no threads of the tokenizer's own.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = build_tokenizer(kind, model), keys, append_eod


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Unlike the parent's number, this also tells of a parent that was gone before we asked.
    parent.join()
    os._exit(1)


def _work(piece: Piece) -> list[Encoded]:
    assert _worker is not None
    return encode_piece(_worker[0], piece, *_worker[1:])


def _in_order(
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    model: str | Path,
    keys: Sequence[str],
    append_eod: bool,
    workers: int,
) -> Iterator[tuple[Piece, list[Encoded]]]:
    """Encode by worker processes; results come in the order of the pieces, a few at a time in memory."""
    if workers == 1:
        for piece in pieces:
            yield piece, encode_piece(tokenizer, piece, keys, append_eod)
        return
    # Spawned, not forked: the caller may hold threads or a device. Workers import no torch.
    context = multiprocessing.get_context("spawn")
    waiting: deque[tuple[Piece, Future[list[Encoded]]]] = deque()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.kind, model, keys, append_eod))
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(_work, piece)))
            if len(waiting) > 3 * workers:
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


# The first pass: encoded documents in input order, and how far it got


class _Journal:
    """`PREFIX.partial/`: for each key tokens, lengths and rejects, and a line for each finished piece.

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
            (key, kind): open(work / f"{k}.{kind}", "ab")  # noqa: SIM115
            for k, key in enumerate(keys)
            for kind in ("tokens", "lengths", "rejects")
        }
        if last is not None:
            self.pieces, sizes, kept = last
            for stream, size in zip(self._files.values(), sizes, strict=True):
                stream.truncate(size)
            os.truncate(path, kept)
        self._log = open(path, "ab")  # noqa: SIM115
        if last is None:
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
        for key, found in zip(self.keys, encoded, strict=True):
            self._files[key, "tokens"].write(found.tokens)
            self._files[key, "lengths"].write(found.lengths)
            for reject in found.rejects:
                self._files[key, "rejects"].write(json.dumps(reject, ensure_ascii=False).encode() + b"\n")
        # The order matters: what a journal line speaks of is already with the system.
        for stream in self._files.values():
            stream.flush()
        self._log.write(json.dumps([s.tell() for s in self._files.values()]).encode() + b"\n")
        self._log.flush()
        self.pieces += 1

    def close(self) -> None:
        for stream in (*self._files.values(), self._log):
            stream.close()


def _encode_all(
    journal: _Journal,
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    model: str | Path,
    append_eod: bool,
    workers: int,
    reject_limit: int,
    log: Callable[[str], None],
) -> None:
    sizes = [os.path.getsize(path) for path in inputs]
    before = {str(path): sum(sizes[:i]) for i, path in enumerate(inputs)}
    rejected = Counter({key: journal.rejects(key) for key in journal.keys})
    skipped = journal.pieces
    if skipped:
        log(f"going on after {skipped} pieces of an interrupted run")
    pieces = (piece for path in inputs for piece in read_pieces(str(path), journal.keys))
    for _ in range(skipped):
        next(pieces)
    with Progress("encode", -(-sum(sizes) // 1_000_000), "MB") as progress:
        for piece, encoded in _in_order(pieces, tokenizer, model, journal.keys, append_eod, workers):
            journal.add(encoded)
            progress.advance((before[piece.path] + piece.position) // 1_000_000 - progress.done)
            for key, found in zip(journal.keys, encoded, strict=True):
                rejected[key] += len(found.rejects)
                if rejected[key] > reject_limit:
                    last = "; ".join(f"{r['file']}:{r['line']}: {r['reason']}" for r in found.rejects[-3:])
                    raise ValueError(
                        f"more than {reject_limit} documents rejected for key {key!r}, the last {last}; "
                        f"mend the input or raise --reject-limit"
                    )


# The second pass: the final order


def document_order(documents: int, seed: int | None) -> np.ndarray:
    """Number of the document stored at each place, [documents]: a permutation by seed; None: the identity."""
    numbers = np.arange(documents, dtype=np.uint64)
    if seed is None:
        return numbers.astype(np.int64)
    # SplitMix64 of the document's number: the same on every machine and NumPy version.
    keys = numbers * np.uint64(_GAMMA) + np.uint64((seed * _MIX[0] + _GAMMA) % 2**64)
    for shift, factor in zip((30, 27), _MIX, strict=True):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(keys ^ (keys >> np.uint64(31)), kind="stable")


_GAMMA = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _finish(
    stem: Path, prefix: Path, rejects_path: Path, about: dict[str, Any], log: Callable[[str], None]
) -> dict[str, Any]:
    """Copy one key's documents (`STEM.tokens`) in the final order; then all its files take their names."""
    dtype = np.dtype(about["dtype"])
    lengths = np.fromfile(with_suffix(stem, ".lengths"), dtype=np.int32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    tokens = map_array(with_suffix(stem, ".tokens"), dtype, 0, int(lengths.sum(dtype=np.int64)))
    order = document_order(len(lengths), about["seed"])
    sidecar = with_suffix(prefix, ".json")
    with IndexedWriter(prefix, dtype) as writer:
        ends = np.cumsum(lengths[order], dtype=np.int64)
        lo = 0
        while lo < len(order):
            base = int(ends[lo - 1]) if lo else 0
            hi = max(lo + 1, int(np.searchsorted(ends, base + COPY_TOKENS, side="right")))
            part = np.empty(int(ends[hi - 1]) - base, dtype=dtype)
            # Read in file order, place in final order: the disk sees one sweep.
            for i in lo + np.argsort(order[lo:hi]):
                start, length = starts[order[i]], lengths[order[i]]
                end = ends[i] - base
                part[end - length : end] = tokens[start : start + length]
            writer.add_documents(part, lengths[order[lo:hi]])
            lo = hi
        with open(with_suffix(stem, ".rejects"), "rb") as quoted:
            reasons = Counter(json.loads(line)["reason"].split(":")[0] for line in quoted)
        # From here to the sidecar no file of an earlier run stands beside one of this run.
        sidecar.unlink(missing_ok=True)
        rejects_path.unlink(missing_ok=True)
        if reasons:
            with open(with_suffix(stem, ".rejects"), "rb") as quoted, replacing(rejects_path) as stream:
                shutil.copyfileobj(quoted, stream)
    described = {
        **about,
        "documents": len(lengths),
        "tokens": writer.num_tokens,
        "rejected": dict(sorted(reasons.items())),
        "bin_sha256": writer.sha256,
    }
    write_json(sidecar, described)
    log(
        f"wrote {prefix}.bin: {len(lengths)} documents, {writer.num_tokens} {dtype} tokens"
        + (f", {sum(reasons.values())} rejected, see {rejects_path}" if reasons else "")
    )
    return described
