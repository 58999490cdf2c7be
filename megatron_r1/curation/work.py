"""A stage that a model takes part in: documents in chunks, and a file of scores for each chunk.

Documents between stages are Parquet files in datatrove's form, with columns text, id and metadata. The id is
the hash of the text, as `data/provenance.py` stores it, in 32 hexadecimal digits. A row group is a chunk.

Each chunk's scores appear whole, as one file. Ranks, shards and launches that go on share the chunks out, and
the result depends on none of them. The names of files and folders hold a hash of all that decides their
content, so scores of two models or two samples never meet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data.npy import read_array, write_array
from megatron_r1.system.arrow_io import open_parquet
from megatron_r1.system.errors import require, rewording
from megatron_r1.system.files import make_folder, replacing, write_json
from megatron_r1.system.json_io import read_object
from megatron_r1.system.terminal import Progress

CHUNK, CHUNK_BYTES = 4096, 64 << 20
"""Most documents of a chunk, and bytes of text beyond which it gets no further document."""
ID = "S32"
"""NumPy's type of an id."""


def key_of(**request: Any) -> str:
    """16 hexadecimal digits for what decides a file's content."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


class Documents:
    """A file of documents, in chunks, and the facts in the .json beside it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._reading(self.path.with_suffix(".json")):
            self.facts = read_object(self.path.with_suffix(".json"))
            self.chunks: list[int] = self.facts["chunks"]
            """Documents of each chunk."""

    def __len__(self) -> int:
        return sum(self.chunks)

    @staticmethod
    def there(path: Path) -> bool:
        """Whether both files are there. The second is written last, so the first is whole."""
        return path.is_file() and path.with_suffix(".json").is_file()

    @staticmethod
    def _reading(path: Path) -> AbstractContextManager[None]:
        way_out = "remove it, and run the same command again"
        return rewording(lambda error: f"{path} is damaged ({error!s:.200}); {way_out}", Exception)

    def read(self, chunk: int, *columns: str) -> list[dict[str, Any]]:
        """The rows of a chunk. ValueError for a damaged file."""
        with self._reading(self.path), open_parquet(self.path) as file:
            return file.read_row_group(chunk, list(columns) or None).to_pylist()

    def column(self, name: str, dtype: Any) -> np.ndarray:
        """The ids, or a number in the metadata, of all documents."""
        columns = ("id",) if name == "id" else ("metadata",)
        values = ((row if name == "id" else row["metadata"])[name] for row in self.rows(*columns))
        return np.fromiter(values, dtype, len(self))

    def rows(self, *columns: str, among: np.ndarray | None = None) -> Iterator[dict[str, Any]]:
        """All rows, or those whose numbers are `among`, ascending."""
        for chunk, wanted in enumerate(parted(np.arange(len(self)) if among is None else among, self.chunks)):
            if len(wanted):
                rows = self.read(chunk, *columns)
                yield from (rows[i] for i in wanted)


