"""The second pass: documents in their final order, with index, origins, rejects and sidecar beside them.

Every file takes its name when it is whole, the sidecar last. A pair with a sidecar is therefore finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data.indexed import IndexedWriter, open_corpus, with_suffix
from megatron_r1.data.integrity import (
    REDO,
    BinHashes,
    DamagedBinError,
    check_bin,
    check_file,
    say_unchecked,
    side_file,
)
from megatron_r1.data.provenance import FORMER, ORIGIN, load_origins, origins_of
from megatron_r1.data.sidecar import read_sidecar
from megatron_r1.preprocess.documents import Input, digest, identity
from megatron_r1.run import ledger
from megatron_r1.run.stage import Standing, differences, finish, read, standing
from megatron_r1.system.errors import shown
from megatron_r1.system.files import (
    json_bytes,
    naming,
    on_disk,
    open_exclusive,
    remove_if_empty,
    replacing,
    sha256,
)
from megatron_r1.system.json_io import mistake, parse_json
from megatron_r1.system.terminal import Progress, say

_MOST_REJECT = 1 << 17
"""Bytes of a line of a file of rejects: a path, a reason and an excerpt are a tenth of that."""
COPY_TOKENS = 1 << 21
"""Copied at a time: few enough to stay in the processor's cache until they are hashed and written."""
_SHOWN_MB = 1000
"""Progress is shown from this size on. Less is stored in a moment."""
MEND = "mend the input or raise --reject-limit"
Log = Callable[[str], None]
Sidecar = dict[str, Any]
"""The content of PREFIX.json, or of a part of it."""


def shard_prefix(output_prefix: str | Path, index: int, count: int) -> Path:
    return with_suffix(output_prefix, f"_shard-{index:05d}-of-{count:05d}")


def shard_counts(output_prefix: Path, key: str) -> list[int]:
    """The numbers of shards, N of I/N, of which finished ones are there; ascending."""
    name, suffix = re.escape(output_prefix.name), re.escape(f"_{key}_document.json")
    pattern = re.compile(rf"{name}_shard-\d+-of-(\d+){suffix}")
    folder = output_prefix.parent
    matches = map(pattern.fullmatch, os.listdir(folder) if folder.is_dir() else [])
    return sorted({int(match[1]) for match in matches if match})


@contextlib.contextmanager
def exclusive(work: Path, log: Log) -> Iterator[None]:
    """Let one process at a time write a prefix. A second one waits, and then finds the work done."""
    lock = work.with_name(work.name + ".lock")
    if os.path.lexists(lock) and (lock.is_symlink() or not lock.is_file() or lock.stat().st_size):
        way_out = "move it away, or name another --output-prefix"
        raise ValueError(f"{lock} is no lock of this tool, which is an empty file; {way_out}")
    with open_exclusive(lock, lambda: log(f"waiting for another process that writes {work.with_suffix('')}")):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def pair_standing(
    prefix: Path, about: Sidecar, sources: Sequence[Input], inputs: Sequence[str], overwrite: bool
) -> tuple[Standing, Sidecar]:
    """The standing of a request's pair, and its sidecar (empty where none can be read).

    inputs: the names of all; sources: those that are there. ValueError for a pair of another request, unless
    `overwrite` lets it be replaced.
    """
    path = with_suffix(prefix, ".json")
    sidecar = read(path) or {}
    before = sidecar.get("inputs")
    same = isinstance(before, list) and len(before) == len(sources) and all(map(_is_same, sources, before))
    ours = {**about, "inputs": before if same else [identity(source) for source in sources]}
    # A damaged sidecar is of no request.
    keys = (*ours, *(_UNUSUAL & sidecar.keys()))
    theirs = {key: sidecar.get(key) for key in keys} if path.exists() else None
    found = standing(theirs, ours, lambda: _is_whole(prefix))
    if found is Standing.OTHER and not overwrite:
        _refuse_other(prefix, sidecar, about, inputs)
    return found, sidecar


_UNUSUAL = {"max_document_bytes"}
"""Options that a sidecar names only where they are not the usual ones."""


