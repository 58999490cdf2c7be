"""This rank's share of a global batch, on its device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_r1.data.loader import BatchLoader, whole_batch
from megatron_r1.parallel import ParallelContext, on_device
from megatron_r1.records import Batch


def micro_batches(
    loader: BatchLoader, first_sample: int, global_batch: int, micro_batch: int, context: ParallelContext
) -> Iterator[Batch]:
    """Global samples [first_sample, first_sample + global_batch), those of this data-parallel rank.

    Which rank computes a sample never changes which samples a step holds.
    """
    samples = rank_samples(first_sample, global_batch, micro_batch, context)
    for sample_B in samples.reshape(-1, micro_batch):
        yield on_device(loader.batch(sample_B))


class FaultTolerantBatches:
    """Batches that go on, with no labels, after one could not be read: `error` says why.

    The other ranks wait within the step's collectives for this one. It takes part to the end of the step,
    whose gradients `discard` then keeps out of every rank's weights, and only then do they speak.
    """

    def __init__(self, batches: Iterator[Batch], passes: int, loader: BatchLoader, micro_batch: int):
        self._batches, self._left, self._loader, self._micro_batch = batches, passes, loader, micro_batch
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in self._batches:
                yield batch
                self._left -= 1
        except (OSError, ValueError) as error:
            self.error = error
            for _ in range(self._left):
                yield on_device(without_labels(self._loader, self._micro_batch))


def without_labels(loader: BatchLoader, micro_batch: int) -> Batch:
    """Rows of the loader's shape, on the CPU, that count for nothing."""
    row_BS = np.zeros((micro_batch, loader.seq_length + 1), dtype=np.int64)
    none_B = np.zeros(micro_batch, dtype=np.int64)
    return whole_batch(row_BS, none_B, none_B, loader.eod)


def rank_samples(
    first_sample: int, global_batch: int, micro_batch: int, context: ParallelContext
) -> np.ndarray:
    """int64 numbers of the samples of a global batch that this data-parallel rank computes, in order."""
    per_pass = micro_batch * context.data_size
    first = np.arange(first_sample, first_sample + global_batch, per_pass, dtype=np.int64)
    mine = first + context.data_rank * micro_batch
    return (mine[:, None] + np.arange(micro_batch)).ravel()
