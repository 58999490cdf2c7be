"""Strings on which encoders have been seen to differ: the input of the differential fuzz."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence

_PIECES = (
    *(
        "'s",
        "'S",
        "'ſ",
        "'t",
        "'re",
        "'RE",
        "'rE",
        "'ve",
        "'m",
        "'ll",
        "'Ll",
        "'d",
        "'D",
        "’s",
        "''s",
        "'sx",
        "rock'del",
    ),
    *(
        " ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\r",
        "\r\n",
        "\n\n",
        " \n",
        "\n ",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x85",
        "\xa0",
        "\u2003",
    ),
    *(
        "\u2028",
        "\u3000",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\u180e",
        "\u202f",
        "\x00",
        "\x01",
        "\x13",
        "\x7f",
        "\x80",
        "\x9d",
    ),
    *(
        "a",
        "B",
        "word",
        "Word",
        "WORD",
        "wOrD",
        "the",
        "def",
        "ing",
        "İ",
        "ı",
        "ß",
        "ẞ",
        "ﬁ",
        "K",
        "Å",
        "Å",
        "A\u030a",
    ),
    *(
        "0",
        "1",
        "12",
        "123",
        "1234",
        "12345678",
        "٣",
        "٤٥٦",
        "೩",
        "߃",
        "Ⅷ",
        "½",
        "²",
        "①",
        "一",
        "𝟘",
        "𑁦",
        "𐄇",
        "9",
    ),
    *(
        "e\u0301",
        "é",
        "\u0301",
        "\u0301\u0323",
        "\u0323\u0301",
        "क्षि",
        "각",
        "각",
        "ก็",
        "עִבְ",
        "عربي",
        "ﷺ",
        "\u0345",
        "\u20e3",
    ),
    *(
        "漢字",
        "カタカナ",
        "ｶﾞ",
        "中",
        "𠀀",
        "豈",
        "豈",
        "🙂",
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "👍🏽",
        "\ufe0f",
        "\U000e0067",
        "\U0001f9ff",
    ),
    *(
        "\ud7ff",
        "\ue000",
        "\ufffd",
        "\uffff",
        "\U0010ffff",
        "\U0001fffe",
        "\u0378",
        "\u0530",
        "\U000e0000",
        "\ufdd0",
        "\uf8ff",
    ),
    *(
        "!",
        "?!",
        "...",
        "---",
        "===",
        "<|",
        "|>",
        "</",
        ">",
        "{",
        "}",
        "(",
        ")",
        "_",
        "__",
        "#",
        "@",
        "$",
        "€",
        "\\",
        '"',
        "`",
    ),
    *(
        "</s>",
        "<s>",
        "<unk>",
        "<pad>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
        "[PAD]",
    ),
    *(
        "https://a.b/c?d=e&f=%20#g",
        "1.5e-10",
        "x_1",
        "a.b",
        "--flag",
        "C++",
        "f(x)=",
        "\n\tif x:\n\t\treturn 'a'",
        "don't",
    ),
)
# Assigned since Unicode 15: libraries differ in the version that they know.
_NEW = (
    (0x1C80, 0x1C90),
    (0x2EBF0, 0x2EE60),
    (0x10D40, 0x10D90),
    (0x11380, 0x113E8),
    (0x16D40, 0x16D80),
    (0x1CC00, 0x1CD00),
    (0x1E5D0, 0x1E600),
    (0x323B0, 0x32480),
    (0xA7CB, 0xA7DD),
    (0x10940, 0x10960),
)


def hostile(count: int, seed: int, words: Sequence[str] = ()) -> Iterator[str]:
    """`count` strings. words: the tokenizer's own special tokens and entries of its vocabulary."""
    draw = random.Random(seed)

    def character() -> str:
        low, high = draw.choice(((0, 0x80), (0, 0x250), (0x250, 0x3000), (0x3000, 0xD800), (0xE000, 0x11000),
                                 (0x10000, 0x20000), (0x20000, 0x110000), *draw.sample(_NEW, 1)))  # fmt: skip
        one = chr(draw.randrange(low, high))
        # The reference encodes texts with unassigned characters, so most texts have none.
        return character() if unicodedata.category(one) == "Cn" and draw.random() < 0.98 else one

    def piece() -> str:
        kind = draw.random()
        if kind < 0.5:
            return draw.choice(_PIECES)
        if kind < 0.7:
            return character()
        if kind < 0.9 and words:
            return draw.choice(words)
        part = draw.choice(_PIECES) if draw.random() < 0.7 else character()
        return part * draw.choice((2, 3, 4, 7, 16, 65))

    for number in range(count):
        text = "".join(piece() for _ in range(draw.choice((1, 2, 3, 5, 8, 13, 30))))
        if number % 500 == 0:
            text += draw.choice(_PIECES) * draw.choice((1000, 5000)) + piece()
        form = draw.random()
        if form < 0.1:
            text = unicodedata.normalize(draw.choice(("NFC", "NFD", "NFKC", "NFKD")), text)
        elif form < 0.15:
            text = draw.choice((text.upper, text.lower, text.title, text.swapcase))()
        yield text