def _is_same(source: Input, before: Any) -> bool:
    """Whether an input is the one in a sidecar. Only a file that moved or was touched is read."""
    if not isinstance(before, dict):
        return False
    now = identity(source)
    if now.items() <= before.items():
        return True
    return now["bytes"] == before.get("bytes") and digest(source) == before.get("sha256")


def _refuse_other(prefix: Path, sidecar: Sidecar, about: Sidecar, inputs: Sequence[str]) -> None:
    """ValueError for a pair of other options or names of inputs. Where only the content of inputs has changed
    since, the same request makes the pair again."""
    entries = sidecar.get("inputs")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        way_out = "remove it with its pair, or replace them with --overwrite"
        raise ValueError(f"{prefix}.json is damaged; {way_out}")
    there = [str(entry.get("path")) for entry in entries]
    changed = differences({key: sidecar.get(key) for key in (*about, *(_UNUSUAL & sidecar.keys()))}, about)
    changed += [f"input {name:.200} (there)" for name in there if name not in inputs][:2]
    changed += [f"input {name:.200} (here)" for name in inputs if name not in there][:2]
    if changed or there != list(inputs):
        fault = f"{prefix}.bin is of another request: {', '.join(changed) or 'order of inputs'}"
        way_out = "Restore these, name another --output-prefix, or replace it with --overwrite"
        raise ValueError(f"{fault}. {way_out}")


def _is_whole(prefix: Path) -> bool:
    """Whether a pair is as it was written. Says the damage, if there is any."""
    try:
        corpus = open_corpus(prefix.name, prefix)
        load_origins(prefix, corpus.documents)
        read_sidecar(prefix, ["bin_sha256"])
        say_unchecked([corpus])
    except (OSError, ValueError) as error:
        say(f"not as it was written: {error}")
        return False
    return True


def verify(output_prefix: str | Path, json_keys: Sequence[str], log: Log) -> None:
    """Compare every byte of each key's pair, or of the pair that `output_prefix` names, with its hashes.

    Raises DamagedBinError, ValueError for a pair that has no hash, FileNotFoundError where no pair is there.
    """
    named = with_suffix(output_prefix, ".idx").is_file()
    for suffix in [""] if named else [f"_{key}_document" for key in json_keys]:
        prefix = with_suffix(output_prefix, suffix)
        corpus, sidecar = open_corpus(prefix.name, prefix), read_sidecar(prefix) or {}
        if doubt := check_bin(prefix, sidecar, whole=True):
            raise ValueError(f"{prefix}.bin cannot be verified: {doubt}")
        digest = sha256(with_suffix(prefix, ".bin"))
        if digest != sidecar.get("bin_sha256", digest):
            fault = f"{prefix}.bin is damaged: its SHA-256 is not that of {prefix.name}.json"
            raise DamagedBinError(f"{fault}; {REDO}")
        check_file(with_suffix(prefix, ".idx"), sidecar, "idx_sha256")
        if origins_of(prefix).is_file():
            load_origins(prefix, corpus.documents)
            check_file(origins_of(prefix), sidecar, "docs_sha256")
        log(f"{prefix}.bin: every byte is as it was written, SHA-256 {digest}")


def add_to_ledger(output: Path, stage: str, sidecars: dict[str, Sidecar], inputs: dict[str, str]) -> None:
    """Add a ledger line to each key's side folder. inputs: besides those in the sidecars.

    The keys share the time of the process.
    """
    name, seconds = f"{stage} {output.name}", (time.time() - ledger.process_start()) / max(1, len(sidecars))
    # Earlier versions wrote one line of all keys, beside the outputs.
    former = {item for line in ledger.read(output.parent) for item in line["outputs"].items()}
    for prefix, sidecar in sidecars.items():
        outputs = {prefix: sidecar["bin_sha256"]}
        if former >= outputs.items():
            continue
        # Those of a shard are hashed when it is merged: other shards read them, too.
        read = inputs | {of["path"]: of["sha256"] for of in sidecar["inputs"] if of.get("sha256")}
        counts = {"tokens": sidecar["tokens"], "seconds": seconds}
        finish(side_file(prefix, ""), name, inputs=read, outputs=outputs, **counts)


