"""`PREFIX.json`, the sidecar that describes a pair: how it was made, and its counts.

tools/preprocess_data.py and tools/curate_probes.py write it. A pair of another tool has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_r1.data.integrity import REDO
from megatron_r1.system.errors import shown
from megatron_r1.system.json_io import read_json

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
    if mistake := [*missing, *wrong, *([] if fields else ["no field"])]:
        raise ValueError(f"{path} is not the sidecar of an indexed dataset: {mistake[0]}; {REDO}")
    return fields


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _are_inputs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, dict) and isinstance(v.get("path"), str) for v in value
    )


Kind = tuple[str, Callable[[Any], bool]]
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("documents", "tokens", "vocab_size"), ("a whole number from 0 on", is_count)),
    **dict.fromkeys(
        ("tokenizer_fingerprint", "tokenizer_type", "dtype", "encoder", "key"),
        ("text", lambda v: isinstance(v, str)),
    ),
    **dict.fromkeys(("seed", "merged_seed"), ("a number or null", lambda v: v is None or type(v) is int)),
    "eod": ("a whole number from 0 on, or null", lambda v: v is None or is_count(v)),
    "append_eod": ("true or false", lambda v: isinstance(v, bool)),
    **dict.fromkeys(("bin_sha256", "idx_sha256", "docs_sha256"), ("64 hexadecimal digits", _is_digest)),
    "inputs": ("a list of files", _are_inputs),
    "lines": ("a list of numbers", lambda v: isinstance(v, list) and all(map(is_count, v))),
    **dict.fromkeys(
        ("rejected", "skipped"),
        ("numbers by reason", lambda v: isinstance(v, dict) and all(map(is_count, v.values()))),
    ),
}
"""Fields that are read somewhere. Others are notes."""
