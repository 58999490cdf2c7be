"""Which windows are scored, and their batches: representative sets R_g and probing sets P_c."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from megatron_r1.data.windows import WindowReader
from megatron_r1.records import Corpus


def choose(corpus: Corpus, seq_length: int, most: int | None, seed: int) -> np.ndarray:
    """Window numbers, ascending: `most` of the corpus's windows by a seeded permutation, or all of them."""
    windows = corpus.windows(seq_length)
    if most is None or most >= windows:
        return np.arange(windows)
    generator = np.random.default_rng([seed, zlib.crc32(corpus.name.encode())])
    return np.sort(generator.choice(windows, most, replace=False))


class Windows:
    """The chosen windows of one corpus, as rows. Raises ValueError where one holds a token that the model
    has no row for."""

    def __init__(self, corpus: Corpus, window_N: np.ndarray, seq_length: int, vocab_size: int):
        self.window_N, self.seq_length = window_N, seq_length
        self._reader = WindowReader(corpus, seq_length)
        # Where a sidecar names the tokenizer, it was asked already.
        if corpus.tokenizer_hash is None:
            worst = max(int(self.rows(np.array([n])).max()) for n in range(len(window_N)))
            if worst >= vocab_size:
                raise ValueError(
                    f"{corpus.prefix} holds token {worst}, beyond model.vocab_size={vocab_size}; "
                    f"preprocess it with the model's tokenizer"
                )

    def __len__(self) -> int:
        return len(self.window_N)

    def rows(self, row_B: np.ndarray) -> np.ndarray:
        """int64 [B, S + 1]: inputs and, one later, labels."""
        return self._reader.rows(self.window_N[row_B])

    def passes(self, first: int, last: int, rows_per_pass: int) -> int:
        return -(-(last - first) // rows_per_pass)

    def batches(
        self, first: int, last: int, micro_batch: int, rank: int, ranks: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """This rank's micro-batches of the rows [first, last): int64 [B, S + 1], and which rows are real.

        Row r is in the same batch, at the same place and beside the same rows, whatever was computed
        before: so results do not depend on where an earlier start was cut off.
        """
        for number in range(self.passes(first, last, micro_batch * ranks)):
            row_B = first + (number * ranks + rank) * micro_batch + np.arange(micro_batch)
            real_B = row_B < last
            yield self.rows(np.where(real_B, row_B, first)), real_B
