"""This rank's share of a global batch, on its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from megatron_r1.data.loader import BatchLoader, whole_batch
from megatron_r1.data.windows import WindowReader, out_of_vocab, outside
from megatron_r1.parallel import ParallelContext, on_device
from megatron_r1.records import Batch, Corpus


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
    whose gradients `spoil` then keeps out of every rank's weights, and only then do they speak.
    """

    def __init__(self, batches: Iterator[Batch], passes: int, without_labels: Callable[[], Batch]):
        self._batches, self._left, self._without_labels = batches, passes, without_labels
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in self._batches:
                yield batch
                self._left -= 1
        except (OSError, ValueError) as error:
            self.error = error
            for _ in range(self._left):
                yield self._without_labels()


def rank_samples(
    first_sample: int, global_batch: int, micro_batch: int, context: ParallelContext
) -> np.ndarray:
    """int64 numbers of the samples of a global batch that this data-parallel rank computes, in order."""
    per_pass = micro_batch * context.data_size
    first = np.arange(first_sample, first_sample + global_batch, per_pass, dtype=np.int64)
    mine = first + context.data_rank * micro_batch
    return (mine[:, None] + np.arange(micro_batch)).ravel()


class HeldOut:
    """Windows that are only measured, laid out for forward passes.

    `sets`: name -> corpus and its window numbers; a row's `source_B` is its set's number. `multiple`: what
    the number of passes must be a multiple of. ValueError for a token beyond `vocab_size`.
    """

    def __init__(
        self,
        sets: Mapping[str, tuple[Corpus, np.ndarray]],
        seq_length: int,
        vocab_size: int,
        micro_batch: int,
        context: ParallelContext,
        eod: int | None = None,
        multiple: int = 1,
    ):
        self.eod, self.context, self.micro_batch = eod, context, micro_batch
        windows = [_rows(*windows, seq_length, vocab_size) for windows in sets.values()]
        self.windows_NS = np.concatenate(windows)
        self.set_N = np.repeat(np.arange(len(windows)), [len(rows) for rows in windows])
        self.passes = -(-len(self.windows_NS) // (micro_batch * context.data_size * multiple)) * multiple

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches; rows beyond the last window carry no labels."""
        n, (rank, size) = self.micro_batch, (self.context.data_rank, self.context.data_size)
        for number in range(self.passes):
            row_B = np.arange(n) + (number * size + rank) * n
            real_B = row_B < len(self.windows_NS)
            row_B = np.where(real_B, row_B, 0)
            batch = whole_batch(self.windows_NS[row_B], real_B, self.set_N[row_B], self.eod)
            yield on_device(batch)


def _rows(corpus: Corpus, window_N: np.ndarray, seq_length: int, vocab_size: int) -> np.ndarray:
    """Whole windows, int64 [N, S + 1], of ids that the model has rows for."""
    row_NS = WindowReader(corpus, seq_length).rows(window_N)
    if found := outside(row_NS, vocab_size):
        position = int(window_N[found[0]]) * seq_length + found[1]
        raise ValueError(out_of_vocab(corpus, position, int(row_NS[found]), vocab_size))
    return row_NS
