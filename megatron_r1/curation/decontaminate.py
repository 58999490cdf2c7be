"""Evaluation items within documents, by word n-grams: verbatim, wrapped anew, or with some words changed.

A word is a run of letters, digits and underscores after NFKC and casefolding. A hyphen between two of them
joins them, also where a line ends behind it. An item has a question, an answer or both, which are matched
apart. Such a part is in a document where the part's distinctive 5-grams stand there close together and in
their order, and cover at least half of the words that they cover in the part.

A 5-gram is distinctive unless it is frequent. Frequent means that it stands in more than four times as many
sampled documents and items as the part's sixth rarest 5-gram, or the one at a tenth of them if that is more
frequent. Licences, quotes, instructions and formulas thus drop out of an item that has words of its own. An
item of which the corpus has many copies keeps all its 5-grams, because all are then equally frequent.

A part whose distinctive 5-grams cover fewer than 13 words must stand there whole, and is left out where more
than four sampled documents and items hold it whole. Such an answer is never matched: numbers and single words
stand everywhere. A question under five words is never matched either.

Of a text of more than 128 5-grams, as probing documents have, the 128 of smallest hash are looked up.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.preprocess.documents import Lines, open_input
from megatron_r1.preprocess.rows import parse
from megatron_r1.system.errors import rewording, shown
from megatron_r1.system.files import json_bytes
from megatron_r1.system.terminal import say

NGRAM, WHOLE, SKETCH = 5, 13, 128
"""Words of an n-gram, words below which a part must stand whole, n-grams of a text that are looked up."""
SHARE, FREQUENT, RARE = 0.8, 4, 5
_SEEDS = 1 / 12
_GAP = 10
"""Words that may be put in, or left out, between two n-grams of a part."""
_BATCH = 1 << 16
"""Characters that are hashed at once: the arrays stay in the processor's cache."""
EXCERPT = 1000
"""Characters of each text of a hit."""
_QUESTION, _ANSWER = ("question", "prompt", "text"), ("answer", "gold")
_HYPHEN = re.compile(r"-(?<=\w-)(?:[ \t\r]*\n\s*)?(?=\w)")
_CUT = re.compile(r"(?<![-\u00ad\u2010\u2011\s])(?=\s)")
_BASE, _MIX = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93


@dataclass(frozen=True)
class Part:
    """The question or the answer of an item of a set."""

    set: str
    item: str
    part: str
    text: str


@dataclass(frozen=True)
class Hit:
    """A part of an item in a document."""

    document: int
    """Number among the texts that were given."""
    set: str
    item: str
    part: str
    score: float
    """Share of the part's words, of those that its distinctive n-grams cover, from SHARE to 1."""
    item_text: str
    document_text: str
    """The matched place. Both texts have at most EXCERPT characters."""


