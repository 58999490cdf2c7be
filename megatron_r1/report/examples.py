"""Examples of the highest and the lowest score of every capability, as text one can read."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.config import SourceConfig
from megatron_r1.data.indexed import IndexedDataset, read_sidecar
from megatron_r1.data.provenance import read_provenance
from megatron_r1.preprocess.tokenizer import KINDS, Tokenizer, build_tokenizer
from megatron_r1.report import summary
from megatron_r1.report.load import Reading

SHOWN = 4
"""Examples at either end."""
PER_SOURCE = 2
"""Of one source among them, so that one source does not fill the list."""
CHARACTERS = 420
_TOKENS = 4 * CHARACTERS
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that a page may not hold."""


@dataclass(frozen=True)
class Example:
    source: str
    number: int
    """Of the window or document."""
    score: float | None
    """None of what has none."""
    place: str = ""
    """Its tokens within the source, the document in which it begins, and the line that this was."""
    text: str | None = None
    """None without a tokenizer."""


@dataclass(frozen=True)
class Extremes:
    capability: str
    highest: list[Example]
    """Best first."""
    lowest: list[Example]
    """Worst first."""
    ends: tuple[str, str] = field(default=("highest scores", "lowest scores"), kw_only=True)


def extremes(reading: Reading, scores: summary.Scores, tokenizer: Tokenizer | None) -> list[Extremes]:
    """Of every capability, with their text where there is a tokenizer."""
    out = []
    for column, capability in enumerate(scores.capabilities):
        ends = [_end(scores.sources, column, sign) for sign in (-1, 1)]
        out.append(Extremes(capability, *([_read(reading, one, tokenizer) for one in end] for end in ends)))
    return out


def _end(scored: Sequence[summary.SourceInfluence], column: int, sign: int) -> list[Example]:
    ranked = []
    for s in scored:
        order = np.argsort(sign * s.score_NC[:, column], kind="stable")[:PER_SOURCE]
        ranked += [Example(s.source, int(s.example_N[n]), float(s.score_NC[n, column])) for n in order]
    return sorted(ranked, key=lambda one: sign * (one.score or 0.0))[:SHOWN]


def find_tokenizer(reading: Reading) -> Tokenizer | None:
    """The tokenizer given, or one that lies in the run, if it is the one that the sidecars name.

    ValueError where the given one is another.
    """
    sidecars = map(_sidecar, reading.run.config.data.sources.values())
    named = {"tokenizer_type", "tokenizer_fingerprint"}
    sidecar = next((sidecar for sidecar in sidecars if sidecar and named <= sidecar.keys()), None)
    if sidecar is None:
        return None
    kind, wanted = sidecar["tokenizer_type"], sidecar["tokenizer_fingerprint"]
    if reading.tokenizer is not None:
        tokenizer = build_tokenizer(kind, reading.tokenizer)
        if tokenizer.fingerprint() != wanted:
            raise ValueError(f"--tokenizer {reading.tokenizer} is not the one that made the datasets")
        return tokenizer
    for name in ("tokenizer.model", "tokenizer.json") if kind in KINDS else ():
        with suppress(OSError, ValueError):
            tokenizer = build_tokenizer(kind, reading.run.root / name)
            if tokenizer.fingerprint() == wanted:
                return tokenizer
    return None


def _sidecar(source: SourceConfig) -> dict[str, Any] | None:
    """None also for a damaged one."""
    with suppress(OSError, ValueError):
        return read_sidecar(source.prefix)
    return None


def _read(reading: Reading, one: Example, tokenizer: Tokenizer | None) -> Example:
    place, text = f"number {one.number:,}; the dataset is not there any more", None
    with suppress(OSError, ValueError, IndexError, OverflowError):
        place, text = _place_and_text(reading, one, tokenizer)
    return Example(one.source, one.number, one.score, place, text)


def _place_and_text(reading: Reading, one: Example, tokenizer: Tokenizer | None) -> tuple[str, str | None]:
    prefix = reading.run.config.data.sources[one.source].prefix
    manifest = reading.scored[one.source][-1].manifest
    dataset = IndexedDataset(prefix)
    if manifest.get("influence", {}).get("unit", "window") == "document":
        document, begin = one.number, dataset.tokens_before(one.number)
        end = dataset.tokens_before(one.number + 1)
    else:
        length = manifest.get("seq_length", reading.run.config.data.seq_length)
        begin, end = one.number * length, (one.number + 1) * length
        document = bisect_right(range(dataset.num_documents), begin, key=dataset.tokens_before) - 1
    if end > len(dataset.tokens):
        raise ValueError(f"{prefix} has become shorter")
    place = f"tokens {begin:,} to {end:,}, document {document:,}"
    with suppress(FileNotFoundError, IndexError):
        origins = read_provenance(prefix)
        file = Path(origins.inputs[origins.files[document]]).name
        place += f", {file}, line {origins.lines[document]:,}"
    if tokenizer is None:
        return place, None
    text = tokenizer.decode(dataset.tokens[begin : min(end, begin + _TOKENS)].tolist())
    text = ILLEGAL.sub("\ufffd", text)
    return place, text[:CHARACTERS] + ("…" if len(text) > CHARACTERS else "")
