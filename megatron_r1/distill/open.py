"""Teachers of the phases of a configuration: their mistakes before any work, and the teachers themselves.

This file imports no torch. transformers does, where its AutoTokenizer decides a teacher's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_r1.config import Config, ObjectiveConfig
from megatron_r1.data.open import OpenData
from megatron_r1.distill.describe import Described
from megatron_r1.distill.vocabulary import identity, vocabulary_of_pair

if TYPE_CHECKING:
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
        name: _Cached(objective, data) if objective.cache else _Online(config, data, objective)
        for name, objective in _objectives(config)
    }


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
            self._cache(Path(self._objective.cache), teacher)
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
