"""Evaluation items within documents, by word n-grams: verbatim, wrapped anew, or with some words changed.

words.py says what a word is. An item has a question, an answer or both, which are matched apart. A part's
distinctive words are those in its distinctive 5-grams. A part is in a document where four fifths of its
distinctive words stand there in their order, close together, with at least a twelfth of its distinctive
5-grams unbroken.

A 5-gram is distinctive unless it is frequent: in more than four of the items and sampled documents, and one
more for each 10,000 of these. Licences, quotes, instructions and formulas thus drop out of an item that has
words of its own. Where the texts hold many copies of an item, all its 5-grams are frequent alike. A 5-gram
therefore stays that is at most twice as frequent as the sixth rarest of its part, or as the one at a tenth
of them if that is more frequent.

A question of fewer than nine distinctive 5-grams, as 13 words have, must stand there whole, and so must a
part that repeats itself: half of its 5-grams or more have been there before. It is left out where all its
5-grams are frequent, or where it has fewer than five words. A short answer is never matched: numbers and
single words stand everywhere.

Of a text of more than 128 5-grams, as probing documents are, the 128 of smallest hash are looked up.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.preprocess.documents import Lines, open_input
from megatron_r1.preprocess.rows import parse
from megatron_r1.system.errors import rewording, shown
from megatron_r1.system.files import json_bytes
from megatron_r1.system.terminal import say
from megatron_r1.system.words import ALONE, NGRAM, grams, hashed, words

WHOLE, SKETCH = 13, 128
"""Words below which a part must stand whole, n-grams of a text that are looked up."""
SHARE, FREQUENT, RARE = 0.8, 4, 5
_SEEDS = 1 / 12
_GAP = 10
"""Words that may be put in, or left out, between two n-grams of a part."""
_BATCH = 1 << 16
"""Characters that are hashed at once: the arrays stay in the processor's cache."""
_LONG = 4096
"""Words of a part beyond which everyday words count only beside other ones, which bounds the time."""
EXCERPT = 1000
"""Characters of each text of a hit."""
_QUESTION, _ANSWER = ("question", "prompt", "text"), ("answer", "gold")
# Before a space, ASCII punctuation but the hyphen, or a character that is a word, and not behind a hyphen.
_CUT = re.compile(rf"(?<![-\u00ad\u2010\u2011\ufe63\uff0d\s])(?=[\s!-,./:-@\[-^`{{-~]|(?=\w)[{ALONE}])")


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
        if not parts:
            raise ValueError("no evaluation items are given; name a file or a set of them")
        self.identity = hashlib.sha256(json_bytes([list(vars(part).values()) for part in parts])).hexdigest()
        number: dict[tuple[str, str], int] = {}
        item_P = [number.setdefault((part.set, part.item), len(number)) for part in parts]
        self.items = len(number)
        of_batches = []
        for first, texts in _batches(part.text for part in parts):
            hash_W, first_T = hashed([*map(words, texts)])
            at_N, gram_N = grams(hash_W, first_T)
            text_N = np.searchsorted(first_T, at_N, "right") - 1
            # Of each text its n-grams once, the smallest hashes, and these in the text's order again.
            order = np.lexsort((gram_N, text_N))
            again = (np.diff(text_N[order]) == 0) & (np.diff(gram_N[order]) == 0)
            order = np.delete(order, np.flatnonzero(again) + 1)
            different_T, all_T = (np.bincount(of, minlength=len(texts)) for of in (text_N[order], text_N))
            repeats_T = 2 * different_T <= all_T
            rank = np.arange(len(order)) - np.searchsorted(text_N[order], text_N[order])
            chosen = np.sort(order[rank < SKETCH])
            text_N, at_N = text_N[chosen], at_N[chosen]
            of_batches.append((text_N + first, at_N - first_T[text_N], gram_N[chosen], repeats_T))
        # Each n-gram of a part is an entry, sorted by part and offset.
        columns = map(np.concatenate, zip(*of_batches, strict=True))
        self.part_E, self.offset_E, gram_E, self.repeats_P = columns
        self.gram_U, self.number_E = np.unique(gram_E, return_inverse=True)
        self._of_items = _once(self.number_E, np.array(item_P)[self.part_E], len(self.gram_U))

    @classmethod
    def read(cls, files: Mapping[str, str | Path], gold: Sequence[str] = ()) -> Items:
        """Items of JSONL files by the name of their set, and of sets of `data.gold`.

        A line has a question (or prompt, or text), an answer (or gold), or both, and may have an id. Raises
        ValueError for a file without items and for a line with neither; OSError.
        """
        items = [(name, *item) for name, path in files.items() for item in _read(name, path)]
        for name in dict.fromkeys(gold):
            from megatron_r1.data import gold as golden

            if name in files:
                raise ValueError(f"items {name} are given as a file and as gold; rename the file's")
            items += [(name, str(item.id), item.question, item.gold) for item in golden.items(name)]
        parts = [
            Part(name, item, part, text)
            for name, item, *texts in items
            for part, text in zip(("question", "answer"), texts, strict=True)
            if text.strip()
        ]
        return cls(parts)

    def count(self, texts: Iterable[str]) -> np.ndarray:
        """In how many items and texts each n-gram stands, and last how many texts: int64 [n-grams + 1]."""
        counts, documents, table = self._of_items, 0, _Table(self.gram_U)
        for first, some in _batches(texts):
            hash_W, first_T = hashed([*map(words, some)])
            at_N, number_N = table.find(hash_W, first_T)
            counts = counts + _once(number_N, np.searchsorted(first_T, at_N, "right"), len(counts))
            documents = first + len(some)
        return np.append(counts, documents)


