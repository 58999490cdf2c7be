"""A tokenizer as the files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.preprocess.tokenizer import HuggingFace, SentencePiece, TikToken, build_tokenizer

_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class TokenizerFiles:
    vocab_size: int
    end_of_text: int
    """The token that ends a document."""
    files: dict[str, bytes]
    """File name -> content."""


def tokenizer_files(kind: str, model: str | Path) -> TokenizerFiles:
    """What stands for `build_tokenizer(kind, model)` in a model's folder; it gives the same tokens.

    Raises ValueError for a SentencePiece model with a normalisation that is not this project's, and as
    `build_tokenizer` does.
    """
    tokenizer = build_tokenizer(kind, model)
    if isinstance(tokenizer, HuggingFace):
        return TokenizerFiles(tokenizer.vocab_size, tokenizer.eod, _copies(Path(model), tokenizer))
    if isinstance(tokenizer, TikToken):
        fast = tokenizer.fast_model()
        assert fast is not None
        described, specials = json.loads(fast), tokenizer.specials()
        first = tokenizer.vocab_size - len(specials)
        described["added_tokens"] = [_special(first + i, token) for i, token in enumerate(specials)]
        end = specials[tokenizer.eod - first]
    else:
        assert isinstance(tokenizer, SentencePiece)
        described, end = _from_sentencepiece(Path(model))
    return TokenizerFiles(
        tokenizer.vocab_size,
        tokenizer.eod,
        {"tokenizer.json": _json(described), "tokenizer_config.json": _settings(end)},
    )


def _copies(model: Path, tokenizer: HuggingFace) -> dict[str, bytes]:
    folder = model if model.is_dir() else model.parent
    files = {name: (folder / name).read_bytes() for name in _COPIED if (folder / name).is_file()}
    if "tokenizer.json" not in files:
        raise ValueError(f"{model} is no folder and no file here; give the local tokenizer's folder")
    files.setdefault("tokenizer_config.json", _settings(tokenizer.decode([tokenizer.eod])))
    return files


def _from_sentencepiece(model: Path) -> tuple[dict[str, Any], str]:
    """The pieces as a byte-falling-back BPE of Hugging Face's format, and the piece that ends a text.

    SentencePiece joins the pair whose union scores best; so does a list of merges in the order of scores.
    """
    from sentencepiece import sentencepiece_model_pb2 as protocol

    proto = protocol.ModelProto.FromString(model.read_bytes())  # type: ignore[attr-defined]
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if (
        trainer.model_type != trainer.BPE
        or not trainer.byte_fallback
        or trainer.treat_whitespace_as_suffix
        or normalizer.precompiled_charsmap
        or normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
    ):
        raise ValueError(
            f"{model}: only BPE with byte fallback and without normalisation, as tools/train_tokenizer.py "
            f"trains it, becomes a tokenizer.json; leave the tokenizer out"
        )
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    words = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    merges = [
        (-score, ids[word], word[:cut], word[cut:])
        for word, score in words.items()
        for cut in range(1, len(word))
        if word[:cut] in words and word[cut:] in words
    ]
    unknown = next(piece.piece for piece in proto.pieces if piece.type == piece.UNKNOWN)
    specials = [piece.piece for piece in proto.pieces if piece.type in (piece.UNKNOWN, piece.CONTROL)]
    space = "\u2581"
    described = {
        "version": "1.0",
        "added_tokens": [_special(ids[token], token) for token in specials],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": space},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": space}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": [[left, right] for *_, left, right in sorted(merges)],
        },
    }
    return described, proto.trainer_spec.eos_piece


def _special(number: int, token: str) -> dict[str, Any]:
    apart = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": token, "special": True, **apart}


def _settings(end_of_text: str) -> bytes:
    return _json({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_text})


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()
