"""Keep masks over documents against an oracle that looks at every token."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1 import config_io
from megatron_r1.data.blend import BlendPlan
from megatron_r1.data.indexed import IndexedWriter, open_corpus
from megatron_r1.data.keep import kept_stretches, load_mask, mask_labels, save_documents
from megatron_r1.data.loader import BatchLoader
from megatron_r1.data.open import open_data
from megatron_r1.data.plan_file import check_extends, fingerprint
from megatron_r1.records import Corpus
from tests.launch import TINY_MODEL, write_corpus

DOCUMENTS = st.lists(st.tuples(st.integers(0, 25), st.booleans()), min_size=1, max_size=40)


def written(folder: Path, lengths: list[int], used: int | None = None) -> Corpus:
    with IndexedWriter(folder / "web", np.uint16) as writer:
        for length in lengths:
            writer.add_document(np.arange(length, dtype=np.uint16))
    return open_corpus("web", folder / "web", used)


@settings(max_examples=40)  # Each writes a dataset, flushed to the disk.
@given(documents=DOCUMENTS, seq_length=st.integers(1, 17), set_aside=st.integers(0, 3))
def test_windows_and_label_masks_are_those_of_every_token(
    documents: list[tuple[int, bool]], seq_length: int, set_aside: int
) -> None:
    used = max(1, len(documents) - set_aside)
    with tempfile.TemporaryDirectory() as folder:
        corpus = written(Path(folder), [length for length, _ in documents], used)
        kept_D = np.array([kept for _, kept in documents[:used]])
        kept_T = [kept for length, kept in documents[:used] for _ in range(length)]
        want = [
            kept_T[w * seq_length + 1 : w * seq_length + seq_length + 1]
            for w in range(corpus.windows(seq_length))
        ]
        path = Path(folder) / "keep.npz"
        if not any(map(any, want)):
            with pytest.raises(ValueError, match="leaves no label within its windows"):
                save_documents(path, corpus, kept_D, seq_length)
            return
        save_documents(path, corpus, kept_D, seq_length)
        mask = load_mask("web", len(want), path)
    packed = np.packbits([any(row) for row in want], bitorder="little")
    assert mask.sha256 == load_mask("web", len(want), path_of(mask, packed, len(want), seq_length)).sha256
    row_S = np.full(seq_length, 7.0, dtype=np.float32)
    for window, labels in enumerate(want):
        assert mask.stretch_N2 is not None
        mask_labels(mask.stretch_N2, window, row_S)
        assert row_S.tolist() == [float(kept) for kept in labels]


def path_of(mask: object, packed: np.ndarray, windows: int, seq_length: int) -> Path:
    """A mask file with the oracle's windows and the same stretches."""
    path = Path(tempfile.mkdtemp()) / "oracle.npz"
    stretch_N2 = mask.stretch_N2  # type: ignore[attr-defined]
    np.savez(path, windows=packed, stretches=stretch_N2, seq_length=seq_length, count=windows, corpus="")
    return path


def test_neighbours_are_joined(tmp_path: Path) -> None:
    corpus = written(tmp_path, [5, 0, 3, 2, 4])
    kept_D = np.array([True, False, True, False, True])
    assert kept_stretches(corpus, kept_D).tolist() == [[0, 8], [10, 14]]


def test_a_batch_carries_the_mask_of_its_samples_phase(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    corpus = written(tmp_path, random.integers(1, 40, 60).tolist())
    other = Corpus("other", corpus.prefix, corpus.documents, corpus.tokens, corpus.dtype, None)
    seq_length, windows = 16, corpus.windows(16)
    kept_D = random.random(60) < 0.5
    save_documents(tmp_path / "keep.npz", corpus, kept_D, seq_length)
    kept_T = np.repeat(kept_D, np.diff(kept_starts(corpus)))
    plan = BlendPlan({"web": windows, "other": windows})
    plan.add_phase(0, [1, 1])
    plan.add_phase(40, [1, 1], keep={"web": tmp_path / "keep.npz"})
    plan.add_phase(90, [1, 1])
    sample_N = np.arange(130)
    source_N, _, window_N = plan.locate_many(sample_N)
    batch = BatchLoader(plan, [corpus, other], seq_length).batch(sample_N)
    for sample, source, window in zip(sample_N, source_N, window_N, strict=True):
        first = window * seq_length + 1
        masked = source == 0 and 40 <= sample < 90
        want = kept_T[first : first + seq_length] if masked else np.ones(seq_length)
        assert batch.loss_mask_BS[sample].tolist() == want.astype(float).tolist()
    assert (batch.loss_mask_BS.sum(1) > 0).all()
    assert not batch.loss_mask_BS[40:90].all()


def kept_starts(corpus: Corpus) -> np.ndarray:
    from megatron_r1.data.indexed import IndexedDataset

    dataset = IndexedDataset(corpus.prefix)
    return np.array([dataset.tokens_before(d) for d in range(corpus.documents + 1)])


def test_other_documents_are_another_plan_even_with_the_same_windows(tmp_path: Path) -> None:
    corpus = written(tmp_path, [10, 6, 10, 7])

    def plan(kept: list[bool]) -> BlendPlan:
        save_documents(tmp_path / "keep.npz", corpus, np.array(kept), 16)
        made = BlendPlan({"web": 2})
        made.add_phase(0, [1], keep={"web": tmp_path / "keep.npz"})
        return made

    one, two = plan([True, False, True, False]), plan([False, True, False, True])
    assert one.phases[0].keep["web"].bitmap.kept == two.phases[0].keep["web"].bitmap.kept == 2
    assert fingerprint(one) != fingerprint(two)
    with pytest.raises(ValueError, match="phase 0 keep masks of 'web'"):
        check_extends(two, one, 1)


def test_mistakes_are_said(tmp_path: Path) -> None:
    corpus = written(tmp_path, [10, 6])
    with pytest.raises(ValueError, match=r"has 2 documents, so kept_D must be bool \[2\], not bool \[3\]"):
        save_documents(tmp_path / "keep.npz", corpus, np.ones(3, bool), 4)
    with pytest.raises(ValueError, match=r"keep.npy: a mask over documents is a .npz file"):
        save_documents(tmp_path / "keep.npy", corpus, np.ones(2, bool), 4)
    assert not list(tmp_path.glob("keep*"))
    save_documents(tmp_path / "keep.npz", corpus, np.array([True, False]), 4)
    with pytest.raises(
        ValueError, match=r"for 3 windows of 4 tokens, does not fit: the source has 30 windows"
    ):
        load_mask("web", 30, tmp_path / "keep.npz")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"keep mask of 'web' \(.*text.npy\) cannot be read"):
        load_mask("web", 30, tmp_path / "text.npy")


