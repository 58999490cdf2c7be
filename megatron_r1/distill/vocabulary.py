"""Identity of a vocabulary: which bytes each id stands for. Imports no torch of its own.

A teacher's distribution is over ids. It means the same to a student if each id is the same piece of text to
both, however the two tokenizers are stored. Equal sizes say nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

from megatron_r1.data.sidecar import read_sidecar
from megatron_r1.export.origin import tokenizer_of_pair
from megatron_r1.preprocess.tokenizer import HuggingFace, SentencePiece, TikToken, Tokenizer, build_tokenizer
from megatron_r1.system.errors import rewording
from megatron_r1.system.json_io import parse_json

Vocabulary = dict[int, bytes | None]
"""Id -> bytes of its text, with the space before it. None: a token of its own, which no text becomes."""


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of any kind of tokenizer. Names of special tokens do not count, but their ids do."""
    model = tokenizer._model
    if isinstance(tokenizer, TikToken):
        return {i: token for token, i in tokenizer._ranks.items()} | dict.fromkeys(
            tokenizer._specials.values()
        )
    if isinstance(tokenizer, SentencePiece):
        unread = (model.is_control, model.is_unknown, model.is_unused)
        return {
            i: None if any(one(i) for one in unread) else _words(model.id_to_piece(i), model.is_byte(i))
            for i in range(tokenizer.vocab_size)
        }
    assert isinstance(tokenizer, HuggingFace)
    spec = parse_json(model.to_str(), "tokenizer.json")
    pieces = _pieces_of(spec)
    vocabulary: Vocabulary = {i: pieces(word) for word, i in model.get_vocab(with_added_tokens=True).items()}
    unknown = model.token_to_id(spec["model"].get("unk_token") or "")
    vocabulary |= {} if unknown is None else {unknown: None}
    for token in spec.get("added_tokens") or ():
        # Some vocabularies have runs of spaces as added tokens.
        blank = pieces(token["content"]).isspace()
        vocabulary[token["id"]] = token["content"].encode() if blank else None
    return vocabulary


def identity(vocabulary: Vocabulary) -> str:
    """SHA-256 over ids and bytes. Equal for a vocabulary as ranks of tiktoken and as a tokenizer.json."""
    digest = hashlib.sha256(b"ids to bytes")
    for i, token in sorted(vocabulary.items()):
        mark = b"special" if token is None else len(token).to_bytes(4, "little") + token
        digest.update(i.to_bytes(4, "little") + mark)
    return digest.hexdigest()


def first_difference(data: Vocabulary, teacher: Vocabulary) -> str:
    """The smallest id that is another piece of text to the two, with both pieces; or nothing."""
    i = min((i for i, _ in data.items() ^ teacher.items()), default=-1)
    there, here = (of.get(i, b"no token") or b"a special token" for of in (data, teacher))
    return "" if i < 0 else f": id {i} is {str(there)[1:]} in the data and {str(here)[1:]} to the teacher"


def vocabulary_of_pair(prefix: str | Path) -> Vocabulary:
    """The vocabulary of the tokenizer that made a pair, as its sidecar and its ledger name it.

    Raises ValueError where they name none, or another lies there now.
    """
    way_out = "preprocess it with the teacher's tokenizer as HuggingFaceTokenizer"
    unknown = f"the tokenizer of {prefix} cannot be compared with the teacher's"
    with rewording(lambda error: f"{unknown}: {error}; {way_out}", ValueError, OSError):
        if (named := tokenizer_of_pair(prefix)) is None:
            raise ValueError("no sidecar and ledger name it")
        tokenizer = build_tokenizer(*named)
        if tokenizer.fingerprint() != (read_sidecar(prefix) or {}).get("tokenizer_fingerprint"):
            raise ValueError(f"{named[1]} is another one now")
    return vocabulary_of(tokenizer)


def _pieces_of(spec: dict[str, object]) -> Callable[[str], bytes]:
    """Bytes of a piece, as the tokenizer.json `spec` spells pieces."""
    cutting = json.dumps([spec.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")])
    if '"ByteLevel"' in cutting:
        return _letters
    model = spec["model"]
    falls_back = isinstance(model, dict) and bool(model.get("byte_fallback"))
    # "\u2581" as json.dumps writes it.
    if falls_back or '"Metaspace"' in cutting or "\\u2581" in cutting:
        return lambda piece: _words(piece, falls_back and len(piece) == 6 and piece.startswith("<0x"))
    return str.encode


def _words(piece: str, is_byte: bool) -> bytes:
    """Bytes of a piece of SentencePiece: "\u2581" for a space, <0x0A> for a byte."""
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("\u2581", " ").encode()


def _alphabet() -> dict[str, int]:
    """Letter -> byte, as byte-level BPE spells bytes: printable ones of Latin-1, others from 256 on."""
    plain, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, count(256)
    return {chr(byte if byte in plain else next(others)): byte for byte in range(256)}


_BYTES = _alphabet()


def _letters(piece: str) -> bytes:
    known = all(letter in _BYTES for letter in piece)
    return bytes(_BYTES[letter] for letter in piece) if known else piece.encode()
