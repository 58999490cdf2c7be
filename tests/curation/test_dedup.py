"""Duplicates: pairs and groups against brute force, and thresholds against planted copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from zlib import crc32

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_r1.curation import dedup
from megatron_r1.curation.dedup import Pairs, calibrate, first_of_each, near_pairs, semantic_pairs
from tests.system.test_words import words as rule


def sentences(n: int, words: int, seed: int) -> list[list[str]]:
    random = np.random.default_rng(seed)
    return [[f"w{i}" for i in random.integers(0, 5000, words)] for _ in range(n)]


def families(n: int, seed: int = 0) -> list[str]:
    """Texts of 80 words in families, whose members differ in up to 30 % of the words, in random order."""
    random = np.random.default_rng(seed)
    texts = []
    for family in sentences(n // 6, 80, seed):
        for share in (0, 0, 0.02, 0.05, 0.1, 0.3):
            changed = random.random(80) < share * random.random()
            texts.append(" ".join("x" + w if c else w for w, c in zip(family, changed, strict=True)))
    return [texts[i] for i in random.permutation(len(texts))]


def jaccard(texts: Sequence[str]) -> np.ndarray:
    sets = []
    for text in texts:
        words = rule(text)
        sets.append({tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))})
    return np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])


def groups(n: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The first document of each document's group: labels that sink until no pair has two."""
    first = list(range(n))
    sinking = True
    while sinking:
        sinking = False
        for i, j in pairs:
            if first[i] != first[j]:
                first[i] = first[j] = min(first[i], first[j])
                sinking = True
    return first


def listed(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.first_P.tolist(), pairs.second_P.tolist(), strict=True))


