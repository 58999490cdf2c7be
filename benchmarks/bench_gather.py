"""A batch of 16 windows of 2048 tokens: ours against megatron-core's GPTDataset and default collation.

python benchmarks/bench_gather.py [--repeats 30] [--cold] [--megabytes 128]

Both read one `.bin` of documents of random length, in random order: plain, and with documents as segments of
their own (positions and attention reset); each of windows that this process has read before, and of windows
that it reads for the first time, as training does, of a file that lies in the page cache. With --cold from a
page cache that was just emptied of the file. Measured in turns in one process; medians, and the median ratio
of a turn. The last line is the floor: the bytes of a batch, moved by memcpy in the same process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from torch.utils.data import default_collate

from megatron_r1.data.blend import BlendPlan
from megatron_r1.data.loader import BatchLoader
from megatron_r1.records import Corpus

S, B, EOD = 2048, 16, 0
COLD_WINDOWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--cold", action="store_true", help="also measure after emptying the page cache")
    parser.add_argument("--megabytes", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="where the files go: a real disk, for --cold")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        corpus = write(Path(folder) / "corpus", options.megabytes)
        for name, eod in (("plain", None), ("documents apart", EOD)):
            report(f"{name}, read before", warm(corpus, eod, options.repeats), B)
            report(f"{name}, first read", first(corpus, eod, options.repeats), B)
        floor(options.repeats)
        if options.cold:
            report(
                f"plain, {COLD_WINDOWS} cold windows",
                cold(corpus, max(3, options.repeats // 5)),
                COLD_WINDOWS,
            )


def write(prefix: Path, megabytes: int) -> Corpus:
    """A pair of uint16 documents of about 1000 tokens, each closed by EOD."""
    random = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    tokens = documents = 0
    while tokens < megabytes * 2**19:
        lengths = random.integers(100, 1900, 256)
        stream = random.integers(1, 50_000, lengths.sum()).astype(np.uint16)
        stream[np.cumsum(lengths) - 1] = EOD
        builder.add_document(stream, lengths.tolist())
        tokens += len(stream)
        documents += 1
    builder.finalize(f"{prefix}.idx")
    return Corpus("corpus", prefix, documents, tokens, DType.dtype_from_code(8).__name__, None)


def peer(corpus: Corpus, eod: int | None) -> GPTDataset:
    apart = eod is not None
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=S,
        blend=None,
        split="1,0,0",
        reset_position_ids=apart,
        reset_attention_mask=apart,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=SimpleNamespace(eod=EOD, pad=-1, vocab_size=50_000, unique_identifiers={}),
        mid_level_dataset_surplus=0.005,
        path_to_cache=str(corpus.prefix.parent / "cache"),
    )
    indexed = IndexedDataset(str(corpus.prefix))
    documents = np.arange(len(indexed.sequence_lengths), dtype=np.int32)
    return GPTDataset(indexed, str(corpus.prefix), documents, corpus.windows(S) - 1, Split.train, config)


def ours(corpus: Corpus, eod: int | None) -> BatchLoader:
    plan = BlendPlan({corpus.name: corpus.windows(S)})
    plan.add_phase(0, [1])
    return BatchLoader(plan, [corpus], S, eod)


def warm(corpus: Corpus, eod: int | None, repeats: int) -> list[tuple[float, float]]:
    """Seconds of a batch, (ours, megatron-core), by turn; every window was read before."""
    loader, dataset = ours(corpus, eod), peer(corpus, eod)
    for row in np.arange(len(dataset) // B * B).reshape(-1, B):
        loader.batch(row)
        for i in row:
            dataset[i]
    random = np.random.default_rng(2)
    turns = []
    for turn in range(repeats + 3):
        rows = random.integers(0, len(dataset), (8, B))
        # One batch alive at a time, as in training.
        mine = sum(seconds(lambda row=row: loader.batch(row)) for row in rows)
        theirs = sum(seconds(lambda row=row: default_collate([dataset[i] for i in row])) for row in rows)
        if turn >= 3:
            turns.append((mine / len(rows), theirs / len(rows)))
    return turns


def first(corpus: Corpus, eod: int | None, repeats: int) -> list[tuple[float, float]]:
    """Seconds of a batch, (ours, megatron-core), by turn; no window was read before by this loader."""
    Path(f"{corpus.prefix}.bin").read_bytes()  # Into the page cache.
    random = np.random.default_rng(4)
    loader, dataset = ours(corpus, eod), peer(corpus, eod)
    order = random.permutation(len(dataset))
    turns = []
    for rows in order[: min(repeats + 1, len(order) // (8 * B)) * 8 * B].reshape(-1, 8, B):
        mine = sum(seconds(lambda row=row: loader.batch(row)) for row in rows)
        theirs = sum(seconds(lambda row=row: default_collate([dataset[i] for i in row])) for row in rows)
        turns.append((mine / len(rows), theirs / len(rows)))
    return turns[1:]


def cold(corpus: Corpus, repeats: int) -> list[tuple[float, float]]:
    """Seconds for COLD_WINDOWS windows, (ours, megatron-core), each after dropping the file's pages."""
    random = np.random.default_rng(3)
    peer(corpus, None)  # Leaves its index files, which stay cached: only token reads are cold.
    turns = []
    for _ in range(repeats):
        rows = random.integers(0, corpus.windows(S) - 2, COLD_WINDOWS)
        drop(corpus)
        loader = ours(corpus, None)

        def read(rows: np.ndarray = rows, loader: BatchLoader = loader) -> None:
            loader.read_ahead(rows)
            for row in rows.reshape(-1, B):
                loader.batch(row)

        mine = seconds(read)
        del loader, read
        drop(corpus)
        dataset = peer(corpus, None)

        def read_peer(rows: np.ndarray = rows, dataset: GPTDataset = dataset) -> None:
            for row in rows.reshape(-1, B):
                default_collate([dataset[i] for i in row])

        theirs = seconds(read_peer)
        del dataset, read_peer
        turns.append((mine, theirs))
    return turns


def floor(repeats: int) -> None:
    """Seconds to copy as many bytes as a batch reads and writes: half of them read, half written."""
    for name, token in (("plain", 2 + 28), ("documents apart", 2 + 32)):
        source = np.ones(B * S * token // 2, np.uint8)
        target = np.empty_like(source)
        copies = [
            seconds(lambda source=source, target=target: np.copyto(target, source))
            for _ in range(8 * repeats)
        ]
        print(
            f"{name}, memcpy of its bytes".ljust(30),
            f"     {statistics.median(copies) * 1e6:9.1f} us ({B * S * token} bytes)",
        )


def drop(corpus: Corpus) -> None:
    file = os.open(f"{corpus.prefix}.bin", os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report(what: str, turns: list[tuple[float, float]], windows: int) -> None:
    mine = statistics.median(turn[0] for turn in turns)
    theirs = statistics.median(turn[1] for turn in turns)
    ratio = statistics.median(turn[1] / turn[0] for turn in turns)
    print(
        f"{what:30s} ours {mine * 1e6:9.1f} us ({windows / mine:9.0f} windows/s)   "
        f"megatron-core {theirs * 1e6:9.1f} us   ratio {ratio:.1f}"
    )


if __name__ == "__main__":
    main()
