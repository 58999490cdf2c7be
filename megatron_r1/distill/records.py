"""A teacher's records for the labels of windows, looked up by the documents that the windows lie in."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_r1.data.indexed import IndexedDataset
from megatron_r1.data.provenance import load_origins
from megatron_r1.distill.cache import Cache
from megatron_r1.records import Corpus

if TYPE_CHECKING:
    from megatron_r1.records import TeacherRecords


class WindowRecords:
    """What a BatchLoader asks for each batch (`data.loader.Records`). Indices and provenance stay mapped.

    `corpora`: one for each source that is drawn, matched by name; `sources`: the plan's names in order. The
    label behind token t of a document has the record of offset t. Behind a document's last token the label is
    the next document's first one. Raises ValueError for a pair without provenance.
    """

    def __init__(self, cache: Cache, corpora: Sequence[Corpus], sources: Iterable[str], seq_length: int):
        self._cache, self._seq_length = cache, seq_length
        by_name = {corpus.name: corpus for corpus in corpora}
        self._places = {n: _Documents(by_name[name]) for n, name in enumerate(sources) if name in by_name}

    def __call__(self, source_N: np.ndarray, window_N: np.ndarray) -> tuple[TeacherRecords, np.ndarray]:
        """The records of the windows' labels, and which labels have one, [N, S].

        ValueError for a document of another length than in the cache, and for a damaged block.
        """
        import torch

        from megatron_r1.records import TeacherRecords

        first_N = window_N * self._seq_length
        rows = zip(source_N.tolist(), first_N.tolist(), strict=True)
        found = [self._places[source].of_window(first, self._seq_length) for source, first in rows]
        *arrays, known_R = self._cache.gather(*(np.concatenate(of) for of in zip(*found, strict=True)))
        shape = len(found), self._seq_length
        tensors = (torch.from_numpy(array.reshape(*shape, *array.shape[1:])) for array in arrays)
        return TeacherRecords(*tensors), known_R.reshape(shape)


class _Documents:
    """The documents of a corpus by their place in its stream."""

    def __init__(self, corpus: Corpus):
        dataset = IndexedDataset(corpus.prefix, share=None)
        try:
            self._hash_DH = load_origins(corpus.prefix, dataset.num_documents)["hash"]
        except FileNotFoundError as error:
            fault = f"source '{corpus.name}' says no document's hash, by which a teacher's cache is read"
            raise ValueError(f"{fault}: {error}. Make the pair again, or leave out objective.cache") from None
        # Plain arrays: an entry of a mapped one takes ten times as long.
        self._token_Q, self._first_D = np.asarray(dataset.pointers), np.asarray(dataset.documents)
        self._item, self._end = dataset.dtype.itemsize, len(dataset.tokens)

    def of_window(self, first: int, tokens: int) -> tuple[np.ndarray, ...]:
        """Of each document among the inputs [first, first + tokens): hash, first offset, the one behind the
        last, and length."""
        lo, hi = (self._document(token) for token in (first, first + tokens - 1))
        sequence_D = self._first_D[lo : hi + 2]
        # Behind the last sequence the stream ends.
        at_D = np.minimum(sequence_D, len(self._token_Q) - 1)
        start_D = np.where(sequence_D > at_D, self._end, self._token_Q[at_D] // self._item)
        begin_D, end_D = np.maximum(start_D[:-1], first), np.minimum(start_D[1:], first + tokens)
        there_D, own_D = end_D > begin_D, start_D[:-1]
        fields = self._hash_DH[lo : hi + 1], begin_D - own_D, end_D - own_D, np.diff(start_D)
        return tuple(field[there_D] for field in fields)

    def _document(self, token: int) -> int:
        """Number of the document that a token is in."""
        # Sequences and documents without tokens begin where the next one does, and come before it.
        sequence = bisect_right(self._token_Q, token * self._item) - 1
        return bisect_right(self._first_D, sequence) - 1
