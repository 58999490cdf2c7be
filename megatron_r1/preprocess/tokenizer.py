"""Text to tokens. Kinds carry Megatron's names (`--tokenizer-type`), so its command lines carry over.

A document is text and nothing else: a string such as "</s>" or "<|end_of_text|>" within it is encoded
as the characters it is made of and never becomes the special token, so that no document can end itself.
Tokens of the Hugging Face kind are those of transformers' AutoTokenizer with `split_special_tokens=True`,
where added tokens that are not special are text, too. (Megatron parses such strings in the Hugging Face and
tiktoken kinds; on any other text tokens are equal.)
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol

from megatron_r1.preprocess.auto_tokenizer import (
    SETTINGS,
    auto_tokenizer,
    end_token,
    existing,
    find_file,
    first_line,
    is_rebuilt,
    named_eos,
    read_model,
    read_settings,
    spells_end,
    without_spelling,
)
from megatron_r1.preprocess.vetted import differences, pipeline, published
from megatron_r1.system.errors import require, rewording, shown, suggest
from megatron_r1.system.json_io import parse_json

MOST_IDS = 1 << 24
"""Ids of a vocabulary, above which libraries take memory and time for each. The largest have a million."""


class Tokenizer(Protocol):
    kind: str
    library: str
    """The package behind it."""
    vocab_size: int
    """The largest id + 1. Not each smaller id need be a token."""
    eod: int
    """The token that ends a document. `encode` never gives it for the text of it."""
    model_bytes: bytes
    """The model's file."""
    note: str = ""
    """What a user must know of the tokens; empty: nothing."""
    _model: Any
    """The package's own object."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without a token before or after it. ValueError for a lone surrogate."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._model.decode(list(tokens))

    def specials(self) -> list[str]:
        """Strings that stand for special tokens elsewhere; in a document they are plain text."""

    def parts(self, text: str) -> list[str]:
        """The parts of a text that are encoded separately: one, unless it exceeds the library's limits."""
        return [text]

    def fast_model(self) -> str | None:
        """A tokenizer.json for gigatoken that should give the same tokens; None: there is none."""
        return None

    def fingerprint(self) -> str:
        """SHA-256 over all that decides tokens: equal fingerprints give equal tokens."""
        return _fingerprint(self.kind, self.model_bytes)


