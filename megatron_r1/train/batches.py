"""This rank's share of a global batch, on its device."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator

import numpy as np

from megatron_r1 import backend
from megatron_r1.data.indexed import open_corpus
from megatron_r1.data.loader import BatchLoader, whole_batch
from megatron_r1.data.windows import WindowReader
from megatron_r1.parallel import ParallelContext
from megatron_r1.records import Batch

# isort: split
from megatron.core.utils import get_batch_on_this_cp_rank


def micro_batches(
    loader: BatchLoader, first_sample: int, global_batch: int, micro_batch: int, context: ParallelContext
) -> Iterator[Batch]:
    """Global samples [first_sample, first_sample + global_batch), those of this data-parallel rank.

    Which rank computes a sample never changes which samples a step holds.
    """
    samples = rank_samples(first_sample, global_batch, micro_batch, context)
    for sample_B in samples.reshape(-1, micro_batch):
        yield on_device(loader.batch(sample_B), context)


def rank_samples(
    first_sample: int, global_batch: int, micro_batch: int, context: ParallelContext
) -> np.ndarray:
    """int64 numbers of the samples of a global batch that this data-parallel rank computes, in order."""
    per_pass = micro_batch * context.data_size
    first = np.arange(first_sample, first_sample + global_batch, per_pass, dtype=np.int64)
    mine = first + context.data_rank * micro_batch
    return (mine[:, None] + np.arange(micro_batch)).ravel()


def on_device(batch: Batch, context: ParallelContext) -> Batch:
    """The batch on this rank's device, cut to this context-parallel rank's part of each sequence."""
    tensors = {
        field.name: value.to(backend.device(), non_blocking=True)
        for field in dataclasses.fields(batch)
        if (value := getattr(batch, field.name)) is not None
    }
    if context.context_size > 1:
        along_sequence = {name: t for name, t in tensors.items() if t.dim() == 2}
        # megatron-core 0.19 wants to be told.
        extra = {"is_hybrid_cp": False} if "is_hybrid_cp" in _CP_PARAMETERS else {}
        tensors.update(get_batch_on_this_cp_rank(along_sequence, **extra))
    return Batch(**tensors)


_CP_PARAMETERS = inspect.signature(get_batch_on_this_cp_rank).parameters


class ProbeSet:
    """Held-out windows of each capability, laid out for forward passes; `source_B` is the capability."""

    def __init__(
        self,
        prefixes: dict[str, str],
        seq_length: int,
        micro_batch: int,
        context: ParallelContext,
        eod: int | None = None,
    ):
        self.capabilities, self.eod = tuple(prefixes), eod
        self.context, self.micro_batch = context, micro_batch
        windows, capability = [], []
        for number, (name, prefix) in enumerate(prefixes.items()):
            probe = open_corpus(name, prefix)
            count = probe.windows(seq_length)
            if count == 0:
                raise ValueError(
                    f"probing set {name} ({prefix}) holds {probe.tokens} tokens, less than one window of "
                    f"{seq_length}; set more documents aside"
                )
            windows.append(WindowReader(probe, seq_length).rows(np.arange(count)))
            capability += [number] * count
        self.windows_NS = np.concatenate(windows)
        self.capability_N = np.array(capability, dtype=np.int64)
        self.passes = -(-len(self.windows_NS) // (micro_batch * context.data_size))

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches; rows beyond the last window carry no labels."""
        n, (rank, size) = self.micro_batch, (self.context.data_rank, self.context.data_size)
        for number in range(self.passes):
            row_B = np.arange(n) + (number * size + rank) * n
            real_B = row_B < len(self.windows_NS)
            row_B = np.where(real_B, row_B, 0)
            batch = whole_batch(self.windows_NS[row_B], real_B, self.capability_N[row_B], self.eod)
            yield on_device(batch, self.context)
