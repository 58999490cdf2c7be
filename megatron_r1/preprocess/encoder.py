"""Choice of the library that encodes: gigatoken for vetted forms of tokenizers, else the reference.

gigatoken is a BPE in Rust that remembers the pieces it has seen, 15 to 100 times faster than the references
(`tokenizers`, `tiktoken`). It is taken only for the forms of tokenizer.json in `vetted.py`, and only where it
gives the reference's very tokens on a sample: hard strings, the tokenizer's own special-token strings, and
documents of the input. During the run one document in 2048, chosen by its hash, is compared as well, and a
difference stops the run.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import psutil

from megatron_r1.preprocess.auto_tokenizer import first_line
from megatron_r1.preprocess.tokenizer import Tokenizer
from megatron_r1.preprocess.vetted import UnvettedError, contested, split_digits, vet

REMEMBERED_BYTES = 1 << 29
"""What gigatoken may remember before it is loaded afresh; without this its memory grows with the input."""
COMPARED = 2048
"""One document in so many is encoded by the reference, too."""

HARD = (
    "",
    " ",
    "a",
    " " * 3000,
    "\n" * 700 + "  x",
    "\t\t \r\n  a \r\r\n\n\n b",
    "x" * 5000,
    "word " * 2000,
    "1234567890 12 3 4567,890.12e-34 0x1F ٣٤٥٦ Ⅷ ½",
    "é漢字🙂\u200d👩‍👩‍👧‍👦🇩🇪\u2028\ufeff\ufffd e\u0301 \u00a0\u00a0x \u3000 \u2003y",
    "don't DON'T I'LL we'Re İ'ſ 'S",
    "nul \x00 bell \x07 escape \x1b[0m \x7f\x85",
    "</s><s><unk><pad><|endoftext|><|end_of_text|><|im_start|>user\n<|im_end|>",
    "def f(x):\n\treturn  {'a': x[0]}  # ok\n\n\nclass A:\n    pass\n",
    "https://a.b/c?d=e&f=%20#g ---- ==== ___ ::: ...... !!!???",
    "ﬁ Å Å ℌ ḍ̇ 각 क्षि ภาษาไทย עברית العربية",
    bytes(range(256)).decode("utf-8", "replace"),
    b"cut \xf0\x9f\x99 and \xe6\xbc in \xff\xfe two".decode("utf-8", "replace"),
)


class Encoder:
    """The reference: the library of the tokenizer's kind."""

    def __init__(self, tokenizer: Tokenizer):
        self.name = tokenizer.library
        self.tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str], utf8: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all texts, one after the other, and how many each has, [texts]. utf8: the texts again."""
        rows = self.tokenizer.encode_batch(texts)
        lengths = np.array([len(tokens) for tokens in rows], dtype=np.int64)
        return np.fromiter(chain.from_iterable(rows), np.int64, count=int(lengths.sum())), lengths


class Gigatoken(Encoder):
    """`model`: the tokenizer in the form of a tokenizer.json (`Tokenizer.fast_model`).

    Texts with bytes that the vocabulary lacks, or with characters that Unicode has not assigned, are left to
    the reference. ValueError with the feature that is not vetted.
    """

    def __init__(self, tokenizer: Tokenizer, model: str):
        super().__init__(tokenizer)
        self.name = f"gigatoken {importlib.metadata.version('gigatoken')}"
        self.model, self.vetted = model, vet(model)
        self._load()

    def _load(self) -> None:
        from gigatoken.gigatoken_rs import load_hf_json

        # The old one goes first: two of them never share the memory.
        self._model: Any = None
        self._model = load_hf_json(self.vetted.model)
        self._loaded = _memory()

    def encode_batch(self, texts: Sequence[str], utf8: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        if _memory() - self._loaded > REMEMBERED_BYTES:
            self._load()
        cut = split_digits if self.vetted.digits_apart else self.tokenizer.parts
        parts = [cut(text) for text in texts]
        counts = np.array([len(some) for some in parts], dtype=np.int64)
        if (counts != 1).any():
            utf8 = [part.encode() for some in parts for part in some]
        flat, ends = self._rows(utf8)
        lengths = np.diff(ends[np.append(0, np.cumsum(counts))].astype(np.int64))
        unsure = {i for i, text in enumerate(texts) if contested(text, self.vetted.composed)}
        foreign = np.flatnonzero(flat >= self.vetted.size)
        unsure.update(np.searchsorted(np.cumsum(lengths), foreign, side="right").tolist())
        if not unsure:
            return flat, lengths
        rows = np.split(flat, np.cumsum(lengths)[:-1])
        for i in unsure:
            rows[i] = np.array(self.tokenizer.encode(texts[i]), dtype=flat.dtype)
        return np.concatenate(rows), np.array([len(row) for row in rows], dtype=np.int64)

    def _rows(self, utf8: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all texts, and where those of each begin and end, [texts + 1]. Takes one thread."""
        rows = self._model.encode_batch(list(utf8), parallel=False).layout
        return np.asarray(rows.content.data), np.asarray(rows.offsets.data)


def choose(tokenizer: Tokenizer, sample: Sequence[str], mode: str = "auto") -> tuple[Encoder, str]:
    """The encoder to use, and why it is that one. mode: "auto", or "reference" for never gigatoken."""
    reference = Encoder(tokenizer)
    if mode == "reference":
        return reference, f"{reference.name}, as asked for"
    try:
        model = tokenizer.fast_model()
        if model is None:
            return reference, f"{reference.name}, gigatoken is not used for {tokenizer.kind}"
        fast = Gigatoken(tokenizer, model)
        specials = [f"{special}a {special} b\n{special}{special}" for special in tokenizer.specials()[:64]]
        texts = [*HARD, *specials, *sample]
        flat, lengths = fast.encode_batch(texts, [text.encode() for text in texts])
        for text, tokens in zip(texts, np.split(flat, np.cumsum(lengths)[:-1]), strict=True):
            if tokens.tolist() != tokenizer.encode(text):
                return reference, f"{reference.name}, since {fast.name} gives other tokens for {text[:60]!r}"
    except ImportError:
        return reference, f"{reference.name}; pip install gigatoken for a faster one"
    except UnvettedError as feature:
        return reference, f"{reference.name}, since gigatoken is not vetted for {feature}"
    except (KeyboardInterrupt, SystemExit):
        raise
    # A panic in Rust is no Exception.
    except BaseException as error:
        return reference, f"{reference.name}, since gigatoken cannot load this tokenizer: {first_line(error)}"
    compared = f"{len(texts)} texts, {sum(map(len, texts))} characters"
    form = f"{fast.name}, vetted for the form {fast.vetted.form}"
    return fast, f"{form}, whose tokens equal {reference.name}'s on {compared}"


def _memory() -> int:
    """Bytes of this process's memory, without what it shares where the system tells."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))
