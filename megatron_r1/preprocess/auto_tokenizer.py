"""What transformers' AutoTokenizer makes of a folder with a tokenizer.json.

A tokenizer.json does not stand alone: tokenizer_config.json names a class, and many classes build the
pipeline anew by rules of their own. Where that may be, AutoTokenizer is asked for the pipeline.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_r1.system.errors import hub_name, require, rewording, shown, suggest_path
from megatron_r1.system.json_io import MOST_BYTES, JsonError, parse_json


def existing(model: Path, kind: str) -> Path:
    if not model.exists():
        raise FileNotFoundError(f"{kind}: no tokenizer model at {model}{suggest_path(model)}")
    return model


def read_model(path: Path) -> bytes:
    """A model's file. ValueError for one that is no model of any kind."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the tokenizer's file in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe or a device; give the tokenizer's file")
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES:,} bytes, which no tokenizer has")
    if not content:
        raise ValueError(f"{path} is empty; copy the tokenizer again")
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of git-lfs, not the file itself; run git lfs pull")
    return content


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


Settings = dict[str, dict[str, Any]]
"""File name -> its content."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
_AS_IT_IS = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of tokenizer_config.json for which AutoTokenizer takes tokenizer.json as it is."""


def read_settings(path: Path) -> dict[str, Any]:
    with rewording(lambda error: f"{error}; copy it again or mend it", JsonError):
        settings = parse_json(read_model(path), str(path))
    half = f"{path} holds half a character, a lone surrogate; mend it"
    with rewording(lambda _: half, UnicodeEncodeError):
        json.dumps(settings, ensure_ascii=False).encode()
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}, not the settings of a tokenizer by name")
    if others := settings.get("fast_tokenizer_files"):
        raise ValueError(
            f"{path}: fast_tokenizer_files={shown(others)} lets transformers read another file than "
            f"tokenizer.json; take the key out to mean tokenizer.json"
        )
    return settings


def named_eos(model: Path, settings: Settings) -> str | None:
    """The eos_token of the settings; None: they name none."""
    folder = model if model.is_dir() else model.parent
    names: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = settings.get(name, {}).get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        if token is not None and (not isinstance(content, str) or not content):
            raise ValueError(f"{folder / name}: eos_token={shown(token)} is no token; give its text")
        if content is not None:
            names[name] = content
    if len(set(names.values())) > 1:
        both = " and ".join(f"{shown(token)} by {name}" for name, token in names.items())
        raise ValueError(f"{model}: eos_token is {both}; let both name the same one")
    return next(iter(names.values()), None)


def end_token(path: Path, named: str | None, file_model: Any) -> str:
    """The end token, which `file_model`, the tokenizer.json at `path`, has. A bare one does not name it."""
    usual = ("<|end_of_text|>", "<|endoftext|>", "</s>")
    there = [token for token in usual if file_model.token_to_id(token) is not None]
    if named is None and len(there) == 1:
        return there[0]
    if named is None:
        also = f", and the vocabulary has {' and '.join(there)}" if there else ""
        way_out = "name one in tokenizer_config.json beside it"
        raise ValueError(f"no eos_token is named for {path}{also}; {way_out}")
    if file_model.token_to_id(named) is None:
        raise ValueError(
            f"{path} lacks {shown(named)}, the eos_token of its tokenizer_config.json or "
            f"special_tokens_map.json; name one that it has"
        )
    if len(named) == 1 and named in file_model.get_vocab(with_added_tokens=False):
        fault = f"{path}: eos_token={named!r} is one character of the vocabulary, which many texts hold"
        raise ValueError(f"{fault}; name a token that no text holds")
    return named


def is_rebuilt(settings: Settings, file_model: Any) -> bool:
    """Whether AutoTokenizer may build something else than tokenizer.json says."""
    config, special = (settings.get(name, {}) for name in SETTINGS[:2])
    if config.get("tokenizer_class") not in _AS_IT_IS or {"auto_map", "fix_mistral_regex"} & config.keys():
        return True
    if not settings.keys().isdisjoint(("added_tokens.json", "config.json")):
        return True
    # Tokens that tokenizer.json lacks get ids of their own.
    named: list[Any] = []
    for key, value in chain(config.items(), special.items()):
        if key.endswith("_token"):
            named.append(value)
        elif key.endswith("special_tokens") or key == "added_tokens_decoder":
            named += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    contents = (token.get("content") if isinstance(token, dict) else token for token in named)
    return any(isinstance(token, str) and file_model.token_to_id(token) is None for token in contents)


