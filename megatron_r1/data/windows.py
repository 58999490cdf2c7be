"""Windows and documents of corpora as rows of tokens, and the search for ids outside the vocabulary.

An example is a window of the token stream, or a document. A document is cut into pieces of `seq_length`
labels, the last one filled up with zeros. A window is one piece. The model sees each piece as a row.
This file imports no torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from megatron_r1._csrc import Streams
from megatron_r1.data.indexed import IndexedDataset, document_starts, map_array, with_suffix
from megatron_r1.records import Corpus

_WIDTH = {"uint16": 2, "int32": 4}
"""Bytes of a token, by `Corpus.dtype`."""


def add_stream(streams: Streams, corpus: Corpus) -> None:
    if corpus.dtype not in _WIDTH:
        way_out = f"use one of {list(_WIDTH)}"
        raise ValueError(f"source '{corpus.name}' has tokens of type {corpus.dtype}; {way_out}")
    streams.add(f"{corpus.prefix}.bin", _WIDTH[corpus.dtype], corpus.tokens)


_STRETCHES, _STRETCH = 64, 1 << 14
"""What is looked at of a long stream: evenly spaced stretches, and the tokens of each."""
_CHECKED_AT_ONCE = 1 << 22
"""Tokens."""


def unknown_id(
    id_NS: np.ndarray, vocab_size: int, corpora: Sequence[Corpus], source_N: np.ndarray, start_N: np.ndarray
) -> str | None:
    """A message about the first of these int64 ids that is outside the vocabulary, or None.

    Row n holds the tokens from `start_N[n]` on of the stream of `corpora[source_N[n]]`.
    """
    # Read as unsigned, negative ids are large ones: one pass finds both.
    if not id_NS.size or int(id_NS.view(np.uint64).max()) < vocab_size:
        return None
    row, column = np.argwhere((id_NS < 0) | (id_NS >= vocab_size))[0]
    way_out = "set model.vocab_size to the tokenizer's, or preprocess with the model's tokenizer"
    path, token = with_suffix(corpora[source_N[row]].prefix, ".bin"), start_N[row] + column
    fault = f"{path}: token {token} has id {id_NS[row, column]}"
    return f"{fault}, but model.vocab_size={vocab_size} holds ids 0 to {vocab_size - 1}; {way_out}"


def sampled_mistakes(corpus: Corpus, vocab_size: int) -> list[str]:
    """A message about an id outside the vocabulary, for a dataset whose sidecar does not say its own.

    The search reads a whole stream of up to a million tokens, and as many tokens, evenly spread, of a longer
    one. `BatchLoader` finds the others when it draws them.
    """
    tokens, mistake = _tokens(corpus), None
    last = max(0, len(tokens) - _STRETCH)
    for first in sorted({last * k // (_STRETCHES - 1) for k in range(_STRETCHES)}):
        id_1S = tokens[None, first : first + _STRETCH].astype(np.int64)
        mistake = mistake or unknown_id(id_1S, vocab_size, [corpus], np.array([0]), np.array([first]))
    return [mistake] if mistake else []


def last_tokens(corpus: Corpus, most: int) -> np.ndarray:
    """The last token of up to `most` of the corpus's documents, evenly spread. Documents without tokens are
    left out."""
    dataset = IndexedDataset(corpus.prefix, share=None)
    document_N = np.unique(np.arange(most) * max(0, corpus.documents - 1) // max(1, most - 1))
    spans = [(dataset.tokens_before(d), dataset.tokens_before(d + 1)) for d in document_N.tolist()]
    end_N = np.array([end for begin, end in spans if begin < end], np.int64)
    return dataset.tokens[end_N - 1].astype(np.int64)


def _tokens(corpus: Corpus) -> np.ndarray:
    """The corpus's stream, memory-mapped."""
    return map_array(with_suffix(corpus.prefix, ".bin"), np.dtype(corpus.dtype), 0, corpus.tokens)


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
    """The chosen examples of some corpora, one corpus after the other, as rows. Axis P: pieces.

    `sets`: corpora, and the numbers of the windows or documents chosen of each. A window that its corpus does
    not have is IndexError; ValueError where a stream is shorter than its corpus says.
    """

    length_N: np.ndarray
    """Labels of each example, s(x) of Eq. 5."""

    def __init__(self, sets: Sequence[tuple[Corpus, np.ndarray]], seq_length: int, unit: Unit = "window"):
        self.seq_length = seq_length
        self._corpora = [corpus for corpus, _ in sets]
        self._streams = Streams()
        self._documents: list[np.ndarray] = []
        start, length = [], []
        for corpus, number_N in sets:
            if unit == "window":
                add_stream(self._streams, corpus)
                start.append(number_N * seq_length)
                length.append(np.full(len(number_N), seq_length))
            else:
                self._documents.append(_tokens(corpus))
                start_D = document_starts(corpus)
                start.append(start_D[number_N])
                length.append(start_D[number_N + 1] - start_D[number_N] - 1)
        self.length_N, self._start_N = np.concatenate(length), np.concatenate(start)
        self._set_N = np.repeat(np.arange(len(sets)), [len(number_N) for _, number_N in sets])
        place_P = self._cut(self.length_N) * seq_length
        self._lay(place_P, np.minimum(self.length_N[self._example_P] - place_P, seq_length))
        self._skipped_P = np.zeros_like(place_P)
        """Labels at the beginning of each piece that do not count."""

    def _cut(self, counted_N: np.ndarray) -> np.ndarray:
        """Divide examples into pieces for so many labels. Returns each piece's number in its example, [P]."""
        pieces_N = -(-counted_N // self.seq_length)
        self._first_N1 = np.concatenate(([0], np.cumsum(pieces_N)))
        """Pieces before each example."""
        self._example_P = np.repeat(np.arange(len(pieces_N)), pieces_N)
        return np.arange(len(self._example_P)) - self._first_N1[self._example_P]

    def _lay(self, place_P: np.ndarray, labels_P: np.ndarray) -> None:
        """Pieces of so many labels that begin at a place of their example."""
        self._start_P, self._labels_P = self._start_N[self._example_P] + place_P, labels_P
        self._set_P = self._set_N[self._example_P]

    def unknown_id(self, vocab_size: int) -> str | None:
        """A message about the first token of the examples that is outside the vocabulary, or None."""
        at_once = max(1, _CHECKED_AT_ONCE // self.seq_length)
        for first in range(0, len(self._start_P), at_once):
            piece_B = np.arange(first, min(first + at_once, len(self._start_P)))
            place = self._corpora, self._set_P[piece_B], self._start_P[piece_B]
            if mistake := unknown_id(self.rows(piece_B), vocab_size, *place):
                return mistake
        return None

    def __len__(self) -> int:
        return len(self.length_N)

    def pieces(self, first: int, last: int) -> int:
        """Rows of the examples [first, last)."""
        return int(self._first_N1[last] - self._first_N1[first])

    def rows(self, piece_B: np.ndarray) -> np.ndarray:
        """int64 [B, S + 1]: inputs and, one later, labels; zeros behind the end of a document.

        ValueError where a file of windows has become shorter since, OSError where its disk fails.
        """
        set_B, start_B = self._set_P[piece_B], self._start_P[piece_B]
        if not self._documents:
            window_B = start_B // self.seq_length
            return self._streams.whole_windows(set_B.astype(np.int32), window_B, self.seq_length)
        out = np.zeros((len(piece_B), self.seq_length + 1), np.int64)
        for row, number, start, labels in zip(out, set_B, start_B, self._labels_P[piece_B], strict=True):
            row[: labels + 1] = self._documents[number][start : start + labels + 1]
        return out

    def chunks(self, rows: int) -> list[tuple[int, int]]:
        """Ranges [first, last) of examples with at most so many rows, or with one example."""
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
        self, first: int, last: int, micro_batch: int, rank: int, ranks: int, passes: int | None = None
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """This rank's micro-batches of the examples [first, last).

        Each is: rows, int64 [B, S + 1]; the labels of each row, [B], 0 for padding rows; how many of these do
        not count, [B]; each row's set, [B]; the labels of each row's whole example, [B]. A piece always has
        the same place in the same batch, so results do not depend on where an earlier start was cut off.
        """
        begin, end = int(self._first_N1[first]), int(self._first_N1[last])
        for number in range(passes or self.passes(first, last, micro_batch * ranks)):
            piece_B = begin + (number * ranks + rank) * micro_batch + np.arange(micro_batch)
            real_B = piece_B < end
            piece_B = np.where(real_B, piece_B, begin)
            length_B = self.length_N[self._example_P[piece_B]]
            labels_B = np.where(real_B, self._labels_P[piece_B], 0)
            yield self.rows(piece_B), labels_B, self._skipped_P[piece_B], self._set_P[piece_B], length_B

    def join(self, first: int, last: int, row_PX: np.ndarray) -> np.ndarray:
        """Sums over the pieces of each of the examples [first, last): [pieces, X] -> [examples, X]."""
        return np.add.reduceat(row_PX, self._first_N1[first:last] - self._first_N1[first])


class Answers(Examples):
    """Gold answers as rows. `sets`: corpora with `gold`, and the numbers of the documents chosen of each.

    The labels that count are those of the answers. A document is cut from its end, into as many pieces as its
    answer needs. So all labels of an answer count once, and most documents are one piece. Of a document that
    is longer than a row, the beginning of the prompt is left out. Where an answer is longer than a row, its
    pieces do not see one another.
    """

    def __init__(self, sets: Sequence[tuple[Corpus, np.ndarray]], seq_length: int):
        super().__init__(sets, seq_length, "document")
        prompts = [np.array(of.gold.prompt_tokens)[number_N] for of, number_N in sets if of.gold]
        # The first label is the second token.
        before_N = np.concatenate(prompts) - 1
        number_P = self._cut(self.length_N - before_N)
        behind_P = (np.diff(self._first_N1)[self._example_P] - 1 - number_P) * seq_length
        end_P = self.length_N[self._example_P] - behind_P
        place_P = np.maximum(0, end_P - seq_length)
        self._lay(place_P, end_P - place_P)
        self._skipped_P = np.maximum(0, before_N[self._example_P] - place_P)
