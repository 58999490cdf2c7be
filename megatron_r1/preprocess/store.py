"""The second pass: documents in their final order, with index, origins, rejects and sidecar beside them.

Every file takes its name only when it is whole, the sidecar last: a pair with a sidecar is finished.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data.indexed import IndexedDataset, IndexedWriter, with_suffix
from megatron_r1.data.provenance import ORIGIN, SUFFIX
from megatron_r1.preprocess.documents import Input, digest, identity
from megatron_r1.run.stage import Standing, finish, read, standing
from megatron_r1.system.files import json_bytes, naming, on_disk, open_exclusive, replacing
from megatron_r1.system.terminal import Progress

COPY_TOKENS = 1 << 21
"""Copied at a time: few enough to stay in the processor's cache until they are hashed and written."""
_SHOWN_MB = 1000
"""Less is stored sooner than one could read of it."""


def shard_prefix(output_prefix: str | Path, index: int, count: int) -> Path:
    return with_suffix(output_prefix, f"_shard-{index:05d}-of-{count:05d}")


@contextlib.contextmanager
def alone(work: Path, log: Callable[[str], None]) -> Iterator[None]:
    """One process a prefix; a second one waits, and then finds the work done."""
    lock = work.with_name(work.name + ".lock")
    with open_exclusive(lock, lambda: log(f"waiting for another process that writes {work.with_suffix('')}")):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def look(prefix: Path, about: dict[str, Any], sources: Sequence[Input]) -> tuple[Standing, dict[str, Any]]:
    """Where the pair of a request stands, and its sidecar (empty where none can be read)."""
    path = with_suffix(prefix, ".json")
    sidecar = read(path) or {}
    before = sidecar.get("inputs")
    same = (
        isinstance(before, list) and len(before) == len(sources) and all(map(_is_as_it_was, sources, before))
    )
    ours = {**about, "inputs": before if same else [identity(source) for source in sources]}
    # A damaged sidecar is of no request.
    theirs = {key: sidecar.get(key) for key in ours} if path.exists() else None
    return standing(theirs, ours, lambda: _is_whole(prefix, sidecar)), sidecar


def _is_as_it_was(source: Input, before: dict[str, Any]) -> bool:
    """Whether an input is the one in a sidecar. Only a file that moved or was touched is read."""
    now = identity(source)
    return now.items() <= before.items() or (
        now["bytes"] == before.get("bytes") and digest(source) == before.get("sha256")
    )


def _is_whole(prefix: Path, sidecar: dict[str, Any]) -> bool:
    try:
        dataset = IndexedDataset(prefix)
    except (OSError, ValueError):
        return False
    counts = sidecar.get("documents"), sidecar.get("tokens")
    return counts == (dataset.num_documents, len(dataset.tokens)) and with_suffix(prefix, SUFFIX).is_file()


def tell(output: Path, stage: str, sidecars: dict[str, dict[str, Any]], inputs: dict[str, str]) -> None:
    """The ledger line beside the outputs, of all keys together. inputs: besides those in the sidecars."""
    sources = [source for sidecar in sidecars.values() for source in sidecar["inputs"]]
    # Those of a shard are hashed when it is merged: other shards read them, too.
    hashed = {source["path"]: source["sha256"] for source in sources if source["sha256"]}
    finish(
        output.parent,
        f"{stage} {output.name}",
        tokens=sum(sidecar["tokens"] for sidecar in sidecars.values()),
        inputs={**inputs, **hashed},
        outputs={prefix: sidecar["bin_sha256"] for prefix, sidecar in sidecars.items()},
    )


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


@dataclass(frozen=True)
class Stored:
    """Documents in input order, as the first pass leaves them: of the whole input, or of one shard."""

    tokens: np.ndarray
    lengths: np.ndarray
    """[documents] int32."""
    origins: np.ndarray
    """[documents] of ORIGIN."""
    rejects: Path
    lines_before: Sequence[int] | None = None
    """Lines or rows of each input that earlier shards read."""
    whole: tuple[Path, str] | None = None
    """The file of the tokens, where it may become the .bin as it is, and its SHA-256."""


def rejects_of(prefix: Path) -> Path:
    """Where the rejects of a pair are written, if it has any."""
    return Path(f"{str(prefix).removesuffix('_document')}_rejects.jsonl")


def refuse_empty(parts: Sequence[Stored], key: str, prefix: Path, inputs: Sequence[dict[str, Any]]) -> None:
    """ValueError where no document is left, with the rejects written to say why."""
    if any(len(part.lengths) for part in parts):
        return
    rejects, path = list(_rejects(parts, inputs)), rejects_of(prefix)
    if not rejects:
        names = ", ".join(source["path"] for source in inputs)
        raise ValueError(f"no document in {names}: nothing is written")
    with replacing(path) as stream:
        stream.write(b"".join(map(_line, rejects)))
    first = rejects[0]
    raise ValueError(
        f"every document is rejected for key {key!r}, so nothing is written: {len(rejects)}, the first "
        f"{first['file']}:{first['line']}: {first['reason']}; all are in {path}"
    )