class Items:
    """Parts of evaluation items, and their n-grams."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)
        self.identity = hashlib.sha256(json_bytes([list(vars(part).values()) for part in parts])).hexdigest()
        none = np.zeros(0, np.int64)
        grams, owners, offsets, lengths, wholes = [none.view(np.uint64)], [none], [none], [none], [none]
        for first, texts in _batches(part.text for part in parts):
            words = _Words(texts)
            at_N, gram_N = words.grams()
            text_N = words.text_W[at_N]
            # Of each text the smallest hashes, and these in the text's order again.
            order = np.lexsort((gram_N, text_N))
            rank = np.arange(len(at_N)) - np.searchsorted(text_N, text_N)
            chosen = np.sort(order[rank < SKETCH])
            grams.append(gram_N[chosen])
            owners.append(text_N[chosen] + first)
            offsets.append((at_N - words.first_T[text_N])[chosen])
            lengths.append(np.diff(words.first_T))
            wholes.append(_hashes(words.hash_W, words.first_T[:-1], words.first_T[1:]).view(np.int64))
        # Each n-gram of a part is an entry, sorted by part and offset.
        self.part_E, self.offset_E = np.concatenate(owners), np.concatenate(offsets)
        self.gram_U, self.gram_E = np.unique(np.concatenate(grams), return_inverse=True)
        self.length_P, self.whole_P = np.concatenate(lengths), np.concatenate(wholes).view(np.uint64)

    @classmethod
    def read(cls, files: Mapping[str, str | Path], gold: Sequence[str] = ()) -> Items:
        """Items of JSONL files by the name of their set, and of sets of `data.gold`.

        A line has a question (or prompt, or text), an answer (or gold), or both, and may have an id. Raises
        ValueError for a file without items and for a line with neither; OSError.
        """
        parts: list[Part] = []
        for name in gold:
            from megatron_r1.data import gold as golden

            of_item = ((item.id, item.question, item.gold) for item in golden.items(name))
            parts += [part for one in of_item for part in _parts(name, *map(str, one))]
        for name, path in files.items():
            if name in gold:
                raise ValueError(
                    f"items {name} are given twice, as a file and as gold; rename the file's set"
                )
            of_file = [part for one in _read(path) for part in _parts(name, *one)]
            if not any(part.part == "answer" for part in of_file):
                say(f"items {name}: {path} has no answers, so questions alone are matched")
            parts += of_file
        return cls(parts)


def _parts(name: str, item: str, question: str, answer: str) -> list[Part]:
    both = (("question", question), ("answer", answer))
    return [Part(name, item, part, text) for part, text in both if text.strip()]


def _read(path: str | Path) -> Iterator[tuple[str, str, str]]:
    """Id, question and answer of each item of a file."""
    source, items = open_input(path), 0
    if not isinstance(source, Lines):
        raise ValueError(f"items {path}: write them as JSON lines of question and answer")
    source.check(())
    for piece in source.pieces(0, (), 0, source.size):
        for line, row in enumerate(piece.rows, piece.first):
            with rewording(lambda error: f"items {path}:{line}: {error}; mend the line"):  # noqa: B023
                record = parse(row)
            if record is None:
                continue
            question, answer = (_first(record, keys) for keys in (_QUESTION, _ANSWER))
            if not question + answer:
                names = ", ".join((*_QUESTION, *_ANSWER))
                fault = f"items {path}:{line} has no question and no answer, only {shown(list(record))}"
                raise ValueError(f"{fault}; name one of its keys as one of {names}")
            items += 1
            yield str(record.get("id", line)), question, answer
    if not items:
        raise ValueError(f"items {path}: the file has no item; leave it out, or write an item a line")


def _first(record: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first text, or number, under these keys."""
    texts = (str(record[k]) for k in keys if isinstance(record.get(k), str | int | float))
    return next(filter(str.strip, texts), "")


class Common:
    """In how many sampled documents, and items, each n-gram of the items stands, and each part whole."""

    def __init__(self, items: Items, texts: Iterable[str] = ()):
        self.documents = 0
        """Documents of the sample."""
        number: dict[tuple[str, str], int] = {}
        item_P = np.array([number.setdefault((p.set, p.item), len(number)) for p in items.parts], np.int64)
        pair = np.unique(items.gram_E * max(1, len(number)) + item_P[items.part_E]) // max(1, len(number))
        self.gram_U = np.bincount(pair, minlength=len(items.gram_U))
        _, same_P, count = np.unique(items.whole_P, return_inverse=True, return_counts=True)
        self.whole_P = count[same_P]
        first_E = np.flatnonzero(items.offset_E == 0)
        first_E = first_E[np.argsort(items.gram_E[first_E], kind="stable")]
        all_grams, beginnings = _Table(items.gram_U), _Table(items.gram_U[items.gram_E[first_E]])
        for _, some in _batches(texts):
            words = _Words(some)
            at_N, number_N = all_grams.find(words)
            self._count(self.gram_U, words.text_W[at_N], number_N)
            at_N, number_N = beginnings.find(words)
            part_N = items.part_E[first_E[number_N]]
            whole = _stands_whole(items, words, at_N, part_N)
            self._count(self.whole_P, words.text_W[at_N[whole]], part_N[whole])
            self.documents += len(some)

    @staticmethod
    def _count(count_N: np.ndarray, text_M: np.ndarray, number_M: np.ndarray) -> None:
        """Count each number once a text."""
        once = np.unique(text_M * len(count_N) + number_M) % max(1, len(count_N))
        count_N += np.bincount(once, minlength=len(count_N))


