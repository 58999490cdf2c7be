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
from megatron_r1.distill.records import WindowRecords
from megatron_r1.distill.vocabulary import first_difference, identity, vocabulary_of_pair
from megatron_r1.records import Batch, Corpus
from megatron_r1.run.stage import differences

if TYPE_CHECKING:
    from megatron_r1.data.loader import Records
    from megatron_r1.parallel import ParallelContext
    from megatron_r1.train.objective import PhaseTeacher, Targets

_SAMPLE = 1 << 16
"""Documents of a source that are looked up in a cache, evenly spread."""


def check(config: Config, data: OpenData) -> tuple[list[str], list[str]]:
    """(mistakes, lines) of the phases with a teacher, by the files of teachers, caches and datasets."""
    mistakes, lines = list[str](), list[str]()
    for name, asked in _objectives(config):
        plain = "" if asked.weight == 1 else f"{1 - asked.weight:g} cross-entropy + {asked.weight:g} "
        try:
            teacher = _open(config, data, name, asked)
            first, *more = teacher.lines()
            described = teacher.described if isinstance(teacher, _Online) else teacher
            mistakes += vocabulary_mistakes(config, data, name, described)
            lines += [f"phase {name}: {plain}KL at temperature {asked.temperature:g} from {first}", *more]
        except (OSError, ValueError) as error:
            mistakes.append(f"phases.{name}.objective: {error}")
    return mistakes, lines


def sizes(config: Config) -> dict[str, tuple[int, float]]:
    """Phase -> parameters of its teacher, and FLOP of its forward pass of a token.

    ValueError or OSError for a teacher that is not here, where objective.parameters does not say its size.
    """
    found = {}
    for name, asked in _objectives(config):
        if asked.teacher is not None:
            # The hub is not asked for the weights of a teacher whose size is configured.
            if asked.parameters is None or Path(asked.teacher).exists():
                described = Described(asked.teacher, asked.bos)
                found[name] = described.parameters, described.flops_per_token(config.data.seq_length)
            else:
                found[name] = asked.parameters, 2.0 * asked.parameters
    return found


def teachers(config: Config, data: OpenData) -> Mapping[str, PhaseTeacher]:
    """Phase -> its teacher, opened and not yet loaded."""
    return {name: _open(config, data, name, asked) for name, asked in _objectives(config)}


def vocabulary_mistakes(
    config: Config, data: OpenData, phase: str, teacher: Described | _Cached
) -> list[str]:
    """Mistakes: a source of another vocabulary than the teacher's, and ids that either model has not."""
    out, seen, tokens, rows = list[str](), {teacher.fingerprint}, teacher.tokens, config.model.vocab_size
    for corpus in _drawn(config, data, phase):
        if corpus.tokenizer_hash is None or corpus.tokenizer_hash not in seen:
            seen |= {corpus.tokenizer_hash or ""}
            if identity(found := vocabulary_of_pair(corpus.prefix)) != teacher.vocabulary_identity:
                where = first_difference(found, getattr(teacher, "vocabulary", found))
                fault = f"data.sources.{corpus.name} has the ids of another vocabulary than the teacher"
                way_out = "take a teacher of its tokenizer, or preprocess it with the teacher's"
                out.append(f"{fault}{where}; {way_out}")
    if rows < tokens:
        fault = f"the teacher has {tokens:,} tokens, model.vocab_size={rows:,} fewer"
        out.append(f"{fault}; set model.vocab_size={tokens} or more")
    if (eod := data.eod) is not None and eod >= tokens:
        out.append(f"data.eod={eod} is no token of the teacher, which has {tokens:,}")
    return [f"phases.{phase}.objective: {mistake}" for mistake in out]


def _drawn(config: Config, data: OpenData, phase: str) -> list[Corpus]:
    weight = config.phase_weights(phase)
    return [one for one in data.corpora if weight[one.name] and one.name not in data.absent]


def _objectives(config: Config) -> Iterator[tuple[str, ObjectiveConfig]]:
    return ((name, phase.objective) for name, phase in config.phases.items() if phase.objective)


def _open(config: Config, data: OpenData, phase: str, asked: ObjectiveConfig) -> _Online | _Cached:
    return _Cached(config, data, phase, asked) if asked.cache else _Online(config, data, asked)


