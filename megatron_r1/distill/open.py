"""Teachers of the phases of a configuration: their mistakes before any work, and the teachers themselves.

This file imports no torch. transformers does, where its AutoTokenizer decides a teacher's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_r1.config import Config, ObjectiveConfig
from megatron_r1.data.indexed import IndexedDataset, document_starts
from megatron_r1.data.open import OpenData
from megatron_r1.data.provenance import load_origins
from megatron_r1.distill.cache import Cache
from megatron_r1.distill.describe import Described
from megatron_r1.distill.vocabulary import identity, vocabulary_of_pair
from megatron_r1.records import Batch, Corpus
from megatron_r1.run.stage import differences

if TYPE_CHECKING:
    from megatron_r1.data.loader import Records
    from megatron_r1.parallel import ParallelContext
    from megatron_r1.train.objective import PhaseTeacher, Targets

_SAMPLE = 1 << 16
"""Documents of a source that are looked up in a cache, evenly spread."""


def check(config: Config, data: OpenData) -> tuple[list[str], list[str]]:
    """(mistakes, lines) of the objectives of all phases, by the files of teachers, caches and datasets."""
    mistakes, lines = list[str](), list[str]()
    for name, objective in _objectives(config):
        found = _Check(config, data, name, objective)
        try:
            found.run()
        except (OSError, ValueError) as error:
            found.mistakes.append(str(error))
        mistakes += [f"phases.{name}.objective: {mistake}" for mistake in found.mistakes]
        lines += [f"phase {name}: {found.lines[0]}", *found.lines[1:]] if found.lines else []
    return mistakes, lines


def sizes(config: Config) -> dict[str, tuple[int, float]]:
    """Phase -> parameters of its teacher, and FLOP of its forward pass of a token.

    ValueError or OSError for a teacher that is not here, where objective.parameters does not say its size.
    """
    found = {}
    for name, objective in _objectives(config):
        if objective.teacher is not None:
            parameters = objective.parameters
            try:
                said = Described(objective.teacher, objective.bos)
                found[name] = said.parameters, said.flops_per_token(config.data.seq_length)
            except (OSError, ValueError):
                if parameters is None or Path(objective.teacher).exists():
                    raise
                found[name] = parameters, 2.0 * parameters
    return found


def teachers(config: Config, data: OpenData) -> Mapping[str, PhaseTeacher]:
    """Phase -> its teacher, opened and not yet loaded."""
    return {
        name: _Cached(config, data, objective) if objective.cache else _Online(config, data, objective)
        for name, objective in _objectives(config)
    }


def vocabulary_mistakes(config: Config, data: OpenData, phase: str, teacher: Described) -> list[str]:
    """Mistakes: datasets of a phase that have the ids of another vocabulary than the teacher's."""
    objective = config.phases[phase].objective
    assert objective is not None
    found = _Check(config, data, phase, objective)
    found._vocabulary(teacher, identity(teacher.vocabulary), teacher.tokens)
    return [f"phases.{phase}.objective: {mistake}" for mistake in found.mistakes]


def _objectives(config: Config) -> Iterator[tuple[str, ObjectiveConfig]]:
    return ((name, phase.objective) for name, phase in config.phases.items() if phase.objective)


