"""Text to tokens. Kinds carry Megatron's names (`--tokenizer-type`), so its command lines carry over.

A document is text and nothing else: a string such as "</s>" or "<|end_of_text|>" within it is encoded
as the characters it is made of and never becomes the special token, so that no document can end itself.
(Megatron parses such strings in the Hugging Face and tiktoken kinds; on any other text tokens are equal.)
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol

from megatron_r1.system.errors import require, suggest, suggest_path


class Tokenizer(Protocol):
    kind: str
    library: str
    """The package behind it."""
    vocab_size: int
    eod: int
    """The token that ends a document."""
    model_bytes: bytes
    """The model's file."""
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
        """SHA-256 over kind and model: equal fingerprints give equal tokens."""
        return _fingerprint(self.kind, self.model_bytes)


def build_tokenizer(kind: str, model: str | Path) -> Tokenizer:
    """Load a tokenizer.

    kind                     model
    SentencePieceTokenizer   a .model file
    HuggingFaceTokenizer     tokenizer.json, a folder with it, or a hub name (read from the local cache
                             or fetched)
    TikTokenizer             tiktoken ranks, as Llama 3's `tokenizer.model`

    Errors: ValueError for an unknown kind, a model of another kind or a missing library,
    FileNotFoundError for no model.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown tokenizer kind {kind!r}{suggest(kind, KINDS)}")
    return KINDS[kind](Path(model))


def _existing(model: Path, kind: str) -> Path:
    if not model.exists():
        raise FileNotFoundError(f"{kind}: no tokenizer model at {model}{suggest_path(model)}")
    return model


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
        self.model_bytes = _existing(model, self.kind).read_bytes()
        try:
            self._model = library.SentencePieceProcessor(model_proto=self.model_bytes)
        except RuntimeError:
            raise ValueError(
                f"{model} is not a SentencePiece model; Llama 3's tokenizer.model is for TikTokenizer"
            ) from None
        self.vocab_size: int = self._model.vocab_size()
        self.eod: int = self._model.eos_id()
        if self.eod < 0:
            raise ValueError(f"{model} defines no </s>, which ends a document; train it with one")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(_utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: preprocessing runs a process a core already.
        return self._model.encode([_utf8(t) for t in texts], num_threads=1)

    def specials(self) -> list[str]:
        return [self._model.id_to_piece(i) for i in range(self.vocab_size) if self._model.is_control(i)]


class HuggingFace(Tokenizer):
    """By `tokenizers`, the library under transformers' fast tokenizers; transformers is not imported."""

    kind = "HuggingFaceTokenizer"
    library = "tokenizers"

    def __init__(self, model: Path):
        library = require("tokenizers", self.kind)
        path = _hf_file(model, "tokenizer.json")
        if path is None:
            raise FileNotFoundError(
                f"{self.kind}: {model} has no tokenizer.json; write one with "
                f"AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        self.model_bytes = path.read_bytes()
        self._model = library.Tokenizer.from_str(self.model_bytes.decode())
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size: int = self._model.get_vocab_size(with_added_tokens=True)
        self.eod: int = self._find_eod(model)

    def _find_eod(self, model: Path) -> int:
        names: list[str] = []
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if with_eos := _hf_file(model, name):
                token = json.loads(with_eos.read_text(encoding="utf-8")).get("eos_token")
                names.append(token["content"] if isinstance(token, dict) else token or "")
        # A bare tokenizer.json does not say which token ends a text; these names leave no doubt.
        for token in (*names, "<|end_of_text|>", "<|endoftext|>", "</s>"):
            number = self._model.token_to_id(token)
            if token and number is not None:
                return int(number)
        raise ValueError(f"{model} names no eos_token; add tokenizer_config.json with one beside it")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(_utf8(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._model.encode_batch_fast([_utf8(t) for t in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._model.decode(list(tokens), skip_special_tokens=False)

    def specials(self) -> list[str]:
        return [token["content"] for token in json.loads(self.model_bytes).get("added_tokens") or []]

    def fast_model(self) -> str | None:
        model = json.loads(self.model_bytes)
        # As `encode_special_tokens` has it: such strings are text.
        added = [token for token in model.get("added_tokens") or [] if not token.get("special")]
        plain = {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
        return json.dumps({**model, **plain})

    def fingerprint(self) -> str:
        return _fingerprint(self.kind, self.model_bytes, str(self.eod).encode())


def _hf_file(model: Path, name: str) -> Path | None:
    """`name` within a folder, beside a tokenizer.json, or of a hub name (org/model); None: not there."""
    if model.exists():
        folder = model if model.is_dir() else model.parent
        path = model if model.is_file() and name == "tokenizer.json" else folder / name
        return path if path.is_file() else None
    if len(model.parts) != 2 or model.is_absolute() or model.parts[0] == "..":
        _existing(model, "HuggingFaceTokenizer")
    hub = require("huggingface_hub", "HuggingFaceTokenizer")
    try:
        return Path(hub.hf_hub_download(str(model), name))
    except (OSError, ValueError, hub.errors.EntryNotFoundError) as error:
        unreachable = not isinstance(error, hub.errors.EntryNotFoundError)
        if name == "tokenizer.json" and (unreachable or isinstance(error, FileNotFoundError)):
            raise FileNotFoundError(
                f"HuggingFaceTokenizer: {model} is no file or folder here, and the hub gave no {name}: "
                f"{str(error).strip().splitlines()[0]}"
            ) from None
        return None


_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPECIAL = {0: "<|begin_of_text|>", 1: "<|end_of_text|>"}
_LLAMA3_SPECIALS = 256
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
    """Tiktoken ranks, one "base64 rank" a line; splitting and special tokens are Llama 3's."""

    kind = "TikTokenizer"
    library = "tiktoken"

    def __init__(self, model: Path):
        library = require("tiktoken", self.kind)
        self.model_bytes = _existing(model, self.kind).read_bytes()
        ranks: dict[bytes, int] = {}
        try:
            for line in self.model_bytes.splitlines():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(
                f"{model} line {len(ranks) + 1} is not 'base64 rank'; TikTokenizer reads tiktoken ranks such "
                f"as Llama 3's tokenizer.model"
            ) from None
        n = len(ranks)
        if sorted(ranks.values()) != list(range(n)):
            raise ValueError(f"{model}: {n} tokens, but their ranks are not 0 to {n - 1}; is it cut short?")
        self._ranks = ranks
        self._specials = {
            _LLAMA3_SPECIAL.get(i, f"<|reserved_special_token_{i}|>"): n + i for i in range(_LLAMA3_SPECIALS)
        }
        self._model = library.Encoding(
            name=model.name, pat_str=_LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=self._specials
        )
        self.vocab_size = n + _LLAMA3_SPECIALS
        self.eod: int = self._specials["<|end_of_text|>"]

    def encode(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._model.encode_ordinary, self.parts(_utf8(text)))))

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

    def tokenizer_json(self, specials: Sequence[str] = ()) -> str:
        """The ranks as a tokenizer.json, with `specials` as the tokens after them."""
        library = require("transformers.convert_slow_tokenizer", "a tokenizer.json of tiktoken ranks")
        converter = library.TikTokenConverter(pattern=_LLAMA3_SPLIT, extra_special_tokens=specials)
        # Its own reader keeps a copy of each file by path, and would give the ranks of an earlier one.
        converter.load_tiktoken_bpe = lambda _: self._ranks
        return converter.converted().to_str()


KINDS = {t.kind: t for t in (SentencePiece, HuggingFace, TikToken)}
# Megatron's of this name gives the tokens of ours, and ends a document with </s>, too.
KINDS["GPTSentencePieceTokenizer"] = SentencePiece


def _utf8(text: str) -> str:
    """The text itself; ValueError where it cannot be written as UTF-8 (JSON lets lone surrogates in)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"lone surrogate {text[error.start]!r} at character {error.start}") from None
    return text