def build_tokenizer(kind: str, model: str | Path) -> Tokenizer:
    """Load a tokenizer.

    kind                     model
    SentencePieceTokenizer   a .model file
    HuggingFaceTokenizer     tokenizer.json, a folder with it, or a name and revision on the hub, as
                             ORG/NAME@COMMIT (read from the local cache or fetched)
    TikTokenizer             the tiktoken ranks of Llama 3, cl100k, o200k or Qwen, known by their hash
    TikTokenizer:FAMILY      other tiktoken ranks, with the pattern and special tokens of a family: llama3,
                             cl100k, o200k or qwen

    Errors: ValueError for an unknown kind, a model that is of another kind, damaged or unsafe, or a missing
    library; FileNotFoundError for no model.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown tokenizer kind {shown(kind)}{suggest(kind, KINDS)}")
    return KINDS[kind](Path(model))


def _fingerprint(kind: str, *parts: bytes) -> str:
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        digest.update(b"\0" + len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


class SentencePiece(Tokenizer):
    kind = "SentencePieceTokenizer"
    library = "sentencepiece"

    def __init__(self, model: Path):
        library = require("sentencepiece", self.kind)
        self.model_bytes = read_model(existing(model, self.kind))
        other = "is not a SentencePiece model; Llama 3's tokenizer.model is for TikTokenizer"
        with rewording(lambda _: f"{model} {other}", RuntimeError):
            self._model = library.SentencePieceProcessor(model_proto=self.model_bytes)
        self.vocab_size: int = self._model.vocab_size()
        # -1 also for a user-defined symbol, which a document's text could spell.
        self.eod: int = self._model.eos_id()
        if self.eod < 0:
            fault = f"{model} defines no </s>, which ends a document, as a control symbol"
            raise ValueError(f"{fault}; train it with one")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(_utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: preprocessing runs a process a core already.
        return self._model.encode([_utf8(t) for t in texts], num_threads=1)

    def specials(self) -> list[str]:
        return [self._model.id_to_piece(i) for i in range(self.vocab_size) if self._model.is_control(i)]


class HuggingFace(Tokenizer):
    """By `tokenizers`, the library under transformers' fast tokenizers.

    transformers is imported only where the folder's settings let AutoTokenizer build something else than
    tokenizer.json says.
    """

    kind = "HuggingFaceTokenizer"
    library = "tokenizers"

    def __init__(self, model: Path):
        names = ("tokenizer.json", *SETTINGS)
        files = {name: file for name in names if (file := find_file(model, name)) is not None}
        if "tokenizer.json" not in files:
            way_out = "write one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            raise FileNotFoundError(f"{self.kind}: {model} has no tokenizer.json; {way_out}")
        self._path = path = files["tokenizer.json"]
        self.model_bytes = read_model(path)
        plain, spec = self._load(self.model_bytes), parse_json(self.model_bytes, str(path))
        settings = {name: read_settings(file) for name, file in files.items() if name in SETTINGS}
        eos = named_eos(model, settings)
        self._rules: list[bytes] = []
        """All that decides tokens beside tokenizer.json and the end token."""
        if is_rebuilt(settings, plain):
            built, eos, maker = auto_tokenizer(path, files, settings)
            spec = parse_json(built, str(path))
            ours, written = pipeline(spec), pipeline(parse_json(plain.to_str(), str(path)))
            if ours != written:
                self._rules.append(json.dumps(ours, sort_keys=True).encode())
                built_parts = " and ".join(differences(ours, written, "")[:3])
                written_parts = " and ".join(differences(written, ours, "")[:3])
                self.note = (
                    f"tokens are those of {maker}, which has {built_parts} where {path} has {written_parts}; "
                    f'if the file is meant, write "tokenizer_class": "PreTrainedTokenizerFast" in '
                    f"tokenizer_config.json"
                )
        if spec["model"].get("dropout"):
            fault = f"{path}: dropout={shown(spec['model']['dropout'])} gives other tokens each time"
            raise ValueError(f'{fault}; set "dropout": null in it')
        eos = end_token(path, eos, plain)
        if any(not token["special"] for token in spec.get("added_tokens") or []):
            self._rules.append(b"added tokens are text")
        for token in spec.get("added_tokens") or []:
            token["special"] = True
        self._spec = {**spec, "truncation": None, "padding": None}
        self._model = self._encoder = self._load(json.dumps(self._spec).encode())
        self.eod = int(self._model.token_to_id(eos))
        if spells_end(self._spec["model"], eos):
            self._rules.append(b"the end token is text")
            self._spec = without_spelling({**self._spec, "added_tokens": []}, eos)
            self._encoder = self._load(json.dumps(self._spec).encode())
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        if self.vocab_size > 2**31 - 1:
            raise ValueError(f"{path}: id {self.vocab_size - 1} is larger than an int32 holds")
        with rewording(self._unreadable, BaseException):
            self.encode("a1 \u0378\n漢🙂")

    def _load(self, content: bytes) -> Any:
        with rewording(self._unreadable, BaseException):
            model = require("tokenizers", self.kind).Tokenizer.from_str(content.decode())
        model.encode_special_tokens = True
        model.no_truncation()
        model.no_padding()
        return model

    def _unreadable(self, error: BaseException) -> str:
        version = require("tokenizers", self.kind).__version__
        way = "copy it again if it is damaged, or save it anew with AutoTokenizer of a version that reads it"
        return f"{self._path} does not work with tokenizers {version}: {first_line(error)}; {way}"

    def encode(self, text: str) -> list[int]:
        return self._encoder.encode(_utf8(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._encoder.encode_batch_fast([_utf8(t) for t in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._model.decode(list(tokens), skip_special_tokens=False)

    def specials(self) -> list[str]:
        spec = parse_json(self.model_bytes, str(self._path))
        return [token["content"] for token in spec.get("added_tokens") or []]

    def fast_model(self) -> str | None:
        if self.vocab_size > MOST_IDS:
            return None
        return json.dumps({**self._spec, "post_processor": None})

    def fingerprint(self) -> str:
        return _fingerprint(self.kind, self.model_bytes, str(self.eod).encode(), *self._rules)


# Llama 3's own limits: tiktoken's pattern matcher runs out of stack on longer ones.
_LONGEST_TEXT, _LONGEST_RUN = 400_000, 25_000
_LONG_RUN = re.compile(rf"\s{{{_LONGEST_RUN + 1},}}|\S{{{_LONGEST_RUN + 1},}}")


def _may_have_long_run(text: str) -> bool:
    """False only where no run is too long. This takes much less time than finding the runs."""
    # A run of two blocks' length holds a whole block, wherever it begins.
    block = _LONGEST_RUN // 2
    for lo in range(0, len(text) - block + 1, block):
        part = text[lo : lo + block]
        if part.isspace() or len(part.split(None, 1)[0]) == block:
            return True
    return False


class TikToken(Tokenizer):
    """Tiktoken ranks, one "base64 rank" a line. family: of published.yaml; None: that of this file."""

    kind = "TikTokenizer"
    library = "tiktoken"

    def __init__(self, model: Path, family: str | None = None):
        library = require("tiktoken", self.kind)
        self.model_bytes = read_model(existing(model, self.kind))
        self._ranks = ranks = _read_ranks(model, self.model_bytes)
        families, n = published()["families"], len(ranks)
        sha256 = hashlib.sha256(self.model_bytes).hexdigest()
        known = next((name for name, one in families.items() if one["sha256"] == sha256), None)
        if family is None and known is None:
            titles = ", ".join(one["title"] for one in families.values())
            raise ValueError(
                f"{model} is not the published file of {titles}, and ranks do not say how text is split and "
                f"which special tokens follow; name the family whose rules hold: --tokenizer-type "
                f"{' or '.join(f'{self.kind}:{name}' for name in families)}"
            )
        if family and known and family != known:
            raise ValueError(f"{model} is the file of {known}, not of {family}; give {self.kind}")
        name = family or known
        if not known:
            # So that a sidecar says how to build it again.
            self.kind = f"{TikToken.kind}:{name}"
        self._fingerprint_kind = TikToken.kind if name == "llama3" else f"{TikToken.kind}:{name}"
        self._family = one = families[name]
        names = [one["specials"].get(str(i), one["others"].format(i, i - 3)) for i in range(one["count"])]
        self._specials = {token: n + i for i, token in enumerate(names)}
        self._model = library.Encoding(
            name=model.name, pat_str=one["pattern"], mergeable_ranks=ranks, special_tokens=self._specials
        )
        self.vocab_size = n + one["count"]
        self.eod: int = self._specials[one["eod"]]

    def encode(self, text: str) -> list[int]:
        text = _utf8(text)
        if self._family.get("composed"):
            text = unicodedata.normalize("NFC", text)
        return list(chain.from_iterable(map(self._model.encode_ordinary, self.parts(text))))

    def parts(self, text: str) -> list[str]:
        if len(text) <= _LONGEST_RUN:
            return [text]
        cuts = set(range(0, len(text), _LONGEST_TEXT))
        if _may_have_long_run(text):
            for start in sorted(cuts):
                for run in _LONG_RUN.finditer(text, start, start + _LONGEST_TEXT):
                    cuts.update(range(run.start(), run.end(), _LONGEST_RUN)[1:])
        return [text[lo:hi] for lo, hi in pairwise([*sorted(cuts), len(text)])]

    def specials(self) -> list[str]:
        return list(self._specials)

    def fast_model(self) -> str | None:
        return self.tokenizer_json()

    def fingerprint(self) -> str:
        return _fingerprint(self._fingerprint_kind, self.model_bytes)

    def tokenizer_json(self, specials: Sequence[str] = ()) -> str:
        """The ranks as a tokenizer.json, with `specials` as the tokens after them."""
        library = require("transformers.convert_slow_tokenizer", "a tokenizer.json of tiktoken ranks")
        converter = library.TikTokenConverter(pattern=self._family["pattern"], extra_special_tokens=specials)
        # Its own reader keeps a copy of each file by path, and would give the ranks of an earlier one.
        converter.load_tiktoken_bpe = lambda _: self._ranks
        converted = converter.converted()
        if self._family.get("composed"):
            converted.normalizer = require("tokenizers.normalizers", self.kind).NFC()
        return converted.to_str()


def _read_ranks(model: Path, content: bytes) -> dict[bytes, int]:
    """Token -> rank. ValueError unless the ranks are 0 to n - 1 and each byte has one."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            word, rank = line.split()
            token = base64.b64decode(word, validate=True)
            ranks[token], twice = int(rank), token in ranks
        except ValueError:
            way_out = "TikTokenizer reads tiktoken ranks such as Llama 3's tokenizer.model"
            raise ValueError(f"{model} line {number} is not 'base64 rank'; {way_out}") from None
        if twice:
            way_out = "copy the file again"
            raise ValueError(f"{model} line {number}: the token {shown(token)} is listed twice; {way_out}")
    n = len(ranks)
    if sorted(ranks.values()) != list(range(n)):
        raise ValueError(f"{model}: {n} tokens, but their ranks are not 0 to {n - 1}; is it cut short?")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        fault = f"{model} has no rank for {len(missing)} of the 256 bytes, the first {missing[0]:#04x}"
        raise ValueError(f"{fault}, so not every text can be encoded; copy the file again")
    return ranks


KINDS: dict[str, Any] = {t.kind: t for t in (SentencePiece, HuggingFace, TikToken)}
KINDS |= {f"{TikToken.kind}:{family}": partial(TikToken, family=family) for family in published()["families"]}
# Megatron's of this name gives the tokens of ours, and ends a document with </s>, too.
KINDS["GPTSentencePieceTokenizer"] = SentencePiece


def _utf8(text: str) -> str:
    """The text itself; ValueError where it cannot be written as UTF-8 (JSON lets lone surrogates in)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"lone surrogate {text[error.start]!r} at character {error.start}") from None
    return text
