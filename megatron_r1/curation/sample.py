"""A seeded random sample of a source's documents, in rounds: the pilot, and what the stages then need.

All inputs of a source are cut into parts of equal bytes, and the parts are put into a random order. The first
of them are read, until enough documents are there. A document belongs to the part that holds its first byte.
So each document is in the sample with the same probability, and inputs of any size are read in part only.
Reading ends with the part that has enough documents: a sample of a few parts favours long documents a little.

A packed file cannot be read from its middle. Its parts are its documents by their hash, and for each round
the file is read whole. Packed files therefore take turns: the parts of 16 are in random order together, and
the next 16 files come when they are used up.

Documents that come again, and documents of another language, are left out and counted.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_r1.curation.request import CurationConfig, TextSource
from megatron_r1.curation.work import ID, Documents, key_of, parted, write_documents
from megatron_r1.preprocess.documents import Input, Lines, Piece, identity, open_inputs
from megatron_r1.preprocess.rows import Row, parse, reject, text_of
from megatron_r1.preprocess.workers import follow_parent
from megatron_r1.system.errors import require, rewording, shown
from megatron_r1.system.terminal import Progress

FORMAT = 1
MOST_PART, LEAST_PART, PARTS = 1 << 20, 1 << 14, 256
"""Bytes of a part, at most and at least, and parts of a source that is cut into pieces between these."""
_PACKED = 4
"""Bytes of text for a byte of a packed file, about. Its parts are smaller by this factor."""
_TURN = 16
"""Packed files whose parts are in one random order."""
_FIRST, _AT_ONCE = 4, 16
"""Parts that are read first, and parts that one task reads."""
_MOST_REJECTS = 20
_NOTHING: dict[str, Any] = {"parts": 0, "counts": {}, "rejects": []}
"""Facts of no round."""
_LANGUAGE_CHARACTERS = 4000
_LARGEST = float(np.finfo(np.float32).max)
_STAGE: dict[str, Any] = {"threshold": None, "fallback": False, "examples": {"kept": [], "dropped": []}}
"""Facts of a stage that are the same for most."""
SCORES = ("quality", "judge", "domain")
SHOWN, CHARACTERS = 3, 300
"""Examples of a stage that the manifest shows, and their characters."""

Task = tuple[int, list[int], int]
"""Number of an input, those of some of its parts, and how many parts it has."""


class Parts:
    """The parts of a source's inputs, in seeded order: `input_P`, `number_P`, and `bytes_P` [P]."""

    def __init__(self, inputs: Sequence[Input], seed: int):
        rng, size_I = np.random.default_rng(seed), np.array([source.size for source in inputs])
        packed_I = np.array([_is_packed(source) for source in inputs])
        size, packed = min(max(int(size_I.sum()) // PARTS, LEAST_PART), MOST_PART), int(packed_I.sum())
        turn_I = np.zeros(len(inputs))
        turn_I[packed_I] = rng.permutation(packed) // _TURN
        self.count_I = np.maximum(1, -(-size_I * np.where(packed_I, _PACKED, 1) // size))
        input_P = np.repeat(np.arange(len(inputs)), self.count_I)
        # Turns of packed files are spread over [0, 1), where all other parts lie at random.
        turns_I = np.where(packed_I, -(-packed // _TURN), 1)
        order = np.argsort((turn_I[input_P] + rng.random(len(input_P))) / turns_I[input_P], kind="stable")
        self.input_P = input_P[order]
        self.number_P = np.concatenate([np.arange(count) for count in self.count_I])[order]
        self.bytes_P = (size_I / self.count_I)[self.input_P]

    def __len__(self) -> int:
        return len(self.input_P)

    def tasks(self, inputs: Sequence[Input], begin: int, end: int) -> list[Task]:
        """Parts [begin, end) as tasks of one input each. A packed file, which is read whole, is one task."""
        tasks = list[Task]()
        input_P, number_P = self.input_P[begin:end], self.number_P[begin:end]
        for number in np.unique(input_P).tolist():
            mine = np.sort(number_P[input_P == number]).tolist()
            size = len(mine) if _is_packed(inputs[number]) else _AT_ONCE
            count = int(self.count_I[number])
            tasks += [(number, mine[at : at + size], count) for at in range(0, len(mine), size)]
        return tasks


def _is_packed(source: Input) -> bool:
    return isinstance(source, Lines) and source.packed


def draw(
    name: str,
    config: CurationConfig,
    work: Path,
    target: int,
    before: Documents | None = None,
    workers: int = 1,
) -> Documents:
    """The next round of a source: at least `target` documents where the inputs have them. Both rounds
    have at most `config.most`.

    Facts of the result, of both rounds: `parts`, `share` of the bytes, `counts` of lines read, rejected, in
    another language and repeated, and the first `rejects`. Raises ValueError where no document is found.
    """
    source = config.sources[name]
    language = config.quality.language if config.quality else None
    inputs = open_inputs(source.text)
    for one in inputs:
        one.check(source.keys())
    key = key_of(
        format=FORMAT, inputs=[identity(one) for one in inputs], keys=source.keys(), language=language,
        seed=config.seed, target=target, most=config.most, before=before and before.path.name,
    )  # fmt: skip
    path, drawn = work / f"sample-{name}-{key}.parquet", work / f"draw-{name}-{key}"
    if Documents.there(path):
        shutil.rmtree(drawn, ignore_errors=True)
        return Documents(path)
    parts, earlier = Parts(inputs, config.seed), before.facts if before else _NOTHING
    known = {row["id"] for row in before.rows("id")} if before else set()
    begin = end = earlier["parts"]
    rate = len(known) / begin if begin else 0.0
    units, fresh = list[Documents](), set[str]()
    read = partial(_read, name, source, language)
    # Spawned, not forked: the caller may hold threads or a device. These processes import no torch.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), follow_parent)
    died = "a worker process died, most often for want of memory; run again with fewer --workers to go on"
    with (
        rewording(lambda _: died, BrokenProcessPool),
        pool,
        Progress(f"sample {name}", target, "documents") as bar,
    ):
        while len(fresh) < target and end < len(parts):
            # Documents that are rare at first are not taken for rare everywhere.
            most = min(8 * (end - begin) or 8 * begin or _FIRST, len(parts) - end)
            more = min(math.ceil((target - len(fresh)) / rate), most) if rate else most
            tasks = parts.tasks(inputs, end, end + more)
            paths = [drawn / f"{end:08d}-{n:06d}.parquet" for n in range(len(tasks))]
            deque((pool.map if workers > 1 else map)(read, tasks, paths), 0)
            some = [Documents(one) for one in paths]
            found = {row["id"] for unit in some for row in unit.rows("id")} - known - fresh
            bar.advance(len(found))
            units, fresh, end = units + some, fresh | found, end + more
            rate = len(fresh) / (end - begin)
    counts = sum((Counter(unit.facts["counts"]) for unit in units), Counter(earlier["counts"]))
    counts["repeated"] += sum(map(len, units)) - len(fresh)
    rejects = [*earlier["rejects"], *chain.from_iterable(unit.facts["rejects"] for unit in units)]
    if not fresh and not known:
        dropped = ", ".join(f"{counts[of]} {of}" for of in ("rejected", "other_language"))
        first = f"; the first reject: {shown(rejects[0])}" if rejects else ""
        raise ValueError(f"sources.{name}: no document in {len(inputs)} inputs ({dropped}){first}")
    share = parts.bytes_P[:end].sum() / parts.bytes_P.sum() if end < len(parts) else 1
    facts = {"parts": end, "share": float(share), "counts": dict(+counts), "rejects": rejects[:_MOST_REJECTS]}
    # Of too many, those of the smallest hashes: they lie in all places of the inputs.
    wanted = set(sorted(fresh)[: config.most - len(known)])
    write_documents(path, _once(units, wanted), lambda: facts)
    shutil.rmtree(drawn, ignore_errors=True)
    return Documents(path)


def _once(units: Sequence[Documents], wanted: set[str]) -> Iterator[dict[str, Any]]:
    """The documents of these ids, each once."""
    for unit in units:
        for row in unit.rows():
            if row["id"] in wanted:
                wanted.remove(row["id"])
                yield row


def _read(name: str, source: TextSource, language: str | None, task: Task, path: Path) -> None:
    """Write the documents of some parts."""
    counts, rejects = Counter[str](), list[dict[str, Any]]()
    number, listed, count = task
    opened, numbers = _opened(tuple(source.text))[number], set(listed)
    packed, size = _is_packed(opened), opened.size
    classify = require("py3langid", "quality.language").classify if language else None

    def document(piece: Piece, line: int, row: Row, within: bool) -> dict[str, Any] | None:
        try:
            if (record := parse(row)) is None:
                return None
            text, utf8 = text_of(record, source.key)
            digest = xxhash.xxh3_128_digest(utf8)
            if packed and int.from_bytes(digest[8:], "big") % count not in numbers:
                return None
            score = _score(record, source.score) if source.score else None
        except ValueError as error:
            # Without a text a packed file's line has no hash.
            if not packed or line % count in numbers:
                counts.update(read=1, rejected=1)
                rejects.append(reject(piece.path, 0 if within else line, str(error), row))
            return None
        counts["read"] += 1
        if classify and classify(text[:_LANGUAGE_CHARACTERS])[0] != language:
            counts["other_language"] += 1
            return None
        metadata = {"source": name, "file": opened.name, "score": score}
        return {"text": text, "id": digest.hex(), "metadata": metadata}

    ranges = [(size * n // count, size * (n + 1) // count) for n in listed]
    rows = (
        document(piece, line, row, lo > 0)
        for lo, hi in ([(0, size)] if packed else ranges)
        for piece in opened.pieces(number, source.keys(), lo, hi)
        for line, row in enumerate(piece.rows, piece.first)
    )
    write_documents(
        path, filter(None, rows), lambda: {"counts": dict(counts), "rejects": rejects[:_MOST_REJECTS]}
    )


@cache
def _opened(names: tuple[str, ...]) -> list[Input]:
    return open_inputs(names)


def _score(record: dict[str, Any], key: str) -> float:
    """The number under a key, `a.b` within `a`. Raises ValueError that says why there is none."""
    value: Any = record
    for name in [key] if key in record else key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    # Scores are float32 from here on.
    if type(value) not in (int, float) or not abs(value) <= _LARGEST:
        raise ValueError(f"no score: {key!r} is {shown(value)}")
    return float(value)


class Source:
    """A source's sample, and how far its documents came. Rows are numbered over both rounds, N in all.

    `left`: rows that passed all stages so far, ascending. `scores`: kind -> float32 [N], NaN where it was not
    asked for. `last_N`: stages that each row passed.
    """

    def __init__(self, name: str, rounds: list[Documents]):
        self.name, self.rounds = name, rounds
        self.ids_N = np.concatenate([one.column("id", ID) for one in rounds])
        n, read = len(self.ids_N), rounds[-1].facts["counts"]["read"]
        self.left, self.last_N = np.arange(n), np.zeros(n, np.int8)
        self.scores = {kind: np.full(n, np.nan, np.float32) for kind in SCORES}
        self.stages: list[dict[str, Any]] = [{"stage": "sample", "in": read, "kept": n, **_STAGE}]

    @property
    def score_N(self) -> np.ndarray:
        """The latest score of each row, 0 without one."""
        out = np.zeros(len(self.ids_N), np.float32)
        for kind in SCORES:
            out = np.where(np.isnan(self.scores[kind]), out, self.scores[kind])
        return out

    def rows(self, among: np.ndarray, *columns: str) -> Iterator[dict[str, Any]]:
        for one, some in zip(self.rounds, parted(among, [*map(len, self.rounds)]), strict=True):
            yield from one.rows(*columns, among=some)

    def ranked(self, rows: np.ndarray, score_N: np.ndarray | None = None) -> np.ndarray:
        """Rows from the best score down."""
        score_N = self.score_N if score_N is None else score_N
        return rows[np.lexsort((self.ids_N[rows], -score_N[rows]))]

    def with_scores(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        """The documents of these rows, in this order, with their latest scores."""
        by_id, score_N = {row["id"]: row for row in self.rows(np.sort(rows))}, self.score_N
        for at in rows:
            row = by_id[self.ids_N[at].decode()]
            yield {**row, "metadata": {**row["metadata"], "score": float(score_N[at])}}

    def halves(self, rows: np.ndarray) -> np.ndarray:
        """0 or 1 for each of these rows, in turn in the order of their ids: halves that share nothing."""
        return np.argsort(np.argsort(self.ids_N[rows])) % 2

    def file(self, work: Path) -> Path:
        """The documents that are left, as a file for the next model."""
        digest = hashlib.sha256(self.left.astype("<i8").tobytes()).hexdigest()
        key = key_of(rounds=[one.path.name for one in self.rounds], left=digest)
        path = work / f"left-{self.name}-{key}.parquet"
        write_documents(path, self.rows(self.left))
        return path

    def keep(self, stage: str, kept: np.ndarray, score_N: np.ndarray | None = None, **facts: Any) -> None:
        """Leave only the rows `kept` of those that are left."""
        before, self.left = self.left, np.sort(kept)
        self.last_N[self.left] += 1
        ends = {"kept": self.left, "dropped": np.setdiff1d(before, self.left)}
        facts = {**_STAGE, **facts, "examples": self._examples(ends, score_N)}
        self.stages.append({"stage": stage, "in": len(before), "kept": len(self.left), **facts})

    def _examples(self, ends: dict[str, np.ndarray], score_N: np.ndarray | None) -> dict[str, Any]:
        """Documents at the top, in the middle and at the bottom of each end."""
        out = {}
        for name, rows in ends.items():
            places = np.unique(np.linspace(0, max(0, len(rows) - 1), SHOWN).astype(int))
            chosen = self.ranked(rows, score_N)[places[: len(rows)]]
            text = {row["id"].encode(): row["text"] for row in self.rows(np.sort(chosen), "id", "text")}
            score = [None] * len(chosen) if score_N is None else score_N[chosen].tolist()
            shown_texts = [text[one][:CHARACTERS] for one in self.ids_N[chosen]]
            out[name] = [{"text": t, "score": s} for t, s in zip(shown_texts, score, strict=True)]
        return out
