"""Find evaluation items, and probing documents, in text that is to be trained on; keep it out by a mask.

Writes to the output folder hits.parquet (a row a hit, with both texts), dropped.txt (hashes of the texts that
were hit), rejects.jsonl, manifest.json and, with --prefix, PAIR.npz: a mask over documents for a phase's
keep. The texts are read in parts. A part that is done stays done: the same command goes on after a kill, and
the result depends neither on --workers nor on shards. docs/curation.md has the rule and its measured errors.

python tools/decontaminate.py --input data/text/a.jsonl data/text/b.parquet --items mine=items.jsonl \\
    --gold gsm8k math500 --probes data/curated --output data/clean --workers 8 \\
    --prefix data/tokens/a_text_document --seq-length 2048

Across nodes, each takes a shard (--shard I/N, or --shard env under torchrun or SLURM). Afterwards, once, the
same command with --merge in place of --shard.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
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
from megatron_r1.data.indexed import open_corpus
from megatron_r1.data.keep import save_documents
from megatron_r1.data.npy import read_array
from megatron_r1.data.provenance import Provenance, read_provenance, text_hashes
from megatron_r1.preprocess.documents import (
    MOST_BYTES,
    Input,
    Piece,
    cut,
    digest,
    identity,
    most_bytes,
    open_input,
    open_inputs,
)
from megatron_r1.preprocess.rows import check_keys, parse, reject, text_of
from megatron_r1.preprocess.shards import parse_shard
from megatron_r1.preprocess.workers import follow_parent
from megatron_r1.records import Corpus
from megatron_r1.run.stage import answer, answered, finish, standing
from megatron_r1.system.errors import require, rewording
from megatron_r1.system.files import make_folder, replacing, sha256, write_json
from megatron_r1.system.json_io import mistake, read_object
from megatron_r1.system.terminal import Progress, count, number, positive, say, tool_parser, user_errors

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


def main() -> None:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="texts, as tools/preprocess_data.py reads them")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="texts of a row (default: text)")
    add("--items", nargs="+", default=[], metavar="NAME=FILE", help="evaluation items: JSON lines of "
        "question (or prompt, text) and answer (or gold); either may be absent")  # fmt: skip
    add("--gold", nargs="+", default=[], metavar="NAME", help="sets of data.gold: gsm8k, math500, ...")
    add("--probes", nargs="+", default=[], type=Path, metavar="DIR", help="curated folders, or files of "
        "documents with text, that training must not hold")  # fmt: skip
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the results")
    add("--prefix", nargs="+", default=[], help="pairs made of these texts: a keep mask is written for each")
    add("--seq-length", type=count, metavar="S", help="of the run that takes the masks; --prefix needs it")
    add("--workers", type=count, default=1, help="processes; the result does not depend on it (default: 1)")
    add("--shard", metavar="I/N", help="scan a share of the parts, from 0; env: as torchrun or SLURM says")
    add("--merge", action="store_true", help="write the results of parts that shards have scanned")
    add("--part-megabytes", type=positive, default=64.0, help="bytes of text in a part (default: 64)")
    add("--reject-limit", type=number(int, 0), default=100, help="stop beyond so many rejects (default: 100)")
    add("--max-document-megabytes", type=float, default=MOST_BYTES / 1e6, metavar="N", help="a longer line "
        "or row of a table is a reject (default: %(default)g)")  # fmt: skip
    add("--check", action="store_true", help="print what would be read and written, and exit")
    add("--estimate", action="store_true", help="print time and memory by a sample of the text, and exit")
    args = parser.parse_args()
    if bool(args.prefix) != bool(args.seq_length):
        parser.error("--prefix and --seq-length go together")
    if args.shard and (args.merge or args.prefix):
        parser.error("--shard only scans; give --merge and --prefix to the last command, without --shard")
    with user_errors():
        check_keys(args.json_keys)
        shard = None
        if args.shard:
            shard = parse_shard(args.shard, output_prefix=None if args.check else args.output / "shard")
            # Each shard is a run of its own: its mistakes are not for rank 0 to tell.
            os.environ.pop("RANK", None)
        named = [item.partition("=")[::2] for item in args.items]
        if wrong := [name for name, path in named if not name or not path]:
            raise ValueError(f"--items {wrong[0]}: write NAME=FILE")
        if len(dict(named)) < len(named):
            raise ValueError("--items: a name is given twice; each names one set")
        parts = Items.read(dict(named), args.gold).parts if named or args.gold else []
        items = Items([*parts, *(part for path in args.probes for part in probing_parts(path))])
        most = most_bytes(args.max_document_megabytes)
        sources = open_inputs(args.input, most)
        for source in sources:
            source.check(args.json_keys)
        size = sum(source.size for source in sources)
        # What is wrong with a pair is said before the scan, which may take hours.
        pairs = {name: (open_corpus(Path(name).name, name), read_provenance(name)) for name in args.prefix}
        masks = Counter(f"{corpus.name}.npz" for corpus, _ in pairs.values())
        if twice := [name for name, n in masks.items() if n > 1]:
            raise ValueError(f"--prefix: two masks would be {twice[0]}; give each pair another --output")
        job = Job([source.name for source in sources], args.json_keys, most, items, args.output,
                  max(1, math.ceil(size / args.part_megabytes / 1e6)))  # fmt: skip
        if args.check:
            probes = f"{len(items.parts) - len(parts)} probing documents"
            say(f"items: {len(parts)} questions and answers, {probes}", result=True)
            say(f"input: {len(sources)} files, {size:,} bytes in {job.parts} parts", result=True)
            say(f"output: {args.output}/hits.parquet, dropped.txt, rejects.jsonl, manifest.json", result=True)
            return
        if args.estimate:
            estimate(job, args.workers, size)
            return
        request = {"format": FORMAT, "inputs": {s.name: identity(s) for s in sources}, "keys": args.json_keys,
                   "max_document_bytes": most, "items": items.identity, "parts": job.parts}  # fmt: skip
        manifest = run(job, request, shard, pairs, args)
        if manifest is not None:
            of = f"{manifest['texts']:,} texts of {manifest['documents']:,} documents were hit"
            say(f"{args.output}: {of}; {manifest['hits']}", result=True)


def run(
    job: Job,
    request: dict[str, Any],
    shard: tuple[int, int] | None,
    pairs: dict[str, tuple[Corpus, Provenance]],
    args: Any,
) -> dict[str, Any] | None:
    """Scan, and write the results where no other shard is to. Returns the manifest, if it is written."""
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
        if not args.merge:
            scan_all(job, mine, args.workers, args.reject_limit)
        if shard is not None:
            say(f"shard {index} of {of}: {len(mine)} of {job.parts} parts are scanned; --merge comes last")
            return None
        manifest = merge(job, request, args.reject_limit)
    files = [output / name for name in manifest["files"]]
    files += [mask(job, *pair, args.seq_length) for pair in pairs.items()]
    with ThreadPoolExecutor(args.workers) as pool:
        inputs = dict(zip(job.inputs, pool.map(digest, job.open()), strict=True))
    finish(output, "decontaminate", inputs=inputs, outputs={str(path): sha256(path) for path in files})
    return manifest


if __name__ == "__main__":
    main()
