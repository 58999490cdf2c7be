"""A tokenizer as the files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.preprocess.tokenizer import HuggingFace, SentencePiece, TikToken, build_tokenizer
from megatron_r1.system.errors import require

_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class TokenizerFiles:
    vocab_size: int
    end_of_text: int
    """The token that ends a document."""
    files: dict[str, bytes]
    """File name -> content."""


def tokenizer_files(kind: str, model: str | Path) -> TokenizerFiles:
    """The files in a model's folder that give the same tokens as `build_tokenizer(kind, model)`.

    Raises ValueError for a SentencePiece model with a normalisation that is not this project's, and as
    `build_tokenizer` does.
    """
    tokenizer = build_tokenizer(kind, model)
    if isinstance(tokenizer, HuggingFace):
        files = _copies(Path(model), tokenizer)
    else:
        if isinstance(tokenizer, TikToken):
            converted, end = tokenizer.tokenizer_json(tokenizer.specials()), tokenizer.decode([tokenizer.eod])
        else:
            assert isinstance(tokenizer, SentencePiece)
            converted, end = _from_sentencepiece(Path(model))
        files = {"tokenizer.json": converted.encode(), "tokenizer_config.json": _settings(end)}
    return TokenizerFiles(tokenizer.vocab_size, tokenizer.eod, files)


def _copies(model: Path, tokenizer: HuggingFace) -> dict[str, bytes]:
    folder = model if model.is_dir() else model.parent
    files = {name: (folder / name).read_bytes() for name in _COPIED if (folder / name).is_file()}
    if "tokenizer.json" not in files:
        raise ValueError(f"{model} is no folder and no file here; give the local tokenizer's folder")
    files.setdefault("tokenizer_config.json", _settings(tokenizer.decode([tokenizer.eod])))
    return files


def _from_sentencepiece(model: Path) -> tuple[str, str]:
    """The pieces as a tokenizer.json, by transformers' converter, and the piece that ends a text."""
    library = require("transformers.convert_slow_tokenizer", "a tokenizer.json of a SentencePiece model")
    extractor = library.SentencePieceExtractor(str(model))
    proto = extractor.proto
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
    parts = extractor.extract(None)
    # The converter would also merge characters into a control token: "<" and "s>" into "<s>".
    normal = {piece.piece for piece in proto.pieces if piece.type == piece.NORMAL}
    merges = [(left, right) for left, right in parts["merges"] if {left, right, left + right} <= normal]
    converted = library.SpmConverter.build_tokenizer_from_spm_proto(proto, parts["vocab"], merges)
    converted.add_special_tokens(parts["additional_special_tokens"])
    return converted.to_str(), trainer.eos_piece


def _settings(end_of_text: str) -> bytes:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_text}
    return json.dumps(settings, ensure_ascii=False, indent=1).encode()