def document_order(documents: int, seed: int | None) -> np.ndarray:
    """Number of the document stored at each place, [documents]: a permutation by seed; None: the identity."""
    if seed is None:
        return np.arange(documents)
    # SplitMix64 of the document's number: the same on every machine and NumPy version.
    keys = np.arange(documents, dtype=np.uint64) * np.uint64(_GAMMA)
    keys += np.uint64((seed * _MIX[0] + _GAMMA) % 2**64)
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
    whole: tuple[Path, BinHashes] | None = None
    """The file of the tokens, where it may become the .bin as it is, and its hashes."""


def rejects_of(prefix: Path) -> Path:
    """The file of a pair's rejects, which is there if it has any: the former one where only that is there."""
    path, former = side_file(prefix, "rejects.jsonl"), _former_rejects(prefix)
    return former if former.is_file() and not path.is_file() else path


def _former_rejects(prefix: Path) -> Path:
    return Path(f"{str(prefix).removesuffix('_document')}_rejects.jsonl")


def refuse_empty(parts: Sequence[Stored], key: str, prefix: Path, inputs: Sequence[dict[str, Any]]) -> None:
    """ValueError where no document is left, with the rejects written to say why."""
    if any(len(part.lengths) for part in parts):
        return
    rejects, path = list(_rejects(parts, inputs)), side_file(prefix, "rejects.jsonl")
    if not rejects:
        names = ", ".join(source["path"] for source in inputs)
        raise ValueError(f"no document in {names}: nothing is written")
    with replacing(path) as stream:
        stream.writelines(map(reject_line, rejects))
    first = rejects[0]
    fault = f"every document is rejected for key {key!r}, so nothing is written: {len(rejects)}"
    place = f"{first['file']}:{first['line']}: {first['reason']}"
    raise ValueError(f"{fault}, the first {place}; all are in {path}")


