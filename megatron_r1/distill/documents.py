"""The documents that a phase may draw, each text once, and the writer of a cache that each belongs to.

This file imports no torch.
"""

from __future__ import annotations

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
"""Samples."""


@dataclass(frozen=True)
class Documents:
    """Documents of some sources. Axis D: documents."""

    corpora: list[Corpus]
    source_D: np.ndarray
    """Number of the corpus."""
    start_D: np.ndarray
    """First token in the corpus's stream."""
    length_D: np.ndarray
    hash_DH: np.ndarray
    """uint8 [D, 16], as data/provenance.py has it."""

    def __len__(self) -> int:
        return len(self.length_D)

    @property
    def total(self) -> int:
        """Tokens."""
        return int(self.length_D.sum())

    def only(self, chosen: np.ndarray) -> Documents:
        """Those of a mask, or of numbers in their order."""
        return replace(self, **{name: of[chosen] for name, of in vars(self).items() if name != "corpora"})

    def of_writer(self, writer: int, writers: int) -> Documents:
        """Those whose hash names this one of so many writers."""
        return self.only(self.hash_DH.view("<u8")[:, 0] % np.uint64(writers) == writer)

    def by_source(self, value_D: np.ndarray | None = None) -> dict[str, Any]:
        """Sums over the documents of each source that has any; of their tokens, where no values are given."""
        value_D = self.length_D if value_D is None else value_D
        numbers = np.unique(self.source_D).tolist()
        return {self.corpora[k].name: value_D[self.source_D == k].sum().item() for k in numbers}

    def tokens(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The tokens of some documents, memory-mapped."""
        at = self.only(numbers)
        of = {k: IndexedDataset(self.corpora[k].prefix, None).tokens for k in np.unique(at.source_D).tolist()}
        spans = zip(*(array.tolist() for array in (at.source_D, at.start_D, at.length_D)), strict=True)
        return [of[k][start : start + length] for k, start, length in spans]

    def name(self, d: int) -> str:
        """A document and its source, for an error."""
        corpus = self.corpora[self.source_D[d]]
        number = int(np.searchsorted(document_starts(corpus), self.start_D[d], side="right")) - 1
        return f"document {number} of source '{corpus.name}' ({corpus.prefix})"


def objective_of(config: Config, phase: str) -> tuple[ObjectiveConfig, str, Path | None]:
    """A phase's objective, its teacher and its cache's folder. ValueError where it has no teacher."""
    if phase not in config.phases:
        raise ValueError(f"--phase {shown(phase)}: the phases are {', '.join(config.phases)}")
    asked = config.phases[phase].objective
    if asked is None or asked.teacher is None:
        raise ValueError(f"phases.{phase}.objective names no teacher, which writes the cache")
    return asked, asked.teacher, Path(asked.cache) if asked.cache else None


def choose(
    config: Config, data: OpenData, phase: str, sources: list[str] | None = None, planned: bool = False
) -> Documents:
    """The documents that a phase may draw, each text once, in the order of sources and streams.

    These are all documents of the sources with weight, but for those of which a keep mask leaves no window or
    no token. sources: of these alone. planned: only documents in windows that the data plan draws.

    Raises FileNotFoundError for a pair without provenance, and ValueError for an unknown source and for no
    document.
    """
    weights, at = config.phase_weights(phase), data.plan.phases[list(config.phases).index(phase)]
    names = [name for name, weight in weights.items() if weight]
    if unknown := [name for name in sources or () if name not in names]:
        raise ValueError(f"--sources {shown(unknown[0])}: phases.{phase} draws from {', '.join(names)}")
    wanted, found = _windows(config, data, phase, planned), list[Documents]()
    for k, corpus in enumerate(data.corpora):
        if corpus.name in names and corpus.name in (sources or names):
            stored = IndexedDataset(corpus.prefix, None).num_documents
            hash_DH, start_D = load_origins(corpus.prefix, stored)["hash"], document_starts(corpus)
            start_D, end_D, mask = start_D[:-1], start_D[1:], at.keep.get(corpus.name)
            before_W = np.concatenate(([0], np.cumsum(wanted[k])))
            first_D, last_D = (
                np.clip(token_D // config.data.seq_length, 0, len(wanted[k]) - 1)
                for token_D in (start_D, end_D - 1)
            )
            kept_D = (end_D > start_D) & (before_W[last_D + 1] > before_W[first_D])
            if mask is not None and mask.stretch_N2 is not None:
                # Edges of stretches ascend: a token in one has an odd number of them at or before it.
                kept_D &= np.searchsorted(mask.stretch_N2.ravel(), start_D, side="right") % 2 == 1
            kept = np.flatnonzero(kept_D)
            length_D, source_D = (end_D - start_D)[kept], np.full(len(kept), k)
            found.append(Documents(data.corpora, source_D, start_D[kept], length_D, np.array(hash_DH[kept])))
    if not any(map(len, found)):
        raise ValueError(f"phases.{phase} leaves no document; see its keep masks, and --sources")
    columns = zip(*(list(vars(one).values())[1:] for one in found), strict=True)
    every = Documents(data.corpora, *map(np.concatenate, columns))
    # As strings, which NumPy can sort: of equal length, so that zeros at their end tell nothing apart.
    _, first_U = np.unique(every.hash_DH.view("S16"), return_index=True)
    return every.only(np.sort(first_U))


def _windows(config: Config, data: OpenData, phase: str, planned: bool) -> list[np.ndarray]:
    """Which windows of each corpus a phase may draw, or, `planned`, does: bool [windows + 1].

    The last one is what lies behind the windows, which another sequence length may draw.
    """
    at, seq_length = data.plan.phases[list(config.phases).index(phase)], config.data.seq_length
    wanted = [np.ones(corpus.windows(seq_length) + 1, bool) for corpus in data.corpora]
    for corpus, wanted_W in zip(data.corpora, wanted, strict=True):
        if planned or corpus.name in at.keep:
            wanted_W[:] = False
        if corpus.name in at.keep and not planned:
            packed, windows = at.keep[corpus.name].packed, len(wanted_W) - 1
            wanted_W[:-1] = np.unpackbits(packed, count=windows, bitorder="little")
    end = at.start + config.phase_steps(phase) * config.train.global_batch
    for first in range(at.start, end, _PLANNED_AT_ONCE) if planned else ():
        source_N, _, window_N = data.plan.locate_range(first, min(_PLANNED_AT_ONCE, end - first))
        for k, wanted_W in enumerate(wanted):
            wanted_W[window_N[source_N == k]] = True
    return wanted
