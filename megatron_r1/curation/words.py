"""Words of a text and their n-grams, as duplicates and evaluation items are looked for by them.

A word is a run of letters, digits and underscores after NFKC and casefolding. A hyphen between two of them
joins them, also where a line ends behind it. Each character of a script without spaces is a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import chain

import numpy as np
from xxhash import xxh3_64_intdigest

NGRAM = 5
"""Words of an n-gram."""
_HYPHEN = re.compile(r"-(?<=\w-)(?:[ \t\r]*\n\s*)?(?=\w)")
# Thai to Burmese, Khmer, kana, and Chinese characters.
ALONE = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"(?=\w)[{ALONE}]|[^\W{ALONE}]+")
# ASCII as the expression and casefold() take it.
_ASCII = bytes(c if re.match(rb"\w", bytes([c])) else 32 for c in range(256)).lower()


def words(text: str) -> list[bytes]:
    """The words in UTF-8."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).casefold()
        # With one character that it begins with, the pattern is found three times as fast.
        text = text.replace("\u00ad", "-").replace("\u2010", "-")
    text = _HYPHEN.sub("", text)
    if text.isascii():
        return text.encode().translate(_ASCII).split()
    return " ".join(_WORD.findall(text)).encode().split()


def hashed(texts: Sequence[Sequence[bytes]]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the words of all texts, [W] uint64, and the first word of each text, [texts + 1] int64."""
    first_T = np.cumsum([0, *map(len, texts)])
    return np.fromiter(map(xxh3_64_intdigest, chain.from_iterable(texts)), np.uint64, first_T[-1]), first_T


def grams(hash_W: np.ndarray, first_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First word of each n-gram within a text, and its hash."""
    gram_W = hash_W
    for following in range(1, NGRAM):
        gram_W = mixed(gram_W[:-1]) + hash_W[following:]
    # The last words of a text begin n-grams that reach into the next one.
    text_W = np.repeat(np.arange(len(first_T) - 1), np.diff(first_T))
    at_N = np.flatnonzero(text_W[: len(gram_W)] == text_W[NGRAM - 1 :])
    return at_N, mixed(gram_W[at_N])


def mixed(hashes: np.ndarray) -> np.ndarray:
    """Other numbers of 64 bits, one to one. Every bit reaches the highest 32."""
    return (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
