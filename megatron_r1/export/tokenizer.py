"""A tokenizer as the files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.export.folder import MOST_JSON
from megatron_r1.preprocess.auto_tokenizer import first_line
from megatron_r1.preprocess.tokenizer import HuggingFace, SentencePiece, TikToken, Tokenizer, build_tokenizer
from megatron_r1.preprocess.vetted import pipeline
from megatron_r1.system.errors import require, rewording
from megatron_r1.system.files import regular
from megatron_r1.system.json_io import parse_json

_SETTINGS, _NAMES = "tokenizer_config.json", "special_tokens_map.json"
_COPIED = (_SETTINGS, _NAMES, "added_tokens.json", "chat_template.jinja")
_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
_BEGIN = "<|begin_of_text|>"
"""Llama 3's token before a text."""
_TEXTS = ["  Two words, 12345\n\n\tx'S don't", "漢字 é\u0301 🙂 Ωmega\u00a0_", "The <s> end.\r\n"]
"""Texts on which readers of another kind differ."""


@dataclass(frozen=True)
class TokenizerFiles:
    vocab_size: int
    end_of_text: int
    """The token that ends a document."""
    files: dict[str, bytes]
    """File name -> content."""
    special: dict[str, int | None] = field(default_factory=dict)
    """Ids of the special tokens, by their keys in config.json."""
    fingerprint: str = ""


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
            converted = tokenizer.tokenizer_json(tokenizer.specials())
            names = {"eos_token": tokenizer.decode([tokenizer.eod])}
            names |= {"bos_token": _BEGIN} if _BEGIN in tokenizer.specials() else {}
        else:
            assert isinstance(tokenizer, SentencePiece)
            converted, names = _from_sentencepiece(Path(model))
        files = {"tokenizer.json": converted.encode(), _SETTINGS: _json(_CLASS | names)}
    special = _special_of(files, tokenizer, str(model))
    return TokenizerFiles(tokenizer.vocab_size, tokenizer.eod, files, special, tokenizer.fingerprint())


def _special_of(files: Mapping[str, bytes], tokenizer: Tokenizer, model: str) -> dict[str, int | None]:
    """Ids of the special tokens that AutoTokenizer finds in the files.

    Raises ValueError where it cannot read them, gives other tokens, or adds a token that is not there.
    """
    library = require("transformers", "a tokenizer for transformers")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**files, "config.json": b'{"model_type": "llama"}'}.items():
            Path(folder, name).write_bytes(content)
        cannot = f"{model}: transformers cannot read this tokenizer"
        with rewording(lambda error: f"{cannot}: {first_line(error)}", BaseException):
            theirs = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            ids = theirs(_TEXTS, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    special = {f"{name}_token_id": getattr(theirs, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    added = [name for name, number in special.items() if (number or 0) >= tokenizer.vocab_size]
    other = ids != tokenizer.encode_batch(_TEXTS)
    if isinstance(tokenizer, HuggingFace):
        # Texts do not show every rule.
        specs = (parse_json(one.to_str(), model) for one in (theirs.backend_tokenizer, tokenizer._model))
        other |= len({json.dumps(pipeline(spec), sort_keys=True) for spec in specs}) > 1
    if other or special["eos_token_id"] != tokenizer.eod or added:
        fault = f"{model}: transformers would read the exported tokenizer with other tokens"
        way_out = f"correct tokenizer_class or the tokens in {_SETTINGS}"
        raise ValueError(f"{fault}, as {type(theirs).__name__} with {special}; {way_out}")
    return special


def _copies(model: Path, tokenizer: HuggingFace) -> dict[str, bytes]:
    """The very tokenizer.json that was read, whatever its name, and the settings beside it."""
    if not model.exists():
        raise ValueError(f"{model} is no folder and no file here; give the local tokenizer's folder")
    folder = model if model.is_dir() else model.parent
    files = {name: _content(folder / name) for name in _COPIED if (folder / name).is_file()}
    files["tokenizer.json"] = tokenizer.model_bytes
    settings, names = (parse_json(files.get(name, b"{}"), str(folder / name)) for name in (_SETTINGS, _NAMES))
    # Without a class, the model's own decides, whatever the tokenizer was.
    needed = {**_CLASS, "eos_token": tokenizer.decode([tokenizer.eod])}
    if lacking := {key: value for key, value in needed.items() if not {**names, **settings}.get(key)}:
        files[_SETTINGS] = _json({**settings, **lacking})
    return files


def _content(path: Path) -> bytes:
    with open(path, "rb", opener=regular) as file:
        content = file.read(MOST_JSON + 1)
    if len(content) > MOST_JSON:
        raise ValueError(f"{path} has more than {MOST_JSON:,} bytes; settings of a tokenizer have less")
    return content


def _from_sentencepiece(model: Path) -> tuple[str, dict[str, str]]:
    """The pieces as a tokenizer.json, by transformers' converter, and the names of the special tokens."""
    library = require("transformers.convert_slow_tokenizer", "a tokenizer.json of a SentencePiece model")
    extractor = library.SentencePieceExtractor(str(model))
    proto = extractor.proto
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    plain = trainer.model_type == trainer.BPE and trainer.byte_fallback
    spaces = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    if not plain or spaces or trainer.treat_whitespace_as_suffix or normalizer.precompiled_charsmap:
        rule = "only BPE with byte fallback and without normalisation, as tools/train_tokenizer.py trains it"
        raise ValueError(f"{model}: {rule}, becomes a tokenizer.json; leave the tokenizer out")
    parts = extractor.extract(None)
    # The converter would also merge characters into a control token: "<" and "s>" into "<s>".
    normal = {piece.piece for piece in proto.pieces if piece.type == piece.NORMAL}
    merges = [(left, right) for left, right in parts["merges"] if {left, right, left + right} <= normal]
    converted = library.SpmConverter.build_tokenizer_from_spm_proto(proto, parts["vocab"], merges)
    converted.add_special_tokens(parts["additional_special_tokens"])
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "pad_token": trainer.pad_id}
    return converted.to_str(), {name: proto.pieces[i].piece for name, i in ids.items() if i >= 0}


def _json(settings: Mapping[str, Any]) -> bytes:
    return json.dumps(settings, ensure_ascii=False, indent=1).encode()
