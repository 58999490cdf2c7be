"""Figure of examples: the most and the least helpful of every capability, as text one can read."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from megatron_r1.data.indexed import IndexedDataset, read_sidecar
from megatron_r1.data.provenance import read_provenance
from megatron_r1.preprocess.tokenizer import KINDS, Tokenizer, build_tokenizer
from megatron_r1.report import palette, summary, words
from megatron_r1.report.figure import INK, Figure
from megatron_r1.report.load import Reading
from megatron_r1.report.summary import SourceInfluence
from megatron_r1.report.svg import element

SHOWN = 4
"""Examples at either end."""
PER_SOURCE = 2
"""Of one source among them, so that one source does not fill the list."""
CHARACTERS = 420
_TOKENS = 4 * CHARACTERS
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What an XML page may not hold."""


@dataclass(frozen=True)
class Place:
    """An example in its source: tokens [begin, end), the document it begins in, and the line that was."""

    begin: int
    end: int
    document: int
    origin: str | None


@dataclass(frozen=True)
class Chosen:
    source: str
    number: int
    """Of the window or document."""
    score: float


def figure(reading: Reading) -> Figure | None:
    """None without scores; a command where no tokenizer of the datasets was found."""
    found = summary.influence(reading)
    if not found:
        return None
    capabilities = reading.scores[0].capabilities
    title = "The most and the least helpful examples"
    tokenizer = find_tokenizer(reading)
    ends = [(c, *extremes(found, i)) for i, c in enumerate(capabilities)]
    command = ""
    lead = " ".join(
        f"{c}: most helped by {best[0].source}, least by {worst[0].source}." for c, best, worst in ends
    )
    lead += (
        " Read a few: is what helps what the capability is about, and what does not help worth training on?"
    )
    colors = palette.source_colors(reading.run.domains)
    parts = []
    for capability, best, worst in ends:
        columns = [
            element(
                "div", element("h4", name) + "".join(_card(reading, one, tokenizer, colors) for one in chosen)
            )
            for name, chosen in (("most helpful", best), ("least helpful", worst))
        ]
        parts.append(element("h3", escape(capability)) + element("div", "".join(columns), class_="pair"))
    note = (
        f"The {SHOWN} examples at either end of each capability's scores, summed over checkpoints as the "
        f"mixture sums them, at most {PER_SOURCE} of a source; the first {CHARACTERS} characters of each. In "
        f"brackets: its tokens within the source, and the document in which it begins, both counted from 0."
    )
    if tokenizer is None:
        lead += " Their text needs the tokenizer that made the datasets:"
        command = f"python tools/report.py {reading.run.root} --tokenizer MODEL"
    return Figure("examples", title, lead, "".join(parts), note, command)


def extremes(found: Sequence[SourceInfluence], column: int) -> tuple[list[Chosen], list[Chosen]]:
    """The most helpful, best first, and the least helpful, worst first."""
    both = []
    for sign in (-1, 1):
        ranked = []
        for s in found:
            order = np.argsort(sign * s.score_NC[:, column], kind="stable")[:PER_SOURCE]
            ranked += [Chosen(s.source, int(s.example_N[n]), float(s.score_NC[n, column])) for n in order]
        both.append(sorted(ranked, key=lambda one: sign * one.score)[:SHOWN])
    return both[0], both[1]


def find_tokenizer(reading: Reading) -> Tokenizer | None:
    """The tokenizer given, or one that lies in the run, if it is the one that the sidecars name.

    ValueError where the given one is another.
    """
    sidecar = None
    for source in reading.run.config.data.sources.values():
        sidecar = sidecar or read_sidecar(source.prefix)
    if sidecar is None:
        return None
    kind, wanted = sidecar["tokenizer_type"], sidecar["tokenizer_fingerprint"]
    if reading.tokenizer is not None:
        tokenizer = build_tokenizer(kind, reading.tokenizer)
        if tokenizer.fingerprint() != wanted:
            raise ValueError(f"--tokenizer {reading.tokenizer} is not the one that made the datasets")
        return tokenizer
    for name in ("tokenizer.model", "tokenizer.json"):
        path = reading.run.root / name
        if kind not in KINDS or not path.is_file():
            continue
        try:
            tokenizer = build_tokenizer(kind, path)
        except (OSError, ValueError):
            continue
        if tokenizer.fingerprint() == wanted:
            return tokenizer
    return None


def _card(reading: Reading, one: Chosen, tokenizer: Tokenizer | None, colors: dict[str, str]) -> str:
    name = element("b", escape(one.source), style=f"color:{colors.get(one.source, INK)}")
    try:
        place, text = _read(reading, one, tokenizer)
        origin = f", {place.origin}" if place.origin else ""
        where = f"[tokens {place.begin:,} to {place.end:,}, document {place.document:,}{origin}]"
    except (OSError, ValueError):
        where, text = f"(number {one.number:,}; the dataset is not there any more)", None
    said = element("p", f"{name} {escape(words.compact(one.score))} {escape(where)}")
    return element("div", said + (element("pre", escape(text)) if text is not None else ""), class_="example")


def _read(reading: Reading, one: Chosen, tokenizer: Tokenizer | None) -> tuple[Place, str | None]:
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
    try:
        origins = read_provenance(prefix)
        origin = f"{Path(origins.inputs[origins.files[document]]).name}, line {origins.lines[document]:,}"
    except (FileNotFoundError, IndexError):
        origin = None
    text = None
    if tokenizer is not None:
        text = tokenizer.decode(dataset.tokens[begin : min(end, begin + _TOKENS)].tolist())
        text = _ILLEGAL.sub("\ufffd", text)
        text = text[:CHARACTERS] + ("…" if len(text) > CHARACTERS else "")
    return Place(begin, end, document, origin), text