def check(pairs: Pairs, likeness_NN: np.ndarray, threshold: float) -> None:
    """The pairs are true ones with their likeness. They make the groups of all true pairs, each once."""
    n = len(likeness_NN)
    true = [(i, j) for j in range(n) for i in range(j) if likeness_NN[i, j] >= threshold]
    assert set(listed(pairs)) <= set(true)
    np.testing.assert_allclose(
        pairs.likeness_P, likeness_NN[pairs.first_P, pairs.second_P], rtol=0, atol=1e-6
    )
    expected = groups(n, true)
    assert groups(n, listed(pairs)) == expected
    assert len(pairs.first_P) == n - len(set(expected))
    assert (pairs.first_P.dtype, pairs.likeness_P.dtype) == (np.int64, np.float32)
    assert first_of_each(n, pairs).tolist() == [i == first for i, first in enumerate(expected)]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_pairs_make_the_groups_of_brute_force(threshold: float) -> None:
    again = " ".join(sentences(1, 30, 9)[0])
    texts = [
        *families(180),
        again,
        f"{again} {again} {again}",
        f"{again} {again}",
        "a b c d e f g h",
        "a b c d e f g h i",
        "",
        "?!",
        "one two",
        "One, TWO",
        "one two three",
        "Straße STRASSE",
        "strasse strasse",
        "汉字之间没有空格可是每个字都是一个词",
        "汉字之间没有空格可是每个字都是一个词了",
        "The cafe\u0301 of well-known oranges is open",
        "the caf\u00e9 of well-\nknown oran-\nges is open",
    ]
    likeness = jaccard(texts)
    pairs = near_pairs(texts, threshold)
    check(pairs, likeness, threshold)
    assert len(pairs.first_P) > 30
    assert {(185, 186), (187, 188), (190, 191), (194, 195)} <= set(listed(pairs))
    assert {(183, 184) in listed(pairs), (192, 193) in listed(pairs)} == {threshold <= 0.8}


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents are compared, in each pass over a band."""
    counts: list[int] = []
    plain = dedup._alike

    def counted(
        texts: Sequence[str], order: np.ndarray, bucket: np.ndarray, chosen: np.ndarray, threshold: float
    ) -> Iterator[Pairs]:
        counts.append(np.bincount(bucket)[bucket[chosen]].sum())
        return plain(texts, order, bucket, chosen, threshold)

    monkeypatch.setattr(dedup, "_alike", counted)
    return counts


def first_pass(documents: int) -> int:
    """What the first pass compares in one bucket: 8 of them or a few more with all."""
    return len(range(0, documents, documents // 8)) * documents


@pytest.fixture
def one_bucket(monkeypatch: pytest.MonkeyPatch, compared: list[int]) -> Callable[[Sequence[str]], list[str]]:
    """Puts the same 300 words before each text. One of their shingles has the least hash of all, so that one
    band of one row makes one bucket."""
    monkeypatch.setattr(dedup, "lsh_bands", lambda threshold: (1, 1))

    def make(ends: Sequence[str]) -> list[str]:
        for words in sentences(100, 300, 11):
            texts = [" ".join([*words, end]) for end in ends]
            compared.clear()
            near_pairs(texts, 0.999)
            if compared[0] == first_pass(len(set(texts))):
                compared.clear()
                return texts
        raise AssertionError("a shingle of the ends always has the least hash")

    return make


@pytest.mark.parametrize("documents", [30, 90])
def test_a_bucket_of_several_groups_misses_none(
    documents: int, one_bucket: Callable[[Sequence[str]], list[str]], compared: list[int]
) -> None:
    texts = one_bucket(families(documents))
    likeness = jaccard(texts)
    pairs = near_pairs(texts, 0.8)
    check(pairs, likeness, 0.8)
    assert documents / 4 < len(pairs.first_P) < documents - 3
    assert compared[0] == first_pass(len(set(texts)))


@pytest.mark.parametrize("documents", [15, 16, 23, 24])
def test_each_two_of_a_small_bucket_are_compared(
    documents: int, one_bucket: Callable[[Sequence[str]], list[str]]
) -> None:
    ends = [" ".join(words) for words in sentences(documents, 90, 1)]
    like = [(i, i + 2) for i in range(1, documents - 2, 4)]
    for i, j in like:
        ends[j] = f"{ends[i]} more"
    assert listed(near_pairs(one_bucket(ends), 0.8)) == like


def test_a_chain_in_a_bucket_is_one_group(one_bucket: Callable[[Sequence[str]], list[str]]) -> None:
    """72 windows of which each is like 4 on either side. The first pass makes groups of 9 of them."""
    words = sentences(1, 400, 2)[0]
    texts = one_bucket([" ".join(words[4 * i : 4 * i + 90]) for i in range(72)])
    likeness = jaccard(texts)
    assert likeness[0, 4] >= 0.89 > likeness[0, 5]
    pairs = near_pairs(texts, 0.89)
    check(pairs, likeness, 0.89)
    assert len(pairs.first_P) == 71


def test_the_largest_group_of_a_bucket_is_not_compared_with_itself(
    one_bucket: Callable[[Sequence[str]], list[str]], compared: list[int]
) -> None:
    others = [" ".join(words) for words in sentences(5, 90, 1)]
    texts = one_bucket([*map(str, range(100)), *others])
    for order in (texts, [*texts[100:103], *texts[:100], *texts[103:]]):
        assert first_of_each(105, near_pairs(order, 0.8)).sum() == 6
    # Each 13th is compared with all, which finds the hundred. Five are left.
    assert compared == [9 * 105, 5 * 105] * 2


def test_copies_by_the_thousand_are_compared_a_few_times(compared: list[int]) -> None:
    one, other = (" ".join(words) for words in sentences(2, 40, 0))
    half = f"{one} {other} {one[: len(one) // 2]}"
    texts = [text for _ in range(1500) for text in (one, other, half, f"{half} end")]
    texts += [one.replace(" ", f" z{i} ", 1) for i in range(1000)]
    pairs = near_pairs(texts, 0.8)
    assert first_of_each(len(texts), pairs).nonzero()[0].tolist() == [0, 1, 2]
    assert len(pairs.first_P) == len(texts) - 3
    # 29,000 to 55,000 over seeds of the permutations. Each with each would be a million and more.
    assert sum(compared) < 100_000


@pytest.mark.parametrize(("bands", "rows"), [(4, 6), (2, 3), (21, 6)])
def test_recall_is_that_of_independent_permutations(
    bands: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 pairs just above the threshold: 86 of 106 shingles in common. Within 4 standard deviations."""
    texts = []
    for number, words in enumerate(sentences(2000, 100, 3)):
        texts += [" ".join(words), " ".join([*words[:90], *(f"v{number}x{i}" for i in range(10))])]
    assert jaccard(texts[:2])[0, 1] == 86 / 106
    monkeypatch.setattr(dedup, "lsh_bands", lambda threshold: (bands, rows))
    pairs = near_pairs(texts, 0.8)
    assert all(j == i + 1 for i, j in listed(pairs))
    expected = 1 - (1 - (86 / 106) ** rows) ** bands
    assert abs(len(pairs.first_P) / 2000 - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    bands, rows = dedup.lsh_bands(threshold)
    assert bands * rows <= 128
    assert (1 - threshold**rows) ** bands <= 0.01
    assert threshold != 0.8 or (bands, rows) == (21, 6)


@pytest.mark.parametrize("threshold", [0, -1, 0.01, 1.5, float("nan")])
def test_no_bands_suit_a_threshold(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"near duplicates: .* use one from 0\.05 to 1"):
        near_pairs(["a", "b"], threshold)


@settings(max_examples=50)
@example([["a", "b"], ["ab"], ["b", "a"], []])
@given(st.lists(st.lists(st.sampled_from(["a", "b", "ab", "ba"]), max_size=9), min_size=1, max_size=6))
def test_shingles_of_a_text_do_not_depend_on_its_neighbours(texts: list[list[str]]) -> None:
    joined = [" ".join(words) for words in texts]
    shingles, starts, whole = dedup._shingles(joined)
    sets = [frozenset(of.tolist()) for of in np.split(shingles, starts[1:])]
    expected = [{tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} for words in texts]
    for a in range(len(texts)):
        assert len(sets[a]) == len(expected[a])
        for b in range(a):
            assert len(sets[a] & sets[b]) == len(expected[a] & expected[b])
            assert (whole[a] == whole[b]) == (texts[a] == texts[b])


def test_order_changes_no_group() -> None:
    texts = families(300, seed=5)
    order = np.random.default_rng(0).permutation(len(texts))
    pairs, moved = near_pairs(texts, 0.8), near_pairs([texts[i] for i in order], 0.8)
    ours = groups(len(texts), listed(pairs))
    theirs = groups(len(texts), [(int(order[i]), int(order[j])) for i, j in listed(moved)])
    assert ours == theirs
    assert listed(near_pairs(texts, 0.8)) == listed(pairs)


def test_nothing_has_no_duplicates() -> None:
    assert listed(near_pairs([], 0.8)) == []
    assert listed(near_pairs(["a"], 0.8)) == []
    assert listed(semantic_pairs(np.empty((0, 4), np.float32), 0.9)) == []
    assert first_of_each(3).tolist() == [True] * 3


def clusters(n: int, seed: int) -> np.ndarray:
    """Embeddings of norm 1 around a few centres, near and far, some of them equal."""
    random = np.random.default_rng(seed)
    centre = random.standard_normal((n // 4, 16))[random.integers(0, n // 4, n)]
    e = centre + random.standard_normal((n, 16)) * random.choice([0, 0.1, 0.5], (n, 1))
    return (e / np.linalg.norm(e, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("threshold", [0.8, 0.95, 1.0])
@pytest.mark.parametrize("waiting", [3, dedup._WAITING])
@pytest.mark.parametrize("block", [7, 64, 2048])
def test_semantic_pairs_make_the_groups_of_brute_force(
    block: int, waiting: int, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "_WAITING", waiting)
    e = clusters(200, seed=block)
    cosine = e.astype(np.float64) @ e.astype(np.float64).T
    # No cosine may lie where float32 and float64 could differ.
    assert not ((np.abs(cosine - threshold + 1e-6) < 3e-7) & (np.abs(cosine - 1) > 1e-6)).any()
    pairs = semantic_pairs(e, threshold, block)
    check(pairs, cosine, threshold - 1e-6)
    assert len(pairs.first_P) > 10


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 2.0])
def test_embeddings_that_are_not_of_norm_1_are_refused(value: float) -> None:
    e = clusters(20, 0)
    e[17] = value
    with pytest.raises(ValueError, match="1 of 20 embeddings, the first of text 17, are not of norm 1"):
        semantic_pairs(e, 0.9)
    with pytest.raises(ValueError, match="are not of norm 1"):
        calibrate(lambda texts: np.full((len(texts), 3), value), families(12), 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda p: p[0] != p[1]), max_size=12))
def test_the_first_of_each_group_stays(edges: list[tuple[int, int]]) -> None:
    edges = sorted({(min(p), max(p)) for p in edges})
    first, second = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    halves = [
        Pairs(a, b, np.full(len(a), 0.9, np.float32))
        for a, b in ((first[::2], second[::2]), (first[1::2], second[1::2]))
    ]
    expected = [i == of for i, of in enumerate(groups(10, edges))]
    assert first_of_each(10, *halves).tolist() == expected


@cache
def vector(word: str, dims: int) -> np.ndarray:
    return np.random.default_rng(crc32(word.encode())).standard_normal(dims)


class Bag:
    """Embeds a text by the sum of a fixed random vector of each word, and a vector that all texts share."""

    def __init__(self, dims: int = 64, shared: float = 0.0) -> None:
        self.dims, self.shared = dims, shared
        self.seen: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.seen.append(list(texts))
        e = np.array([np.sum([vector(word, self.dims) for word in text.split()], axis=0) for text in texts])
        e[:, 0] += self.shared
        return (e / np.linalg.norm(e, axis=1, keepdims=True)).astype(np.float32)


def test_the_threshold_is_the_largest_that_finds_the_planted_copies() -> None:
    texts = [" ".join(words) for words in sentences(400, 100, 1)] + ["too short"] * 50
    bag = Bag()
    found = calibrate(bag, texts, seed=3)
    originals, copies = bag.seen
    assert sorted(originals) == sorted(texts[:400])
    vocabulary = set(" ".join(originals).split())
    for original, copy in zip(originals, copies, strict=True):
        words = list(zip(original.split(), copy.split(), strict=True))
        changed = [b for a, b in words if a != b]
        assert len(changed) == 5 and set(changed) <= vocabulary
    e, c = bag(originals), bag(copies)
    planted, others = (e * c).sum(1), (e @ e.T)[np.triu_indices(400, 1)]
    assert found.recall == (planted >= found.threshold).mean() >= 0.99
    assert (planted >= found.threshold + 1e-4).mean() < 0.99
    assert found.unrelated == (others >= found.threshold).mean() == 0
    assert not found.raised
    assert calibrate(Bag(), texts, seed=3) == found != calibrate(Bag(), texts, seed=4)


@pytest.mark.parametrize("dims", [5, 8])
def test_a_threshold_that_joins_different_texts_is_raised(dims: int) -> None:
    """Where a text has more than a tenth of another one for a copy, on average."""
    texts = [" ".join(words) for words in sentences(400, 100, 1)]
    bag = Bag(dims)
    found = calibrate(bag, texts, seed=3)
    e = bag(bag.seen[0])
    cosine = e @ e.T - 2 * np.eye(400)
    assert found.raised and 0.1 <= found.recall < 0.99
    assert (cosine >= found.threshold).sum() / 400 <= 0.1
    assert (cosine >= found.threshold - 1e-4).sum() / 400 > 0.1 * 0.95


@pytest.mark.parametrize(("bag", "recall"), [(Bag(dims=4), "6%"), (Bag(shared=1e6), "0%")])
def test_a_model_that_tells_no_texts_apart_is_refused(bag: Bag, recall: str) -> None:
    texts = [" ".join(words) for words in sentences(400, 100, 1)]
    with pytest.raises(
        ValueError, match=f"finds only {recall} of edited copies; use another embedding model"
    ):
        calibrate(bag, texts, seed=3)


@pytest.mark.parametrize("texts", [[], ["word " * 30], ["short", "texts"], ["same " * 30, "same " * 40]])
def test_too_few_texts_are_refused(texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"of \d texts have 20 words, too few .* give a threshold"):
        calibrate(Bag(), texts, seed=3)
