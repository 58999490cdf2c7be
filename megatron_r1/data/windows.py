"""Windows and examples of one corpus, whichever are asked for, and the ids in them. No torch.

An example is a window of the token stream, or a document. A document is cut into pieces of `seq_length`
labels, the last one filled up; a window is its own only piece. Pieces are what the model sees as rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

from megatron_r1._csrc import Streams
from megatron_r1.data.indexed import IndexedDataset, document_starts, map_array, with_suffix
from megatron_r1.records import Corpus

_WIDTH = {"uint16": 2, "int32": 4}
"""Bytes of a token, by `Corpus.dtype`."""


class WindowReader:
    """Reads whole windows of `seq_length` tokens; ValueError where the stream is shorter than declared."""

    def __init__(self, corpus: Corpus, seq_length: int) -> None:
        self.seq_length = seq_length
        self._streams = Streams()
        add_stream(self._streams, corpus)

    def rows(self, window_N: np.ndarray) -> np.ndarray:
        """int64 [N, S + 1]: inputs and, one later, labels.

        ValueError where the file has become shorter since, OSError where its disk fails.
        """
        window_N = np.asarray(window_N, dtype=np.int64)
        return self._streams.whole_windows(np.zeros(len(window_N), np.int32), window_N, self.seq_length)


def add_stream(streams: Streams, corpus: Corpus) -> None:
    if corpus.dtype not in _WIDTH:
        raise ValueError(
            f"source '{corpus.name}' has tokens of type {corpus.dtype}; use one of {list(_WIDTH)}"
        )
    streams.add(f"{corpus.prefix}.bin", _WIDTH[corpus.dtype], corpus.tokens)


_STRETCHES, _STRETCH = 64, 1 << 14
"""What is looked at of a long stream: evenly spaced stretches, and the tokens of each."""


def outside(id_NS: np.ndarray, vocab_size: int) -> tuple[int, int] | None:
    """Row and column of the first of these int64 ids that is not in [0, vocab_size); None if all are."""
    # Read as unsigned, negative ids are large ones: one pass finds both.
    if not id_NS.size or int(id_NS.view(np.uint64).max()) < vocab_size:
        return None
    row, column = np.argwhere((id_NS < 0) | (id_NS >= vocab_size))[0]
    return int(row), int(column)


def out_of_vocab(corpus: Corpus, position: int, token: int, vocab_size: int) -> str:
    """What to say of the token at `position` of a corpus's stream that the model has no row for."""
    return (
        f"{with_suffix(corpus.prefix, '.bin')}: token {position} has id {token}, but "
        f"model.vocab_size={vocab_size} holds ids 0 to {vocab_size - 1}; set model.vocab_size to the "
        f"tokenizer's, or preprocess with the model's tokenizer"
    )


