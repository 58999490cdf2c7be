"""Evaluation items and probing documents in corpora: parts, processes, shards, hits, masks.

The inputs are cut into parts of equal bytes. What is found in a part is one file, so a launch that was killed
goes on with the parts that are missing. docs/curation.md has the rule and the files.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.curation.decontaminate import Items, Matcher, Part
from megatron_r1.data.keep import save_documents
from megatron_r1.data.npy import read_array
from megatron_r1.data.provenance import Provenance, text_hashes
from megatron_r1.preprocess.documents import (
    Input,
    Piece,
    cut,
    digest,
    identity,
    open_input,
    open_inputs,
)
from megatron_r1.preprocess.rows import parse, reject, text_of
from megatron_r1.preprocess.workers import follow_parent
from megatron_r1.records import Corpus
from megatron_r1.run.stage import answer, answered, finish, standing
from megatron_r1.system.errors import require, rewording
from megatron_r1.system.files import make_folder, replacing, sha256, write_json
from megatron_r1.system.json_io import mistake, read_object
from megatron_r1.system.terminal import Progress, say

FORMAT = 1
RANGES, OF_RANGE = 256, 128
"""Places at which the inputs are sampled for frequent n-grams, and the documents taken at each."""
MOST_PART = 1 << 30
"""Bytes of a part's file. Of a part in which all texts are hit it has a few times the text's."""
PLACE = {"input": int, "line": int}
PART = {"documents": int, "lines": [int], "looked_up": [str], "hits": [PLACE], "rejects": [PLACE]}
COLUMNS = {
    "hash": "string", "file": "string", "line": "int64", "key": "string", "set": "string", "item": "string",
    "part": "string", "score": "float64", "item_text": "string", "document_text": "string",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a process needs to scan a part."""

    inputs: list[str]
    keys: list[str]
    most: int
    items: Items
    output: Path
    parts: int

    def open(self) -> list[Input]:
        return open_inputs(self.inputs, self.most)

    def matcher(self) -> Matcher:
        path = self.output / "frequent.npy"
        with rewording(lambda error: f"{path}: {error}; remove it and run again"):
            counted = read_array(path, np.int64, (len(self.items.gram_U) + 1,))
        return Matcher(self.items, counted)

    def path(self, part: int) -> Path:
        return self.output / "parts" / f"{part:06d}.json"


Text = tuple[bytes, int, str, str]
"""UTF-8, line in its part, key and text of a document."""


def texts_of(piece: Piece, keys: Sequence[str], rejects: list[dict[str, Any]]) -> Iterator[Text]:
    """The documents of a piece. Rows that are none are added to `rejects`, once for each key."""
    for line, row in enumerate(piece.rows, piece.first):
        for key in keys:
            try:
                record = parse(row)
                text, utf8 = text_of(record, key) if record is not None else ("", b"")
            except ValueError as error:
                rejects.append(reject(piece.path, line, str(error), row))
            else:
                if text:
                    yield utf8, line, key, text


