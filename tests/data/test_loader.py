"""Batches against plain slicing of the token streams."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_r1.data.blend import BlendPlan
from megatron_r1.data.loader import BatchLoader, example_batches, whole_batch
from megatron_r1.data.windows import Examples
from megatron_r1.parallel import ParallelContext
from megatron_r1.records import Corpus

S = 16
EOD = 0
STREAMS = {
    "web": np.random.default_rng(0).integers(0, 65536, 1003).astype(np.uint16),
    "code": np.random.default_rng(1).integers(0, 128256, 500).astype(np.int32),
    "math": np.random.default_rng(2).integers(0, 9, 333).astype(np.uint16),
}


def corpus(folder: Path, name: str, tokens: int | None = None) -> Corpus:
    stream = STREAMS[name]
    stream.tofile(folder / f"{name}.bin")
    return Corpus(name, folder / name, 3, tokens or len(stream), stream.dtype.name, None)


@pytest.fixture
def corpora(tmp_path: Path) -> list[Corpus]:
    return [corpus(tmp_path, name) for name in STREAMS]


@pytest.fixture
def plan(corpora: list[Corpus]) -> BlendPlan:
    made = BlendPlan({c.name: c.windows(S) for c in corpora})
    made.add_phase(0, {"web": 3, "code": 2, "math": 2})
    return made


def test_rows_are_the_plans_windows(plan: BlendPlan, corpora: list[Corpus]) -> None:
    sample_N = np.array([5, 0, 400, 17, 5])
    batch = BatchLoader(plan, corpora, S).batch(sample_N)
    names = list(plan.sources)
    for row, sample in enumerate(sample_N):
        source, _, window = plan.locate(int(sample))
        want = STREAMS[names[source]][window * S : window * S + S + 1].astype(np.int64)
        assert batch.tokens_BS[row].tolist() == want[:-1].tolist()
        assert batch.labels_BS[row].tolist() == want[1:].tolist()
        assert batch.source_B[row] == source
    assert batch.tokens_BS.dtype == batch.labels_BS.dtype == batch.position_BS.dtype == torch.int64
    assert torch.equal(batch.loss_mask_BS, torch.ones(5, S))
    assert torch.equal(batch.position_BS, torch.arange(S).expand(5, S))
    assert batch.documents is None


def test_an_epoch_shows_every_label_once(plan: BlendPlan, corpora: list[Corpus]) -> None:
    loader = BatchLoader(plan, corpora, S)
    batch = loader.batch(np.array([plan.position("math", j) for j in range(plan.sources["math"])]))
    windows = plan.sources["math"]
    shown = np.sort(batch.labels_BS.numpy().ravel())
    assert np.array_equal(shown, np.sort(STREAMS["math"][1 : windows * S + 1].astype(np.int64)))


def test_ranks_together_see_what_one_rank_sees(plan: BlendPlan, corpora: list[Corpus]) -> None:
    loader = BatchLoader(plan, corpora, S)
    whole = loader.batch(np.arange(96)).tokens_BS
    for ranks in (2, 3, 8):
        parts = [loader.batch(np.arange(rank, 96, ranks)).tokens_BS for rank in range(ranks)]
        assert torch.equal(torch.stack(parts, 1).reshape(96, S), whole)


def test_end_of_document_makes_segments(plan: BlendPlan, corpora: list[Corpus]) -> None:
    batch = BatchLoader(plan, corpora, S, eod=EOD).batch(np.arange(200))
    assert batch.documents is not None and batch.documents.dtype == torch.int32
    for tokens, segment, position in zip(
        batch.tokens_BS.tolist(), batch.documents.tolist(), batch.position_BS.tolist(), strict=True
    ):
        document = start = 0
        for s, token in enumerate(tokens):
            assert (segment[s], position[s]) == (document, s - start)
            if token == EOD:
                document, start = document + 1, s + 1
    assert batch.documents.max() > 2


@pytest.mark.parametrize("eod", [None, EOD])
def test_chosen_windows_make_the_batch_that_samples_make(
    plan: BlendPlan, corpora: list[Corpus], eod: int | None
) -> None:
    """Of two sources, one after the other, on two ranks; and rows that only fill up carry no labels."""
    names = list(plan.sources)
    sample_N = np.array([plan.position(n, j) for n in ("code", "math") for j in range(plan.sources[n])])
    want = BatchLoader(plan, corpora, S, eod=eod).batch(sample_N)
    source_N, _, window_N = plan.locate_many(sample_N)
    order = np.lexsort((window_N, source_N))
    sets = [(corpora[k], window_N[order][source_N[order] == k]) for k in (1, 2)]
    examples = Examples(sets, S)
    count, ranks, size = len(sample_N), 2, 5
    turns = [
        [batch for batch, _ in example_batches(examples, (0, count), size, context(rank, ranks), eod, 6)]
        for rank in range(ranks)
    ]
    got = [turns[rank][number] for number in range(6) for rank in range(ranks)]
    for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "position_BS", "source_B", "documents"):
        one = getattr(want, name)
        if one is None:
            assert getattr(got[0], name) is None
            continue
        two = torch.cat([getattr(batch, name) for batch in got])
        assert torch.equal(one[order] - names.index("code") * (name == "source_B"), two[:count]), name
        assert one.dtype == two.dtype
    assert not torch.cat([batch.loss_mask_BS for batch in got])[count:].any()


def context(rank: int, ranks: int) -> ParallelContext:
    return SimpleNamespace(data_rank=rank, data_size=ranks)  # type: ignore[return-value]


def test_only_leading_labels_count() -> None:
    batch = whole_batch(np.ones((3, S + 1), np.int64), np.array([0, 4, S]), np.zeros(3), None)
    assert batch.loss_mask_BS.sum(1).tolist() == [0, 4, S] and batch.loss_mask_BS[1, :4].all()


def test_whole_windows_of_a_source(plan: BlendPlan, corpora: list[Corpus]) -> None:
    last = plan.sources["code"] - 1
    tokens = rows(corpora[1], last, 0)
    assert tokens.tolist() == [STREAMS["code"][w * S : w * S + S + 1].tolist() for w in (last, 0)]
    with pytest.raises(IndexError, match=f"window {last + 1} of source 0, which has {last + 1} windows"):
        rows(corpora[1], last + 1)


def rows(corpus: Corpus, *windows: int) -> np.ndarray:
    return Examples([(corpus, np.array(windows))], S).rows(np.arange(len(windows)))


def test_read_ahead_changes_nothing(plan: BlendPlan, corpora: list[Corpus]) -> None:
    loader = BatchLoader(plan, corpora, S)
    before = loader.batch(np.arange(64)).tokens_BS
    loader.read_ahead(np.arange(256))
    assert torch.equal(loader.batch(np.arange(64)).tokens_BS, before)
    assert loader.batch(np.arange(0)).tokens_BS.shape == (0, S)


def test_a_stream_shorter_than_declared_is_refused_at_open(plan: BlendPlan, corpora: list[Corpus]) -> None:
    path = Path(f"{corpora[0].prefix}.bin")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"web.bin holds 2005 bytes, but 1003 tokens of 2 bytes .* truncated"
    ):
        BatchLoader(plan, corpora, S)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds 0 bytes"):
        BatchLoader(plan, corpora, S)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"web.bin"):
        BatchLoader(plan, corpora, S)


def test_a_stream_cut_short_while_open_is_one_error(plan: BlendPlan, corpora: list[Corpus]) -> None:
    loader = BatchLoader(plan, corpora, S, eod=EOD)
    last = plan.sources["web"] - 1
    chosen = Examples([(corpora[0], np.array([last, 0]))], S)
    path = Path(f"{corpora[0].prefix}.bin")
    offset = 2 * last * S
    os.truncate(path, offset + 6)
    message = rf"web.bin ends at byte {offset + 6}, where {2 * S + 2} bytes at offset {offset} .* restore"
    with pytest.raises(ValueError, match=message):
        loader.batch(np.array([plan.position("web", j) for j in range(last + 1)]))
    with pytest.raises(ValueError, match=message):
        chosen.rows(np.array([0]))
    os.truncate(path, 0)
    with pytest.raises(ValueError, match=r"web.bin ends at byte 0,"):
        chosen.rows(np.array([1]))


@pytest.mark.parametrize("place", [0, 7, S])
@pytest.mark.parametrize("token", [9, -1])
def test_an_id_beyond_the_vocabulary_is_one_error(place: int, token: int, tmp_path: Path) -> None:
    """`place`: in the second of two windows; the last is a label alone."""
    stream = (np.arange(2 * S + 1) % 9).astype(np.int32)
    stream[S + place] = token
    stream.tofile(tmp_path / "web.bin")
    plan = BlendPlan({"web": 2}, shuffle=False)
    plan.add_phase(0, [1])
    loader = BatchLoader(
        plan, [Corpus("web", tmp_path / "web", 1, 2 * S + 1, "int32", None)], S, vocab_size=9
    )
    if place:
        loader.batch(np.array([0]))
    with pytest.raises(ValueError, match=rf"web.bin: token {S + place} has id {token}, .*vocab_size=9 holds"):
        loader.batch(np.array([1]))


def test_a_stream_replaced_while_open_is_read_on_as_it_was(plan: BlendPlan, corpora: list[Corpus]) -> None:
    loader = BatchLoader(plan, corpora, S)
    before = loader.batch(np.arange(64)).tokens_BS
    for c in corpora:
        Path(f"{c.prefix}.other").write_bytes(b"\7")
        os.replace(f"{c.prefix}.other", f"{c.prefix}.bin")
    assert torch.equal(loader.batch(np.arange(64)).tokens_BS, before)


def test_a_stream_that_is_no_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "web.bin").mkdir()  # A folder opens like a file, and has a size.
    head = Corpus("web", tmp_path / "web", 1, S + 1, "uint16", None)
    plan = BlendPlan({"web": 1})
    plan.add_phase(0, [1])
    with pytest.raises(ValueError, match=r"web.bin is no regular file"):
        BatchLoader(plan, [head], S)


def test_a_head_of_a_stream_is_a_corpus(tmp_path: Path) -> None:
    head = corpus(tmp_path, "web", tokens=100)
    plan = BlendPlan({"web": head.windows(S)})
    plan.add_phase(0, [1])
    BatchLoader(plan, [head], S)
    assert plan.sources == {"web": 6}
    with pytest.raises(IndexError, match="has 6 windows"):
        rows(head, 6)


def test_plan_and_corpora_must_agree(plan: BlendPlan, corpora: list[Corpus]) -> None:
    with pytest.raises(ValueError, match=r"at seq_length=17 .* 'web' has 58 windows where the plan has 62"):
        BatchLoader(plan, corpora, 17)
    with pytest.raises(ValueError, match=r"corpora are \['code', 'web'\], but the plan's sources are"):
        BatchLoader(plan, corpora[:2], S)
    with pytest.raises(ValueError, match="seq_length=0"):
        BatchLoader(plan, corpora, 0)
    # The order of the corpora does not matter: they go by name.
    one = BatchLoader(plan, corpora[::-1], S).batch(np.arange(9)).tokens_BS
    assert torch.equal(one, BatchLoader(plan, corpora, S).batch(np.arange(9)).tokens_BS)


def test_windows_of_one_id_are_noted(tmp_path: Path) -> None:
    stream = STREAMS["web"].copy()
    stream[3 * S : 5 * S + 5] = 0
    stream.tofile(tmp_path / "web.bin")
    damaged = Corpus("web", tmp_path / "web", 3, len(stream), "uint16", None)
    plan = BlendPlan({"web": damaged.windows(S)})
    plan.add_phase(0, {"web": 1})
    loader = BatchLoader(plan, [damaged], S)
    loader.batch(np.arange(damaged.windows(S)))
    assert sorted(loader.one_id, key=lambda place: place[1]) == [(damaged, 3, 0), (damaged, 4, 0)]