def sampled_mistakes(corpus: Corpus, vocab_size: int) -> list[str]:
    """The first id found that the model has no row for, where no sidecar says the vocabulary.

    Looks at the whole of a stream of up to a million tokens and at as many tokens, evenly spread, of a
    longer one: what it misses, `BatchLoader` finds when it is drawn.
    """
    tokens = map_array(with_suffix(corpus.prefix, ".bin"), np.dtype(corpus.dtype), 0, corpus.tokens)
    last = max(0, len(tokens) - _STRETCH)
    for first in sorted({last * k // (_STRETCHES - 1) for k in range(_STRETCHES)}):
        ids = tokens[None, first : first + _STRETCH].astype(np.int64)
        if found := outside(ids, vocab_size):
            return [out_of_vocab(corpus, first + found[1], int(ids[found]), vocab_size)]
    return []


Unit = Literal["window", "document"]


def choose(corpus: Corpus, seq_length: int, most: int | None, seed: int, unit: Unit = "window") -> np.ndarray:
    """Numbers of windows or documents, ascending: `most` of the corpus's by a seeded permutation, or all.

    A document of fewer than two tokens has no label, and is no example.
    """
    if unit == "window":
        number_N = np.arange(corpus.windows(seq_length))
    else:
        number_N = np.flatnonzero(np.diff(document_starts(corpus)) > 1)
    if most is None or most >= len(number_N):
        return number_N
    generator = np.random.default_rng([seed, zlib.crc32(corpus.name.encode())])
    return number_N[np.sort(generator.choice(len(number_N), most, replace=False))]


class Examples:
    """The chosen examples of one corpus, as rows. Raises ValueError where one holds a token that the model
    has no row for."""

    length_N: np.ndarray
    """Labels of each example, s(x) of Eq. 5."""

    def __init__(
        self, corpus: Corpus, number_N: np.ndarray, seq_length: int, vocab_size: int, unit: Unit = "window"
    ):
        self.number_N, self.seq_length = number_N, seq_length
        if unit == "window":
            self._documents = None
            self._reader = WindowReader(corpus, seq_length)
            self.length_N = np.full(len(number_N), seq_length)
            start_N = number_N * seq_length
        else:
            self._documents = IndexedDataset(corpus.prefix).tokens
            start_D = document_starts(corpus)
            start_N = start_D[number_N]
            self.length_N = start_D[number_N + 1] - start_N - 1
        pieces_N = -(-self.length_N // seq_length)
        self._first_N1 = np.concatenate(([0], np.cumsum(pieces_N)))
        """Pieces before each example."""
        self._example_P = np.repeat(np.arange(len(number_N)), pieces_N)
        place_P = (np.arange(len(self._example_P)) - self._first_N1[self._example_P]) * seq_length
        self._start_P = start_N[self._example_P] + place_P
        self._labels_P = np.minimum(self.length_N[self._example_P] - place_P, seq_length)
        # Where a sidecar names the tokenizer, it was asked already.
        if corpus.tokenizer_hash is None:
            worst = max(int(self.rows(np.array([p])).max()) for p in range(len(self._start_P)))
            if worst >= vocab_size:
                raise ValueError(
                    f"{corpus.prefix} holds token {worst}, beyond model.vocab_size={vocab_size}; "
                    f"preprocess it with the model's tokenizer"
                )

    def __len__(self) -> int:
        return len(self.number_N)

    def pieces(self, first: int, last: int) -> int:
        """Rows of the examples [first, last)."""
        return int(self._first_N1[last] - self._first_N1[first])

    def rows(self, piece_B: np.ndarray) -> np.ndarray:
        """int64 [B, S + 1]: inputs and, one later, labels; zeros behind the end of a document."""
        if self._documents is None:
            return self._reader.rows(self.number_N[piece_B])
        out = np.zeros((len(piece_B), self.seq_length + 1), np.int64)
        for row, start, labels in zip(out, self._start_P[piece_B], self._labels_P[piece_B], strict=True):
            row[: labels + 1] = self._documents[start : start + labels + 1]
        return out

    def chunks(self, rows: int) -> list[tuple[int, int]]:
        """Stretches of examples with at most so many rows, or with one example."""
        out, first = [], 0
        while first < len(self):
            # Of the examples that end within so many rows, the last one.
            last = int(np.searchsorted(self._first_N1, self._first_N1[first] + rows, side="right")) - 1
            out.append((first, max(last, first + 1)))
            first = out[-1][1]
        return out

    def passes(self, first: int, last: int, rows_per_pass: int) -> int:
        return -(-self.pieces(first, last) // rows_per_pass)

    def batches(
        self, first: int, last: int, micro_batch: int, rank: int, ranks: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """This rank's micro-batches of the examples [first, last): windows, int64 [B, S + 1]; labels of each
        row, [B], 0 where it only fills up; and labels of its whole example, [B].

        A piece is in the same batch, at the same place and beside the same rows, whatever was computed
        before: so results do not depend on where an earlier start was cut off.
        """
        begin, end = int(self._first_N1[first]), int(self._first_N1[last])
        for number in range(self.passes(first, last, micro_batch * ranks)):
            piece_B = begin + (number * ranks + rank) * micro_batch + np.arange(micro_batch)
            real_B = piece_B < end
            piece_B = np.where(real_B, piece_B, begin)
            length_B = self.length_N[self._example_P[piece_B]]
            yield self.rows(piece_B), np.where(real_B, self._labels_P[piece_B], 0), length_B

    def join(self, first: int, last: int, row_PX: np.ndarray) -> np.ndarray:
        """Sums over the pieces of each of the examples [first, last): [pieces, X] -> [examples, X]."""
        return np.add.reduceat(row_PX, self._first_N1[first:last] - self._first_N1[first])
