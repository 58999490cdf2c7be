"""Documents that say the same: near duplicates by their words, semantic ones by their embeddings.

Near: the Jaccard similarity J of two documents' sets of shingles, 5 words in a row, reaches a threshold.
Documents whose MinHash signatures agree in one band are candidates (locality-sensitive hashing), with the
probability 1 - (1 - J^rows)^bands, which is at least 0.99 at the threshold. Each candidate is compared by its
shingles, so no pair below the threshold is reported.

Semantic: the cosine of two documents' embeddings reaches a threshold. Every pair is compared.

Documents that a chain of pairs joins are one group, of which one stays. A thousand copies have half a million
pairs. A group of n documents is therefore reported by n - 1 pairs that join it: as many as documents go.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from xxhash import xxh3_64_intdigest

from megatron_r1 import backend
from megatron_r1.backend import cpu_products
from megatron_r1.system.words import NGRAM, grams, hashed, mixed, words

PERMUTATIONS = 128
"""Most numbers of a signature."""
RECALL = 0.99
"""Share of pairs at the threshold that become candidates, and of planted copies that `calibrate` finds."""
EDITED, PLANTED = 0.05, 1000
"""Share of a planted copy's words that are other words, and the most copies that are planted."""
PARTNERS = 0.1
"""Most different documents, of all, that a document may be taken for a copy of, on average."""
LEAST = 0.1
"""Least share of planted copies that a threshold must find to be of use."""

_WORD = re.compile(r"(\w+)")
# Documents, or pairs of them, whose shingles are in memory together.
_AT_ONCE = 256
# Documents of a large bucket that are compared with all of it, up to twice as many.
_FEW = 8
# Semantic pairs that are in memory together before they are cut down to those that join groups.
_WAITING = 1 << 21


@dataclass(frozen=True)
class Pairs:
    """Documents `first_P` < `second_P`, [P] int64, and their Jaccard similarity or cosine, [P] float32."""

    first_P: np.ndarray
    second_P: np.ndarray
    likeness_P: np.ndarray


@dataclass(frozen=True)
class Calibration:
    """A cosine threshold, and what it does to texts of which copies were planted."""

    threshold: float
    recall: float
    """Share of the planted copies whose cosine with their originals reaches the threshold."""
    unrelated: float
    """Share of the pairs of different texts whose cosine reaches it."""
    raised: bool
    """Whether the threshold that finds `RECALL` of the copies joined different texts. This one is higher."""


