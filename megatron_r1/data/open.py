"""Opening of datasets for training, scoring, mixing and planning. Curation opens its own.

This file imports no torch, so that `--check` is quick.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_r1.config import Config, SourceConfig
from megatron_r1.config_io import ConfigError
from megatron_r1.data.blend import BlendPlan
from megatron_r1.data.indexed import identity_of, open_corpus, stored_sha256
from megatron_r1.data.integrity import DamagedBinError, sample_hash, say_unchecked
from megatron_r1.data.keep import require_made_for
from megatron_r1.data.sidecar import gold_mistakes, read_sidecar
from megatron_r1.data.windows import last_tokens, sampled_mistakes
from megatron_r1.records import Corpus
from megatron_r1.system.errors import shown
from megatron_r1.system.process import allow_open_files, launch_number
from megatron_r1.system.terminal import is_first_rank, say

Use = Literal["train", "score", "mix", "plan"]


def launched() -> tuple[int, int]:
    """(rank, ranks) that share the checks of datasets: those of torchrun; (0, 1) under another launcher.

    torchrun ends every rank when one finds damage. Without it the others would wait for that rank, so each
    checks everything and ends by itself.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return launch_number("RANK", 0), launch_number("WORLD_SIZE", 1)


@dataclass(frozen=True)
class OpenData:
    """Opened datasets that fit the configuration, with their data plan and identities."""

    corpora: list[Corpus]
    """Of data.sources, in order."""
    probes: list[Corpus]
    """Of data.probes; opened for training only."""
    directions: list[Corpus]
    """Of influence.directions, one a capability; opened for scoring only."""
    gold: list[Corpus]
    """Of data.gold, whose `gold` is there; opened for training only."""
    eod: int | None
    """The token that ends each document where windows must not attend across documents, else None."""
    absent: frozenset[str]
    """Sources whose size is the recipe's `tokens`, because the dataset is not there; for planning only."""
    _config: Config = field(repr=False)

    @cached_property
    def plan(self) -> BlendPlan:
        """The data plan of all phases. Raises ConfigError for a phase that draws nothing, for keep masks that
        do not fit, and for epoch caps that leave nothing to draw before the end."""
        config = self._config
        plan = build_plan(config, self.corpora)
        steps = sum(map(config.phase_steps, config.phases))
        try:
            plan.locate(steps * config.train.global_batch - 1)
        except IndexError as error:
            raise ConfigError([f"phases: {error}"]) from None
        return plan

    @cached_property
    def identities(self) -> dict[str, str]:
        """Prefix -> identity of each dataset. Of a pair without a sidecar this reads the whole index."""
        opened = (*self.corpora, *self.probes, *self.directions, *self.gold)
        return {str(corpus.prefix): identity_of(corpus.prefix) for corpus in opened}

    @cached_property
    def drawn_from(self) -> dict[str, str]:
        """Source -> identity of its dataset, for a data plan.

        A pair without a sidecar is known by its index, and by a hash of a sample of its tokens after a "+".
        """
        known = {corpus.name: self.identities[str(corpus.prefix)] for corpus in self.corpora}
        unnamed = [corpus for corpus in self.corpora if stored_sha256(corpus.prefix) is None]
        return known | {of.name: f"{known[of.name]}+{sample_hash(of.prefix)}" for of in unnamed}


def open_data(
    config: Config,
    share: tuple[int, int] = (0, 1),
    use: Use = "train",
    also: Callable[[OpenData], Iterable[str]] = lambda data: (),
) -> OpenData:
    """Open the datasets that `use` reads, each once. Raises ConfigError with every mistake.

    Raises DamagedBinError for tokens that are not those that were written, before any mistake.

    Names the pairs that could not be compared with stored hashes. Raises the limit of open files where the
    datasets need it.

    share: (rank, ranks) of a launch whose every rank calls this; each checks its part of every pair.
    also: further mistakes, which come in the same message. It sees the datasets that could be opened.
    """
    opener = _Opener(config, share, use)
    directions = config.influence.directions if use == "score" and config.influence else {}
    opened = OpenData(
        opener.corpora("data.sources", config.data.sources),
        opener.corpora("data.probes", config.data.probes if use == "train" else {}),
        opener.corpora("influence.directions", directions),
        opener.corpora("data.gold", config.data.gold if use == "train" else {}),
        None if config.data.cross_documents else opener.eod,
        frozenset(opener.absent),
        config,
    )
    if opener.damaged:
        raise DamagedBinError("\n".join(opener.damaged))
    every = (*opened.corpora, *opened.probes, *opened.directions, *opened.gold)
    if is_first_rank():
        say_unchecked(every)
        _say_trained_on(opened)
    twice = _named_twice(c for c in opened.corpora if c.name not in opener.absent)
    if mistakes := [*opener.mistakes, *twice, *also(opened)]:
        raise ConfigError(mistakes)
    if use in ("train", "score"):
        # Each stays open as long as windows are drawn from it.
        allow_open_files(len(every), "datasets")
    return opened


