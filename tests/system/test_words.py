"""Words and their n-grams against the rule in plain form."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_r1.system.words import NGRAM, grams, hashed
from megatron_r1.system.words import words as ours

ALONE = ("\u0e00\u109f", "\u1780\u17ff", "\u3040\u30ff", "\u3400\u4dbf", "\u4e00\u9fff", "\uf900\ufaff",
         "\U00020000\U0003ffff")  # fmt: skip


def words(text: str) -> list[str]:
    """The words by the rule in the module's docstring, a character at a time."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u00ad", "-").replace("\u2010", "-")
    text = re.sub(r"(?<=\w)-([ \t\r]*\n\s*)?(?=\w)", "", text)
    out = [""]
    for char in text:
        alone = any(low <= char <= high for low, high in ALONE)
        if not (char.isalnum() or char == "_"):
            out.append("")
        elif alone:
            out += [char, ""]
        else:
            out[-1] += char
    return [word for word in out if word]


CHARACTERS = st.sampled_from("aAbé-\u00ad\u2010_ \t\n.,1ﬁ漢かไß\u0301")


@given(st.text(st.one_of(CHARACTERS, st.characters(max_codepoint=127), st.characters()), max_size=40))
@example("\ud800 a-\udfff")
def test_words_are_those_of_the_rule(text: str) -> None:
    assert ours(text).split() == [word.encode() for word in words(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Well-known, FOO_bar 3.5", "wellknown foo_bar 3 5"),
        ("oran-  \r\n   ges - a -b c- d", "oranges a b c d"),
        ("har\u00adbour ｏｒａｎｇｅ ﬁn Straße cafe\u0301", "harbour orange fin strasse café"),
        ("漢字 かな abc漢1", "漢 字 か な abc 漢 1"),
        ("한국어 слово", "한국어 слово"),
        ("", ""),
    ],
)
def test_words_are(text: str, expected: str) -> None:
    assert ours(text).split() == [word.encode() for word in expected.split()]


# Of 7 to 25 bytes, alike but for one byte, or with two that changed places.
ALIKE = [
    "ab",
    "axxxxxxxb",
    "bxxxxxxxa",
    *(f"{'x' * n}{end}" for n in (7, 8, 15, 16, 24) for end in ("", "y", "z")),
]


@given(st.lists(st.lists(st.sampled_from(ALIKE), max_size=9), max_size=6), st.sampled_from([" ", "  "]))
@example([["a" * n for n in range(1, 40)]], " ")
@example([[f"{n:0{size}d}" for size in (8, 9, 16, 17) for n in range(100)]], " ")
def test_words_have_equal_hashes_where_they_are_equal(texts: list[list[str]], space: str) -> None:
    hash_W, first_T = hashed([f"{space}{space.join(text)}{space}".encode() for text in texts])
    assert first_T.tolist() == [0, *np.cumsum([len(text) for text in texts])]
    flat = [word for text in texts for word in text]
    assert [hash_W.tolist().index(one) for one in hash_W.tolist()] == [flat.index(word) for word in flat]


@given(st.lists(st.lists(st.sampled_from([b"a", b"b", b"ab", b"-"]), max_size=9), max_size=6))
def test_n_grams_are_those_of_each_text(texts: list[list[bytes]]) -> None:
    """Equal where their words are, and within one text."""
    hash_W, first_T = hashed([*map(b" ".join, texts)])
    at_N, gram_N = grams(hash_W, first_T)
    flat = [word for text in texts for word in text]
    begins = [
        first + n
        for first, text in zip(first_T.tolist(), texts, strict=False)
        for n in range(len(text) - NGRAM + 1)
    ]
    assert at_N.tolist() == begins
    plain = [tuple(flat[at : at + NGRAM]) for at in begins]
    same = np.array([[a == b for b in plain] for a in plain]).reshape(len(plain), len(plain))
    assert np.array_equal(gram_N[:, None] == gram_N, same)