class Matcher:
    """Finds items in texts. `common`: counted over a sample of these texts."""

    def __init__(self, items: Items, common: Common):
        self._items = items
        part_E, offset_E, parts = items.part_E, items.offset_E, len(items.parts)
        count_E = common.gram_U[items.gram_E]
        order_E = np.lexsort((count_E, part_E))
        size_P = np.bincount(part_E, minlength=parts)
        first_P, has_P = np.cumsum(size_P) - size_P, size_P > 0
        nth_P = np.minimum(np.maximum(RARE, size_P // 10), size_P - 1)
        low_P = np.ones(parts, np.int64)
        low_P[has_P] = count_E[order_E[(first_P + nth_P)[has_P]]]
        kept_E = count_E <= np.maximum(FREQUENT, 2 * low_P[part_E])
        cover_E = _cover(part_E[kept_E], offset_E[kept_E])
        self._whole_P = np.bincount(part_E[kept_E], cover_E, parts) < WHOLE
        self._kept_part_E, self._kept_offset_E = part_E[kept_E], offset_E[kept_E]
        self._size_P = np.bincount(self._kept_part_E, minlength=parts)
        question_P = np.array([part.part == "question" for part in items.parts], bool)
        frequent_P = has_P & self._whole_P & question_P & (common.whole_P > FREQUENT)
        whole_P = self._whole_P & has_P & question_P & ~frequent_P & (items.length_P <= SKETCH)
        # A part that stands whole is found by its rarest n-gram.
        rarest_E = np.zeros(len(part_E), bool)
        rarest_E[order_E[first_P[has_P]]] = True
        used_E = np.flatnonzero(np.where(self._whole_P[part_E], whole_P[part_E] & rarest_E, kept_E))
        used_E = used_E[np.argsort(items.gram_E[used_E], kind="stable")]
        self._part_E, self._offset_E = part_E[used_E], offset_E[used_E]
        self._table = _Table(items.gram_U[items.gram_E[used_E]])
        self.left_out = [items.parts[p] for p in np.flatnonzero(self._whole_P & ~whole_P)]
        """Parts that are never matched."""
        self.counts = {
            "parts": parts,
            "matched whole": int(whole_P.sum()),
            "too short": int((self._whole_P & ~whole_P & ~frequent_P).sum()),
            "frequent": int(frequent_P.sum()),
            "n-grams": len(items.gram_U),
            "frequent n-grams": len(np.unique(items.gram_E[~kept_E])),
            "sampled documents": common.documents,
        }

    def __call__(self, texts: Iterable[str]) -> Iterator[Hit]:
        """Hits in the order of the texts, at most one a text and part."""
        for first, some in _batches(texts):
            words = _Words(some)
            at_N, entry_N = self._table.find(words)
            if len(at_N):
                yield from self._hits(words, some, first, at_N, entry_N)

    def _hits(
        self, words: _Words, texts: Sequence[str], first: int, at_N: np.ndarray, entry_N: np.ndarray
    ) -> Iterator[Hit]:
        part_N = self._part_E[entry_N]
        shift_N = at_N - self._offset_E[entry_N]
        good_N = ~self._whole_P[part_N]
        ask = np.flatnonzero(~good_N)
        good_N[ask] = _stands_whole(self._items, words, shift_N[ask], part_N[ask])
        text_N, part_N, shift_N = words.text_W[at_N[good_N]], part_N[good_N], shift_N[good_N]
        order = np.lexsort((shift_N, part_N, text_N))
        text_N, part_N, shift_N = text_N[order], part_N[order], shift_N[order]
        # N-grams of a part, in one document, whose places there and in the part keep step.
        step = (np.diff(text_N) != 0) | (np.diff(part_N) != 0) | (np.diff(shift_N) > _GAP)
        first_C = np.flatnonzero(np.append(True, step)[: len(part_N)])
        until_C = np.append(first_C[1:], len(part_N))
        likely_C = (until_C - first_C) >= _SEEDS * self._size_P[part_N[first_C]]
        best: dict[tuple[int, int], tuple[float, int, int]] = {}
        for c in np.flatnonzero(likely_C | self._whole_P[part_N[first_C]]).tolist():
            text, part = int(text_N[first_C[c]]), int(part_N[first_C[c]])
            begin, until = int(shift_N[first_C[c]]), int(shift_N[until_C[c] - 1] + self._items.length_P[part])
            begin, until = max(begin, int(words.first_T[text])), min(until, int(words.first_T[text + 1]))
            score = 1.0 if self._whole_P[part] else self._aligned(part, words.hash_W[begin:until])
            best[text, part] = max(best.get((text, part), (0.0, 0, 0)), (score, -begin, until))
        for (text, number), (score, begin, until) in best.items():
            if score >= SHARE:
                part_ = self._items.parts[number]
                place = words.excerpt(texts[text], text, -begin, until)
                yield Hit(first + text, part_.set, part_.item, part_.part, score, part_.text[:EXCERPT], place)

    def _aligned(self, part: int, there_M: np.ndarray) -> float:
        """Share of a part's distinctive words that stand in a stretch of a document, in their order."""
        hash_W = _Words([self._items.parts[part].text]).hash_W
        lo, hi = np.searchsorted(self._kept_part_E, [part, part + 1])
        distinctive_W = np.zeros(len(hash_W), bool)
        distinctive_W[(self._kept_offset_E[lo:hi, None] + np.arange(NGRAM)).ravel()] = True
        found_W = np.zeros(len(hash_W), bool)
        matcher = SequenceMatcher(None, there_M.tolist(), hash_W.tolist(), autojunk=False)
        for block in matcher.get_matching_blocks():
            found_W[block.b : block.b + block.size] = True
        return float(found_W[distinctive_W].mean())


class _Words:
    """The words of some texts: hashes [W], text of each [W], first word of each text [T + 1]."""

    def __init__(self, texts: Sequence[str]):
        folded = [_fold(text) for text in texts]
        joined = "\n".join([*folded, ""]).encode("utf-32-le", "surrogatepass")
        char_N = np.frombuffer(joined, np.uint32)
        inside = np.zeros(len(char_N) + 1, bool)
        inside[1:] = _in_words()[char_N]
        edge = np.flatnonzero(inside[1:] != inside[:-1])
        self.begin_W, self.end_W = edge[::2], edge[1::2]
        self.start_T = np.cumsum([0, *(len(text) + 1 for text in folded)])
        self.first_T = np.searchsorted(self.begin_W, self.start_T)
        self.text_W = np.repeat(np.arange(len(texts)), np.diff(self.first_T))
        self.hash_W = _hashes(char_N, self.begin_W, self.end_W)

    def grams(self) -> tuple[np.ndarray, np.ndarray]:
        """First word, and hash, of each n-gram within a text."""
        last = max(0, len(self.hash_W) - NGRAM + 1)
        at_N = np.flatnonzero(self.text_W[:last] == self.text_W[NGRAM - 1 :][:last])
        return at_N, _hashes(self.hash_W, at_N, at_N + NGRAM)

    def excerpt(self, text: str, number: int, begin: int, until: int) -> str:
        """What text `number` has from one word to before another, and what is joined to them."""
        pieces, end_N = _pieces(text)
        first, last = np.array([self.begin_W[begin] + 1, self.end_W[until - 1]]) - self.start_T[number]
        lo, hi = np.searchsorted(end_N, [first, last]).tolist()
        return "".join(pieces[lo : hi + 1]).strip()[:EXCERPT]


@lru_cache(1)
def _pieces(text: str) -> tuple[list[str], np.ndarray]:
    """A text cut where folding one piece does not depend on the next, and where each ends in the folded."""
    pieces = _CUT.split(text)
    return pieces, np.cumsum([len(_fold(piece)) for piece in pieces])


class _Table:
    """Where n-grams stand in a sorted array of them."""

    def __init__(self, gram_E: np.ndarray):
        self._gram_E = gram_E
        bits = min(30, max(10, len(gram_E).bit_length() + 5))
        self._shift = np.uint64(64 - bits)
        # Most n-grams of a text are in no item, and one look-up tells.
        self._may = np.zeros(1 << bits, bool)
        self._may[gram_E >> self._shift] = True

    def find(self, words: _Words) -> tuple[np.ndarray, np.ndarray]:
        """Each n-gram of the texts that is there: its first word, and its number, once for each number."""
        at_N, gram_N = words.grams()
        maybe = np.flatnonzero(self._may[gram_N >> self._shift])
        lo, hi = (np.searchsorted(self._gram_E, gram_N[maybe], side) for side in ("left", "right"))
        count = hi - lo
        before = np.cumsum(count) - count
        return np.repeat(at_N[maybe], count), np.arange(count.sum()) + np.repeat(lo - before, count)


def _fold(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    # With one character that it begins with, the pattern is found three times as fast.
    return _HYPHEN.sub("", text.replace("\u00ad", "-").replace("\u2010", "-"))


def _batches(texts: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Some texts at a time, and the number of the first."""
    some, size, first = list[str](), 0, 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= _BATCH:
            yield first, some
            some, size, first = [], 0, first + len(some)
    if some:
        yield first, some


@cache
def _in_words() -> np.ndarray:
    return np.array([char.isalnum() or char == "_" for char in map(chr, range(0x110000))])


@lru_cache(2)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    powers = [np.full(size, of, np.uint64) for of in (_BASE, pow(_BASE, -1, 1 << 64))]
    for of in powers:
        of[0] = 1
        np.cumprod(of, out=of)
    return powers[0], powers[1]


def _hashes(value_N: np.ndarray, begin_M: np.ndarray, end_M: np.ndarray) -> np.ndarray:
    """64 bits that tell values [begin, end), [M] uint64: sum of value_i B^(i - begin), mixed."""
    power, inverse = _powers(1 << max(16, (len(value_N) + 1).bit_length()))
    before = np.zeros(len(value_N) + 1, np.uint64)
    np.cumsum(value_N * power[: len(value_N)], out=before[1:])
    hash_M = (before[end_M] - before[begin_M]) * inverse[begin_M]
    hash_M = (hash_M ^ (hash_M >> np.uint64(32))) * np.uint64(_MIX)
    return hash_M ^ (hash_M >> np.uint64(29))


def _cover(group_N: np.ndarray, offset_N: np.ndarray) -> np.ndarray:
    """Words that each n-gram covers before the next of its group begins. Sorted by group and offset."""
    words_N = np.full(len(group_N), NGRAM)
    same = group_N[1:] == group_N[:-1]
    words_N[:-1][same] = np.minimum(np.diff(offset_N), NGRAM)[same]
    return words_N


def _stands_whole(items: Items, words: _Words, at_N: np.ndarray, part_N: np.ndarray) -> np.ndarray:
    """Whether parts stand in the texts from these words on, word for word."""
    until_N = at_N + items.length_P[part_N]
    good_N = (at_N >= 0) & (until_N <= len(words.hash_W))
    # Within one text: that of the first word is that of the last.
    good_N[good_N] = words.text_W[at_N[good_N]] == words.text_W[until_N[good_N] - 1]
    hash_M = _hashes(words.hash_W, at_N[good_N], until_N[good_N])
    good_N[good_N] = hash_M == items.whole_P[part_N[good_N]]
    return good_N
