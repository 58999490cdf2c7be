"""Token ids that a model has no row for, found before an embedding does. NumPy only."""

from __future__ import annotations

import numpy as np

from megatron_r1.data.indexed import map_array, with_suffix
from megatron_r1.records import Corpus

_STRETCHES, _STRETCH = 64, 1 << 14
"""What is looked at of a long stream: evenly spaced stretches, and the tokens of each."""


def outside(id_NS: np.ndarray, vocab_size: int) -> tuple[int, int] | None:
    """Row and column of the first of these int64 ids that is not in [0, vocab_size); None if all are."""
    # Read as unsigned, negative ids are large ones: one pass finds both.
    if not id_NS.size or int(id_NS.view(np.uint64).max()) < vocab_size:
        return None
    row, column = np.argwhere((id_NS < 0) | (id_NS >= vocab_size))[0]
    return int(row), int(column)


def foreign(corpus: Corpus, position: int, token: int, vocab_size: int) -> str:
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
            return [foreign(corpus, first + found[1], int(ids[found]), vocab_size)]
    return []