def test_a_phase_names_its_masks_in_the_configuration(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", 20, seed=0)
    corpus = open_corpus("a", tmp_path / "a")
    save_documents(tmp_path / "keep.npz", corpus, np.arange(20) < 3, 32)
    words = [
        *TINY_MODEL,
        "train={run: unused, global_batch: 4, micro_batch: 2}",
        f"data={{seq_length: 32, sources: {{a: {{prefix: '{tmp_path}/a'}}}}}}",
        "phases.one.steps=5",
        "phases.two.steps=5",
        f"phases.two.keep.a={tmp_path}/keep.npz",
    ]
    plan = open_data(config_io.load(words)).plan
    assert [bool(phase.keep) for phase in plan.phases] == [False, True]
    assert plan.phases[1].unseen == {"a": corpus.windows(32) - 20 % corpus.windows(32)}
    with pytest.raises(config_io.ConfigError, match=r"phases.two.keep.b: no such source in data.sources"):
        config_io.load([*words, "phases.two.keep.b=x.npy"])
    with pytest.raises(config_io.ConfigError, match=r"phases.two: .*nowhere.npy"):
        open_data(config_io.load([*words, "phases.two.keep.a=nowhere.npy"])).plan  # noqa: B018


def test_a_mask_knows_what_it_was_made_for(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", 20, seed=0)
    save_documents(tmp_path / "keep.npz", open_corpus("a", tmp_path / "a"), np.arange(20) < 3, 32)
    words = [
        *TINY_MODEL,
        "train={run: unused, global_batch: 4, micro_batch: 2}",
        f"data={{seq_length: 32, sources: {{a: {{prefix: '{tmp_path}/a'}}}}}}",
        f"phases.one={{steps: 5, keep: {{a: '{tmp_path}/keep.npz'}}}}",
    ]
    open_data(config_io.load(words)).plan  # noqa: B018
    windows = open_corpus("a", tmp_path / "a").windows(33)
    with pytest.raises(
        config_io.ConfigError, match=rf"tokens, does not fit: the source has {windows} windows"
    ):
        open_data(config_io.load([*words, "data.seq_length=33"])).plan  # noqa: B018
    write_corpus(tmp_path / "a", 20, seed=3)
    with pytest.raises(config_io.ConfigError, match=r"phases.one.*"):
        open_data(config_io.load(words)).plan  # noqa: B018


@pytest.mark.parametrize("what", ["windows", "stretches", "order", "type"])
def test_a_mask_that_contradicts_itself_is_damaged(what: str, tmp_path: Path) -> None:
    corpus = written(tmp_path, [40] * 6)
    path, windows = tmp_path / "keep.npz", corpus.windows(16)
    save_documents(path, corpus, np.array([True, False, True, False, True, False]), 16)
    parts = dict(np.load(path))
    assert load_mask("web", windows, path).seq_length == 16
    if what == "windows":
        parts["windows"] = np.zeros_like(parts["windows"])
    else:
        wrong = {"stretches": parts["stretches"][:1], "order": parts["stretches"][::-1]}
        parts["stretches"] = wrong.get(what, parts["stretches"].astype(np.float32))
    np.savez(path, **parts)
    with pytest.raises(ValueError, match=r"keep\.npz\), for \d+ windows of 16 tokens, is damaged"):
        load_mask("web", windows, path)
