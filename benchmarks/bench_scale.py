"""What grows with documents, sources, ranks, examples and checkpoints: the constants of docs/scaling.md.

python benchmarks/bench_scale.py [--repeats 5] [--documents 20_000_000]

Ranks are simulated one after the other, on one core; times are processor time of this process. Files lie in
the page cache: what a disk or a network adds is bytes over its rate, and the bytes are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_r1.data.blend import BlendPlan
from megatron_r1.data.indexed import IndexedDataset, IndexedWriter, open_corpus
from megatron_r1.data.loader import BatchLoader
from megatron_r1.influence.store import FORMAT, ScoreStore, directory_of, read_scores

CAPABILITIES = ("code", "math", "knowledge")
MICRO_BATCHES = 8
"""Of a chunk of scores: what each data-parallel rank passes before they are written."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--documents", type=int, default=20_000_000, help="of the index that is opened")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start_up(Path(folder), options.documents, options.repeats)
        handles(Path(folder))
        tokens(Path(folder), options.repeats)
        store(Path(folder), options.repeats)


def start_up(folder: Path, documents: int, repeats: int) -> None:
    """Opening an index: alone, and as one of many ranks that check a part each."""
    with IndexedWriter(folder / "many", np.uint16) as writer:
        one = np.ones(documents // 20, dtype=np.uint16)
        for _ in range(20):
            writer.add_documents(one, np.ones(len(one), dtype=np.int64))
    size = os.path.getsize(folder / "many.idx")
    print(f"an index of {documents:,} documents, {size / documents:.1f} bytes each")
    for ranks in (1, 8, 168, 10_000):
        # The middle rank: the first pages are in everyone's cache.
        cost = seconds(lambda ranks=ranks: IndexedDataset(folder / "many", (ranks // 2, ranks)), repeats)
        read = size / ranks
        print(
            f"  {ranks:6,} ranks: {1e3 * cost:8.3f} ms a rank, {cost / documents * 1e9:8.4f} ns a document; "
            f"reads {read / 1e6:8.3f} MB of it, {size / 1e9:.2f} GB all ranks together"
        )


def handles(folder: Path) -> None:
    """Open files of a loader."""
    pairs = 400
    for n in range(pairs):
        with IndexedWriter(folder / f"source_{n}", np.uint16) as writer:
            writer.add_document(np.arange(100, dtype=np.uint16))
    corpora = [open_corpus(f"s{n}", folder / f"source_{n}") for n in range(pairs)]
    plan = BlendPlan({c.name: c.windows(8) for c in corpora})
    plan.add_phase(0, {c.name: 1.0 for c in corpora})
    before = len(os.listdir("/proc/self/fd"))
    loader = BatchLoader(plan, corpora, 8)
    loader.batch(np.arange(4 * pairs))
    print(f"a loader of {pairs} sources holds {len(os.listdir('/proc/self/fd')) - before} more files open")


def tokens(folder: Path, repeats: int) -> None:
    """Opening pairs in the page cache: tokens against hashes, holes, and index."""
    for pairs, size_MiB in ((300, 4), (14, 64), (14, 256)):
        prefixes = [folder / f"tokens_{n}" for n in range(pairs)]
        stream = np.random.default_rng(0).integers(0, 60_000, 1 << 20).astype(np.uint16)
        for prefix in prefixes:
            with IndexedWriter(prefix, np.uint16) as writer:
                for _ in range(size_MiB // 2):
                    writer.add_documents(stream, np.full(1024, 1024))
        cost = seconds(lambda prefixes=prefixes: [open_corpus("x", prefix) for prefix in prefixes], repeats)
        index = seconds(lambda prefixes=prefixes: [IndexedDataset(prefix) for prefix in prefixes], repeats)
        print(
            f"{pairs} pairs of {size_MiB} MiB open in {cost:.2f} s of processor time, indices {index:.2f} s"
        )


def store(folder: Path, repeats: int) -> None:
    """Scores written by the leading rank, a chunk of all ranks' micro-batches at a time; and read again."""
    print("influence store, examples a second that one process writes, and reads for the mixture")
    for ranks in (1, 8, 168, 1024):
        rows = MICRO_BATCHES * 4 * ranks
        examples = max(20_000, 4 * rows)
        found = []
        for repeat in range(repeats):
            run = folder / f"run_{ranks}_{repeat}"
            found.append(examples / timed(lambda run=run, n=examples, rows=rows: write(run, n, rows)))
        reading = examples / seconds(lambda run=run: read_scores(run), repeats)
        held = sum(path.stat().st_size for path in run.rglob("*.npy"))
        print(
            f"  {ranks:5,} ranks x 4 examples: chunks of {rows:6,}: {statistics.median(found):12,.0f} "
            f"written, {reading:12,.0f} read; {held / examples:.1f} bytes an example"
        )


def write(run: Path, examples: int, rows: int) -> None:
    inputs = {"format": FORMAT, "source": "a", "step": 1, "position": 0, "capabilities": list(CAPABILITIES)}
    example_N, length_N = np.arange(examples), np.full(examples, 2048)
    shapes = {"scores": (len(CAPABILITIES),), "losses": ()}
    directory = directory_of(run, 1, "a")
    scores = ScoreStore(directory, inputs, example_N, length_N, shapes)
    for first in range(0, examples, rows):
        n = min(rows, examples - first)
        results = {"scores": np.ones((n, len(CAPABILITIES)), np.float32), "losses": np.ones(n, np.float32)}
        scores.write(first, results)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median processor time."""
    call()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return statistics.median(found)


def timed(call: Callable[[], object]) -> float:
    """Wall time: most of a write is a wait for the disk."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