def _named_twice(corpora: Iterable[Corpus]) -> list[str]:
    """Mistakes: sources of one pair of files. Each draws documents that the other draws, or leaves out."""
    first: dict[Path, str] = {}
    return [
        f"data.sources.{corpus.name}: its pair is that of data.sources.{name}; name "
        f"{corpus.prefix} once, and give it the weight of both"
        for corpus in corpora
        if (name := first.setdefault(corpus.prefix.resolve(), corpus.name)) != corpus.name
    ]


def _say_trained_on(opened: OpenData) -> None:
    sources = {corpus.prefix.resolve(): corpus.name for corpus in opened.corpora}
    for probe in opened.probes:
        if name := sources.get(probe.prefix.resolve()):
            say(f"data.probes.{probe.name} is the pair of data.sources.{name}, so its loss is not held out")


_DOCUMENTS = 1024
"""Documents of a dataset whose last token is looked at, where documents must not attend to each other."""


class _Opener:
    """Opens one dataset after the other, and collects the mistakes of all."""

    def __init__(self, config: Config, share: tuple[int, int], use: Use):
        self._config, self._share, self._use = config, share, use
        self._tokenizers: dict[str, str] = {}
        """Hash of each tokenizer -> the first dataset that was made with it."""
        self.eod, vocab_size = config.data.eod, config.model.vocab_size
        unknown = f"data.eod={self.eod}: model.vocab_size={vocab_size} has ids 0 to {vocab_size - 1}"
        self.mistakes = [unknown] if self.eod is not None and not 0 <= self.eod < vocab_size else []
        self.damaged: list[str] = []
        self.absent: set[str] = set()

    def corpora(self, section: str, named: Mapping[str, SourceConfig | str]) -> list[Corpus]:
        """The datasets that could be opened, in order. `named`: a probing set is its prefix alone."""
        opened, seq_length = [], self._config.data.seq_length
        for name, source in named.items():
            path, aside = f"{section}.{name}", ""
            if isinstance(source, str):
                source, aside = SourceConfig(source), "; set more documents aside"
            try:
                corpus = self._open(path, name, source)
                window = f"one window of data.seq_length={seq_length}, which takes {seq_length + 1}"
                short = f"{corpus.tokens} tokens are less than {window}{aside}"
                mistakes = [short] if corpus.tokens <= seq_length and section != "data.gold" else []
                mistakes += self._gold_mistakes(corpus) if section == "data.gold" else gold_mistakes(corpus)
                if name not in self.absent:
                    mistakes += self._mistakes_of(path, corpus)
                opened.append(corpus)
            except DamagedBinError as error:
                self.damaged.append(f"{path}: {error}")
                continue
            except (OSError, ValueError) as error:
                mistakes = [str(error)]
            self.mistakes += [f"{path}: {mistake}" for mistake in mistakes]
        return opened

    def _open(self, path: str, name: str, source: SourceConfig) -> Corpus:
        try:
            return open_corpus(name, source.prefix, source.documents, self._share)
        except FileNotFoundError as error:
            if self._use != "plan":
                raise
            if source.tokens is None:
                raise ValueError(f"{error}; for a plan without it, say {path}.tokens=N") from None
            self.absent.add(name)
            return Corpus(name, Path(source.prefix), 0, source.tokens, "int32", None)

    def _gold_mistakes(self, corpus: Corpus) -> list[str]:
        """A mistake for a pair without gold answers, and for those of another set than its name says."""
        if corpus.gold and corpus.gold.name == corpus.name:
            return []
        has = f"the gold answers of {shown(corpus.gold.name)}" if corpus.gold else "no gold answers"
        return [f"{corpus.prefix} has {has}; name each set as tools/prepare_gold.py does"]

    def _mistakes_of(self, path: str, corpus: Corpus) -> list[str]:
        """Mistakes: tokens of two tokenizers, ids outside the vocabulary, documents without an end token."""
        sidecar, vocab_size = read_sidecar(corpus.prefix), self._config.model.vocab_size
        # An item of gold answers is alone in its row.
        apart = not self._config.data.cross_documents and corpus.gold is None
        out = self._end_mistakes(path, corpus, sidecar) if apart else []
        if sidecar is None or corpus.tokenizer_hash is None:
            return sampled_mistakes(corpus, vocab_size) + out
        # Sidecars of earlier versions hold the number of tokens, which the largest id may exceed.
        made_with = corpus.tokenizer_hash
        tokens = max(sidecar.get("vocab_size", 0), (sidecar.get("eod") or 0) + 1)
        if tokens > vocab_size and made_with not in self._tokenizers:
            way_out = f"set model.vocab_size={tokens} or preprocess with the model's tokenizer"
            out.append(f"its tokenizer has {tokens} tokens, model.vocab_size={vocab_size} fewer; {way_out}")
        self._tokenizers.setdefault(made_with, path)
        first, other = next(iter(self._tokenizers.items()))
        if first != made_with:
            way_out = "preprocess both with the same one"
            out.append(f"made with tokenizer {made_with[:12]}, {other} with {first[:12]}; {way_out}")
        return out

    def _end_mistakes(self, path: str, corpus: Corpus, sidecar: Mapping[str, object] | None) -> list[str]:
        """Mistakes of a dataset whose documents must not attend to each other. Sets `eod`."""
        asked, prefix = self._config.data.eod, corpus.prefix
        if asked is not None and not 0 <= asked < self._config.model.vocab_size:
            return []
        if sidecar is None:
            needed = "which data.cross_documents=false needs; set data.eod"
            missing = f"{prefix} has no sidecar that names its end-of-document token, {needed}"
            return [missing] if asked is None else self._false_ends(path, corpus, asked, f"data.eod={asked}")
        eod = sidecar.get("eod")
        if not sidecar.get("append_eod") or not isinstance(eod, int):
            fault = "so data.cross_documents=false cannot tell its documents apart"
            way_out = "preprocess it again with --append-eod (a probing set: curate it with --end-documents)"
            return [f"{prefix} was preprocessed without --append-eod, {fault}; {way_out}"]
        if asked not in (None, eod):
            return [f"its documents end with token {eod}, not data.eod={asked}"]
        self.eod = eod if self.eod is None else self.eod
        return self._false_ends(path, corpus, eod, f"{prefix}.json says eod {eod}, which")

    def _false_ends(self, path: str, corpus: Corpus, eod: int, subject: str) -> list[str]:
        """A mistake where most documents do not end with `eod`. Says a line where only some do not.

        One rank looks at up to 1,024 documents, evenly spread.
        """
        rank, ranks = self._share
        if zlib.crc32(bytes(corpus.prefix)) % ranks != rank:
            return []
        last_N = last_tokens(corpus, _DOCUMENTS)
        ends = int(np.sum(last_N == eod))
        if ends == len(last_N):
            return []
        count = f"{subject} ends {ends} of {len(last_N)} documents looked at"
        if 2 * ends > len(last_N):
            say(f"{path}: {count}; windows attend from the others to the documents behind them")
            return []
        ids, times = np.unique(last_N, return_counts=True)
        common = f"{times.max()} of them end with {ids[times.argmax()]}"
        return [f"{count} ({common}); name the token that ends them, or preprocess with --append-eod"]


