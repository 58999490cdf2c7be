"""Batches of global samples. The plan names their windows, and C++ reads these from the token files.

The loader keeps nothing between batches, so any rank may ask for any samples in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass, replace

import numpy as np
import torch

from megatron_r1._csrc import Streams
from megatron_r1.data.blend import BlendPlan
from megatron_r1.data.keep import mask_labels
from megatron_r1.data.windows import Examples, add_stream, unknown_id
from megatron_r1.parallel import ParallelContext
from megatron_r1.records import Batch, Corpus, TeacherRecords

Records = Callable[[np.ndarray, np.ndarray], tuple[TeacherRecords, np.ndarray]]
"""(source [B], window [B]) -> records of the windows' labels, and which labels have one, [B, S]."""


@dataclass(eq=False)
class BatchLoader:
    """Batches of windows of `seq_length` tokens. Tensors are on the CPU; moving them is the caller's.

    `corpora`: one for each source of the plan, matched by name. `eod`: None lets a window attend across
    the documents in it; the tokenizer's end-of-document token makes documents segments of their own, with
    positions from 0. `pin_memory`: page-locked buffers, for a copy to the GPU that does not wait.
    `vocab_size`: ids beyond it are an error; None: ids are not looked at.

    Where the plan's phase has a keep mask over documents (data/keep.py), the loss mask leaves out the labels
    of dropped documents.

    ValueError where plan and corpora disagree or a stream is shorter than its corpus says.
    """

    plan: BlendPlan
    corpora: InitVar[Sequence[Corpus]]
    seq_length: int
    eod: int | None = None
    pin_memory: bool = False
    vocab_size: int | None = None

    def __post_init__(self, corpora: Sequence[Corpus]) -> None:
        plan, seq_length = self.plan, self.seq_length
        if seq_length < 1:
            raise ValueError(f"seq_length={seq_length} must be at least 1")
        by_name = {corpus.name: corpus for corpus in corpora}
        if len(by_name) != len(corpora) or by_name.keys() != plan.sources.keys():
            names = sorted(corpus.name for corpus in corpora)
            fault = f"the corpora are {names}, but the plan's sources are {sorted(plan.sources)}"
            raise ValueError(f"{fault}; give one corpus for each source")
        if differ := [
            f"'{name}' has {by_name[name].windows(seq_length)} windows where the plan has {windows}"
            for name, windows in plan.sources.items()
            if by_name[name].windows(seq_length) != windows
        ]:
            fault = f"at seq_length={seq_length} the corpora are not the ones that the plan was made for"
            way_out = "Restore the files or the sequence length, or make a new plan"
            raise ValueError(f"{fault}: {'; '.join(differ)}. {way_out}")
        self._corpora = [by_name[name] for name in plan.sources]
        self._streams = Streams()
        for corpus in self._corpora:
            add_stream(self._streams, corpus)
        self.records: Records | None = None
        """What asks a teacher's cache. Labels without a record are left out by the loss mask."""
        self.one_id: list[tuple[Corpus, int, int]] = []
        """Windows drawn whose inputs are one id throughout: corpus, window, id. The caller takes them out."""

    def batch(self, sample_N: np.ndarray) -> Batch:
        """The windows of these global samples, one a row, in the order asked.

        ValueError where a file has become shorter since the loader was made, or holds an id beyond
        `vocab_size`; OSError where its disk fails.
        """
        source_N, _, window_N = self.plan.locate_many(sample_N)
        tokens_BS, labels_BS, loss_mask_BS, position_BS, segment_BS = self._streams.gather(
            source_N, window_N, self.seq_length, self.eod
        )
        self._check_ids(tokens_BS, 0, source_N, window_N)
        self._check_ids(labels_BS[:, -1:], self.seq_length, source_N, window_N)
        self._note_one_id(tokens_BS, source_N, window_N)
        self._mask_dropped_documents(np.asarray(sample_N), source_N, window_N, loss_mask_BS)
        teacher = None
        if self.records:
            teacher, known_BS = self.records(source_N, window_N)
            loss_mask_BS[~known_BS] = 0
        fields = tokens_BS, labels_BS, loss_mask_BS, position_BS, source_N.astype(np.int64), segment_BS
        return _batch(*fields, teacher=teacher, pin_memory=self.pin_memory)

    def _note_one_id(self, tokens_BS: np.ndarray, source_N: np.ndarray, window_N: np.ndarray) -> None:
        # Nearly every window differs in three of its tokens, which cost nothing to compare.
        suspects = np.flatnonzero((tokens_BS[:, [self.seq_length // 2, -1]] == tokens_BS[:, :1]).all(1))
        for row in suspects.tolist():
            if (tokens_BS[row] == tokens_BS[row, 0]).all():
                corpus = self._corpora[source_N[row]]
                self.one_id.append((corpus, int(window_N[row]), int(tokens_BS[row, 0])))

    def _check_ids(self, id_BS: np.ndarray, first: int, source_N: np.ndarray, window_N: np.ndarray) -> None:
        """Raise ValueError for an id outside the vocabulary. `id_BS` begins at token `first` of a window."""
        if self.vocab_size is None:
            return
        place = self._corpora, source_N, window_N * self.seq_length + first
        if mistake := unknown_id(id_BS, self.vocab_size, *place):
            raise ValueError(mistake)

    def _mask_dropped_documents(
        self, sample_N: np.ndarray, source_N: np.ndarray, window_N: np.ndarray, loss_mask_BS: np.ndarray
    ) -> None:
        """Clear the loss mask where the sample's phase drops the label's document."""
        phases = self.plan.phases
        if not any(mask.stretch_N2 is not None for phase in phases for mask in phase.keep.values()):
            return
        phase_N = np.searchsorted([phase.start for phase in phases], sample_N, side="right") - 1
        for row, (phase, source) in enumerate(zip(phase_N.tolist(), source_N.tolist(), strict=True)):
            mask = phases[phase].keep.get(self._corpora[source].name)
            if mask is not None and mask.stretch_N2 is not None:
                mask_labels(mask.stretch_N2, int(window_N[row]), loss_mask_BS[row])

    def read_ahead(self, sample_N: np.ndarray) -> None:
        """Ask the kernel to read these samples' windows from disk; returns at once.

        Worth calling some hundred samples ahead of `batch` where the corpora do not fit the page cache.
        """
        source_N, _, window_N = self.plan.locate_many(sample_N)
        self._streams.will_need(source_N, window_N, self.seq_length)


def example_batches(
    examples: Examples,
    span: tuple[int, int],
    micro_batch: int,
    context: ParallelContext,
    eod: int | None,
    passes: int | None = None,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """This data-parallel rank's micro-batches of the examples `span` = [first, last), on the CPU.

    Beside each batch comes the number of labels of each row's whole example, [B]. `Batch.source_B` has the
    number of each row's corpus in `examples`. `passes`: number of batches, by default as many as hold labels.
    Batches beyond these hold none.
    """
    rank, ranks = context.data_rank, context.data_size
    turn = examples.batches(*span, micro_batch, rank, ranks, passes)
    for row_BS, labels_B, skipped_B, set_B, length_B in turn:
        yield whole_batch(row_BS, labels_B, set_B, eod, skipped_B), length_B


def whole_batch(
    window_NS: np.ndarray,
    labels_N: np.ndarray,
    source_N: np.ndarray,
    eod: int | None,
    skipped_N: np.ndarray | None = None,
) -> Batch:
    """Rows of tokens, int64 [N, S + 1], as a batch on the CPU.

    The first `labels_N` labels of a row count, without the first `skipped_N` of these.
    """
    tokens_NS, labels_NS = window_NS[:, :-1], window_NS[:, 1:]
    position_NS = np.broadcast_to(np.arange(tokens_NS.shape[1]), tokens_NS.shape)
    segment_NS = None
    if eod is not None:
        ends_NS = np.zeros_like(tokens_NS)
        ends_NS[:, 1:] = tokens_NS[:, :-1] == eod
        segment_NS = ends_NS.cumsum(axis=1, dtype=np.int32)
        position_NS = position_NS - np.maximum.accumulate(position_NS * ends_NS, axis=1)
    place_S, first_N = np.arange(labels_NS.shape[1]), 0 * labels_N if skipped_N is None else skipped_N
    counts_NS = (first_N[:, None] <= place_S) & (place_S < labels_N[:, None])
    mask_NS = counts_NS.astype(np.float32)
    # Slices of the windows, and positions that all rows share, become arrays of their own.
    views = [np.require(view, requirements=("C", "W")) for view in (tokens_NS, labels_NS, position_NS)]
    return _batch(*views[:2], mask_NS, views[2], source_N.astype(np.int64), segment_NS)


def _batch(
    *fields: np.ndarray | None, teacher: TeacherRecords | None = None, pin_memory: bool = False
) -> Batch:
    """A batch on the CPU, from the fields of Batch in order. It shares the memory of the arrays."""
    tensors = [torch.from_numpy(array) for array in fields if array is not None]
    if pin_memory:
        tensors = [tensor.pin_memory() for tensor in tensors]
        teacher = teacher and TeacherRecords(*(tensor.pin_memory() for tensor in vars(teacher).values()))
    return replace(Batch(*tensors), teacher=teacher)  # type: ignore[arg-type]