class _Check:
    """Mistakes and lines of a phase's objective. A mistake that ends the search is raised."""

    def __init__(self, config: Config, data: OpenData, name: str, objective: ObjectiveConfig):
        self._config, self._data, self._objective = config, data, objective
        weights = config.phase_weights(name)
        self._drawn = [c for c in data.corpora if weights[c.name] and c.name not in data.absent]
        self.mistakes, self.lines = list[str](), list[str]()

    def run(self) -> None:
        teacher = self._teacher()
        if self._objective.cache:
            self._cache(Cache(Path(self._objective.cache)), teacher)
        elif teacher:
            self._online(teacher)
            self._vocabulary(teacher, identity(teacher.vocabulary), teacher.tokens)

    def _teacher(self) -> Described | None:
        asked = self._objective
        if asked.teacher is None:
            return None
        try:
            return Described(asked.teacher, asked.bos)
        except FileNotFoundError:
            # A cache stands for it.
            if not asked.cache:
                raise
            return None

    def _online(self, teacher: Described) -> None:
        config, seq_length = self._config, self._config.data.seq_length
        lead = int(teacher.bos is not None)
        if seq_length + lead > teacher.longest:
            fault = f"the context of {teacher.model} is {teacher.longest:,} tokens, and it would read"
            more = " behind one before each text" if lead else ""
            way_out = f"lower it to {teacher.longest - lead:,}, or take another teacher"
            self.mistakes.append(f"{fault} data.seq_length={seq_length:,}{more}; {way_out}")
        size = teacher.parameters * (2 if config.train.precision == "bf16" else 4)
        flops, own = teacher.flops_per_token(seq_length), config.model.flops_per_token(seq_length)
        token = "no token" if teacher.bos is None else f"token {teacher.bos}"
        self.lines += [
            f"{self._loss()} from {teacher.model}, {token} before each document",
            f"  {teacher.parameters:,} parameters, {size:,} B ({config.train.precision}) on each rank",
            f"  {flops:.4g} FLOP a token: a step takes {(flops + own) / own:.1f} times the student's own",
        ]

    def _cache(self, cache: Cache, teacher: Described | None) -> None:
        asked, header = self._objective, cache.header
        here: dict[str, Any] = {"temperature": asked.temperature}
        if teacher:
            here |= {"teacher": teacher.identity, "bos": teacher.bos}
        elif asked.bos != "auto":
            here["bos"] = None if asked.bos == "none" else asked.bos
        if changed := differences({name: getattr(header, name) for name in here}, here):
            fault = f"the cache {cache.folder} is another one: {', '.join(changed)}"
            self.mistakes.append(f"{fault}; restore these, or write a cache of its own")
        record = f"the {header.top_k} largest" if header.top_k else f"{header.draws} draws of"
        token = "no token" if header.bos is None else f"token {header.bos}"
        self.lines += [
            f"{self._loss()} from the cache {cache.folder}, which holds {record} probabilities a token",
            f"  teacher {header.teacher[:12]}, {token} before each document, {header.tokens:,} ids, context "
            f"{header.context:,}",
        ]
        for corpus in self._drawn:
            share = self._covered(cache, corpus)
            self.lines.append(f"  {corpus.name}: {share:.1%} of its tokens have a record")
            if not share:
                way_out = "write them with tools/cache_teacher.py, or take its weight away"
                self.mistakes.append(f"{cache.folder} has no record of data.sources.{corpus.name}; {way_out}")
        self._vocabulary(teacher, header.vocabulary, header.tokens)

    def _covered(self, cache: Cache, corpus: Corpus) -> float:
        """Share of a source's tokens that have a record, by a sample of its documents, or by all."""
        hash_DH = load_origins(corpus.prefix, IndexedDataset(corpus.prefix, share=None).num_documents)["hash"]
        length_D = np.diff(document_starts(corpus))
        for step in sorted({max(1, len(length_D) // _SAMPLE), 1}, reverse=True):
            known_D = cache.has(hash_DH[: len(length_D) : step], length_D[::step])
            if known_D.any():
                return float(known_D.sum() / length_D[::step].sum())
        return 0.0

    def _loss(self) -> str:
        asked = self._objective
        plain = "" if asked.weight == 1 else f"{1 - asked.weight:g} cross-entropy + {asked.weight:g} "
        return f"{plain}KL at temperature {asked.temperature:g}"

    def _vocabulary(self, teacher: Described | None, expected: str, tokens: int) -> None:
        """Mistakes: datasets of another vocabulary than `expected`, and ids that either model has not."""
        config = self._config
        seen = {teacher.tokenizer.fingerprint()} if teacher else set[str]()
        for corpus in self._drawn:
            if corpus.tokenizer_hash is None or corpus.tokenizer_hash not in seen:
                seen |= {corpus.tokenizer_hash or ""}
                if identity(vocabulary_of_pair(corpus.prefix)) != expected:
                    fault = f"data.sources.{corpus.name} has the ids of another vocabulary than the teacher"
                    way_out = "take a teacher of its tokenizer, or preprocess it with the teacher's"
                    self.mistakes.append(f"{fault}; {way_out}")
        if config.model.vocab_size < tokens:
            fault = f"the teacher has {tokens:,} tokens, model.vocab_size={config.model.vocab_size:,} fewer"
            self.mistakes.append(f"{fault}; set model.vocab_size={tokens} or more")
        if (eod := self._data.eod) is not None and eod >= tokens:
            self.mistakes.append(f"data.eod={eod} is no token of the teacher, which has {tokens:,}")


class _Online:
    """A teacher that runs beside the student."""

    records = None

    def __init__(self, config: Config, data: OpenData, objective: ObjectiveConfig):
        assert objective.teacher is not None
        self._config, self._eod, self._objective = config, data.eod, objective
        self._said = Described(objective.teacher, objective.bos)
        self.tokens = self._said.tokens

    @cached_property
    def identities(self) -> dict[str, str]:
        return {self._said.model: self._said.identity}

    def targets(self, context: ParallelContext) -> Targets:
        from megatron_r1.distill.teacher import Teacher

        precision, rows = self._config.train.precision, self._config.model.vocab_size // context.tensor_size
        teacher = Teacher(self._said.model, precision, self._objective.bos, together=True)
        return teacher.targets(self._eod, rows)


class _Cached:
    """A teacher's records."""

    def __init__(self, config: Config, data: OpenData, objective: ObjectiveConfig):
        from megatron_r1.distill.records import WindowRecords

        assert objective.cache is not None
        self._cache, self._objective = Cache(Path(objective.cache)), objective
        self.tokens = self._cache.header.tokens
        sources = [corpus.name for corpus in data.corpora]
        self.records: Records | None = WindowRecords(
            self._cache, data.corpora, sources, config.data.seq_length
        )

    @cached_property
    def identities(self) -> dict[str, str]:
        asked, theirs = self._objective, self._cache.header.teacher
        return {str(self._cache.folder): self._cache.identity} | (
            {asked.teacher: theirs} if asked.teacher else {}
        )

    def targets(self, context: ParallelContext) -> Targets:
        from megatron_r1.model.divergence import SparseTarget

        def of(batch: Batch) -> SparseTarget:
            records = batch.teacher
            assert records is not None, "the loader asks for them"
            ids_NK, share_NK = (
                of_BSK.transpose(0, 1).flatten(0, 1) for of_BSK in (records.ids_BSK, records.share_BSK)
            )
            tail = self._cache.header.top_k is not None
            return SparseTarget(ids_NK, share_NK, records.entropy_BS.t().flatten(), tail)

        return of
