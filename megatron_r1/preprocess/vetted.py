"""Forms of tokenizer.json for which gigatoken gives the tokens of the reference.

published.yaml holds the forms. A form is everything that decides how text is cut: normalizer, pre-tokenizer
with all options, and the flags of the model. tests/preprocess/test_vetted.py compares the two encoders on
hostile strings for each form. Added tokens, post-processor, truncation and padding are in no form, because
documents are encoded without them. `trim_offsets` is in none either, because it moves offsets and no token.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.system.json_io import parse_json
from megatron_r1.system.yaml_io import read_yaml


@functools.cache
def published() -> dict[str, Any]:
    """published.yaml: forms of tokenizer.json, and families of tiktoken ranks."""
    return read_yaml(Path(__file__).with_name("published.yaml")).tree


@dataclass(frozen=True)
class Vetted:
    """A tokenizer of a vetted form, as gigatoken takes it."""

    form: str
    model: str
    """tokenizer.json without what the form says is left out."""
    size: int
    """Tokens of the vocabulary. gigatoken gives larger ids for bytes that the vocabulary lacks."""
    digits_apart: bool
    """Whether each digit is encoded as a text of its own, which gigatoken cannot be told."""
    composed: bool
    """Whether text is brought to NFC."""


class UnvettedError(ValueError):
    """A feature of a tokenizer.json that no vetted form has."""


def vet(model: str) -> Vetted:
    """The tokenizer.json `model` for gigatoken. UnvettedError names a feature that is in no vetted form."""
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel

    given = parse_json(model, "tokenizer.json")
    # Defaults filled in, and merges as the reference ranks them.
    full = parse_json(Tokenizer.from_str(model).to_str(), "tokenizer.json")
    bpe = full["model"]
    vocab, merges = bpe["vocab"], bpe.get("merges")
    parts = pipeline(full)
    for key in ("vocab", "merges", "unk_token"):
        parts["model"].pop(key, None)
    features = {name: differences(parts, form, "") for name, form in published()["forms"].items()}
    # The nearest form: that with the fewest parts of another type.
    other_types = {name: sum('{"type"' in one for one in of) for name, of in features.items()}
    form = min(features, key=lambda name: (other_types[name], len(features[name])))
    for feature in features[form]:
        raise UnvettedError(feature)

    ids, letters = sorted(given["model"]["vocab"].values()), ByteLevel.alphabet()
    if ids != list(range(len(ids))):
        raise UnvettedError(f"ids that are not 0 to {len(ids) - 1}")
    if len(given["model"]["merges"]) != len(merges):
        raise UnvettedError("merges that are listed twice")
    made = [vocab[left + right] for left, right in merges]
    whole_words = bpe["ignore_merges"]
    if any(left > right or (left == right and not whole_words) for left, right in pairwise(made)):
        raise UnvettedError("merges in another order than their tokens' ids")
    added = {token["content"] for token in full["added_tokens"]}
    others = vocab.keys() - set(letters) - {left + right for left, right in merges}
    if whole_words and not added.isdisjoint(others):
        raise UnvettedError(f"the added token {min(added & others)!r} as a word of the vocabulary")
    if not whole_words and not others <= added:
        raise UnvettedError(f"the token {min(others - added)!r}, which no merge makes")

    missing = [letter for letter in letters if letter not in vocab]
    vocab |= {letter: len(ids) + i for i, letter in enumerate(sorted(missing))}
    full |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    if digits_apart := form == "SmolLM2":
        full["pre_tokenizer"] = full["pre_tokenizer"]["pretokenizers"][1]
    return Vetted(form, json.dumps(full), len(ids), digits_apart, full["normalizer"] is not None)


def pipeline(full: dict[str, Any]) -> dict[str, Any]:
    """The parts of a tokenizer.json with its defaults filled in that decide the tokens of a text."""
    model = {key: value or None if key.endswith("fix") else value for key, value in full["model"].items()}
    cut = _without(full["pre_tokenizer"], "trim_offsets")
    return {"normalizer": full["normalizer"], "pre_tokenizer": cut, "model": model}


def _without(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _without(part, key) for name, part in value.items() if name != key}
    return [_without(part, key) for part in value] if isinstance(value, list) else value


def differences(given: Any, form: Any, path: str) -> list[str]:
    """What `given` has and `form` has not, each as "path=value"."""
    if isinstance(given, dict) and isinstance(form, dict) and given.get("type") == form.get("type"):
        keys = [(key, f"{path}.{key}" if path else key) for key in {**form, **given}]
        return [one for key, name in keys for one in differences(given.get(key), form.get(key), name)]
    if isinstance(given, list) and isinstance(form, list) and len(given) == len(form):
        both = enumerate(zip(given, form, strict=True))
        return [one for i, (left, right) in both for one in differences(left, right, f"{path}[{i}]")]
    return [] if given == form else [f"{path}={json.dumps(given, ensure_ascii=False)[:200]}"]


_PLANES = 0x40000


@functools.cache
def _contested(composed: bool) -> np.ndarray:
    """[code points below `_PLANES`] bool."""
    characters, old = list(map(chr, range(_PLANES))), unicodedata.ucd_3_2_0
    table = np.array([unicodedata.category(one) == "Cn" for one in characters])
    for code, one in enumerate(characters if composed else ()):
        parts = unicodedata.decomposition(one)
        if (unicodedata.combining(one), parts) != (old.combining(one), old.decomposition(one)):
            table[code] = True
            # A character that composes since then has a new character among its parts.
            new = [int(part, 16) for part in parts.split() if part[0] != "<"]
            table[[part for part in new if old.category(chr(part)) == "Cn"]] = True
    return table


def contested(text: str, composed: bool = False) -> bool:
    """Whether a character is unassigned in Python's version of Unicode; libraries know different versions,
    so one may take such a character for a letter and another may not.

    composed: also, whether text is brought to NFC and a character composes or reorders otherwise than in
    Unicode 3.2. The tables of tokenizers' NFC are years old.
    """
    if text.isascii():
        return False
    code_S = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return bool(code_S.max() >= _PLANES or _contested(composed)[code_S].any())


@functools.cache
def _number() -> re.Pattern[str]:
    numbers = [chr(code) for code in range(_PLANES) if unicodedata.category(chr(code))[0] == "N"]
    return re.compile(f"([{''.join(numbers)}])")


def split_digits(text: str) -> list[str]:
    """The text with each character of a number as a part of its own."""
    return [part for part in _number().split(text) if part]
