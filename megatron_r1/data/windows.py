"""Windows of one corpus, whichever are asked for: what is scored, and what is measured on. No torch."""

from __future__ import annotations

import numpy as np

from megatron_r1._csrc import Streams
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
