"""This rank's share of a global batch, on its device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from megatron_r1 import backend
from megatron_r1.config import Config
from megatron_r1.data.loader import BatchLoader, Records, whole_batch
from megatron_r1.data.open import OpenData
from megatron_r1.parallel import ParallelContext, on_device
from megatron_r1.records import Batch, TeacherRecords
from megatron_r1.system.terminal import say

_READ_AHEAD = 256
"""Windows that a rank asks for before they are needed."""


def micro_batches(
    loader: BatchLoader, first_sample: int, global_batch: int, micro_batch: int, context: ParallelContext
) -> Iterator[Batch]:
    """Global samples [first_sample, first_sample + global_batch), those of this data-parallel rank.

    Which rank computes a sample never changes which samples a step holds.
    """
    samples = rank_samples(first_sample, global_batch, micro_batch, context)
    for sample_B in samples.reshape(-1, micro_batch):
        yield on_device(loader.batch(sample_B))


class StepBatches:
    """The micro-batches of this rank, step by step.

    A batch that cannot be read does not end a step, because the other ranks wait for this one in the step's
    collectives. `errors` then holds the reason, and the rest of the step has batches without labels. The
    caller keeps the gradients of this and later steps out of every rank's weights, and stops.
    """

    def __init__(self, config: Config, data: OpenData, context: ParallelContext):
        self._global_batch, self._micro_batch = config.train.global_batch, config.train.micro_batch
        self._context = context
        self._loader = BatchLoader(
            data.plan,
            data.corpora,
            config.data.seq_length,
            data.eod,
            pin_memory=backend.HAS_CUDA,
            vocab_size=config.model.vocab_size,
        )
        self.passes = self._global_batch // (self._micro_batch * context.data_size)
        """Micro-batches of a step."""
        self.errors: dict[int, Exception] = {}
        """First sample of a step -> why a batch of it could not be read."""
        self._end = sum(config.phase_steps(name) for name in config.phases) * self._global_batch
        self._one_id: Counter[str] = Counter()
        self._asked = 0
        """Samples before this one have been asked for."""

    def of_step(self, first_sample: int) -> Iterator[Batch]:
        """The batches of the step that begins at a global sample."""
        self._read_ahead(first_sample)
        return self._fault_tolerant(first_sample)

    @property
    def records(self) -> Records | None:
        """What asks a teacher's cache for each batch; None: nobody does."""
        return self._loader.records

    @records.setter
    def records(self, records: Records | None) -> None:
        self._loader.records = records

    def one_id_windows(self) -> int:
        """Windows that are one id throughout among those drawn since the last call.

        Names a source's 1st, 10th, 100th of this launch and so on. Ranks that share samples count them once.
        """
        drawn, self._loader.one_id = self._loader.one_id, []
        if not self._context.first_of_copy:
            return 0
        for corpus, window, token in drawn:
            self._one_id[corpus.name] += 1
            count = self._one_id[corpus.name]
            if str(count).strip("0") == "1":
                say(
                    f"warning: source {corpus.name}: window {window} of {corpus.prefix}.bin is id {token} "
                    f"throughout, as {count - 1} before it on rank {self._context.rank}; see if it is damaged"
                )
        return len(drawn)

    def _read_ahead(self, first_sample: int) -> None:
        """Ask for this rank's windows of the coming steps, so that a cold page cache is no wall."""
        size = self._global_batch
        ahead = -(-_READ_AHEAD * self._context.data_size // size) * size
        self._asked = max(self._asked, first_sample)
        while self._asked < min(first_sample + ahead, self._end):
            self._loader.read_ahead(rank_samples(self._asked, size, self._micro_batch, self._context))
            self._asked += size

    def _fault_tolerant(self, first_sample: int) -> Iterator[Batch]:
        left, sizes = self.passes, (self._global_batch, self._micro_batch)
        try:
            for batch in micro_batches(self._loader, first_sample, *sizes, self._context):
                yield batch
                left -= 1
        except (OSError, ValueError) as error:
            self.errors[first_sample] = error
            row_BS = np.zeros((self._micro_batch, self._loader.seq_length + 1), dtype=np.int64)
            none_B = np.zeros(self._micro_batch, dtype=np.int64)
            batch = whole_batch(row_BS, none_B, none_B, self._loader.eod)
            if self.records:
                none_BS1 = torch.zeros(*batch.tokens_BS.shape, 1)
                batch = replace(batch, teacher=TeacherRecords(none_BS1.int(), none_BS1, none_BS1[..., 0]))
            for _ in range(left):
                yield on_device(batch)


def rank_samples(
    first_sample: int, global_batch: int, micro_batch: int, context: ParallelContext
) -> np.ndarray:
    """int64 numbers of the samples of a global batch that this data-parallel rank computes, in order."""
    per_pass = micro_batch * context.data_size
    first = np.arange(first_sample, first_sample + global_batch, per_pass, dtype=np.int64)
    mine = first + context.data_rank * micro_batch
    return (mine[:, None] + np.arange(micro_batch)).ravel()