def near_pairs(texts: Sequence[str], threshold: float) -> Pairs:
    """Pairs of Jaccard similarity >= `threshold` that join each group of near duplicates.

    words.py says what a word is. A text of fewer than 5 words is one shingle, and texts without words are the
    same. Two shingles of one 64-bit hash count as one. ValueError for a threshold that no bands suit.

    Beside the texts, memory holds 8 bytes a document and band, 80 a document, and the shingles of 256 texts
    or of one bucket. Time grows with the square of a bucket's documents that are not in its largest group.
    """
    bands, rows = lsh_bands(threshold)
    # Permutations of the numbers of 32 bits: an odd factor, and a number that is added.
    draw_PE = np.random.default_rng(0).integers(0, 1 << 32, (bands * rows, 2), dtype=np.uint32)
    draw_PE[:, 0] |= 1
    n = len(texts)
    keys_BN, whole_N = np.empty((bands, n), dtype=np.uint64), np.empty(n, dtype=np.uint64)
    for low in range(0, n, _AT_ONCE):
        some = slice(low, low + _AT_ONCE)
        shingles, starts, whole_N[some] = _shingles(texts[some])
        hashes = (shingles >> np.uint64(32)).astype(np.uint32)
        least = np.stack([np.minimum.reduceat(hashes * odd + added, starts) for odd, added in draw_PE])
        key = np.zeros((bands, 1), dtype=np.uint64)
        for row in least.reshape(bands, rows, -1).swapaxes(0, 1):
            key = mixed(key) + row
        keys_BN[:, some] = key
    # Documents of the same words in the same order need no comparison. The first stands for them.
    _, first, which = np.unique(whole_N, return_index=True, return_inverse=True)
    copies = np.flatnonzero(first[which] != np.arange(n))
    pairs = Pairs(first[which][copies], copies, np.ones(len(copies), dtype=np.float32))
    document_M = np.sort(first)
    for key_N in keys_BN:
        order = document_M[np.argsort(key_N[document_M], kind="stable")]
        for few in (True, False):
            # In each bucket of several groups some documents are compared with all, which joins copies by the
            # thousand and is all of a small bucket. Then those are that the largest group does not hold.
            group = _groups(n, pairs)[order]
            starts = np.flatnonzero(np.diff(key_N[order], prepend=~key_N[order[:1]]))
            sizes = np.diff(starts, append=len(order))
            several = np.minimum.reduceat(group, starts) < np.maximum.reduceat(group, starts)
            stay = np.repeat(several & (sizes >= (2 if few else 2 * _FEW)), sizes)
            within, step = np.arange(len(order)) - np.repeat(starts, sizes), np.maximum(1, sizes // _FEW)
            order, group, bucket = order[stay], group[stay], np.repeat(np.arange(len(starts)), sizes)[stay]
            if not len(order):
                break
            chosen = (within % np.repeat(step, sizes) == 0)[stay]
            if not few:
                code, which, members = np.unique(bucket * n + group, return_inverse=True, return_counts=True)
                last = np.flatnonzero(np.diff(code // n, append=-1))
                largest = code[np.lexsort((members, code // n))][last]
                chosen = ~np.isin(code, largest)[which]
            pairs = _joining(n, pairs, _alike(texts, order, bucket, chosen, threshold))
    return pairs


def lsh_bands(threshold: float) -> tuple[int, int]:
    """Bands, and rows of a band, by which a pair at the threshold is a candidate with probability `RECALL`.

    Of the choices with at most `PERMUTATIONS` numbers it has the longest bands, which take the fewest pairs
    below the threshold for candidates. ValueError where there is none.
    """
    for rows in range(PERMUTATIONS, 0, -1):
        bands = PERMUTATIONS // rows
        if 0 < threshold <= 1 and 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    raise ValueError(f"near duplicates: {threshold} is no threshold for a similarity; use one from 0.05 to 1")


def semantic_pairs(E_ND: np.ndarray, threshold: float, block: int = 2048) -> Pairs:
    """Pairs of cosine >= `threshold` that join each group of semantic duplicates, of all pairs.

    E_ND: embeddings, rows of norm 1. Products are float32, so a cosine 1e-6 below the threshold may count.
    Beside the embeddings, memory holds a few arrays of block^2 numbers. ValueError for a row of another norm.
    """
    _check_norms(E_ND)
    cpu_products.use_onednn()
    E = torch.as_tensor(E_ND, dtype=torch.float32, device=backend.device())
    n = len(E_ND)

    def alike() -> Iterator[Pairs]:
        for i in range(0, n, block):
            for j in range(i, n, block):
                cosine = torch.mm(E[i : i + block], E[j : j + block].t())
                hit = cosine >= threshold - 1e-6
                at = (hit.triu(1) if i == j else hit).nonzero(as_tuple=True)
                yield Pairs(*(of.cpu().numpy() for of in (i + at[0], j + at[1], cosine[at])))

    return _joining(n, _NONE, alike())


def calibrate(embed: Callable[[Sequence[str]], np.ndarray], texts: Sequence[str], seed: int) -> Calibration:
    """The largest cosine, to 4 digits, that finds `RECALL` of planted copies of these texts.

    texts: all that the threshold is for, without near duplicates, which would count as different texts. In a
    copy, 5 % of the words are other words of the texts. At most 1,000 texts of 20 words or more are copied,
    drawn by `seed`. Where a text had more than `PARTNERS` different ones that reach the threshold, on average
    of all texts, the threshold is raised. ValueError where it then finds fewer copies than `LEAST`, or where
    fewer than 2 texts have 20 words.
    """
    random = np.random.default_rng(seed)
    order = (texts[i] for i in random.permutation(len(texts)))
    drawn = list(islice((text for text in order if len(_WORD.findall(text)) >= 1 / EDITED), PLANTED))
    pool = sorted({word for text in drawn for word in _WORD.findall(text)})
    way_out = "give a threshold (duplicates.threshold)"
    if len(drawn) < 2 or len(pool) < 2:
        fault = f"{len(drawn)} of {len(texts)} texts have 20 words, too few to calibrate a threshold on"
        raise ValueError(f"semantic duplicates: {fault}; {way_out}")
    E_ND, copies_ND = embed(drawn), embed([_edited(text, pool, random) for text in drawn])
    _check_norms(np.concatenate([E_ND, copies_ND]))
    planted = np.sort((E_ND * copies_ND).sum(1))
    others = np.sort((E_ND @ E_ND.T)[np.triu_indices(len(drawn), 1)])
    wanted = math.floor(planted[int((1 - RECALL) * len(planted))] * 1e4) / 1e4
    most = int(len(others) * PARTNERS / (len(texts) - 1))
    threshold = max(wanted, (math.floor(others[-1 - most] * 1e4) + 1) / 1e4)
    recall, unrelated = (float((cosines >= threshold).mean()) for cosines in (planted, others))
    if recall < LEAST:
        fault = f"the cosine {threshold:.4f} tells texts apart, and finds only {recall:.0%} of edited copies"
        raise ValueError(f"semantic duplicates: {fault}; use another embedding model, or {way_out}")
    return Calibration(threshold, recall, unrelated, threshold > wanted)


def first_of_each(documents: int, *pairs: Pairs) -> np.ndarray:
    """The first document of each group, [documents] bool. A document of no pair is a group by itself."""
    kept_N = np.zeros(documents, dtype=bool)
    kept_N[np.unique(_groups(documents, *pairs), return_index=True)[1]] = True
    return kept_N


_NONE = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Hashes of the shingles of all texts, where each text's begin, and a hash of each text's words."""
    # A text of fewer words than a shingle is one shingle, with what is no word at its end.
    padded = [of + b" -" * (NGRAM - len(of.split(None, NGRAM - 1))) for of in map(words, texts)]
    hash_W, first_T = hashed(padded)
    starts = first_T[:-1] - (NGRAM - 1) * np.arange(len(texts))
    whole = [xxh3_64_intdigest(hash_W[a:b].tobytes()) for a, b in pairwise(first_T)]
    return grams(hash_W, first_T)[1], starts, whole


def _alike(
    texts: Sequence[str], order: np.ndarray, bucket: np.ndarray, chosen: np.ndarray, threshold: float
) -> Iterator[Pairs]:
    """Pairs of a chosen document and another of its bucket whose Jaccard similarity reaches the threshold.

    order, bucket, chosen: of each place, sorted by bucket, the document, its bucket and whether it is chosen.
    """
    # Whole buckets together, of about `_AT_ONCE` documents or one larger bucket.
    begins = np.flatnonzero(np.diff(bucket, prepend=-1))
    cuts = begins[np.flatnonzero(np.diff(begins // _AT_ONCE)) + 1]
    for place in np.split(np.arange(len(order)), cuts):
        shingles, starts, _ = _shingles([texts[i] for i in order[place]])
        row = np.repeat(np.arange(len(place)), np.diff(starts, append=len(shingles)))
        # Shingles of two buckets are no common ones.
        column = np.unique(shingles + bucket[place].astype(np.uint64)[row], return_inverse=True)[1]
        sets = csr_array((np.ones(len(row), dtype=np.int32), (row, column)))
        sets.data[:] = 1
        size = np.diff(sets.indptr)
        some = np.flatnonzero(chosen[place])
        for low in range(0, len(some), _AT_ONCE):
            common = (sets[some[low : low + _AT_ONCE]] @ sets.T).tocoo()
            i, j = some[low : low + _AT_ONCE][common.coords[0]], common.coords[1]
            likeness = common.data / (size[i] + size[j] - common.data)
            # Two chosen ones meet twice.
            new = (likeness >= threshold) & ((i < j) | ~chosen[place][j]) & (i != j)
            ends = np.sort(order[place][np.stack([i[new], j[new]])], axis=0)
            yield Pairs(ends[0], ends[1], likeness[new].astype(np.float32))


def _graph(documents: int, pairs: Sequence[Pairs]) -> csr_array:
    """Edges between documents, of a weight from 1 to 3: the smaller, the more alike."""
    columns = [(some.first_P, some.second_P, some.likeness_P) for some in (_NONE, *pairs)]
    first, second, likeness = map(np.concatenate, zip(*columns, strict=True))
    return csr_array((2.0 - likeness.astype(np.float64), (first, second)), shape=(documents, documents))


def _groups(documents: int, *pairs: Pairs) -> np.ndarray:
    """The number of each document's group, [documents]."""
    return connected_components(_graph(documents, pairs), directed=False)[1]


def _joining(documents: int, pairs: Pairs, more: Iterable[Pairs]) -> Pairs:
    """Of all pairs those that join the same groups without a circle, the most alike. None may come twice."""
    group_N, waiting = _groups(documents, pairs), [pairs]
    for some in more:
        apart = group_N[some.first_P] != group_N[some.second_P]
        waiting.append(Pairs(some.first_P[apart], some.second_P[apart], some.likeness_P[apart]))
        if sum(len(of.first_P) for of in waiting) > documents + _WAITING:
            waiting = [_tree(documents, waiting)]
            group_N = _groups(documents, *waiting)
    return _tree(documents, waiting)


def _tree(documents: int, pairs: Sequence[Pairs]) -> Pairs:
    tree = minimum_spanning_tree(_graph(documents, pairs)).tocoo()
    first_P, second_P = (of.astype(np.int64) for of in tree.coords)
    return Pairs(first_P, second_P, (2.0 - tree.data).astype(np.float32))


def _check_norms(E_ND: np.ndarray) -> None:
    """Raises ValueError for embeddings that are not of norm 1, or not finite."""
    wrong = np.flatnonzero(~(np.abs(np.linalg.norm(E_ND, axis=1) - 1) < 1e-3))
    if len(wrong):
        fault = f"{len(wrong)} of {len(E_ND)} embeddings, the first of text {wrong[0]}, are not of norm 1"
        raise ValueError(f"semantic duplicates: {fault}; use another embedding model")


def _edited(text: str, pool: Sequence[str], random: np.random.Generator) -> str:
    """The text with `EDITED` of its words replaced by other ones of the pool."""
    parts = _WORD.split(text)
    words = len(parts) // 2
    for at in 2 * random.choice(words, round(EDITED * words), replace=False) + 1:
        new = int(random.integers(len(pool)))
        parts[at] = pool[new] if pool[new] != parts[at] else pool[new - 1]
    return "".join(parts)