def auto_tokenizer(path: Path, files: dict[str, Path], settings: Settings) -> tuple[str, str | None, str]:
    """The tokenizer.json of AutoTokenizer's tokenizer, its end token, and its class and version."""
    name = settings.get("tokenizer_config.json", {}).get("tokenizer_class") or "of config.json"
    name = name if isinstance(name, str) and len(name) < 100 else shown(name)
    library = require("transformers", f"the tokenizer class {name} at {path}", "transformers")
    # A folder of its own, since the file may have another name, and others beside it are not meant.
    with tempfile.TemporaryDirectory() as folder:
        for file, source in files.items():
            Path(folder, file).write_bytes(source.read_bytes())
        cannot = f"AutoTokenizer of transformers {library.__version__} cannot build the class {name}"
        way_out = "take out what it objects to, or save the tokenizer anew"
        with rewording(lambda error: f"{path}: {cannot}: {first_line(error)}; {way_out}", Exception):
            built = library.AutoTokenizer.from_pretrained(
                folder, split_special_tokens=True, trust_remote_code=False, local_files_only=True
            )
    base, own, methods = library.PreTrainedTokenizerFast, type(built), ("__call__", "_encode_plus")
    if not isinstance(built, base) or any(getattr(own, m) is not getattr(base, m) for m in methods):
        fault = f"{path}: AutoTokenizer builds {own.__name__}, which does not encode as tokenizers does"
        way_out = "name tokenizer_class PreTrainedTokenizerFast if tokenizer.json alone says how to encode"
        raise ValueError(f"{fault}; {way_out}")
    maker = f"{own.__name__} of transformers {library.__version__}"
    return built.backend_tokenizer.to_str(), built.eos_token, maker


def spells_end(model: dict[str, Any], eos: str) -> bool:
    """Whether text can become the end token as an ordinary word of the vocabulary."""
    vocab = model.get("vocab") or {}
    if isinstance(vocab, list):
        return any(entry[0] == eos for entry in vocab)
    if eos not in vocab or eos == model.get("unk_token"):
        return False
    if model.get("type") != "BPE" or model.get("ignore_merges") or len(eos) == 1:
        return True
    return any(left + right == eos for left, right in map(_pair, model["merges"]))


def _pair(merge: Any) -> Sequence[str]:
    return merge.split(" ", 1) if isinstance(merge, str) else merge


def without_spelling(spec: dict[str, Any], eos: str) -> dict[str, Any]:
    """`spec` with another name for the end token, which no text has: it ends in a noncharacter."""
    model, other = dict(spec["model"]), f"{eos}\U0010ffff\ufdd0"
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [[other if entry[0] == eos else entry[0], *entry[1:]] for entry in vocab]
    else:
        model["vocab"] = {other if token == eos else token: number for token, number in vocab.items()}
    if "merges" in model:
        merges = [_pair(merge) for merge in model["merges"]]
        model["merges"] = [pair for pair in merges if eos not in (*pair, "".join(pair))]
    return {**spec, "model": model}


def find_file(model: Path, name: str) -> Path | None:
    """`name` within a folder, beside a tokenizer.json, or of a hub name with a revision; None: not there.

    Raises FileNotFoundError for a model that is neither, or that the hub does not give.
    """
    if model.exists():
        folder = model if model.is_dir() else model.parent
        path = model if model.is_file() and name == "tokenizer.json" else folder / name
        return path if path.is_file() else None
    repository, revision = hub_name(str(model), "HuggingFaceTokenizer: no tokenizer model at")
    hub = require("huggingface_hub", "HuggingFaceTokenizer")
    try:
        return Path(hub.hf_hub_download(repository, name, revision=revision))
    except (OSError, ValueError, hub.errors.EntryNotFoundError) as error:
        unreachable = not isinstance(error, hub.errors.EntryNotFoundError)
        if name == "tokenizer.json" and (unreachable or isinstance(error, FileNotFoundError)):
            absent = f"HuggingFaceTokenizer: {model} is no file or folder here"
            raise FileNotFoundError(f"{absent}, and the hub gave no {name}: {first_line(error)}") from None
        return None