class _Online:
    """A teacher that runs beside the student."""

    records = None

    def __init__(self, config: Config, data: OpenData, asked: ObjectiveConfig):
        self._config, self._data, self._asked = config, data, asked
        self.described = Described(asked.teacher or "", asked.bos)
        self.tokens = self.described.tokens

    @cached_property
    def identities(self) -> dict[str, str]:
        return {self.described.model: self.described.identity}

    def targets(self, context: ParallelContext) -> Targets:
        from megatron_r1.distill.teacher import Teacher

        precision, rows = self._config.train.precision, self._config.model.vocab_size // context.tensor_size
        teacher = Teacher(self.described.model, precision, self._asked.bos, together=True)
        return teacher.targets(self._data.eod, rows)

    def lines(self) -> list[str]:
        """Describe it. ValueError for a context that is shorter than a window."""
        config, described, seq_length = self._config, self.described, self._config.data.seq_length
        if seq_length > (most := described.longest - (described.bos is not None)):
            fault = (
                f"data.seq_length={seq_length} exceeds the context of {described.model}, {most:,} tokens with"
            )
            way_out = f"lower it to {most}, or take another teacher"
            raise ValueError(f"{fault} {_token(described.bos)} before a document; {way_out}")
        size = described.parameters * (2 if config.train.precision == "bf16" else 4)
        flops, own = described.flops_per_token(seq_length), config.model.flops_per_token(seq_length)
        return [
            f"{described.model}, with {_token(described.bos)} before each document",
            f"  {described.parameters:,} parameters, {size:,} B ({config.train.precision}) on each rank",
            f"  {flops:.4g} FLOP a token: a step takes {1 + flops / own:.1f} times the student's own",
        ]


class _Cached:
    """A teacher's records."""

    def __init__(self, config: Config, data: OpenData, phase: str, asked: ObjectiveConfig):
        self._config, self._data, self._asked = config, data, asked
        self._drawn = _drawn(config, data, phase)
        self._cache = Cache(Path(asked.cache or ""))
        self.header, self.fingerprint = self._cache.header, ""
        self.tokens, self.vocabulary_identity = self.header.tokens, self.header.vocabulary

    @cached_property
    def identities(self) -> dict[str, str]:
        teacher = {self._asked.teacher: self.header.teacher} if self._asked.teacher else {}
        return {str(self._cache.folder): self._cache.identity, **teacher}

    @cached_property
    def records(self) -> Records:
        return WindowRecords(self._cache, self._drawn, self._data.plan.sources, self._config.data.seq_length)

    def targets(self, context: ParallelContext) -> Targets:
        from megatron_r1.model.divergence import SparseTarget

        def target(batch: Batch) -> SparseTarget:
            of = batch.teacher
            assert of is not None, "the loader asks for records"
            fields = (of.ids_BSK, of.share_BSK, of.entropy_BS)
            ids_NK, share_NK, entropy_N = (one.transpose(0, 1).flatten(0, 1) for one in fields)
            return SparseTarget(ids_NK, share_NK, entropy_N, tail=self.header.top_k is not None)

        return target

    def lines(self) -> list[str]:
        """Describe it. ValueError for one of another request, and for a source without any record."""
        asked, cache, header = self._asked, self._cache, self.header
        here: dict[str, Any] = {"temperature": asked.temperature}
        if asked.bos != "auto":
            here["bos"] = None if asked.bos == "none" else asked.bos
        # Elsewhere it is not asked for: training from a cache takes neither its weights nor a network.
        if asked.teacher and Path(asked.teacher).exists():
            described = Described(asked.teacher, asked.bos)
            self.fingerprint = described.fingerprint
            here |= {"teacher": described.identity, "bos": described.bos}
        if changed := differences({name: getattr(header, name) for name in here}, here):
            fault = f"the cache {cache.folder} is of another teacher or objective: {', '.join(changed)}"
            raise ValueError(f"{fault}; restore these, or name another cache")
        share = {corpus.name: _covered(cache, corpus) for corpus in self._drawn}
        if absent := [name for name in share if not share[name]]:
            way_out = "write them with tools/cache_teacher.py, or take its weight away"
            raise ValueError(f"the cache {cache.folder} has no record of data.sources.{absent[0]}; {way_out}")
        kind = f"the {header.top_k} largest" if header.top_k else f"{header.draws} draws of the"
        return [
            f"the cache {cache.folder}, {kind} probabilities of each token",
            f"  of {header.teacher[:12]}, {_token(header.bos)} before a document, context {header.context}",
            *(f"  {name}: {part:.1%} of its tokens have a record" for name, part in share.items()),
        ]


def _token(bos: int | None) -> str:
    return "no token" if bos is None else f"token {bos}"


def _covered(cache: Cache, corpus: Corpus) -> float:
    """Share of a source's tokens that have a record, by a sample of its documents, or by all."""
    hash_DH = load_origins(corpus.prefix, IndexedDataset(corpus.prefix, share=None).num_documents)["hash"]
    length_D = np.diff(document_starts(corpus))
    for step in sorted({max(1, len(length_D) // _SAMPLE), 1}, reverse=True):
        known_D = cache.has(hash_DH[: len(length_D) : step], length_D[::step])
        if known_D.any():
            return float(known_D.sum() / length_D[::step].sum())
    return 0.0
