"""Finalising an index: ours against megatron-core's IndexedDatasetBuilder, in turns, in one process.

    python benchmarks/bench_index.py [--documents 1000000] [--repeats 7]

Both have taken the same documents (4 tokens each, so that the .bin weighs little) and write the same bytes
into an empty folder. megatron-core does not flush its files to the disk; ours does, which is measured apart.
Where other work shares the cores, the ratio of processor seconds is the steadier one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from megatron_r1.data.indexed import IndexedDataset, IndexedWriter

TOKENS = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    n = args.documents
    tokens = np.arange(TOKENS * n, dtype=np.int32) % 1000
    lengths = np.full(n, TOKENS)
    waited = 0.0
    flush = os.fsync

    def timed_flush(descriptor: int) -> None:
        nonlocal waited
        start = time.perf_counter()
        flush(descriptor)
        waited += time.perf_counter() - start

    os.fsync = timed_flush
    found: dict[str, list[float]] = {"megatron": [], "ours": [], "ours, flushed": [], "opening": []}
    cpu: dict[str, list[float]] = {"megatron": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeats):
            builder = IndexedDatasetBuilder(f"{folder}/theirs.bin", dtype=np.int32)
            # What n calls of add_document leave behind.
            builder.data_file.write(tokens.tobytes())
            builder.sequence_lengths = [TOKENS] * n
            builder.document_indices = list(range(n + 1))
            start, busy = time.perf_counter(), time.process_time()
            builder.finalize(f"{folder}/theirs.idx")
            found["megatron"].append(time.perf_counter() - start)
            cpu["megatron"].append(time.process_time() - busy)

            writer = IndexedWriter(f"{folder}/ours", np.int32)
            writer.add_documents(tokens, lengths)
            waited = 0.0
            start, busy = time.perf_counter(), time.process_time()
            writer.finalize()
            took = time.perf_counter() - start
            cpu["ours"].append(time.process_time() - busy)
            found["ours"].append(took - waited)
            found["ours, flushed"].append(took)

            start = time.perf_counter()
            IndexedDataset(f"{folder}/ours")
            found["opening"].append(time.perf_counter() - start)
            for path in filter(Path.is_file, Path(folder).iterdir()):
                same = Path(folder) / f"theirs{path.suffix}"
                assert path.read_bytes() == same.read_bytes(), path
            for path in Path(folder).iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    middle = {name: statistics.median(times) for name, times in found.items()}
    for name, seconds in middle.items():
        print(f"{name:14} {seconds / n * 1e9:8.1f} ns a document")
    for name in ("ours", "ours, flushed"):
        ratios = sorted(a / b for a, b in zip(found["megatron"], found[name], strict=True))
        print(
            f"index finalise, {name}: {middle['megatron'] / middle[name]:.1f}x megatron-core "
            f"({ratios[0]:.1f} to {ratios[-1]:.1f})"
        )
    busy = statistics.median(a / b for a, b in zip(cpu["megatron"], cpu["ours"], strict=True))
    print(f"index finalise, processor seconds (flushing included): {busy:.1f}x megatron-core")


if __name__ == "__main__":
    main()