def _read(name: str, path: str | Path) -> list[tuple[str, str, str]]:
    """Id, question and answer of each item of a file."""
    source, items = open_input(path), list[tuple[str, str, str]]()
    source.check(())
    for piece in source.pieces(0, (), 0, source.size) if isinstance(source, Lines) else ():
        for line, row in enumerate(piece.rows, piece.first):
            with rewording(lambda error: f"items {path}:{line}: {error}; mend the line"):  # noqa: B023
                if (record := parse(row)) is None:
                    continue
                question, answer = (_first(record, keys) for keys in (_QUESTION, _ANSWER))
                if not (question + answer).encode():
                    keys = ", ".join((*_QUESTION, *_ANSWER))
                    raise ValueError(f"no text under any of the keys {keys}, only {shown(list(record))}")
                items.append((_first(record, ("id",)) or str(line), question, answer))
    if not items:
        raise ValueError(f"items {path}: no item is in it; leave it out, or write JSON lines, an item each")
    if not any(answer for *_, answer in items):
        say(f"items {name}: {path} has no answers, so its questions alone are looked for")
    return items


def _first(record: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first text, or number, under these keys."""
    texts = (str(record[key]) for key in keys if isinstance(record.get(key), str | int | float))
    return next(filter(str.strip, texts), "")


def _once(number_N: np.ndarray, text_N: np.ndarray, numbers: int) -> np.ndarray:
    """How often each number is there, counted once a text."""
    return np.bincount(np.unique(text_N * numbers + number_N) % numbers, minlength=numbers)


class Matcher:
    """Finds items in texts. `counts`: `Items.count` of a sample of these texts."""

    def __init__(self, items: Items, counts: np.ndarray):
        self._parts, parts = items.parts, len(items.parts)
        # Items and documents that may hold an n-gram that is not frequent.
        most = FREQUENT + (int(counts[-1]) + items.items) // 10_000
        count_E = counts[items.number_E]
        size_P = np.bincount(items.part_E, minlength=parts)
        # The n-grams of each part from the rarest on.
        rare_E = np.lexsort((count_E, items.part_E))
        first_P, has_P = np.cumsum(size_P) - size_P, size_P > 0
        nth_P = np.minimum(np.maximum(RARE, size_P // 10), size_P - 1)
        low_P, least_P = np.zeros((2, parts), np.int64)
        low_P[has_P] = count_E[rare_E[(first_P + nth_P)[has_P]]]
        least_P[has_P] = count_E[rare_E[first_P[has_P]]]
        kept_E = count_E <= np.maximum(most, 2 * low_P[items.part_E])
        self._kept_part_E, self._kept_offset_E = items.part_E[kept_E], items.offset_E[kept_E]
        kept_P = np.bincount(self._kept_part_E, minlength=parts)
        few_P = kept_P < WHOLE - NGRAM + 1
        self._whole_P = few_P | items.repeats_P
        self._seeds_P = np.where(self._whole_P, 1, _SEEDS * kept_P)
        question_P = np.array([part.part != "answer" for part in items.parts])
        short_P = few_P & ~(has_P & question_P)
        # Of a part of which not all n-grams are known none tells that it stands whole.
        frequent_P = self._whole_P & ~short_P & ((least_P > most) | (few_P & (size_P >= SKETCH)))
        whole_P = self._whole_P & ~short_P & ~frequent_P
        # A part that stands whole is found by its rarest n-gram.
        used_E = np.flatnonzero(kept_E & ~self._whole_P[items.part_E])
        used_E = np.append(used_E, rare_E[first_P[whole_P]])
        used_E = used_E[np.argsort(items.number_E[used_E], kind="stable")]
        self._part_E, self._offset_E = items.part_E[used_E], items.offset_E[used_E]
        self._table = _Table(items.gram_U[items.number_E[used_E]])
        reasons = {"short": short_P, "frequent": frequent_P}
        self.left_out = {name: [items.parts[p] for p in np.flatnonzero(of)] for name, of in reasons.items()}
        """Parts that are never matched, by the reason."""
        self.counts = {
            "parts": parts,
            "matched whole": int(whole_P.sum()),
            **{name: len(of) for name, of in self.left_out.items()},
            "n-grams": len(items.gram_U),
            "frequent n-grams": len(np.unique(items.number_E[~kept_E])),
            "sampled documents": int(counts[-1]),
        }

    def passed_over(self) -> dict[str, list[str]]:
        """Reason -> questions and texts that are never looked for, as SET/ITEM/PART. A line says how many."""
        out = {
            reason: [f"{part.set}/{part.item}/{part.part}" for part in parts if part.part != "answer"]
            for reason, parts in self.left_out.items()
        }
        if any(out.values()):
            counts = ", ".join(f"{len(names)} too {reason}" for reason, names in out.items() if names)
            say(f"warning: evaluation items that are not looked for: {counts}; manifest.json names them")
        return out

    def __call__(self, texts: Iterable[str]) -> Iterator[Hit]:
        """Hits in the order of the texts, at most one a text and part."""
        for first, some in _batches(texts):
            hash_W, first_T = hashed([*map(words, some)])
            at_N, entry_N = self._table.find(hash_W, first_T)
            if not len(at_N):
                continue
            part_N, shift_N = self._part_E[entry_N], at_N - self._offset_E[entry_N]
            text_N = np.searchsorted(first_T, at_N, "right") - 1
            order = np.lexsort((shift_N, part_N, text_N))
            text_N, part_N, shift_N = text_N[order], part_N[order], shift_N[order]
            # N-grams of a part, in one document, whose places there and in the part keep step.
            apart = (np.diff(text_N) != 0) | (np.diff(part_N) != 0) | (np.diff(shift_N) > _GAP)
            bound_C = np.flatnonzero(np.concatenate(([True], apart, [True])))
            likely_C = np.flatnonzero(np.diff(bound_C) >= self._seeds_P[part_N[bound_C[:-1]]])
            best: dict[tuple[int, int], tuple[float, int, int]] = {}
            for lo, hi in zip(bound_C[likely_C], bound_C[likely_C + 1], strict=True):
                key = text, part = int(text_N[lo]), int(part_N[lo])
                ours_W = _hashed(self._parts[part].text)
                begin = max(shift_N[lo], first_T[text])
                until = min(shift_N[hi - 1] + len(ours_W), first_T[text + 1])
                score = self._score(part, ours_W, hash_W[begin:until])
                place = (score, int(first_T[text] - begin), int(until - first_T[text]))
                best[key] = max(best.get(key, (0.0, 0, 0)), place)
            for (text, part), (score, before, until) in best.items():
                if score >= SHARE:
                    item, there = self._parts[part], _excerpt(some[text], -before, until)
                    yield Hit(first + text, item.set, item.item, item.part, score, item.text[:EXCERPT], there)

    def _score(self, part: int, ours_W: np.ndarray, theirs_M: np.ndarray) -> float:
        """Share of a part's distinctive words that stand in a stretch of a document, in their order."""
        # Words have 8 bytes. Others than whole ones are found next to never, and do not count.
        theirs, ours = theirs_M.tobytes(), ours_W.tobytes()
        if self._whole_P[part] or ours in theirs:
            return float(ours in theirs)
        matcher = SequenceMatcher(None, theirs_M.tolist(), ours_W.tolist(), autojunk=len(ours_W) > _LONG)
        lo, hi = np.searchsorted(self._kept_part_E, [part, part + 1])
        distinctive_W, found_W = np.zeros((2, len(ours_W)), bool)
        distinctive_W[self._kept_offset_E[lo:hi, None] + np.arange(NGRAM)] = True
        for block in matcher.get_matching_blocks():
            found_W[block.b : block.b + block.size] = True
        return float(found_W[distinctive_W].mean())


@lru_cache(1)
def _hashed(text: str) -> np.ndarray:
    return hashed([words(text)])[0]


def _excerpt(text: str, begin: int, until: int) -> str:
    """What a text has from one word to before another."""
    pieces, end_N = _pieces(text)
    lo, hi = np.searchsorted(end_N, begin, "right"), np.searchsorted(end_N, until, "right")
    return "".join(pieces[lo:hi]).strip()[:EXCERPT]


@lru_cache(1)
def _pieces(text: str) -> tuple[list[str], np.ndarray]:
    """A text cut where no word depends on the next piece, and the words up to the end of each."""
    pieces = _CUT.split(text)
    return pieces, np.cumsum([len(words(piece).split()) for piece in pieces])


class _Table:
    """Where n-grams stand in a sorted array of them."""

    def __init__(self, gram_E: np.ndarray):
        self._gram_E = gram_E
        bits = min(27, max(10, len(gram_E).bit_length() + 5))
        self._shift = np.uint64(64 - bits)
        # Most n-grams of a text are in no item, and one look-up tells.
        self._may = np.zeros(1 << bits, bool)
        self._may[gram_E >> self._shift] = True

    def find(self, hash_W: np.ndarray, first_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each n-gram of the texts that is there: its first word, and its number, once for each number."""
        at_N, gram_N = grams(hash_W, first_T)
        maybe = np.flatnonzero(self._may[gram_N >> self._shift])
        lo, hi = (np.searchsorted(self._gram_E, gram_N[maybe], side) for side in ("left", "right"))
        count = hi - lo
        before = np.cumsum(count) - count
        return np.repeat(at_N[maybe], count), np.arange(count.sum()) + np.repeat(lo - before, count)


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