def build_plan(config: Config, corpora: list[Corpus]) -> BlendPlan:
    """The data plan of all phases. A phase begins at the sample where the one before it ends.

    Raises ConfigError for a phase that draws nothing, or whose keep masks do not fit.
    """
    data = config.data
    windows = {corpus.name: corpus.windows(data.seq_length) for corpus in corpora}
    plan = BlendPlan(windows, seed=data.seed, order=data.order, shuffle=data.shuffle)
    start = 0
    for name, phase in config.phases.items():
        weights = config.phase_weights(name)
        if data.order == "megatron":
            # Its greedy rule takes weights as they are, and Megatron gives it shares.
            total = sum(weights.values())
            weights = {source: weight / total for source, weight in weights.items()}
        try:
            plan.add_phase(start, weights, max_epochs=phase.max_epochs, keep=phase.keep)
        except (OSError, ValueError) as error:
            raise ConfigError([f"phases.{name}: {error}"]) from None
        mistakes = []
        for source, mask in plan.phases[-1].keep.items():
            try:
                require_made_for(mask, data.sources[source].prefix, data.seq_length)
            except ValueError as error:
                mistakes.append(f"phases.{name}.keep.{source}: {error}")
        if mistakes:
            raise ConfigError(mistakes)
        start += config.phase_steps(name) * config.train.global_batch
    return plan
