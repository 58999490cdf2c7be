"""The documents that a phase may draw, each text once, and which of several writers a document belongs to.

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.config import Config, ObjectiveConfig
from megatron_r1.data.indexed import IndexedDataset, document_starts
from megatron_r1.data.open import OpenData
from megatron_r1.data.provenance import load_origins
from megatron_r1.records import Corpus
from megatron_r1.system.errors import shown

_PLANNED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Documents:
    """Documents of some sources, each once. Axis D: documents."""

    corpora: list[Corpus]
    source_D: np.ndarray
    """Number of the corpus."""
    start_D: np.ndarray
    """First token in the corpus's stream."""
    length_D: np.ndarray
    hash_D16: np.ndarray
    """uint8, as data/provenance.py has it."""

    def __len__(self) -> int:
        return len(self.length_D)

    @property
    def total(self) -> int:
        """Tokens."""
        return int(self.length_D.sum())

    def only(self, chosen: np.ndarray) -> Documents:
        """Those of a mask or of numbers."""
        arrays = {name: value[chosen] for name, value in vars(self).items() if name != "corpora"}
        return replace(self, **arrays)

    def of_writer(self, writer: int, writers: int) -> Documents:
        """Those that writer `writer` of `writers` writes: by the hash."""
        return self.only(self.hash_D16.view("<u8")[:, 0] % np.uint64(writers) == writer)

    def by_source(self, value_D: np.ndarray | None = None) -> dict[str, Any]:
        """Sums over the documents of each source that has any; of their tokens, where no values are given."""
        value_D, there = self.length_D if value_D is None else value_D, np.unique(self.source_D).tolist()
        return {self.corpora[k].name: value_D[self.source_D == k].sum().item() for k in there}

    def tokens(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """The tokens of some documents, memory-mapped."""
        streams: dict[int, np.ndarray] = {}
        for d in numbers.tolist():
            k, start = int(self.source_D[d]), int(self.start_D[d])
            if k not in streams:
                streams[k] = IndexedDataset(self.corpora[k].prefix, share=None).tokens
            yield streams[k][start : start + int(self.length_D[d])]

    def name(self, d: int) -> str:
        """Document and source, for an error."""
        source = self.corpora[int(self.source_D[d])]
        number = int(np.searchsorted(document_starts(source), self.start_D[d], side="right")) - 1
        return f"document {number} of source '{source.name}' ({source.prefix})"


def objective_of(config: Config, phase: str) -> tuple[ObjectiveConfig, str, Path]:
    """A phase's objective, its teacher and the folder of its cache. ValueError where it has not all of them."""
    if phase not in config.phases:
        raise ValueError(f"--phase {shown(phase)}: the phases are {', '.join(config.phases)}")
    asked = config.phases[phase].objective
    if asked is None or asked.teacher is None or asked.cache is None:
        lacking = "teacher and cache" if asked is None else "teacher" if asked.teacher is None else "cache"
        raise ValueError(f"phases.{phase}.objective names no {lacking}; a cache is written from teacher to cache")
    if config.data.cross_documents:
        fault = "data.cross_documents=true, and a cache's records are of documents apart"
        raise ValueError(f"{fault}; set it to false, and preprocess with --append-eod")
    return asked, asked.teacher, Path(asked.cache)


def choose(
    config: Config, data: OpenData, phase: str, sources: list[str] | None = None, planned: bool = False
) -> Documents:
    """The documents that a phase may draw from, in the order of the sources and of their streams.

    These are all documents of the sources with weight. A document of which a keep mask leaves no label, or no
    window, is left out. sources: of these alone. planned: only documents of windows that the data plan draws
    in this phase.

    Raises FileNotFoundError for a pair without provenance, and ValueError for an unknown source, for no
    document, and for one text that two sources store with different numbers of tokens.
    """
    weight, at = config.phase_weights(phase), data.plan.phases[list(config.phases).index(phase)]
    if unknown := [name for name in sources or () if not weight.get(name)]:
        having = ", ".join(name for name, of in weight.items() if of)
        raise ValueError(f"--sources {shown(unknown[0])}: phases.{phase} gives weight to {having}")
    names = [name for name, of in weight.items() if of and name in (sources or weight)]
    drawn = _drawn(config, data, at.start, config.phase_steps(phase)) if planned else None
    found, seq_length = list[Documents](), config.data.seq_length
    for k, corpus in enumerate(data.corpora):
        if corpus.name not in names:
            continue
        stored = IndexedDataset(corpus.prefix, share=None).num_documents
        hash_D16 = load_origins(corpus.prefix, stored)["hash"][: corpus.documents]
        start_D, mask = document_starts(corpus), at.keep.get(corpus.name)
        start_D, end_D, windows = start_D[:-1], start_D[1:], corpus.windows(seq_length)
        # Windows that are wanted, and what lies behind the last one, which another sequence length may draw.
        wanted_W = np.ones(windows + 1, bool)
        if drawn is not None:
            wanted_W = drawn[k]
        elif mask is not None:
            wanted_W = np.append(np.unpackbits(mask.packed, count=windows, bitorder="little"), 0)
        before_W = np.concatenate(([0], np.cumsum(wanted_W)))
        first_D, last_D = (np.minimum(token_D // seq_length, windows) for token_D in (start_D, end_D - 1))
        kept_D = (end_D > start_D) & (before_W[last_D + 1] > before_W[first_D])
        if mask is not None and mask.stretch_N2 is not None and len(mask.stretch_N2):
            begin_N, end_N = mask.stretch_N2.T
            at_D = np.minimum(np.searchsorted(end_N, start_D, side="right"), len(end_N) - 1)
            kept_D &= (begin_N[at_D] <= start_D) & (start_D < end_N[at_D])
        start_D, length_D = start_D[kept_D], (end_D - start_D)[kept_D]
        source_D = np.full(len(start_D), k)
        found.append(Documents(data.corpora, source_D, start_D, length_D, np.array(hash_D16[kept_D])))
    arrays = (np.concatenate(part) for part in zip(*(list(vars(of).values())[1:] for of in found), strict=True))
    return _once(Documents(data.corpora, *arrays), phase)


def _drawn(config: Config, data: OpenData, start: int, steps: int) -> list[np.ndarray]:
    """Of each corpus, the windows that a phase draws, bool [windows + 1]; the last one is none."""
    out = [np.zeros(corpus.windows(config.data.seq_length) + 1, bool) for corpus in data.corpora]
    end = start + steps * config.train.global_batch
    for lo in range(start, end, _PLANNED_AT_ONCE):
        source_N, _, window_N = data.plan.locate_range(lo, min(_PLANNED_AT_ONCE, end - lo))
        for k, wanted_W in enumerate(out):
            wanted_W[window_N[source_N == k]] = True
    return out


def _once(documents: Documents, phase: str) -> Documents:
    """The first of the documents of each text. Raises ValueError as `choose`."""
    if not len(documents):
        raise ValueError(f"phases.{phase} leaves no document to write; check its keep masks and --sources")
    # As strings, which NumPy can sort: of equal length, so that zeros at their end tell nothing apart.
    text_D = documents.hash_D16.view("S16").ravel()
    _, first_U, same_D = np.unique(text_D, return_index=True, return_inverse=True)
    first_D = first_U[same_D]
    if len(other := np.flatnonzero(documents.length_D != documents.length_D[first_D])):
        two = [f"{documents.name(d)} has {documents.length_D[d]} tokens" for d in (first_D[other[0]], other[0])]
        raise ValueError(f"{', and '.join(two)}, where the text is the same; preprocess both in the same way")
    return documents.only(np.sort(first_U))
