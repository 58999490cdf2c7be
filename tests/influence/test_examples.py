"""Windows and documents as rows, against slices of the token stream."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from megatron_r1.data.indexed import IndexedDataset, IndexedWriter, open_corpus
from megatron_r1.data.windows import Examples, Unit, choose
from megatron_r1.records import Corpus

SEQ = 8
LENGTHS = (5, 1, 9, 30, 2, 17, 0, 8, 25)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Documents of these lengths, token after token; the last one is set aside."""
    prefix = tmp_path_factory.mktemp("examples") / "c"
    ends = np.cumsum(LENGTHS)
    with IndexedWriter(prefix, np.dtype("uint16")) as writer:
        for length, end in zip(LENGTHS, ends, strict=True):
            writer.add_document(np.arange(end - length, end).astype(np.uint16))
        writer.finalize()
    return open_corpus("c", str(prefix), len(LENGTHS) - 1)


def made(corpus: Corpus, unit: Unit) -> Examples:
    return Examples([(corpus, choose(corpus, SEQ, None, 1, unit))], SEQ, unit)


def labels(examples: Examples, micro_batch: int, ranks: int, rows: int) -> list[list[int]]:
    """Labels of each example, in order, as the ranks meet them chunk by chunk."""
    out: list[list[int]] = []
    for first, last in examples.chunks(rows):
        seen: dict[int, list[int]] = {}
        for rank in range(ranks):
            turn = examples.batches(first, last, micro_batch, rank, ranks)
            for number, (window_BS, labels_B, _, _, length_B) in enumerate(turn):
                assert (labels_B <= length_B).all()
                for row, (window, count) in enumerate(zip(window_BS, labels_B, strict=True)):
                    place = (number * ranks + rank) * micro_batch + row
                    seen[place] = window[1 : count + 1].tolist()
        pieces = [seen[place] for place in sorted(seen)][: examples.pieces(first, last)]
        assert not any(seen[place] for place in sorted(seen)[len(pieces) :])
        one_NP = examples.join(first, last, np.eye(len(pieces)))
        out += [list(chain(*(p for p, mine in zip(pieces, row, strict=True) if mine))) for row in one_NP]
    return out


def test_documents_pass_whole_and_alone(corpus: Corpus) -> None:
    examples = made(corpus, "document")
    # Without labels: the documents of 1 and 0 tokens. Set aside: the last.
    chosen = choose(corpus, SEQ, None, 1, "document").tolist()
    assert chosen == [0, 2, 3, 4, 5, 7]
    ends = np.cumsum(LENGTHS)
    true = [list(range(ends[d] - LENGTHS[d] + 1, ends[d])) for d in chosen]
    assert examples.length_N.tolist() == [len(t) for t in true]
    for micro_batch, ranks, rows in ((1, 1, 1), (2, 1, 4), (3, 2, 6), (2, 3, 100)):
        assert labels(examples, micro_batch, ranks, rows) == true


def test_windows_are_stretches_of_the_stream(corpus: Corpus) -> None:
    stream = IndexedDataset(corpus.prefix).tokens
    examples = made(corpus, "window")
    true = [stream[w * SEQ + 1 : w * SEQ + SEQ + 1].tolist() for w in range((corpus.tokens - 1) // SEQ)]
    for micro_batch, ranks, rows in ((1, 1, 1), (2, 1, 4), (3, 2, 6)):
        assert labels(examples, micro_batch, ranks, rows) == true
    assert examples.chunks(3)[0] == (0, 3)


def test_a_choice_is_a_subset_in_order(corpus: Corpus) -> None:
    for unit in ("window", "document"):
        everything, some = (choose(corpus, SEQ, most, 4, unit) for most in (None, 3))  # type: ignore[arg-type]
        assert len(some) == 3 and set(some) < set(everything) and (np.diff(some) > 0).all()


def test_the_first_id_that_the_model_has_no_row_for_is_named(corpus: Corpus) -> None:
    """Tokens count up from 0, so the model's last row says which comes first."""
    for unit, chosen in (("window", [1, 4, 5]), ("document", [0, 3, 5])):
        examples = Examples([(corpus, np.array([0])), (corpus, np.array(chosen))], SEQ, unit)  # type: ignore[arg-type]
        assert examples.unknown_id(1000) is None
        told = examples.unknown_id(40)
        assert told is not None
        assert told.startswith(f"{corpus.prefix}.bin: token 40 has id 40, but model.vocab_size=40 holds ids")