def sample(job: Job) -> Iterator[str]:
    """Texts at places that lie evenly over each input, whatever its size."""
    sources = job.open()
    ranges = max(1, RANGES // len(sources))
    for n, source in enumerate(sources):
        of_source = [source.size * k // ranges for k in range(ranges + 1)]
        if getattr(source, "packed", False):
            pieces: Iterator[Piece] = islice(source.pieces(n, job.keys, 0, source.size), ranges)
        else:
            each = (source.pieces(n, job.keys, lo, hi) for lo, hi in pairwise(of_source))
            pieces = (piece for of_range in each for piece in islice(of_range, 1))
        for piece in pieces:
            yield from (text for *_, text in islice(texts_of(piece, job.keys, []), OF_RANGE))


def name_of(utf8: bytes) -> str:
    """The hash that names a text in provenance and in documents of a curated folder."""
    return text_hashes([utf8]).tobytes().hex()


def scan(job: Job, matcher: Matcher, part: int) -> tuple[int, int]:
    """Write what is found in a part. Returns the number of its rejects and of its documents."""
    sources, documents = job.open(), 0
    lines, looked_up = [0] * len(sources), list[str]()
    hits, rejects = list[dict[str, Any]](), list[dict[str, Any]]()
    for n, (source, (lo, hi)) in enumerate(zip(sources, cut(sources, (part, job.parts)), strict=True)):
        for piece in source.pieces(n, job.keys, lo, hi) if lo < hi else ():
            before = len(rejects)
            texts = list(texts_of(piece, job.keys, rejects))
            for rejected in rejects[before:]:
                rejected["input"] = n
            for hit in matcher(text for *_, text in texts):
                utf8, line, key, _ = texts[hit.document]
                place = {"hash": name_of(utf8), "input": n, "line": line, "key": key}
                hits.append(asdict(hit) | place)
            if texts and not lines[n]:
                looked_up.append(name_of(texts[0][0]))
            lines[n], documents = piece.first + len(piece.rows) - 1, documents + len(texts)
    found = {"documents": documents, "lines": lines, "hits": hits, "rejects": rejects, "looked_up": looked_up}
    write_json(job.path(part), found)
    return len(rejects), documents


_scan: partial[tuple[int, int]]
"""`scan` of a worker process."""


def start_worker(job: Job) -> None:
    global _scan
    follow_parent()
    _scan = partial(scan, job, job.matcher())


def work(part: int) -> tuple[int, int]:
    return _scan(part)


def scan_all(job: Job, parts: Sequence[int], workers: int, reject_limit: int) -> None:
    """Scan the parts that are not done."""
    missing, rejected = [part for part in parts if not job.path(part).exists()], 0
    with Progress("decontaminate", len(missing), "parts") as bar:
        if workers == 1 or len(missing) < 2:
            done = map(partial(scan, job, job.matcher()), missing) if missing else iter(())
        else:
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(workers, context, start_worker, (job,))
            done = pool.map(work, missing)
        try:
            for rejects, _ in done:
                bar.advance()
                rejected += rejects
                if rejected > reject_limit:
                    raise ValueError(f"{rejected} rejects, more than {reject_limit}: {MEND}")
        except BrokenProcessPool:
            died = "a worker process died, most often for want of memory"
            raise ChildProcessError(f"{died}; run again with fewer --workers to go on") from None
        finally:
            if workers > 1 and len(missing) > 1:
                pool.shutdown(cancel_futures=True)


MEND = "name another --json-keys, mend the inputs, or raise --reject-limit"


def parts_of(job: Job) -> Iterator[dict[str, Any]]:
    """What was found in each part, with lines counted from the beginning of each input."""
    before = [0] * len(job.inputs)
    for part in range(job.parts):
        path = job.path(part)
        with rewording(lambda error: f"{path}: {error}; remove it and run again"):  # noqa: B023
            found = read_object(path, MOST_PART)
            if wrong := mistake(found, PART):
                raise ValueError(wrong)
            for row in (*found["hits"], *found["rejects"]):
                row["line"] += before[row["input"]]
                row["file"] = job.inputs[row.pop("input")]
            before = [a + b for a, b in zip(before, found["lines"], strict=True)]
        yield found


def merge(job: Job, request: dict[str, Any], reject_limit: int) -> dict[str, Any]:
    """Write the results of all parts and the manifest."""
    if missing := [part for part in range(job.parts) if not job.path(part).exists()]:
        raise ValueError(f"{len(missing)} of {job.parts} parts are not scanned; run the other shards first")
    arrow, parquet = require("pyarrow", "hits.parquet"), require("pyarrow.parquet", "hits.parquet")
    schema = arrow.schema([(name, getattr(arrow, kind)()) for name, kind in COLUMNS.items()])
    hashes, counts, documents, rejected = set[str](), Counter[str](), 0, 0
    files = [job.output / name for name in ("hits.parquet", "rejects.jsonl", "dropped.txt")]
    with replacing(files[0]) as table, replacing(files[1]) as rejects:
        with parquet.ParquetWriter(table, schema) as writer:
            for found in parts_of(job):
                # An empty row group for each clean part would slow down every reader.
                if found["hits"]:
                    writer.write_table(arrow.Table.from_pylist(found["hits"], schema))
                rejects.writelines(
                    json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in found["rejects"]
                )
                counts.update(f"{hit['set']}/{hit['part']}" for hit in found["hits"])
                hashes.update(hit["hash"] for hit in found["hits"])
                documents, rejected = documents + found["documents"], rejected + len(found["rejects"])
        if rejected > reject_limit:
            raise ValueError(f"{rejected} rejects in all, more than {reject_limit}: {MEND}")
        if not documents:
            rows = (row for found in parts_of(job) for row in found["rejects"])
            why = next((f"; {row['file']}:{row['line']}: {row['reason']}" for row in rows), "")
            raise ValueError(f"no document in {', '.join(job.inputs)}{why}; name other inputs or --json-keys")
    with replacing(files[2]) as stream:
        stream.writelines(f"{one}\n".encode() for one in sorted(hashes))
    matcher = job.matcher()
    facts = {"documents": documents, "rejects": rejected, "texts": len(hashes), "items": matcher.counts}
    of_sets = dict(sorted(counts.items()))
    return answer(
        job.output / "manifest.json", request, files, **facts, hits=of_sets, left_out=matcher.passed_over()
    )


def mask(job: Job, prefix: str, pair: tuple[Corpus, Provenance], seq_length: int) -> Path:
    """Write the mask of a pair's documents that were not hit and are no probing documents themselves."""
    corpus, origins = pair
    # A probing document that is too short to be looked for is still known by its hash.
    probing = (part.item for part in job.items.parts if part.part == "text")
    dropped = [*map(bytes.fromhex, (*(job.output / "dropped.txt").read_text().split(), *probing))]
    looked_up = [bytes.fromhex(of) for found in parts_of(job) for of in found["looked_up"]]
    if not origins.among(looked_up).any():
        fault = f"{prefix}: none of {len(looked_up)} texts that were looked up in it is there"
        raise ValueError(f"{fault}; name the pair that was made of --input and --json-keys")
    hit_D = origins.among(dropped)
    path = job.output / f"{corpus.name}.npz"
    save_documents(path, corpus, ~hit_D, seq_length)
    say(f"{path}: keeps {int((~hit_D).sum()):,} of {len(hit_D):,} documents", result=True)
    return path


def probing_parts(path: Path) -> Iterator[Part]:
    """Texts of a curated folder's documents, or of a file of the same form."""
    files = sorted((path / "documents").glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"--probes {path}: it has no documents/*.parquet; name a folder of curate_probes")
    for file in files:
        source = open_input(file)
        source.check(["text"])
        for piece in source.pieces(0, ["text"], 0, source.size):
            rejects = list[dict[str, Any]]()
            for utf8, _, _, text in texts_of(piece, ["text"], rejects):
                yield Part(f"probes/{file.stem}", name_of(utf8), "text", text)
            if rejects:
                raise ValueError(f"--probes {file}:{rejects[0]['line']}: {rejects[0]['reason']}; mend it")


def estimate(job: Job, workers: int, size: int) -> None:
    """Print what the job will take, from the pace of the sample on this machine."""
    texts = list(islice(sample(job), 8192))
    matcher = Matcher(job.items, job.items.count(texts))
    start = time.process_time()
    found = sum(1 for _ in matcher(list(islice(sample(job), len(texts)))))
    pace = (time.process_time() - start) / max(1, sum(len(text.encode()) for text in texts))
    say(f"items: {matcher.counts}", result=True)
    say(f"sample: {len(texts):,} documents, {found} hits, {pace * 2e9:.0f} us a 2 kB", result=True)
    hours = pace * size / 3600
    took = f"{hours:.2f} processor hours, {hours / workers:.2f} h by {workers} workers"
    say(f"text: {size / 1e9:.3f} GB in {job.parts} parts: {took}; packed files take longer", result=True)
    megabytes = (200 * len(job.items.number_E) + sum(len(p.text) for p in job.items.parts)) / 1e6
    longest = "and 35 bytes for each byte of its longest document"
    say(f"memory: about {megabytes + 300:.0f} MB in each worker, {longest}", result=True)


def decontaminate(
    job: Job,
    pairs: dict[str, tuple[Corpus, Provenance]],
    seq_length: int | None,
    *,
    shard: tuple[int, int] | None = None,
    merging: bool = False,
    workers: int = 1,
    reject_limit: int = 100,
) -> dict[str, Any] | None:
    """Scan, and write the results where no other shard is to. Returns the manifest, if it is written.

    `pairs`: prefix -> corpus and origins of the pairs that get a mask, for runs of `seq_length` tokens.
    `merging`: write the results of parts that shards have scanned. ValueError for results of another request,
    more than `reject_limit` rejects, inputs without a document, and a pair of other texts.
    """
    request = {
        "format": FORMAT,
        "inputs": {source.name: identity(source) for source in job.open()},
        "keys": job.keys,
        "max_document_bytes": job.most,
        "items": job.items.identity,
        "parts": job.parts,
    }
    output, asked = job.output, job.output / "request.json"
    make_folder(output / "parts")
    way_out = "name another --output, or remove this one"
    theirs = read_object(asked) if asked.exists() else None
    standing(theirs, request, lambda: True, f"{output} is of another request", way_out)
    if theirs is None:
        write_json(asked, request)
    if not (output / "frequent.npy").exists():
        counts = job.items.count(sample(job))
        with replacing(output / "frequent.npy") as stream:
            np.save(stream, counts)
    manifest = answered(output / "manifest.json", request) if shard is None else None
    if manifest is None:
        index, of = shard or (0, 1)
        mine = range(job.parts * index // of, job.parts * (index + 1) // of)
        if not merging:
            scan_all(job, mine, workers, reject_limit)
        if shard is not None:
            say(f"shard {index} of {of}: {len(mine)} of {job.parts} parts are scanned; --merge comes last")
            return None
        manifest = merge(job, request, reject_limit)
    files = [output / name for name in manifest["files"]]
    files += [mask(job, *pair, seq_length) for pair in pairs.items() if seq_length]
    with ThreadPoolExecutor(workers) as pool:
        inputs = dict(zip(job.inputs, pool.map(digest, job.open()), strict=True))
    finish(output, "decontaminate", inputs=inputs, outputs={str(path): sha256(path) for path in files})
    return manifest
