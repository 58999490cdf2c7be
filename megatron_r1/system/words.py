"""Words of a text and their n-grams, as duplicates and evaluation items are looked for by them.

A word is a run of letters, digits and underscores after NFKC and casefolding. A hyphen between two of them
joins them, also where a line ends behind it. Each character of a script without spaces is a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from xxhash import xxh3_64_intdigest

NGRAM = 5
"""Words of an n-gram."""
_HYPHEN = re.compile(r"-(?<=\w-)(?:[ \t\r]*\n\s*)?(?=\w)")
# Thai to Burmese, Khmer, kana, and Chinese characters.
ALONE = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_ALONE = re.compile(rf"([{ALONE}])")
_OTHER = re.compile(r"[^\x00-\x7f\w]")
# ASCII as the expression and casefold() take it.
_ASCII = bytes(c if c > 127 or re.match(rb"\w", bytes([c])) else 32 for c in range(256)).lower()
_FIRST = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
"""Masks of a number's first n bytes."""


def words(text: str) -> bytes:
    """The words in UTF-8, with spaces between them."""
    if not text.isascii():
        # With one character that it begins with, the pattern is found three times as fast.
        text = unicodedata.normalize("NFKC", text).casefold().replace("\u00ad", "-").replace("\u2010", "-")
    text = _HYPHEN.sub("", text)
    if not text.isascii():
        text = " ".join(_ALONE.split(_OTHER.sub(" ", text)))
    return text.encode().translate(_ASCII)


def hashed(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the words of all texts, [W] uint64, and the first word of each text, [texts + 1] int64."""
    joined = b" ".join((b"", *texts, b" " * 16))
    bounds = np.flatnonzero(np.diff(np.frombuffer(joined, np.uint8) != 32)) + 1
    at_W, size_W = bounds[::2], bounds[1::2] - bounds[::2]
    # The 8 bytes from each place on. No two words of up to 8 have one hash.
    bytes_N = np.ndarray(len(joined) - 7, "<u8", joined, strides=(1,))
    low_W, high_W = (bytes_N[at_W + n] & _FIRST[np.clip(size_W - n, 0, 8)] for n in (0, 8))
    hash_W = mixed(mixed(low_W) + high_W)
    for word in np.flatnonzero(size_W > 16).tolist():
        hash_W[word] = xxh3_64_intdigest(joined[at_W[word] : at_W[word] + size_W[word]])
    return hash_W, np.searchsorted(at_W, np.cumsum([1, *(len(text) + 1 for text in texts)]))


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