def parted(among: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Ascending numbers of rows of consecutive parts, as numbers within each part."""
    ends = np.cumsum(counts, dtype=np.int64)
    parts = np.split(among, np.searchsorted(among, ends)[:-1])
    return [part - end + count for part, end, count in zip(parts, ends, counts, strict=False)]


def write_documents(
    path: Path, rows: Iterable[dict[str, Any]], facts: Callable[[], dict[str, Any]] = dict
) -> None:
    """Write the rows of `Documents`. The facts, which are asked for after the last row, are written last.

    A file whose facts are there is whole, and is left as it is.
    """
    if not Documents.there(path):
        make_folder(path.parent)
        chunks = parquet_rows(path, rows)
        write_json(path.with_suffix(".json"), {**facts(), "chunks": chunks})


def parquet_rows(path: Path, rows: Iterable[dict[str, Any]]) -> list[int]:
    """Write rows {text, id, metadata} in datatrove's form. Returns the documents of each row group."""
    arrow, parquet = require("pyarrow", "curation"), require("pyarrow.parquet", "curation")
    fields = {"source": arrow.string(), "file": arrow.string(), "score": arrow.float64()}
    metadata = arrow.struct(list(fields.items()))
    schema = arrow.schema([("text", arrow.string()), ("id", arrow.string()), ("metadata", metadata)])
    chunks, rows = list[int](), iter(rows)
    with (
        replacing(path) as stream,
        parquet.ParquetWriter(stream, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        while chunk := _chunk(rows):
            writer.write_table(arrow.Table.from_pylist(chunk, schema), row_group_size=CHUNK)
            chunks.append(len(chunk))
    return chunks


def _chunk(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    chunk, size = list[dict[str, Any]](), 0
    for row in rows:
        chunk.append(row)
        size += len(row["text"])
        if len(chunk) == CHUNK or size > CHUNK_BYTES:
            break
    return chunk


@dataclass(frozen=True)
class Job:
    """A stage's work on one source. It travels between ranks as JSON."""

    kind: str
    source: str
    documents: str
    work: str
    identity: str
    prompt: str | None = None

    @property
    def folder(self) -> Path:
        """Where the chunks' scores are. The name follows from the request."""
        key = key_of(documents=Path(self.documents).name, identity=self.identity, prompt=self.prompt)
        return Path(self.work) / f"{self.kind}-{self.source}-{key}"

    def files(self) -> list[Path]:
        """The file of each chunk's scores."""
        folder = self.folder
        return [folder / f"{i:06d}.npy" for i in range(len(Documents(self.documents).chunks))]


class Pending(Exception):
    """Jobs whose scores are not all there."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs = list(jobs)
        super().__init__(", ".join(f"{job.kind} of {job.source}" for job in jobs))

    def chunks(self) -> tuple[int, int]:
        """Chunks that are scored, and all."""
        files = [path for job in self.jobs for path in job.files()]
        return sum(path.is_file() for path in files), len(files)


def scores(jobs: Sequence[Job], *axes: None) -> dict[str, np.ndarray]:
    """Source -> float32 [N], or [N, D] where `axes` is None. Raises Pending while a chunk is missing."""
    if not all(path.is_file() for job in jobs for path in job.files()):
        raise Pending(jobs)
    out = {}
    for job in jobs:
        parts = []
        for path, count in zip(job.files(), Documents(job.documents).chunks, strict=True):
            with rewording(lambda error: f"{path} is damaged ({error}); remove it to score it again"):  # noqa: B023
                parts.append(read_array(path, np.float32, (count, *axes)))
        out[job.source] = np.concatenate(parts or [np.zeros((0, *(0 for _ in axes)), np.float32)])
    return out


def score(
    jobs: Sequence[Job], make: Callable[[str], Any], share: tuple[int, int] = (0, 1), show: bool = True
) -> int:
    """Score the chunks r, r + n, ... of all jobs that have no file yet, for `share` (r, n). Returns how many.

    `make`: kind of a job -> its model, asked for only where a chunk is left. Raises ValueError for
    a model that is not the jobs', and for a score that is no finite number.
    """
    chunks = [(job, i, path) for job in jobs for i, path in enumerate(job.files())][share[0] :: share[1]]
    left = [chunk for chunk in chunks if not chunk[2].is_file()]
    kinds = ", ".join(dict.fromkeys(job.kind for job, _, _ in left))
    with Progress(kinds, len(chunks), "chunks", len(chunks) - len(left), show) as bar:
        for job, i, path in left:
            scorer = make(job.kind)
            if scorer.identity != job.identity:
                fault = f"{job.kind}: the model here is {scorer.identity[:12]}, and scores are wanted of"
                raise ValueError(f"{fault} {job.identity[:12]}; give every machine the same files")
            rows = Documents(job.documents).read(i, "text", "id")
            texts = [row["text"] for row in rows]
            values = np.asarray(
                scorer(texts) if job.prompt is None else scorer.judge(texts, job.prompt), np.float32
            )
            assert len(values) == len(rows)
            wrong = np.flatnonzero(~np.isfinite(values.reshape(len(rows), -1)).all(1))
            if len(wrong):
                text = rows[int(wrong[0])]["id"]
                raise ValueError(
                    f"{job.kind}: the model gives document {text} of {job.source} no finite score"
                )
            make_folder(path.parent)
            with replacing(path) as stream:
                write_array(stream, values)
            bar.advance()
    return len(left)