def _rejects(parts: Sequence[Stored], inputs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rejects of all parts, in input order, with line numbers of the whole input."""
    names = [source["path"] for source in inputs]
    for part in parts:
        with part.rejects.open("rb") if part.rejects.is_file() else io.BytesIO() as stream:
            while line := stream.readline(_MOST_REJECT):
                rejected = parse_json(line, str(part.rejects), _MOST_REJECT - 1)
                if mistake(rejected, _REJECT) or (
                    part.lines_before is not None and rejected["file"] not in names
                ):
                    raise ValueError(f"{part.rejects} is damaged: it has the line {shown(line)}; {REDO}")
                before = part.lines_before[names.index(rejected["file"])] if part.lines_before else 0
                yield {**rejected, "line": rejected["line"] + before}


_REJECT = {"file": str, "line": int, "reason": str, "excerpt": str}


def reject_line(rejected: dict[str, Any]) -> bytes:
    return json.dumps(rejected, ensure_ascii=False).encode() + b"\n"


def write_pair(parts: Sequence[Stored], prefix: Path, about: Sidecar, began: float, log: Log) -> Sidecar:
    """Bring one key's documents into their final order; then all its files take their names.

    Tokens that are in that order already, in one file, are not copied. began: `time.monotonic()` of the run.
    Returns the sidecar.
    """
    dtype = np.dtype(about["dtype"])
    lengths = np.concatenate([part.lengths for part in parts])
    reasons = Counter(rejected["reason"].split(":")[0] for rejected in _rejects(parts, about["inputs"]))
    sidecar, origins_path = with_suffix(prefix, ".json"), side_file(prefix, "docs.npy")
    rejects_path = side_file(prefix, "rejects.jsonl")
    with contextlib.ExitStack() as files:
        # After a failed write, once its files are gone.
        files.callback(remove_if_empty, side_file(prefix, ""))
        # They take their names in the opposite order, the sidecar last.
        sidecar_file = files.enter_context(replacing(sidecar))
        origins = files.enter_context(replacing(origins_path))
        rejects_file = files.enter_context(replacing(rejects_path)) if reasons else None
        writer = files.enter_context(IndexedWriter(prefix, dtype))
        docs = hashlib.sha256()

        def add_origins(data: Any) -> None:
            with naming(origins_path):
                origins.write(data)
            docs.update(data)

        descr = np.lib.format.dtype_to_descr(ORIGIN)
        header = {"descr": descr, "fortran_order": False, "shape": (len(lengths),)}
        np.lib.format.write_array_header_1_0(head := io.BytesIO(), header)
        add_origins(head.getvalue())
        whole = parts[0].whole if len(parts) == 1 and about["seed"] is None else None
        if whole is not None and writer.adopt(whole[0], lengths, whole[1]):
            add_origins(parts[0].origins.data)
        else:
            tokens_MB = -(-int(lengths.sum(dtype=np.int64)) * dtype.itemsize // 1_000_000)
            progress = files.enter_context(Progress("store", tokens_MB, "MB", show=tokens_MB >= _SHOWN_MB))
            for tokens, counts, records in _in_order(parts, lengths, about["seed"], dtype):
                writer.add_documents(tokens, counts)
                add_origins(records.data)
                progress.advance(writer.num_tokens * dtype.itemsize // 1_000_000 - progress.done)
        described = {
            "tool": _tool(),
            **about,
            "documents": len(lengths),
            "tokens": writer.num_tokens,
            "rejected": dict(sorted(reasons.items())),
            "bin_sha256": writer.sha256,
            "idx_sha256": writer.idx_sha256,
            "docs_sha256": docs.hexdigest(),
        }
        with naming(sidecar):
            sidecar_file.write(json_bytes(described))
            on_disk(sidecar_file)
        with naming(origins_path):
            on_disk(origins)
        if rejects_file is not None:
            with naming(rejects_path):
                rejects_file.writelines(map(reject_line, _rejects(parts, about["inputs"])))
                on_disk(rejects_file)

        # Only a pair of ours has a sidecar. Files of these names beside another's are none of ours.
        former = [_former_rejects(prefix), with_suffix(prefix, FORMER)] if sidecar.exists() else []

        def forget_earlier() -> None:
            for path in (sidecar, rejects_path, *former):
                path.unlink(missing_ok=True)

        writer.finalize(forget_earlier)
    rejected = f", {sum(reasons.values())} rejected, see {rejects_path}" if reasons else ""
    stored = f"{len(lengths)} documents, {writer.num_tokens} {dtype} tokens"
    log(f"wrote {prefix}.bin: {stored}, {time.monotonic() - began:.1f} s{rejected}")
    return described


def _in_order(
    parts: Sequence[Stored], lengths: np.ndarray, seed: int | None, dtype: np.dtype[Any]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, lengths and origins of consecutive documents in their final order, about COPY_TOKENS a time.

    The next turn overwrites the tokens.
    """
    order = document_order(len(lengths), seed)
    firsts = np.cumsum([0] + [len(part.lengths) for part in parts])
    starts = np.concatenate([np.cumsum(p.lengths, dtype=np.int64) - p.lengths for p in parts])
    ends = np.cumsum(lengths[order], dtype=np.int64)
    # Plain views: a slice of one costs a fifth of that of an array.
    sources = [np.asarray(part.tokens).data for part in parts]
    lo, base, room = 0, 0, np.empty(0, dtype=dtype)
    while lo < len(order):
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
        for n, (part, source) in enumerate(zip(parts, sources, strict=True)):
            here = slice(bounds[n], bounds[n + 1])
            origins = part.origins[documents[here] - firsts[n]]
            if part.lines_before is not None:
                origins["line"] += np.array(part.lines_before, dtype=np.uint64)[origins["file"]]
            records[places[here]] = origins
            first, length = starts[documents[here]], lengths[documents[here]]
            last = ends[lo + places[here]] - base
            for to, until, at in zip((last - length).tolist(), last.tolist(), first.tolist(), strict=True):
                into[to:until] = source[at : at + until - to]
        yield tokens, lengths[order[lo:hi]], records
        lo, base = hi, int(ends[hi - 1])


def _tool() -> str:
    try:
        return f"megatron_r1 {importlib.metadata.version('megatron-r1')}"
    except importlib.metadata.PackageNotFoundError:
        return "megatron_r1, not installed"
