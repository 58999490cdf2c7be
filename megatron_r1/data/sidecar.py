"""`PREFIX.json`, the sidecar that describes a pair: how it was made, and its counts.

tools/preprocess_data.py and tools/curate_probes.py write it. A pair of another tool has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data.integrity import REDO
from megatron_r1.records import Corpus, Gold
from megatron_r1.system.errors import shown
from megatron_r1.system.json_io import is_count, mistake, read_json

_MOST_BYTES = 64 << 20
"""Of a sidecar. One that names 300,000 inputs has so many."""


def read_sidecar(prefix: str | Path, needed: Iterable[str] = ()) -> dict[str, Any] | None:
    """The fields of a sidecar; None for a pair without one.

    Raises ValueError that names the file and the field for a value of another kind than a writer gives, and
    for a `needed` field that is missing.
    """
    path = Path(f"{prefix}.json")
    try:
        sidecar = read_json(path, _MOST_BYTES)
    except FileNotFoundError:
        return None
    except ValueError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path} is not the sidecar of an indexed dataset ({why}); {REDO}") from None
    fields = sidecar if isinstance(sidecar, dict) else {}
    missing = [f"no {field}" for field in needed if field not in fields]
    wrong = [
        f"{field} is {shown(value)}, not {_KINDS[field][0]}"
        for field, value in fields.items()
        if field in _KINDS and not _KINDS[field][1](value)
    ]
    if mistakes := [*missing, *wrong, *([] if fields else ["no field"])]:
        raise ValueError(f"{path} is not the sidecar of an indexed dataset: {mistakes[0]}; {REDO}")
    return fields


def gold_of(prefix: str | Path, sidecar: dict[str, Any] | None, length_N: np.ndarray) -> Gold | None:
    """The gold answers of a pair whose documents have so many tokens; None for a pair of text.

    Raises ValueError where the prompts in the sidecar do not fit the documents.
    """
    if (facts := (sidecar or {}).get("gold")) is None:
        return None
    prompt_N = np.array(facts["prompt_tokens"], np.int64)
    fits = len(prompt_N) == len(length_N) > 0 and bool(np.all((prompt_N > 0) & (prompt_N < length_N)))
    if not fits or facts["bytes"] < 1:
        fault = f"{prefix}.json belongs to another pair: its prompts do not fit the documents"
        raise ValueError(f"{fault}; make the set again with tools/prepare_gold.py")
    return Gold(facts["name"], facts["bytes"], tuple(facts["prompt_tokens"]))


def gold_mistakes(corpus: Corpus) -> list[str]:
    """A mistake where a pair has gold answers. Every use of a pair but measuring asks this."""
    if corpus.gold is None:
        return []
    has = f"{corpus.prefix} has the gold answers of {shown(corpus.gold.name)}"
    rule = "which are measured (data.gold) and never trained on, mixed for or probed with"
    return [f"{has}, {rule}; name another dataset"]


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


_WORDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "a whole number from 0 on": (is_count, "documents tokens vocab_size"),
    "text": (lambda v: isinstance(v, str), "tokenizer_fingerprint tokenizer_type dtype encoder key"),
    "a number or null": (lambda v: v is None or type(v) is int, "seed merged_seed"),
    "a whole number from 0 on, or null": (lambda v: v is None or is_count(v), "eod"),
    "true or false": (lambda v: isinstance(v, bool), "append_eod"),
    "64 hexadecimal digits": (_is_digest, "bin_sha256 idx_sha256 docs_sha256"),
    "a set of gold answers": (
        lambda v: not mistake(v, {"name": str, "bytes": int, "prompt_tokens": [int]}),
        "gold",
    ),
    "a list of files": (lambda v: not mistake(v, [{"path": str}]), "inputs"),
    "a list of numbers": (lambda v: isinstance(v, list) and all(map(is_count, v)), "lines"),
    "numbers by reason": (lambda v: type(v) is dict and all(map(is_count, v.values())), "rejected skipped"),
}
_KINDS = {name: (words, holds) for words, (holds, names) in _WORDS.items() for name in names.split()}
"""Fields that are read somewhere. Others are notes."""