def _rejects(parts: Sequence[Stored], inputs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Those of all parts, in input order, with their lines in the whole input."""
    names = [source["path"] for source in inputs]
    for part in parts:
        for line in part.rejects.open("rb") if part.rejects.is_file() else ():
            found = json.loads(line)
            if part.lines_before is not None:
                found["line"] += part.lines_before[names.index(found["file"])]
            yield found


def _line(found: dict[str, Any]) -> bytes:
    return json.dumps(found, ensure_ascii=False).encode() + b"\n"


def write_pair(
    parts: Sequence[Stored],
    prefix: Path,
    about: dict[str, Any],
    began: float,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Bring one key's documents into their final order; then all its files take their names.

    Tokens that are in that order already, in one file, are not copied. began: `time.monotonic()` of the run.
    Returns the sidecar.
    """
    dtype = np.dtype(about["dtype"])
    lengths = np.concatenate([part.lengths for part in parts])
    reasons = Counter(found["reason"].split(":")[0] for found in _rejects(parts, about["inputs"]))
    sidecar, origins_path = with_suffix(prefix, ".json"), with_suffix(prefix, SUFFIX)
    rejects_path = rejects_of(prefix)
    with contextlib.ExitStack() as files:
        # They take their names in the opposite order, the sidecar last.
        said = files.enter_context(replacing(sidecar))
        origins = files.enter_context(replacing(origins_path))
        quoted = files.enter_context(replacing(rejects_path)) if reasons else None
        writer = files.enter_context(IndexedWriter(prefix, dtype))
        kind = np.lib.format.dtype_to_descr(ORIGIN)
        shape = {"descr": kind, "fortran_order": False, "shape": (len(lengths),)}
        np.lib.format.write_array_header_1_0(origins, shape)
        whole = parts[0].whole if len(parts) == 1 and about["seed"] is None else None
        if whole is not None and writer.adopt(whole[0], lengths, whole[1]):
            with naming(origins_path):
                origins.write(parts[0].origins.data)
        else:
            tokens_MB = -(-int(lengths.sum(dtype=np.int64)) * dtype.itemsize // 1_000_000)
            progress = files.enter_context(Progress("store", tokens_MB, "MB", show=tokens_MB >= _SHOWN_MB))
            for tokens, counts, records in _in_order(parts, lengths, about["seed"], dtype):
                writer.add_documents(tokens, counts)
                with naming(origins_path):
                    origins.write(records.data)
                progress.advance(writer.num_tokens * dtype.itemsize // 1_000_000 - progress.done)
        described = {
            "tool": _tool(),
            **about,
            "documents": len(lengths),
            "tokens": writer.num_tokens,
            "rejected": dict(sorted(reasons.items())),
            "bin_sha256": writer.sha256,
        }
        with naming(sidecar):
            said.write(json_bytes(described))
            on_disk(said)
        with naming(origins_path):
            on_disk(origins)
        if quoted is not None:
            with naming(rejects_path):
                for found in _rejects(parts, about["inputs"]):
                    quoted.write(_line(found))
                on_disk(quoted)

        def forget_earlier() -> None:
            sidecar.unlink(missing_ok=True)
            rejects_path.unlink(missing_ok=True)

        writer.finalize(forget_earlier)
    log(
        f"wrote {prefix}.bin: {len(lengths)} documents, {writer.num_tokens} {dtype} tokens, "
        f"{time.monotonic() - began:.1f} s"
        + (f", {sum(reasons.values())} rejected, see {rejects_path}" if reasons else "")
    )
    return described


def _in_order(
    parts: Sequence[Stored], lengths: np.ndarray, seed: int | None, dtype: np.dtype[Any]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, lengths and origins of consecutive documents in their final order, about COPY_TOKENS a time.

    The tokens are good until the next are asked for.
    """
    order = document_order(len(lengths), seed)
    firsts = np.cumsum([0] + [len(part.lengths) for part in parts])
    starts = np.concatenate([np.cumsum(p.lengths, dtype=np.int64) - p.lengths for p in parts])
    ends = np.cumsum(lengths[order], dtype=np.int64)
    # Plain views: a slice of one costs a fifth of that of an array.
    sources = [np.asarray(part.tokens).data for part in parts]
    lo, room = 0, np.empty(0, dtype=dtype)
    while lo < len(order):
        base = int(ends[lo - 1]) if lo else 0
        hi = max(lo + 1, int(np.searchsorted(ends, base + COPY_TOKENS, side="right")))
        size = int(ends[hi - 1]) - base
        if size > len(room):
            room = np.empty(size, dtype=dtype)
        tokens = room[:size]
        records = np.empty(hi - lo, dtype=ORIGIN)
        into = tokens.data
        # Read in file order, place in final order: the disk sees one sweep.
        places = np.argsort(order[lo:hi])
        documents = order[lo:hi][places]
        bounds = np.searchsorted(documents, firsts)
        for n, part in enumerate(parts):
            here = slice(bounds[n], bounds[n + 1])
            found = part.origins[documents[here] - firsts[n]]
            if part.lines_before is not None:
                found["line"] += np.array(part.lines_before, dtype=np.uint64)[found["file"]]
            records[places[here]] = found
            first, length = starts[documents[here]], lengths[documents[here]]
            last = ends[lo + places[here]] - base
            source = sources[n]
            copies = zip((last - length).tolist(), last.tolist(), first.tolist(), strict=True)
            for to, until, at in copies:
                into[to:until] = source[at : at + until - to]
        yield tokens, lengths[order[lo:hi]], records
        lo = hi


def _tool() -> str:
    try:
        return f"megatron_r1 {importlib.metadata.version('megatron-r1')}"
    except importlib.metadata.PackageNotFoundError:
        return "megatron_r1, not installed"
